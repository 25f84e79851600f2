"""What a call of ``engram-lm bench serve`` will take, before anything is written: disk, memory and minutes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engram_lm.errors import ConfigError
from engram_lm.hashing import TokenMap
from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.sizes import model_sizes
from engram_lm.planning.this_machine import read_machine
from engram_lm.serving.bench.bench_model import SHAPES, read_config, shape_fields, shape_memory, stored_tables
from engram_lm.serving.bench.serve_arms import ARMS
from engram_lm.tables.available_memory import available_bytes
from engram_lm.tables.byte_size import byte_size
from engram_lm.tables.choose import spare_bytes

_ENGINE_BYTES = 512 << 20
"""Memory of an arm beside weights, cache and tables; what was imported is shared (measured: 0.2 to 0.4 GB)."""
_SMALLEST_CACHE_BYTES = 256 << 20
# For the estimate of minutes, as measured on two cores: shares of the rate of a large product of matrices, seconds to
# load an engine, bytes written in a second, and rows that a file server answers in a second.
_ENGINE_SHARE = {"vllm": 0.3, "transformers": 0.1}
_LOAD_SECONDS = 12
_WRITTEN_BYTES_PER_SECOND = 100e6
_REMOTE_ROWS_PER_SECOND = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be measured, as far as it decides the price."""

    model: str
    """A shape, or the folder of a checkpoint."""
    dtype: str | None
    """Type of weights and tables; that of the checkpoint, or bfloat16, where None."""
    table_bytes: int | None
    """Bytes of all tables of a shape; those of the shape where None."""
    holes: bool
    """Whether its tables take no room on the disk."""
    prompt_tokens: int
    """Tokens of all requests."""
    requests: int
    """Number of requests."""
    longest: int
    """Tokens of the longest request with those generated for it."""
    new_tokens: int
    """Tokens generated for each."""
    sequences: int
    """Requests at the same time."""
    passes: int
    """Passes of each arm."""
    remote_requests: int
    """Requests of the arm remote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """The arms that are to be measured, and what they take."""

    arms: tuple[str, ...]
    """Names of the arms."""
    left_out: dict[str, str]
    """Arms that were not asked for and cannot be, and why."""
    dtype: str
    """Type of weights and tables."""
    table_bytes: int
    """Bytes of all tables."""
    disk_bytes: int
    """Bytes that are written."""
    memory_bytes: int
    """Memory of all arms together."""
    available_bytes: int | None
    """Memory that there is; None where the system does not say."""
    kv_cache_bytes: int
    """Memory of the cache of keys and values of one engine."""
    minutes: float
    """About how long it takes."""

    def check(self) -> None:
        """Refuse arms that do not fit into memory together, by a ConfigError."""
        if not self.arms:
            raise ConfigError(f"no arm can be measured: {self.left_out}")
        if self.available_bytes is not None and self.memory_bytes > self.available_bytes:
            raise ConfigError(
                f"the arms {', '.join(self.arms)} take about {byte_size(self.memory_bytes)} of memory together, "
                f"{byte_size(self.available_bytes)} are left; name fewer with --arms, and measure in several calls "
                "with none in each"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """The price for people."""
        room = "" if self.available_bytes is None else f" of {byte_size(self.available_bytes)}"
        lines = [
            f"arms: {', '.join(self.arms)}",
            f"written: {byte_size(self.disk_bytes)} (tables of {byte_size(self.table_bytes)})",
            f"memory of all arms: {byte_size(self.memory_bytes)}{room}",
            f"about {self.minutes:.0f} minutes",
        ]
        return "\n".join([*lines, *(f"{name} is left out: {why}" for name, why in self.left_out.items())])


def price(work: Work, asked: Sequence[str] | None) -> Price:
    """Choose the arms and price them.

    Where none are asked for, all are taken except those whose tables do not fit into memory.

    Raises:
        ConfigError: The model is neither a shape nor a checkpoint of ours with memory.
    """
    config, dtype = _configuration(work)
    sizes, item = model_sizes(config, context=work.longest), getattr(torch, dtype).itemsize
    memory = config.memory_config
    assert memory is not None
    weight_bytes = (sizes.total - sizes.memory_tables) * item
    is_made = work.model in SHAPES
    table_bytes = (
        memory.table_bytes(item) if is_made else sum(table.num_bytes for table in stored_tables(Path(work.model)))
    )
    cache_bytes = _cache_bytes(config, work, item)
    found = available_bytes()
    room = None if found is None else spare_bytes(found)
    arms, left_out = list(asked if asked is not None else ARMS), {}

    def arm_bytes(name: str) -> int:
        arm = ARMS[name]
        tables = table_bytes if arm.tier in ("device", "host") else 0
        return _ENGINE_BYTES + weight_bytes + tables + (cache_bytes if arm.engine == "vllm" else 2 * cache_bytes)

    if asked is None and room is not None:
        for name in ("device", "host"):
            if sum(map(arm_bytes, arms)) > room:
                arms.remove(name)
                left_out[name] = f"its tables of {byte_size(table_bytes)} do not fit into memory beside the other arms"
    cold = any(ARMS[name].is_cold for name in arms)
    tables_written = 0 if work.holes else table_bytes * (is_made + cold)
    written = tables_written + weight_bytes * (is_made + 1)
    seconds = written / _WRITTEN_BYTES_PER_SECOND + _LOAD_SECONDS * len(arms)
    rate = read_machine().flops_per_second
    for name in arms:
        share = min(1.0, work.remote_requests / work.requests) if name == "remote" else 1.0
        tokens = share * (work.prompt_tokens + work.requests * work.new_tokens)
        once = tokens * sizes.flops_per_token / (rate * _ENGINE_SHARE[ARMS[name].engine])
        if name == "remote":
            once += tokens * len(memory.layers) * memory.num_heads_total / _REMOTE_ROWS_PER_SECOND
        seconds += work.passes * once
    return Price(
        arms=tuple(arms),
        left_out=left_out,
        dtype=dtype,
        table_bytes=table_bytes,
        disk_bytes=written,
        memory_bytes=sum(map(arm_bytes, arms)),
        available_bytes=room,
        kv_cache_bytes=cache_bytes,
        minutes=seconds / 60,
    )


def _configuration(work: Work) -> tuple[EngramLMConfig, str]:
    """The configuration of the model, and the type of its numbers."""
    if work.model not in SHAPES and Path(work.model).is_dir():
        config = read_config(Path(work.model))
        return config, work.dtype or str(config.dtype or "bfloat16").removeprefix("torch.")
    backbone, _ = shape_fields(work.model)
    dtype = work.dtype or "bfloat16"
    memory = shape_memory(work.model, work.table_bytes, getattr(torch, dtype))
    spec = memory.hash_spec(TokenMap.identity(backbone["vocab_size"]), pad_token_id=0)
    return EngramLMConfig(memory=memory.to_dict(), hash_spec=spec.to_dict(), **backbone), dtype


def _cache_bytes(config: EngramLMConfig, work: Work, item: int) -> int:
    """Bytes of vLLM's cache for the longest requests at the same time, so that none has to give way."""
    memory = config.memory_config
    assert memory is not None
    head = max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    padded = -(-head // 32) * 32
    per_token = config.num_hidden_layers * config.num_attention_heads * 2 * padded * item
    per_token += len(memory.layers) * (config.hidden_size * item + 4 * config.num_streams + 16)
    return max(_SMALLEST_CACHE_BYTES, 5 * per_token * work.sequences * (work.longest + 128) // 4)
