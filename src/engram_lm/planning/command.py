"""``engram-lm plan``: what a model holds and costs, from its name or its configuration, without building it."""

import copy
import dataclasses
import json as json_module
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from huggingface_hub.errors import StrictDataclassError

from engram_lm.errors import ConfigError, check_flags, closest
from engram_lm.files import read_json, user_path
from engram_lm.hashing import TokenMap
from engram_lm.memory.config import EngramConfig
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.presets import NAMES
from engram_lm.planning.bars import print_bars
from engram_lm.planning.budget import allocate
from engram_lm.planning.served_cache import cache_bytes_per_token, cache_tokens
from engram_lm.planning.shape import ITEM_BYTES
from engram_lm.planning.sizes import model_sizes, muon_parameters
from engram_lm.tables.block_float8 import num_blocks
from engram_lm.tables.byte_size import byte_size


@dataclasses.dataclass(frozen=True)
class Plan:
    """Print what a model holds and costs. Nothing is allocated, so the paper's 40B takes no longer than a nano.

    Presets: dense-, moe- and engram- with -nano, -tiny, -small (for a CPU, a small GPU, a large GPU; the three of a
    size have equal active FLOPs), and the paper's dense-4b, moe-27b, engram-27b, engram-40b.

    Parameters are counted as in the paper: the total has one vocabulary matrix, the active have none.

    Examples::

        engram-lm plan engram-27b
        engram-lm plan runs/mine/model/config.json --json
        engram-lm plan engram-tiny --context 512 --batch-size 32
        engram-lm plan engram-27b --ratio 0.6
        engram-lm plan engram-27b --placement --disk /mnt/nvme/tables --batch-size 8
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|CONFIG.json")]
    """A preset, a config.json, or a folder that holds one."""
    context: int | None = None
    """Tokens in a sequence, for attention and for the state of decoding; what the model is made for unless given."""
    batch_size: int = 1
    """Sequences that are decoded at a time."""
    ratio: float | None = None
    """Divide the model's sparse budget anew, this share to experts and the rest to memory, and plan the result."""
    placement: bool = False
    """Say on which tier the tables should be on this machine, with predicted time per token and traps."""
    table_dtype: Literal["float32", "bfloat16", "float8_e4m3"] = "bfloat16"
    """Type of the stored rows, for --placement."""
    ram_gib: float | None = None
    """Available memory in GiB, for --placement; what this machine and container have unless given."""
    device_gib: float | None = None
    """Free memory of the accelerator in GiB, for --placement, 0 for none; what torch finds unless given."""
    disk: Path | None = None
    """Folder of the tables, for --placement: random reads of its largest file are timed for a second."""
    disk_iops: float | None = None
    """Random reads of 4 KiB a second that the disk does, many at a time, in place of --disk."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_flags(self, "context", "batch_size")
        for name, low in (("ram_gib", 0.0), ("device_gib", 0.0), ("disk_iops", 1.0), ("disk", None)):
            value = getattr(self, name)
            if value is not None and not self.placement:
                raise ConfigError(f"--{name.replace('_', '-')} is used by --placement; ask for it too")
            if value is not None and low is not None and not low <= value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be a number from {low:g}, not {value}")
        if self.disk is not None and self.disk_iops is not None:
            raise ConfigError("--disk measures the disk and --disk-iops says its rate: give one of them")

    def run(self) -> int:
        """Print the plan."""
        config = read_config(self.model)
        divided: dict[str, Any] = {}
        if self.ratio is not None:
            config, divided = _divide(config, self.ratio)
        found = {**plan(config, context=self.context, batch_size=self.batch_size), **divided}
        if self.placement:
            found["placement"] = self._place(config, found)
        if self.json:
            print(json_module.dumps({"model": self.model, **found}))
        else:
            _print(self.model, found)
        return 0

    def _place(self, config: EngramLMConfig, found: dict[str, Any]) -> dict[str, Any]:
        from engram_lm.planning.placement import place
        from engram_lm.planning.this_machine import DiskRate, measure_disk, read_machine

        memory = config.memory_config
        if memory is None:
            raise ConfigError("this model has no memory, so there are no tables to place; leave --placement out")
        disk = None if self.disk is None else measure_disk(self.disk)
        if self.disk_iops is not None:
            disk = DiskRate.told(self.disk_iops)
        row_bytes = _row_bytes(memory.head_dim)[self.table_dtype]
        machine = read_machine(ram_gib=self.ram_gib, device_gib=self.device_gib, disk=disk, row_bytes=row_bytes)
        return place(found, config, machine, dtype=self.table_dtype)


def read_config(source: str) -> EngramLMConfig:
    """Find a configuration by preset name or path.

    A hand-written file may lack its ``hash_spec``: raw tokens are assumed, which cost the same.

    Raises:
        ConfigError: No such preset or file, or a file that is no configuration of this family; the message names the
            field and what is near it.
    """
    path = user_path(source)
    if "/" not in source and not source.endswith(".json") and (source in NAMES or not path.exists()):
        return EngramLMConfig.preset(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    values = read_json(path, error=ConfigError)
    kind = values.pop("model_type", EngramLMConfig.model_type)
    if kind != EngramLMConfig.model_type:
        raise ConfigError(
            f"{path} is the configuration of a {kind!r} model; engram-lm plan prices {EngramLMConfig.model_type!r} "
            f"models and the presets {', '.join(NAMES)}"
        )
    try:
        _check_names(values)
        if values.get("memory") and not values.get("hash_spec"):
            EngramLMConfig(**{**values, "memory": None, "hash_spec": None})  # sizes first
            memory = EngramConfig.from_dict(values["memory"])
            raw = TokenMap.identity(values["vocab_size"])
            values["hash_spec"] = memory.hash_spec(raw, pad_token_id=values.get("pad_token_id") or 0).to_dict()
        return EngramLMConfig(**values)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, StrictDataclassError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split()):.400}") from error


def _divide(config: EngramLMConfig, ratio: float) -> tuple[EngramLMConfig, dict[str, Any]]:
    """The configuration with another division of its sparse budget, and that division for the output."""
    found = allocate(config, ratio)
    config = copy.deepcopy(config)
    config.n_routed_experts, config.intermediate_size = found.num_experts, found.intermediate_size
    config.memory = config.hash_spec = None
    if found.memory is not None:
        raw = TokenMap.identity(config.vocab_size)
        config.memory = found.memory.to_dict()
        config.hash_spec = found.memory.hash_spec(raw, pad_token_id=0).to_dict()
    numbers = dataclasses.asdict(found)
    del numbers["memory"]
    differences = {"total_difference": found.total_difference, "active_difference": found.active_difference}
    return config, {"allocation": {**numbers, **differences}}


def plan(config: EngramLMConfig, *, context: int | None = None, batch_size: int = 1) -> dict[str, Any]:
    """Price a configuration.

    Args:
        config: Any configuration.
        context: Tokens in a sequence; ``max_position_embeddings`` where None.
        batch_size: Sequences that are decoded at a time; decode state is given for one and for all of them.

    Returns:
        Plain values for JSON. Bytes and FLOPs are whole numbers.
    """
    context = config.max_position_embeddings if context is None else context
    sizes, memory = model_sizes(config, context=context), config.memory_config
    width = 0 if memory is None else memory.head_dim
    rows = 0 if memory is None else memory.numbers_read_per_token() // width
    rest, muon = sizes.total - sizes.memory_tables, muon_parameters(config)
    own = (
        "attention", "dense_feed_forward", "shared_experts", "routed_experts", "routers", "streams", "norms",
        "memory_layers", "active", "sparse",
    )  # fmt: skip
    values: dict[str, Any] = {
        "context_tokens": context,
        "batch_size": batch_size,
        "parameters": {
            "total": sizes.paper_total,
            "memory": sizes.memory_tables,
            "vocabulary": sizes.vocabulary_matrix,
            "stored": sizes.total,
            **{name: getattr(sizes, name) for name in own},
        },
        "weights_bytes": {name: sizes.total * each for name, each in ITEM_BYTES.items()},
        "table": None
        if memory is None
        else {
            "rows": list(memory.num_table_rows()),
            "row_width": width,
            "rows_per_head": memory.rows_per_head,
            "heads": memory.num_heads_total,
            "bytes": _row_bytes(width, sum(memory.num_table_rows())),
        },
        "flops_per_token": {"inference": sizes.flops_per_token, "training": 3 * sizes.flops_per_token},
        "reads_per_token": {"rows": rows, "bytes": _row_bytes(width, rows)},
        "decode": _decode(config, memory, context, batch_size),
        "vllm_cache": {name: _served(config, name) for name in ITEM_BYTES},
        # In float32: two moments (Adam, RowAdam), or one for what Muon updates.
        "optimizer_bytes": {
            "backbone_adamw": 8 * rest,
            "backbone_muon": 4 * muon + 8 * (rest - muon),
            "tables_adam": 8 * sizes.memory_tables,
            "total_adamw": 8 * sizes.total,
        },
    }
    hash_seconds = 0.0
    if config.spec is not None and memory is not None:
        # Finding the primes is what a hash costs beside its token map; it is done again here for its time.
        raw = TokenMap.identity(config.spec.vocab_size)
        started = time.perf_counter()
        memory.hash_spec(raw, pad_token_id=0)
        hash_seconds = time.perf_counter() - started
    rate = _initial_values_per_second()
    values["build"] = {
        "hash_seconds": hash_seconds,
        "initialize_seconds": sizes.total / rate,
        "values_per_second": rate,
    }
    return values


def _row_bytes(width: int, num_rows: int = 1) -> dict[str, int]:
    """Bytes of rows by type: plain, and FP8 with a scale byte per 32 columns."""
    plain = {name: num_rows * width * each for name, each in ITEM_BYTES.items()}
    return {**plain, "float8_e4m3": num_rows * (width + num_blocks(width))}


def _decode(config: EngramLMConfig, memory: EngramConfig | None, context: int, batch_size: int) -> dict[str, int]:
    """State of decoding in bfloat16; multi-head latent attention caches its latents, not keys and values."""
    per_token = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    if memory is not None and memory.entry.writes == "values":  # what is added to values stands beside the latents
        per_token += len(memory.layers) * memory.hidden_size * 2
    state = 0
    if memory is not None:
        window = memory.conv_context * memory.num_streams * memory.hidden_size * 2
        state = len(memory.layers) * window + (max(memory.orders) - 1) * 8  # int64 token codes, once
    per_sequence = per_token * context + state
    return {
        "kv_cache_bytes_per_token": per_token,
        "kv_cache_bytes_per_sequence": per_token * context,
        "memory_state_bytes_per_sequence": state,
        "bytes_per_sequence": per_sequence,
        "bytes_of_batch": per_sequence * batch_size,
    }


def _served(config: EngramLMConfig, dtype: str) -> dict[str, int] | None:
    """What vLLM keeps of a token on a CPU, and how many tokens a GiB of its cache holds; None where it cannot serve."""
    import torch

    found = cache_bytes_per_token(config, getattr(torch, dtype))
    if found is None:
        return None
    attention, memory = found
    return {
        "bytes_per_token": attention + memory,
        "memory_bytes_per_token": memory,
        "tokens_per_gib": cache_tokens(1 << 30, attention + memory),
    }


def _initial_values_per_second() -> float:
    """How fast this machine makes a model's first values, from a sample of 4 MB.

    They are drawn into fresh memory, and twice: by each module for itself, then by transformers' ``post_init``.
    """
    import torch

    number, seconds = 1 << 20, []
    for _ in range(3):
        started = time.perf_counter()
        torch.empty(number).normal_().normal_()
        seconds.append(time.perf_counter() - started)
    return number / min(seconds)


def _check_names(values: dict[str, Any]) -> None:
    """Refuse a misspelled field, which transformers would keep as an attribute that nothing reads."""
    missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if name not in values]
    known = set(EngramLMConfig().to_dict()) | {field.name for field in dataclasses.fields(EngramLMConfig)}
    unknown = []
    for name in values:
        if name not in known:
            if near := closest(name, known, cutoff=0.85):
                raise ConfigError(f"there is no field {name!r}; did you mean {near!r}?")
            unknown.append(name)
    if missing:
        raise ConfigError(f"a configuration to be planned says at least {', '.join(missing)}")
    if unknown:
        print(f"engram-lm plan: ignored, as nothing reads it: {', '.join(map(repr, unknown))}", file=sys.stderr)


def _print(name: str, found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=f"[bold]{name}", title_justify="left", pad_edge=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in _rows(found):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for title, (values, write) in _divided(found).items():
        print_bars(console, title, values, write)


def _divided(found: dict[str, Any]) -> dict[str, tuple[dict[str, float], Callable[[float], str]]]:
    """What is drawn: where parameters, bytes and seconds go, each as parts of a whole and how to write them."""
    sizes, optimizer, build = found["parameters"], found["optimizer_bytes"], found["build"]
    kinds = ("attention", "dense_feed_forward", "shared_experts", "routed_experts", "routers", "streams", "norms")
    parts = {"memory tables": sizes["memory"], "memory layers": sizes["memory_layers"]}
    parts |= {kind: sizes[kind] for kind in kinds}
    parts["vocabulary"] = sizes["stored"] - sum(parts.values())
    rest = sizes["stored"] - sizes["memory"]
    training = {
        "weights of the backbone": 4 * rest,
        "weights of the tables": 4 * sizes["memory"],
        "optimizer of the backbone": optimizer["backbone_adamw"],
        "optimizer of the tables": optimizer["tables_adam"],
        "gradients of the backbone": 4 * rest,
    }
    seconds = {"the hash": build["hash_seconds"], "first values": build["initialize_seconds"]}
    return {
        "where the stored parameters are, every vocabulary matrix counted": (parts, _count),
        "bytes while training in float32 (activations and rows' gradients come on top)": (
            training,
            lambda size: byte_size(int(size)),
        ),
        "seconds to build it here": (seconds, lambda value: f"{value:.3g} s"),
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is printed of a plan: name, value, remark."""
    parameters, weights, flops = found["parameters"], found["weights_bytes"], found["flops_per_token"]
    decode, optimizer, build = found["decode"], found["optimizer_bytes"], found["build"]
    share = f"{parameters['sparse'] / max(1, parameters['total']):.0%} of the total"
    remarks = {
        "total": ("parameters, total", "with one vocabulary matrix, as the paper counts"),
        "active": ("  active per token", "without the vocabulary"),
        "sparse": ("  sparse", f"experts not visited and rows not read: {share}"),
        "memory": ("  memory tables", ""),
        "vocabulary": ("  vocabulary matrix", ""),
    }
    rows = [(title, _count(parameters[kind]), remark) for kind, (title, remark) in remarks.items()]
    kinds = ["attention", "dense_feed_forward", "shared_experts", "routed_experts", "routers", "streams"]
    kinds = [kind for kind in [*kinds, "memory_layers"] if parameters[kind]]
    rows += [(f"  {kind.replace('_', ' ')}", _count(parameters[kind]), "") for kind in kinds]
    if "allocation" in found:
        divided = found["allocation"]
        remark = f"of {divided['moe_num_experts']}: {divided['ratio']:.1%} of the sparse budget; dense width "
        remark += f"{divided['intermediate_size']:,}, rows per head {divided['rows_per_head']:,}"
        rows.insert(0, ("experts of each block", f"{divided['num_experts']}", remark))
    rows.append(("weights", byte_size(weights["bfloat16"]), f"bfloat16; {byte_size(weights['float32'])} in float32"))
    if found["table"]:
        sizes, reads = found["table"]["bytes"], found["reads_per_token"]
        tables = " + ".join(f"{count:,}" for count in found["table"]["rows"])
        rows += [
            ("tables", byte_size(sizes["bfloat16"]), f"bfloat16; {tables} rows of {found['table']['row_width']}"),
            ("", byte_size(sizes["float8_e4m3"]), "FP8 with one scale per 32 numbers"),
            ("", byte_size(sizes["float32"]), "float32"),
            ("read per token", byte_size(reads["bytes"]["bfloat16"]), f"{reads['rows']} rows, bfloat16"),
        ]
    batch = f"batch of {found['batch_size']}: {byte_size(decode['bytes_of_batch'])}"
    rows += [
        ("FLOPs per token", _count(flops["inference"]), f"forward, sequences of {found['context_tokens']:,}"),
        ("", _count(flops["training"]), "training: forward and backward"),
        ("key-value cache", byte_size(decode["kv_cache_bytes_per_sequence"]), f"per sequence, bfloat16; {batch}"),
        ("memory's decode state", byte_size(decode["memory_state_bytes_per_sequence"]), "per sequence, bfloat16"),
        *_served_rows(found["vllm_cache"]),
        ("optimizer state", byte_size(optimizer["total_adamw"]), "AdamW, and Adam on rows for the tables, float32"),
    ]
    if parameters["memory"]:
        rows.append(("  of the tables", byte_size(optimizer["tables_adam"]), ""))
    seconds = build["hash_seconds"] + build["initialize_seconds"]
    remark = f"here, drawing {build['values_per_second'] / 1e6:,.0f} M values a second"
    rows.append(("time to build", f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s", remark))
    if "placement" in found:
        from engram_lm.planning.placement import rows_for_people

        rows += rows_for_people(found["placement"])
    return rows


def _served_rows(served: dict[str, dict[str, int] | None]) -> list[tuple[str, str, str]]:
    lines, title = [], "cache of vLLM on a CPU"
    for name, kept in served.items():
        if kept is not None:
            remark = f"of a token, {name}, {byte_size(kept['memory_bytes_per_token'])} of it memory's: "
            remark += f"{kept['tokens_per_gib']:,} tokens in a GiB"
            lines.append((title, byte_size(kept["bytes_per_token"]), remark))
            title = ""
    return lines


def _count(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f}"
