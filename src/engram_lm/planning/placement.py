"""Where a model's tables should be on this machine, and what reading them costs there.

The model of time, per decoding step of a batch:

- Compute: the larger of weights read over memory bandwidth and FLOPs over FLOP rate. Both rates are of this machine's
  processor, from short samples, or of the accelerator, from what torch says of its memory.
- Reading: every sequence reads its rows, all distinct (the worst case), at the cost of a row on that tier, and each
  layer's gather has a fixed cost.
- With prefetch all rows are asked for when the step begins, layer by layer in order, and computing goes on until a
  layer needs rows that are not there. Block b starts after b / blocks of the compute. Without prefetch reading adds up.
- Rows on disk: the share of the table that memory has room for is read at the cost of memory, the rest at the
  measured rate of random reads; uniform use of rows is assumed, which real text is kinder than
  (``engram-lm table simulate`` says how much).
"""

import dataclasses
import functools
import math
import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError

__all__ = ["DiskRate", "Machine", "measure_disk", "place", "read_machine"]

TIERS = ("device", "host", "shared", "mmap", "file")
PAGE_BYTES = 4096
GIB = 1 << 30

HEADROOM = 0.1
"""Share of available memory that is left alone: activations, allocators, the rest of the system."""
LINK_BYTES_PER_SECOND = 12e9
"""Host to device; what PCIe 4 gives to a copy from pinned memory, less what small copies lose."""
LINK_SECONDS = 20e-6
"""A copy to a device, and waiting for it."""
LEAST_ROW_SECONDS = 1e-7
"""A row of a table of gigabytes misses every cache, that of addresses too, which a sample of 64 MiB does not show:
6,144 rows of 256 bytes took 0.7 to 1.0 ms (measured)."""
GATHER_SECONDS = 50e-6
"""What a gather costs however few rows it has, on every tier but a device: Python, checks, system calls (measured)."""
DISK_THREADS = 16
"""Reads under way at the same time while the disk is measured."""

_SAMPLE_SECONDS = 0.4
_SMALLEST_FILE_BYTES = 16 << 20
_FILES_LOOKED_AT = 10_000


