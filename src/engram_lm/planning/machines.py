"""From bytes and operations to seconds: a few public figures of machines."""

import dataclasses
import math

from engram_lm.errors import ConfigError
from engram_lm.planning.bill import Bill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides the time of a step on a cluster; rates are per accelerator, bandwidths one way."""

    name: str
    """Its name, for people."""
    accelerators_per_node: int
    """Accelerators that the faster network joins."""
    flops_per_second: float
    """Dense matrix products in the type that is used, as the data sheet has it."""
    memory_bytes: float
    """Memory of one accelerator."""
    memory_bytes_per_second: float
    """Bytes of that memory that are read or written in a second."""
    intra_bytes_per_second: float
    """Bytes a second to other accelerators of the node."""
    inter_bytes_per_second: float
    """Bytes a second to other nodes."""
    latency_seconds: float = 20e-6
    """Seconds of a collective however little it sends. An assumption."""
    message_seconds: float = 1e-6
    """Seconds of each of the W - 1 messages of an all-to-all. An assumption."""
    efficiency: float = 0.4
    """Share of ``flops_per_second`` that training reaches. An assumption."""
    bandwidth_efficiency: float = 0.8
    """Share of the three bandwidths that is reached. An assumption."""
    source: str = ""
    """Where the figures come from."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not str and not 0 <= value < math.inf:
                raise ConfigError(f"{field.name} must be a number from 0, not {value!r}")
            if field.default is dataclasses.MISSING and value == 0:
                raise ConfigError(f"{field.name} must be above 0")
        for name in ("efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share above 0, at most 1, not {getattr(self, name)!r}")

    def all_to_all_seconds(self, sent_bytes: float, world_size: int) -> float:
        """Seconds in which every rank sends ``sent_bytes``, evenly to all others, over both networks at once."""
        if world_size == 1:
            return 0.0
        inside = (min(world_size, self.accelerators_per_node) - 1) / (world_size - 1)
        links = (
            inside * sent_bytes / self.intra_bytes_per_second,
            (1 - inside) * sent_bytes / self.inter_bytes_per_second,
        )
        return max(links) / self.bandwidth_efficiency + self.latency_seconds + self.message_seconds * (world_size - 1)

    def ring_seconds(self, sent_bytes: float, world_size: int) -> float:
        """Seconds of an all-gather or reduce-scatter in which every rank sends ``sent_bytes``.

        The accelerators of a node share the work of bringing everything to the other nodes once.
        """
        if world_size == 1:
            return 0.0
        whole, size = sent_bytes * world_size / (world_size - 1), min(world_size, self.accelerators_per_node)
        nodes = -(-world_size // self.accelerators_per_node)
        links = (
            whole * (size - 1) / size / self.intra_bytes_per_second,
            whole * (nodes - 1) / nodes / size / self.inter_bytes_per_second,
        )
        return max(links) / self.bandwidth_efficiency + self.latency_seconds


_H100 = Machine(
    name="8 x H100 SXM, 400 Gb/s each",
    accelerators_per_node=8,
    flops_per_second=989e12,
    memory_bytes=80e9,
    memory_bytes_per_second=3.35e12,
    intra_bytes_per_second=450e9,
    inter_bytes_per_second=50e9,
    source="NVIDIA H100 and DGX H100 data sheets",
)

MACHINES = {
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100,
        name="8 x H200 SXM, 400 Gb/s each",
        memory_bytes=141e9,
        memory_bytes_per_second=4.8e12,
        source="NVIDIA H200 and DGX H200 data sheets",
    ),
    "b200": dataclasses.replace(
        _H100,
        name="8 x B200, 400 Gb/s each",
        flops_per_second=2250e12,
        memory_bytes=180e9,
        memory_bytes_per_second=8e12,
        intra_bytes_per_second=900e9,
        source="NVIDIA DGX B200 data sheet",
    ),
    "gloo-loopback": Machine(
        name="processes of one shared CPU, gloo",
        accelerators_per_node=2,
        flops_per_second=3.2e10,
        memory_bytes=12e9,
        memory_bytes_per_second=41e9,
        intra_bytes_per_second=0.88e9,
        inter_bytes_per_second=0.88e9,
        latency_seconds=3e-4,
        message_seconds=0.0,
        efficiency=1.0,
        bandwidth_efficiency=1.0,
        source="benchmarks/results/scaling.json: engram-nano in float32 on one core, all-to-all of two processes",
    ),
}
"""Nodes whose figures are public (dense bfloat16, NVLink one way, one 400 Gb/s port per accelerator), and processes of
the machine that the results were measured on."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one step: computing, updating, and the part of sending that computing does not hide (“exposed”)."""

    compute_seconds: float
    """Seconds of forward and backward."""
    update_seconds: float
    """Optimizers: memory traffic, and the orthogonalization of Muon."""
    backbone_seconds: float
    """Seconds of the backbone's collectives by themselves."""
    backbone_exposed_seconds: float
    """Seconds of these that computing does not hide."""
    exchange_seconds: float
    """Seconds of all exchanges of tables by themselves."""
    exchange_exposed_seconds: float
    """Seconds of these that are waited for: counts, requests, gradients, and `rows_exposed_seconds`."""
    rows_exposed_seconds: float
    """Time by which rows come later than the memory layers want them; 0 as long as they hide."""
    step_seconds: float
    """Seconds of everything, overlapped as the library does it."""
    serial_seconds: float
    """Seconds of everything with nothing overlapped."""
    tokens_per_second: float
    """Tokens that all ranks train on in a second."""
    memory_share: float
    """Memory of the bill over that of an accelerator; above about 0.9 it does not fit."""

    @property
    def exchange_share(self) -> float:
        """Share of the step that waits for tables."""
        return self.exchange_exposed_seconds / self.step_seconds


