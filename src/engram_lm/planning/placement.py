"""Where a model's tables should be on this machine, and what reading them costs there.

The model of time, for one decoding step of a batch:

- Computing takes the larger of weights read over memory bandwidth and FLOPs over FLOP rate. Both rates are those of
  this machine's processor, from short samples, or of the accelerator, from what torch says of its memory.
- Every sequence reads its rows, all of them distinct (the worst case), at the cost of a row on that tier, and each
  layer's gather has a fixed cost.
- With prefetch all rows are asked for when the step begins, layer by layer in order, and computing continues until a
  layer needs rows that are not there yet. Block b starts after b / blocks of the compute. Without prefetch the time of
  reading adds to that of computing.
- Of a table on disk, the share that memory has room for is read at the cost of memory and the rest at the measured
  rate of random reads. Rows are assumed to be used evenly; real text is kinder (``engram-lm table simulate`` says how
  much).
"""

import dataclasses
import math
from typing import Any

from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.this_machine import PAGE_BYTES, ThisMachine
from engram_lm.tables.byte_size import byte_size
from engram_lm.tables.choose import MEMORY_SHARE, choose_tier, spare_bytes

LINK_BYTES_PER_SECOND = 12e9
"""Host to device: what PCIe 4 gives to a copy from pinned memory, less what small copies lose."""
LINK_SECONDS = 20e-6
"""Seconds of one copy to a device and of waiting for it."""
GATHER_SECONDS = 50e-6
"""Seconds of a gather however few rows it has, on every tier but a device: Python, checks, system calls (measured)."""

_TIERS = ("device", "host", "mmap", "file")


@dataclasses.dataclass(frozen=True)
class _Room:
    """Memory that a model leaves for its tables, in bytes."""

    beside: int
    """What the model takes: weights without tables, and the state of the batch."""
    memory: int
    """Left for tables and caches on the host."""
    device: int
    """Left for tables on the accelerator; 0 without one."""

    @classmethod
    def of(cls, machine: ThisMachine, beside: int) -> "_Room":
        has_device = machine.device_bytes > 0
        device = spare_bytes(machine.device_bytes, beside) if has_device else 0
        on_host = not has_device or machine.device_is_integrated
        memory = spare_bytes(machine.ram_allowed_bytes, beside if on_host else 0)
        if machine.device_is_integrated:
            memory = device = min(memory, device)
        return cls(beside, memory, device)


