"""The memory of Qwen3.8-Flash-Next (transformers ``qwen4_exp``), which calls it PLE."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.formats.family import FLOATS, Family, Plan, expect, gather, lookup, pieces
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.block_integers import INT4
from engram_lm.tables.files.safetensors_file import TensorFolder
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.files.sources import TABLE_NAMES
from engram_lm.tables.stored_tensor import StoredTensor
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.record_table import RecordTable


class QwenPle(Family):
    """Memory of one table for each layer, in one tensor or in shards, with a convolution and zero-centered norms.

    Source: names and shapes of transformers ``models/qwen4_exp/modeling_qwen4_exp.py``, ``conversion_mapping.py``.
    """

    variant = "qwen_ple"
    prefix = "model.language_model."
    names = {
        "multipliers": "ple.ple_embedding.layer_multipliers",
        "primes": "ple.ple_embedding.ngram_heads_vocab_sizes",
        "offsets": "ple.ple_embedding.ngram_heads_offsets",
        **TABLE_NAMES["qwen_ple"],
        "key": "ple.key_proj.weight",
        "value": "ple.value_proj.weight",
        "key_norm": "ple.norm_key.weight",
        "query_norm": "ple.norm_query.weight",
        "conv_norm": "ple.norm_conv.weight",
        "conv": "ple.conv1d.weight",
    }
    held = {
        **Family.held,
        "norm_weight": ("zero_centered", "its norms multiply by 1 + weight"),
    }
    splits_tables = True

    def read_config(self, keys: Mapping[str, Any], spec: HashSpec) -> EngramConfig:
        """Read geometry and options from a ``config.json``."""
        # transformers saves no key that has the class's default: hence these defaults, its own.
        hidden = lookup(keys, "hidden_size", default=2048)
        return EngramConfig(
            hidden_size=hidden,
            layers=spec.blocks,
            num_streams=lookup(keys, "hc_count", default=4),
            orders=spec.orders,
            num_heads=spec.num_heads,
            memory_dim=lookup(keys, "ple_embed_dim", default=hidden),
            rows_per_head=lookup(keys, "ngram_vocab_size_base", default=20_000_000),
            kernel_size=lookup(keys, "ple_conv_kernel_size", default=4),
            norm_eps=lookup(keys, "rms_norm_eps", default=1e-6),
            norm_weight="zero_centered",
            seed=spec.seed,
        )

    def locate(
        self, tensors: TensorFolder, stem: str, config: EngramConfig, spec: HashSpec, index: int
    ) -> dict[str, StoredTensor]:
        """Find the weights of a layer, and compare the constants of its hash with the config's."""
        wide = config.num_streams * config.hidden_size
        shapes = {
            "key": (wide, config.memory_dim),
            "value": (config.hidden_size, config.memory_dim),
            "key_norm": (wide,),
            "query_norm": (wide,),
            "conv_norm": (wide,),
            "conv": (wide, 1, config.kernel_size),
        }
        found = {name: expect(tensors.find(stem + self.names[name]), shape, FLOATS) for name, shape in shapes.items()}
        for name, constants in self._constants(spec, index).items():
            stored = expect(tensors.find(stem + self.names[name]), (len(constants),), ("I64",))
            if stored.load().tolist() != list(constants):
                raise MismatchError(
                    f"{stored} holds {stored.load().tolist()}, the config gives {list(constants)}; they belong to "
                    "different models"
                )
        return found

    def load(
        self, stored: Mapping[str, StoredTensor], config: EngramConfig, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Load the weights of a layer, as its state dict."""
        loaded = {name: tensor.load().to(dtype or tensor.torch_dtype) for name, tensor in stored.items()}
        streams = (config.num_streams, config.hidden_size)
        return {
            # Of two types, `cat` takes the one that holds both.
            "key_value.weight": torch.cat([loaded["key"], loaded["value"]]),
            "query_norm": loaded["query_norm"].view(streams),
            "key_norm": loaded["key_norm"].view(streams),
            "conv_norm": loaded["conv_norm"].view(streams),
            "conv_weight": loaded["conv"][:, 0],
        }

    def check_options(self, config: EngramConfig) -> None:
        """Refuse options that the format has no place for."""
        super().check_options(config)
        if not config.kernel_size:
            raise ConfigError("qwen_ple cannot hold kernel_size=0: it always has a convolution")
        if config.conv_dilation != config.orders[-1]:
            raise ConfigError(
                f"qwen_ple cannot hold dilation={config.conv_dilation}: its convolution's is the highest order, "
                f"{config.orders[-1]}"
            )

    def write_config(self, config: EngramConfig, spec: HashSpec, num_shards: int) -> dict[str, Any]:
        """Return the ``config.json``."""
        text = {
            "model_type": "qwen4_exp_text",
            "ple_layer_ids": list(spec.layers),
            "ple_embed_dim": config.memory_dim,
            "ple_conv_kernel_size": config.kernel_size,
            "ngram_size": spec.orders[-1],
            "heads_per_ngram": spec.num_heads,
            "ngram_vocab_size_base": config.rows_per_head,
            "make_ngram_vocab_size_divisible_by": _divisor(spec),
            "split_ngram_parts": num_shards,
            "seed": spec.seed,
            "vocab_size": spec.vocab_size,
            "eos_token_id": spec.pad_token_id,
            "hidden_size": config.hidden_size,
            "hc_count": config.num_streams,
            "rms_norm_eps": config.norm_eps,
        }
        return {"architectures": ["Qwen4ExpForConditionalGeneration"], "model_type": "qwen4_exp", "text_config": text}

    def weights(self, layer: EngramLayer, names: Mapping[str, str], spec: HashSpec, index: int) -> dict[str, Tensor]:
        """Return everything of a layer but its table."""
        wide = layer.config.num_streams * layer.config.hidden_size
        key, value = layer.key_value.weight.detach().split([wide, layer.config.hidden_size])
        return {
            "key": key,
            "value": value,
            "key_norm": layer.key_norm.detach().flatten(),
            "query_norm": layer.query_norm.detach().flatten(),
            "conv_norm": layer.conv_norm.detach().flatten(),
            "conv": layer.conv_weight.detach().unsqueeze(1),
            **{name: torch.tensor(constants) for name, constants in self._constants(spec, index).items()},
        }

    def plan_table(self, table: Table, names: Mapping[str, str], num_shards: int) -> Plan:
        """Say which tensors a table becomes: its shards, and its scales where it is stored in 8 bits."""
        stored = _stored_alike(table)
        plan: Plan = {}
        for name, scale_name, start, stop in _shards(table, names, num_shards):
            plan[name] = (table.dtype if stored is None else stored.codec.stored_dtype, (stop - start, table.width))
            if stored is not None and stored.codec.scale == "blocks":
                assert stored.codec.scale_dtype is not None
                plan[scale_name] = (stored.codec.scale_dtype, (stop - start, 1))
        if stored is not None and stored.codec.scale == "table":
            plan[names["table_scale"]] = (torch.float32, ())
        return plan

    def write_table(self, writer: TensorWriter, table: Table, names: Mapping[str, str], num_shards: int) -> None:
        """Write the shards; records that are already in this format are copied byte for byte."""
        stored = _stored_alike(table)
        for name, scale_name, first, end in _shards(table, names, num_shards):
            for start, stop in pieces(table, first, end):
                if stored is None:
                    writer.append(name, gather(table, start, stop))
                    continue
                codec = stored.codec
                numbers, scales = stored.load_records(start, stop).split([codec.value_bytes, codec.scale_bytes], dim=1)
                writer.append(name, numbers.contiguous().view(codec.stored_dtype))
                if codec.scale == "blocks":
                    assert codec.scale_dtype is not None
                    writer.append(scale_name, scales.contiguous().view(codec.scale_dtype))
        if stored is not None and stored.codec.scale == "table":
            writer.append(names["table_scale"], torch.tensor(stored.codec.table_scale, dtype=torch.float32))

    def _constants(self, spec: HashSpec, index: int) -> dict[str, tuple[int, ...]]:
        """The numbers of the hash that the format stores beside the weights."""
        return {
            "multipliers": tuple(spec.multipliers[index]),
            "primes": tuple(spec.primes[index]),
            "offsets": tuple(spec.offsets_at(index)),
        }


def _divisor(spec: HashSpec) -> int:
    """Find what the rows of all tables were padded to a multiple of; the published one where it fits."""
    rows = [(sum(primes), padded) for primes, padded in zip(spec.primes, spec.padded_rows, strict=True)]

    def fits(divisor: int) -> bool:
        return all(-(-needed // divisor) * divisor == padded for needed, padded in rows)

    # A divisor may be as large as a table, but nobody pads to more than this.
    divisor = next(filter(fits, (128, *range(1, 2**16))), None)
    if divisor is None:
        raise ConfigError(f"qwen_ple cannot hold tables of {spec.padded_rows} rows for primes adding up to {rows}")
    return divisor


def _shards(table: Table, names: Mapping[str, str], num_shards: int) -> Iterator[tuple[str, str, int, int]]:
    """Names of numbers and scales, first row and end of every shard; their sizes differ by one row at most."""
    if num_shards == 1:
        yield names["table"], names["table_scale"], 0, table.num_rows
        return
    bounds = [table.num_rows * number // num_shards for number in range(num_shards + 1)]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield names["table_shard"].format(number), names["table_shard_scale"].format(number), start, stop


def _stored_alike(table: Table) -> RecordTable | None:
    """Return a table whose records the format holds as they are: plain, or 8 bits with a scale for all or each row."""
    if not isinstance(table, RecordTable):
        return None
    codec = table.codec
    by_row = codec.stored_dtype.itemsize == 1 and codec.stored_dtype != INT4 and codec.block >= codec.width
    return table if codec.scale != "blocks" or by_row else None