def predict(found: Bill, machine: Machine) -> Prediction:
    """Turn a bill into seconds on a machine.

    Overlap, as `engram_lm.tables.tiers.sharded` and DDP or FSDP2 have it: counts and requests are waited for as soon as
    tokens are known; rows travel while the blocks before the memory layer compute, one layer after the other; gradients
    of rows are waited for. An all-reduce hides behind the last backward pass, FSDP2's collectives behind all computing.
    Tables and backbone are taken not to slow each other down.
    """
    shape, world = found.shape, found.shape.world_size
    passes, layers, sent = shape.num_micro_batches, max(1, len(found.memory_blocks)), found.tables_sent
    rate = machine.flops_per_second * machine.efficiency
    compute = found.flops["per_rank"] / rate
    parts = 4 if shape.checkpointing else 3
    memory_rate = machine.memory_bytes_per_second * machine.bandwidth_efficiency
    kept = found.memory
    updated = 3 * kept["weights"] + 2 * kept["optimizer"]
    touched = found.rows["distinct_per_step"] / (world if shape.shard_tables else 1)
    if touched:
        per_row = (kept["table_rows"] * 3 + kept["table_optimizer"] * 2) / max(1, found.rows["per_rank"])
        updated += round(touched * per_row)
    update = updated / memory_rate + found.flops["optimizer_per_rank"] / rate

    gathers = passes * layers
    asking = rows = gradients = late = 0.0
    if sent.total and world > 1:
        one = {name: getattr(sent, name) / gathers for name in ("counts", "places", "busiest_rows")}
        asking = machine.all_to_all_seconds(one["counts"], world) + machine.all_to_all_seconds(one["places"], world)
        rows = gradients = machine.all_to_all_seconds(one["busiest_rows"], world)
        forward, ready = compute / passes / parts, 0.0
        for block in found.memory_blocks:
            ready += rows
            computed = forward * block / found.num_blocks
            # The waits of earlier layers move this layer's start back.
            late = max(late, ready - computed)
        late *= passes
    exposed = late + gathers * (asking + gradients)
    exchange = gathers * (asking + rows + gradients)

    backbone = sum(
        machine.ring_seconds(found.backbone_sent[name], world)
        for name in found.backbone_sent
        if name != "total" and found.backbone_sent[name]
    )
    window = compute * 2 / parts / passes if shape.backbone == "ddp" else compute
    backbone_exposed = max(0.0, backbone - window)
    step = compute + update + exposed + backbone_exposed
    return Prediction(
        compute_seconds=compute,
        update_seconds=update,
        backbone_seconds=backbone,
        backbone_exposed_seconds=backbone_exposed,
        exchange_seconds=exchange,
        exchange_exposed_seconds=exposed,
        rows_exposed_seconds=late,
        step_seconds=step,
        serial_seconds=compute + update + exchange + backbone,
        tokens_per_second=found.tokens["per_step"] / step,
        memory_share=kept["total"] / machine.memory_bytes,
    )