def place(
    found: dict[str, Any],
    config: EngramLMConfig,
    machine: ThisMachine,
    *,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Choose a tier for the tables of a planned model, by the rule that ``open_table(tier="auto")`` follows too.

    ``found`` is the plan of the configuration, which has memory, and ``dtype`` the type of the stored rows, as the plan
    names it. Returns plain values for JSON.
    """
    batch, table_bytes = found["batch_size"], found["table"]["bytes"][dtype]
    num_rows, parameters = batch * found["reads_per_token"]["rows"], found["parameters"]
    row_bytes = found["reads_per_token"]["bytes"][dtype] / found["reads_per_token"]["rows"]
    backbone = 2 * (parameters["stored"] - parameters["memory"]) + found["decode"]["bytes_of_batch"]
    compute, room = _compute_seconds(found, config, machine), _Room.of(machine, backbone)
    on_network = machine.disk is not None and machine.disk.is_on_network
    choice = choose_tier(table_bytes, room.memory, device_bytes=room.device, lies="network" if on_network else "disk")
    num_layers = len(config.memory_layers)
    layer_rows = num_rows / num_layers
    fits = {"device": machine.device_bytes > 0 and table_bytes <= room.device, "host": table_bytes <= room.memory}
    tiers: dict[str, dict[str, Any]] = {}
    for tier in _TIERS:
        cost = _row_seconds(tier, machine, layer_rows, row_bytes, max(0.0, 1 - room.memory / table_bytes))
        needs = table_bytes if tier in fits else 0
        tiers[tier] = {"fits": fits.get(tier, True), "needs_bytes": needs, "seconds_per_row": cost}
        if cost is None:
            continue
        fixed = 0.0 if tier == "device" else GATHER_SECONDS + (LINK_SECONDS if _has_link(machine) else 0.0)
        read = layer_rows * cost + fixed
        exposed = _exposed_seconds(read, config, compute)
        tiers[tier].update(
            read_seconds_per_step=read * num_layers,
            waited_seconds_per_step_with_prefetch=exposed,
            seconds_per_token=(compute + read * num_layers) / batch,
            seconds_per_token_with_prefetch=(compute + exposed) / batch,
        )
    # Half for rows, which a cache packs closely, and half for the kernel's pages, which hold rows of strangers too.
    cache = min(room.memory // 2, table_bytes) if choice.tier in ("mmap", "file") else 0
    return {
        "table_dtype": dtype,
        "table_bytes": table_bytes,
        "row_bytes": row_bytes,
        "rows_per_step": num_rows,
        "backbone_and_state_bytes": backbone,
        "spare_ram_bytes": room.memory,
        "compute_seconds_per_step": compute,
        "recommended": {
            "tier": choice.tier,
            "cache_bytes": cache,
            "prefetch": choice.tier != "device",
            "reason": choice.reason,
        },
        "tiers": tiers,
        "warnings": _warnings(machine, table_bytes, room, choice.tier),
        "machine": dataclasses.asdict(machine),
        "headroom_share": round(1 - MEMORY_SHARE, 6),
        "time_model": (
            "compute = max(weights / bandwidth, FLOPs / FLOP rate); reading = distinct rows x seconds per row + a "
            "gather's fixed cost for each layer; with prefetch a layer waits only for rows not there when its block "
            "begins; rows of a table larger than memory are read from disk in proportion to what has no room"
        ),
    }


def _compute_seconds(found: dict[str, Any], config: EngramLMConfig, machine: ThisMachine) -> float:
    parameters, batch = found["parameters"], found["batch_size"]
    dense = parameters["total"] - parameters["memory"] - parameters["routed_experts"]
    touched = parameters["routed_experts"]
    if config.has_experts:
        # Experts that at least one of the batch's tokens visits, if each token chooses its own.
        touched *= 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    weights = 2 * (dense + touched) + found["decode"]["bytes_of_batch"]
    flops = batch * found["flops_per_token"]["inference"]
    return max(weights / machine.bytes_per_second, flops / machine.flops_per_second)


def _has_link(machine: ThisMachine) -> bool:
    """Whether rows of the host travel to an accelerator with memory of its own."""
    return machine.device_bytes > 0 and not machine.device_is_integrated


def _row_seconds(tier: str, machine: ThisMachine, layer_rows: float, row_bytes: float, missed: float) -> float | None:
    """Seconds of one row, where memory has no room for the share missed; None where the tier or its disk is unknown."""
    if tier == "device":
        # A row is a few transactions of 32 bytes; scattered ones cost about twice its bytes.
        return 2 * row_bytes / machine.bytes_per_second if machine.device_bytes else None
    memory = machine.row_seconds + (row_bytes / LINK_BYTES_PER_SECOND if _has_link(machine) else 0.0)
    if tier == "host" or not missed:
        return memory
    if machine.disk is None:
        return None
    reads = 1 + (row_bytes - 1) / PAGE_BYTES  # rows may cross the end of a page
    rate = machine.disk.parallel_reads_per_second if layer_rows > 1 else machine.disk.serial_reads_per_second
    return memory + missed * reads / rate


def _exposed_seconds(read: float, config: EngramLMConfig, compute: float) -> float:
    """Seconds that a step waits for rows when all are asked for at its beginning and read layer after layer."""
    here = waited = 0.0
    for block in sorted(config.memory_layers):
        here += read
        waited += max(0.0, here - (block / config.num_hidden_layers * compute + waited))
    return waited


def _warnings(machine: ThisMachine, table_bytes: int, room: _Room, tier: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    def warn(kind: str, message: str) -> None:
        found.append({"kind": kind, "message": message})

    tables, on_host = byte_size(table_bytes), not machine.device_bytes or machine.device_is_integrated
    outside = spare_bytes(machine.ram_available_bytes, room.beside if on_host else 0)
    if room.memory < table_bytes <= outside:
        warn(
            "container_limit",
            f"the machine has room for the tables, but this container may take {byte_size(machine.ram_allowed_bytes)} "
            "only: raise its memory limit, or processes are killed rather than slowed down",
        )
    if table_bytes > machine.ram_total_bytes:
        warn(
            "table_larger_than_ram",
            f"the tables take {tables}, the machine has {byte_size(machine.ram_total_bytes)}: most reads of rows go to "
            "the disk, and loading with a tier in memory fails",
        )
    elif table_bytes > room.memory:
        warn("table_larger_than_free_ram", f"the tables take {tables}, {byte_size(room.memory)} are free for them")
    if machine.device_is_integrated:
        warn(
            "unified_memory",
            "the device's memory is the machine's: tables on the host, pinned ones above all, take from the same pool "
            "and free nothing; on disk they do",
        )
    if room.beside > (machine.device_bytes or machine.ram_allowed_bytes):
        warn("model_does_not_fit", f"the model without its tables takes {byte_size(room.beside)} with its state")
    if machine.swap_bytes and tier == "host":
        warn(
            "swap",
            f"this machine has {byte_size(machine.swap_bytes)} of swap: rows that were not read for long may be "
            "swapped out, and reading them back is slower than the file tier; pin the table or turn swap off",
        )
    if tier in ("mmap", "file") and machine.disk is None:
        warn("disk_unknown", "the disk was not measured: name the tables' folder with --disk, or its --disk-iops")
    return found


def rows_for_people(placement: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What ``engram-lm plan`` prints of a placement: name, value, remark."""
    recommended = placement["recommended"]
    cache = f", cache {byte_size(recommended['cache_bytes'])}" if recommended["cache_bytes"] else ""
    lines = [
        ("placement of the tables", recommended["tier"] + cache, recommended["reason"]),
        ("  compute per step", _milliseconds(placement["compute_seconds_per_step"]), "estimated"),
    ]
    for tier, values in placement["tiers"].items():
        if "seconds_per_token" not in values:
            continue
        remark = f"per token; {_milliseconds(values['seconds_per_token'])} without prefetch"
        remark += "" if values["fits"] else "; does not fit"
        lines.append((f"  {tier}", _milliseconds(values["seconds_per_token_with_prefetch"]), remark))
    disk = placement["machine"]["disk"]
    if disk is not None:
        rate = f"{disk['serial_reads_per_second']:,.0f} reads/s"
        lines.append(("  disk", rate, f"one by one; {disk['parallel_reads_per_second']:,.0f} in parallel"))
    lines += [("  warning", warning["kind"].replace("_", " "), warning["message"]) for warning in placement["warnings"]]
    return lines


def _milliseconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    return f"{seconds * 1e3:,.3f} ms" if seconds >= 1e-6 else f"{seconds * 1e9:,.1f} ns"