@dataclasses.dataclass(frozen=True)
class DiskRate:
    """Random reads of 4096 bytes that a disk does."""

    serial_reads_per_second: float
    """One after another: what a gather of one row does."""
    parallel_reads_per_second: float
    """Many at a time: what mmap and file tiers do for several rows, which they ask the kernel for at once."""
    method: str
    """How it is known."""
    is_on_network: bool = False
    """Whether another machine serves it: files may vanish or be cut there, which ends a process that maps them."""

    @classmethod
    def told(cls, reads_per_second: float) -> "DiskRate":
        """A disk whose rate of parallel reads is known; one by one it is taken to do a tenth of them."""
        return cls(reads_per_second / 10, reads_per_second, "told; one by one a tenth is assumed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a machine matters for tables. Sizes in bytes."""

    ram_total_bytes: int
    """Memory of the machine."""
    ram_available_bytes: int
    """Memory that can be taken without swapping, on the machine."""
    ram_allowed_bytes: int
    """The same within this process's container: less, where a limit is set."""
    swap_bytes: int = 0
    """Swap space."""
    shm_available_bytes: int | None = None
    """Room in /dev/shm; None where there is none."""
    device_bytes: int = 0
    """Free memory of the accelerator, 0 without one."""
    device_is_integrated: bool = False
    """Whether its memory is the machine's."""
    bytes_per_second: float = 10e9
    """Reading weights, on what computes."""
    flops_per_second: float = 50e9
    """Arithmetic, likewise."""
    row_seconds: float = 2e-7
    """Reading a row from the machine's memory, among many."""
    disk: DiskRate | None = None
    """The disk that holds the tables, where it was measured."""


def read_machine(
    *, ram_gib: float | None = None, device_gib: float | None = None, disk: DiskRate | None = None, row_bytes: int = 256
) -> Machine:
    """Look at this machine.

    Args:
        ram_gib: Available memory, in GiB, in place of what is found; container limits then do not count.
        device_gib: Memory of the accelerator likewise; 0 for none.
        disk: What `measure_disk` found.
        row_bytes: Bytes of a row, for timing the memory.
    """
    from engram_lm.tables.available_memory import available_bytes

    memory = read_meminfo(Path("/proc/meminfo"))
    total = memory.get("MemTotal", 0)
    available = memory.get("MemAvailable", total)
    allowed = available_bytes()
    allowed = available if allowed is None else min(allowed, available)
    if ram_gib is not None:
        available = allowed = round(ram_gib * GIB)
    device = _device()
    if device_gib is not None:
        device["device_bytes"] = round(device_gib * GIB)
    bandwidth, flops, row_seconds = _sample_memory(row_bytes)
    return Machine(
        ram_total_bytes=max(total, available),
        ram_available_bytes=available,
        ram_allowed_bytes=allowed,
        swap_bytes=memory.get("SwapTotal", 0),
        shm_available_bytes=_room(Path("/dev/shm")),
        disk=disk,
        row_seconds=row_seconds,
        **{"bytes_per_second": bandwidth, "flops_per_second": flops, **device},
    )


def read_meminfo(path: Path) -> dict[str, int]:
    """Read a file like ``/proc/meminfo``: name to bytes; empty where there is none."""
    found: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return found
    for line in lines:
        name, _, value = line.partition(":")
        number, *unit = value.split() or [""]
        if number.isdigit():
            found[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return found


def _room(path: Path) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _device() -> dict[str, Any]:
    """What torch says of the accelerator; nothing where it has none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "device_bytes": torch.cuda.mem_get_info(0)[0],
        "device_is_integrated": bool(getattr(properties, "is_integrated", False)),
    }
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if clock and width:
        # Kilohertz and bits, two transfers a clock; 70 % of the peak is what reading weights reaches.
        found["bytes_per_second"] = 0.7 * 2 * clock * 1e3 * width / 8
        # Decoding is bound by memory long before this; a mild guess that only keeps large batches from being free.
        found["flops_per_second"] = properties.multi_processor_count * 1e12
    return found


def _sample_memory(row_bytes: int) -> tuple[float, float, float]:
    """Bytes a second of copying, FLOPs a second of a product, seconds of a row among many; about 50 ms in all."""
    import torch

    source = np.zeros(64 << 20, np.uint8)
    target = np.empty_like(source)
    copied = min(_timed(lambda: np.copyto(target, source)) for _ in range(3))
    rows = source[: len(source) // row_bytes * row_bytes].reshape(-1, row_bytes)
    # Other rows each time: those of the time before are in the processor's cache.
    taken = min(_timed(functools.partial(np.take, rows, numbers, axis=0)) for numbers in _some_rows(len(rows)))
    left = torch.ones(512, 512)
    multiplied = min(_timed(lambda: left @ left) for _ in range(3))
    return 2 * len(source) / copied, 2 * 512**3 / multiplied, max(taken / 8192, LEAST_ROW_SECONDS)


def _some_rows(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_rows, (3, 8192))


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)


def measure_disk(folder: Path, *, seconds: float = 2 * _SAMPLE_SECONDS) -> DiskRate:
    """Time random reads of the largest file below a folder, past the page cache.

    Args:
        folder: A folder, or a file.
        seconds: How long to read, in all.

    Returns:
        Reads a second one by one and by `DISK_THREADS` threads.

    Raises:
        ConfigError: There is no file of at least 16 MiB, or it can be read neither with ``O_DIRECT`` nor from dropped
            pages.
    """
    from engram_lm.tables.available_memory import is_on_network

    path, size = _largest_file(folder)
    direct = getattr(os, "O_DIRECT", 0)
    method = "O_DIRECT"
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
        with mmap.mmap(-1, PAGE_BYTES) as buffer:
            os.preadv(descriptor, [buffer], 0)
        if not direct:
            raise OSError("this system has no O_DIRECT")
    except OSError:
        from engram_lm.tables.tiers.residency import resident_share

        descriptor, method = os.open(path, os.O_RDONLY), "after posix_fadvise(POSIX_FADV_DONTNEED)"
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        left = resident_share(path)
        if left is None or left > 0.1:
            os.close(descriptor)
            raise ConfigError(
                f"{path} lies on a file system that neither reads past its cache nor drops it, so its disk cannot be "
                "measured; say its rate with --disk-iops"
            ) from None
    try:
        serial = _random_reads(descriptor, size, 1, seconds / 2)
        parallel = _random_reads(descriptor, size, DISK_THREADS, seconds / 2)
    finally:
        os.close(descriptor)
    said = f"{method}, {seconds:.1f} s of reads from {path} ({size:,} bytes), 1 and {DISK_THREADS} threads"
    return DiskRate(serial, max(serial, parallel), said, is_on_network(path))


def _largest_file(folder: Path) -> tuple[Path, int]:
    files: Any = [folder]
    if folder.is_dir():
        files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in sorted(names))
    largest, size = None, _SMALLEST_FILE_BYTES - 1
    for _, path in zip(range(_FILES_LOOKED_AT), files, strict=False):
        # A file with holes answers from nowhere: what counts is what the disk holds of it.
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            if status.st_size > size and status.st_blocks * 512 >= status.st_size // 2:
                largest, size = path, status.st_size
    if largest is None:
        raise ConfigError(
            f"{folder} holds no file of {_SMALLEST_FILE_BYTES >> 20} MiB or more to time reads with; name the folder "
            "of the tables, or say the disk's rate with --disk-iops"
        )
    return largest, size


def _random_reads(descriptor: int, size: int, num_threads: int, seconds: float) -> float:
    counts, errors = [0] * num_threads, []
    end = time.perf_counter() + seconds

    def read(index: int) -> None:
        places = np.random.default_rng((time.perf_counter_ns(), index)).integers(0, size // PAGE_BYTES, 1 << 16)
        try:
            with mmap.mmap(-1, PAGE_BYTES) as buffer:  # direct reads need an aligned buffer
                for place in (places * PAGE_BYTES).tolist():
                    if time.perf_counter() >= end:
                        return
                    os.preadv(descriptor, [buffer], place)
                    counts[index] += 1
        except OSError as error:
            errors.append(error)

    started = time.perf_counter()
    threads = [threading.Thread(target=read, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return max(1, sum(counts)) / (time.perf_counter() - started)


def place(
    found: dict[str, Any],
    machine: Machine,
    *,
    blocks: Sequence[int],
    num_blocks: int,
    experts: tuple[int, int],
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Choose a tier for the tables of a planned model.

    Args:
        found: What `engram_lm.planning.command.plan` found.
        machine: Where the model shall run.
        blocks: Blocks with memory.
        num_blocks: Blocks of the model.
        experts: Routed experts of a block, and how many a token visits; ``(0, 0)`` without experts.
        dtype: Type of the stored rows, as `plan` names it.

    Returns:
        Plain values for JSON.

    Raises:
        ConfigError: The model has no tables.
    """
    if found["table"] is None:
        raise ConfigError("this model has no memory, so there are no tables to place; leave --placement out")
    batch, table_bytes = found["batch_size"], found["table"]["bytes"][dtype]
    rows = found["reads_per_token"]["rows"]
    row_bytes = found["reads_per_token"]["bytes"][dtype] / rows
    parameters = found["parameters"]
    backbone = 2 * (parameters["stored"] - parameters["memory"]) + found["decode"]["bytes_of_batch"]
    compute = _compute_seconds(found, machine, experts)
    work = {"gather_rows": batch * rows / len(blocks), "row_bytes": row_bytes, "table_bytes": table_bytes}
    on_device = machine.device_bytes > 0
    usable = round((1 - HEADROOM) * machine.ram_allowed_bytes)
    device_usable = round((1 - HEADROOM) * machine.device_bytes)
    # Memory that the model itself takes where it computes, and what is left for tables and caches of them.
    spare = max(0, usable - (0 if on_device and not machine.device_is_integrated else backbone))
    device_spare = max(0, device_usable - backbone)
    if machine.device_is_integrated:
        spare = device_spare = min(spare, device_spare)
    needs = {"device": table_bytes, "host": table_bytes, "shared": table_bytes, "mmap": 0, "file": 0}
    shm = machine.shm_available_bytes
    fits = {
        "device": on_device and table_bytes <= device_spare,
        "host": table_bytes <= spare,
        "shared": table_bytes <= spare and shm is not None and table_bytes <= shm,
        "mmap": True,
        "file": True,
    }
    tiers: dict[str, dict[str, Any]] = {}
    for tier in TIERS:
        cost = _row_seconds(tier, machine, work, spare)
        tiers[tier] = {"fits": fits[tier], "needs_bytes": needs[tier], "seconds_per_row": cost}
        if cost is None:
            continue
        fixed = 0.0 if tier == "device" else GATHER_SECONDS
        fixed += LINK_SECONDS if on_device and tier != "device" and not machine.device_is_integrated else 0.0
        read = batch * rows / len(blocks) * cost + fixed  # of one layer
        exposed = _exposed_seconds([read] * len(blocks), blocks, num_blocks, compute)
        tiers[tier].update(
            read_seconds_per_step=read * len(blocks),
            waited_seconds_per_step_with_prefetch=exposed,
            seconds_per_token=(compute + read * len(blocks)) / batch,
            seconds_per_token_with_prefetch=(compute + exposed) / batch,
        )
    tier, reason = _choose(fits, machine)
    # Half for rows, which a cache packs closely, and half for the kernel's pages, which hold them between strangers.
    cache = min(spare // 2, table_bytes) if tier in ("mmap", "file") else 0
    return {
        "table_dtype": dtype,
        "table_bytes": table_bytes,
        "row_bytes": row_bytes,
        "rows_per_step": batch * rows,
        "backbone_and_state_bytes": backbone,
        "spare_ram_bytes": spare,
        "compute_seconds_per_step": compute,
        "recommended": {
            "tier": tier,
            "cache_bytes": cache,
            "prefetch": tier != "device",
            "reason": reason,
        },
        "tiers": tiers,
        "warnings": _warnings(machine, table_bytes, backbone, spare, tier),
        "machine": dataclasses.asdict(machine),
        "headroom_share": HEADROOM,
        "time_model": (
            "compute = max(weights / bandwidth, FLOPs / FLOP rate); reading = distinct rows x seconds per row + a "
            "gather's fixed cost for each layer; with "
            "prefetch a layer waits only for rows not there when its block begins; rows of a table larger than memory "
            "are read from disk in proportion to what has no room"
        ),
    }


def _compute_seconds(found: dict[str, Any], machine: Machine, experts: tuple[int, int]) -> float:
    parameters, batch = found["parameters"], found["batch_size"]
    dense = parameters["total"] - parameters["memory"] - parameters["routed_experts"]
    number, visited = experts
    # Experts that at least one of the batch's tokens visits, if each visits its own.
    touched = parameters["routed_experts"] * (1 - (1 - visited / number) ** batch) if number else 0
    weights = 2 * (dense + touched) + found["decode"]["bytes_of_batch"]
    flops = batch * found["flops_per_token"]["inference"]
    return max(weights / machine.bytes_per_second, flops / machine.flops_per_second)


def _row_seconds(tier: str, machine: Machine, work: dict[str, Any], spare: int) -> float | None:
    """Seconds of one row among many; None where the tier is not there or unknown."""
    row_bytes, table_bytes = work["row_bytes"], work["table_bytes"]
    if tier == "device":
        # A row is a few transactions of 32 bytes; twice its bytes is what scattered ones cost.
        return 2 * row_bytes / machine.bytes_per_second if machine.device_bytes else None
    link = row_bytes / LINK_BYTES_PER_SECOND if machine.device_bytes and not machine.device_is_integrated else 0.0
    memory = machine.row_seconds + link
    if tier in ("host", "shared"):
        return memory
    missed = max(0.0, 1 - spare / table_bytes)
    if not missed:
        return memory
    if machine.disk is None:
        return None
    disk = machine.disk
    reads = 1 + (row_bytes - 1) / PAGE_BYTES  # rows may cross the end of a page
    rate = disk.parallel_reads_per_second if work["gather_rows"] > 1 else disk.serial_reads_per_second
    return memory + missed * reads / rate


def _exposed_seconds(reads: Sequence[float], blocks: Sequence[int], num_blocks: int, compute: float) -> float:
    """What a step waits for rows, all asked for at its beginning and read layer after layer."""
    here = waited = 0.0
    for seconds, block in sorted(zip(reads, blocks, strict=True), key=lambda each: each[1]):
        here += seconds
        waited += max(0.0, here - (block / num_blocks * compute + waited))
    return waited


def _choose(fits: dict[str, bool], machine: Machine) -> tuple[str, str]:
    if fits["device"]:
        return "device", "the tables fit into the device's memory beside the model"
    if fits["host"]:
        return "host", "the tables fit into memory beside everything else"
    why = "the tables do not fit into memory"
    if machine.disk is not None and machine.disk.is_on_network:
        return "file", f"{why}, and their disk is another machine's, where a mapped file may vanish"
    return "mmap", f"{why}; their pages are read when needed and asked for all at once"


def _warnings(machine: Machine, table_bytes: int, backbone: int, spare: int, tier: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    def warn(kind: str, message: str) -> None:
        found.append({"kind": kind, "message": message})

    on_host = machine.device_bytes == 0 or machine.device_is_integrated
    outside = round((1 - HEADROOM) * machine.ram_available_bytes) - (backbone if on_host else 0)
    if spare < table_bytes <= outside:
        warn(
            "container_limit",
            f"the machine has room for the tables, this container may take {_gib(machine.ram_allowed_bytes)} only: "
            "raise its memory limit, or processes are killed rather than slowed down",
        )
    if table_bytes > machine.ram_total_bytes:
        warn(
            "table_larger_than_ram",
            f"the tables take {_gib(table_bytes)}, the machine has {_gib(machine.ram_total_bytes)}: most reads of rows "
            "go to the disk, and loading with a tier in memory fails",
        )
    elif table_bytes > spare:
        warn("table_larger_than_free_ram", f"the tables take {_gib(table_bytes)}, {_gib(spare)} are free for them")
    if machine.shm_available_bytes is None:
        warn("no_shared_memory", "/dev/shm is not there: the shared tier cannot be used")
    elif machine.shm_available_bytes < table_bytes:
        warn(
            "shared_memory_too_small",
            f"/dev/shm has {_gib(machine.shm_available_bytes)}, the tables take {_gib(table_bytes)}: the shared tier "
            "cannot be used; containers get 64 MiB unless started with more (--shm-size)",
        )
    if machine.device_is_integrated:
        warn(
            "unified_memory",
            "the device's memory is the machine's: tables on the host, pinned above all, take from the same pool and "
            "free nothing; on disk they do",
        )
    if backbone > (machine.device_bytes if machine.device_bytes else machine.ram_allowed_bytes):
        warn("model_does_not_fit", f"the model without its tables takes {_gib(backbone)} with its state: too much")
    if machine.swap_bytes and tier in ("host", "shared"):
        warn(
            "swap",
            f"this machine has {_gib(machine.swap_bytes)} of swap: rows that were not read for long may be swapped "
            "out, and reading them back is slower than the file tier; pin the table or turn swap off",
        )
    if tier in ("mmap", "file") and machine.disk is None:
        warn("disk_unknown", "the disk was not measured: name the tables' folder with --disk, or its --disk-iops")
    return found


def _gib(number: float) -> str:
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 100 else f"{number / (1 << 20):,.2f} MiB"


def rows_for_people(placement: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What ``engram-lm plan`` prints of a placement: name, value, remark."""
    recommended = placement["recommended"]
    cache = f", cache {_gib(recommended['cache_bytes'])}" if recommended["cache_bytes"] else ""
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
