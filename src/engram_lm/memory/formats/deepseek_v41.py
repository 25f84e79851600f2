"""The memory of DeepSeek-V4.1, which calls it Engram."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.formats.family import FLOATS, Family, Plan, expect, gather, lookup, pieces, rounded
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.block_float8 import BLOCK, dequantize, num_blocks
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.safetensors_file import TensorFolder
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.files.sources import SCALE_NAMES, TABLE_NAMES
from engram_lm.tables.stored_tensor import StoredTensor
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.record_table import RecordTable


class DeepSeekV41(Family):
    """Memory with projections and tables in 8 bits, a scale for each block, and no convolution.

    Source: names and shapes of deepseek-ai/DeepSeek-V4.1-Flash ``inference/model.py``.
    """

    variant = "deepseek_v41"
    prefix = ""
    names = {
        **TABLE_NAMES["deepseek_v41"],
        "key_value": "engram.wkv.weight",
        "key_value_scale": "engram.wkv.scale",
        "query_norm": "engram.q_weight",
        "key_norm": "engram.k_weight",
    }
    held = {
        **Family.held,
        "norm_weight": ("plain", "its norms multiply by their weight"),
        "kernel_size": (0, "it has no convolution"),
    }

    def read_config(self, keys: Mapping[str, Any], spec: HashSpec) -> EngramConfig:
        """Read geometry and options from a ``config.json``."""
        width = lookup(keys, "engram_head_dim")
        if type(width) is not int:
            raise ConfigError(f"'engram_head_dim' is an integer, got {width!r}")
        return EngramConfig(
            # The second names are those of the release's own inference code.
            hidden_size=lookup(keys, "hidden_size", "dim"),
            layers=spec.blocks,
            num_streams=lookup(keys, "hc_mult"),
            orders=spec.orders,
            num_heads=spec.num_heads,
            memory_dim=width * spec.num_heads_total,
            rows_per_head=lookup(keys, "engram_vocab_size"),
            kernel_size=0,
            norm_eps=lookup(keys, "rms_norm_eps", "norm_eps"),
            seed=spec.seed,
        )

    def locate(
        self, tensors: TensorFolder, stem: str, config: EngramConfig, spec: HashSpec, index: int
    ) -> dict[str, StoredTensor]:
        """Find the weights of a layer."""
        projected = (config.num_streams + 1) * config.hidden_size
        norm = ((config.num_streams, config.hidden_size), FLOATS)
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "key_value": ((projected, config.memory_dim), (*FLOATS, "F8_E4M3")),
            "query_norm": norm,
            "key_norm": norm,
        }
        found = {
            name: expect(tensors.find(stem + self.names[name]), shape, types)
            for name, (shape, types) in expected.items()
        }
        if found["key_value"].dtype not in FLOATS:
            found["key_value_scale"] = self._scale(tensors, found["key_value"])
        return found

    def _scale(self, tensors: TensorFolder, weight: StoredTensor) -> StoredTensor:
        """Find the scales of an 8-bit projection, which release and converters name differently: one per square."""
        stem = weight.name.removesuffix("weight")
        scale = tensors.find(next((stem + name for name in SCALE_NAMES if stem + name in tensors), stem + "scale"))
        if scale.dtype not in (*FLOATS, "F8_E8M0") or _square(weight, scale) is None:
            shape = [num_blocks(size) for size in weight.shape]
            raise CheckpointError(
                f"{scale}: engram-lm reads scales of {', '.join(FLOATS)} or F8_E8M0, one for each square block of "
                f"{weight}, such as {shape} for blocks of {BLOCK} x {BLOCK}"
            )
        return scale

    def load(
        self, stored: Mapping[str, StoredTensor], config: EngramConfig, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Load the weights of a layer, as its state dict."""
        weight = stored["key_value"].load()
        norms = {name: stored[name].load() for name in ("query_norm", "key_norm")}
        if scale := stored.get("key_value_scale"):
            block = _square(stored["key_value"], scale) or BLOCK
            weight = dequantize(weight, scale.load(), dtype or torch.bfloat16, block=block, square=True)
        return {
            "key_value.weight": weight.to(dtype or weight.dtype),
            **{name: norm.to(dtype or norm.dtype) for name, norm in norms.items()},
        }

    def write_config(self, config: EngramConfig, spec: HashSpec, num_shards: int) -> dict[str, Any]:
        """Return the ``config.json``."""
        text = {
            "model_type": "deepseek_v41_text",
            "engram_layer_ids": list(spec.layers),
            "engram_num_embeddings": list(spec.padded_rows),
            "engram_max_ngram_size": spec.orders[-1],
            "engram_vocab_size": config.rows_per_head,
            "engram_n_heads": spec.num_heads,
            "engram_head_dim": config.head_dim,
            "engram_pad_token_id": spec.pad_token_id,
            "engram_compressed_vocab_size": spec.vocab_size,
            "hidden_size": config.hidden_size,
            "hc_mult": config.num_streams,
            "rms_norm_eps": config.norm_eps,
            "vocab_size": spec.num_tokens,
        }
        dead = spec.segments.dead_tokens
        return {
            "architectures": ["DeepseekV41ForCausalLM"],
            "model_type": "deepseek_v41",
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "weight_block_size": [32, 32],
                "scale_fmt": "ue8m0",
                "activation_scheme": "dynamic",
            },
            **({"image_token_id": dead[0]} if dead else {}),
            "text_config": text,
        }

    def weights(self, layer: EngramLayer, names: Mapping[str, str], spec: HashSpec, index: int) -> dict[str, Tensor]:
        """Return everything of a layer but its table, its projection rounded to 8 bits."""
        # In parts of whole blocks: rounding takes several times the memory of what it rounds.
        parts = layer.key_value.weight.detach().split(32 * BLOCK)
        values = [rounded(part.cpu(), names["key_value"], square=True) for part in parts]
        return {
            "key_value": torch.cat([numbers for numbers, _ in values]),
            "key_value_scale": torch.cat([scales for _, scales in values]),
            # As the format has them, whatever type they were trained in; nothing is lost of those that came from it.
            "query_norm": layer.query_norm.detach().to(torch.bfloat16),
            "key_norm": layer.key_norm.detach().to(torch.bfloat16),
        }

    def plan_table(self, table: Table, names: Mapping[str, str], num_shards: int) -> Plan:
        """Say which tensors a table becomes: its numbers and the scales of their blocks."""
        return {
            names["table"]: (torch.float8_e4m3fn, (table.num_rows, table.width)),
            names["table_scale"]: (torch.float8_e8m0fnu, (table.num_rows, num_blocks(table.width))),
        }

    def write_table(self, writer: TensorWriter, table: Table, names: Mapping[str, str], num_shards: int) -> None:
        """Write numbers and scales; records that are already in this format are copied byte for byte."""
        for start, stop in pieces(table, 0, table.num_rows):
            if isinstance(table, RecordTable) and table.codec == RowCodec.named("float8_e4m3", table.width):
                records = table.load_records(start, stop)
                rows, scales = records.split([table.codec.value_bytes, table.codec.scale_bytes], dim=1)
                rows = rows.contiguous().view(torch.float8_e4m3fn)
                scales = scales.contiguous().view(torch.float8_e8m0fnu)
            else:
                rows, scales = rounded(gather(table, start, stop), f"rows {start} to {stop - 1} of {names['table']}")
            writer.append(names["table"], rows)
            writer.append(names["table_scale"], scales)


def _square(weight: StoredTensor, scale: StoredTensor) -> int | None:
    """Find how large the square blocks of a matrix are, from the shape of their scales; None where none fit."""
    sizes = (BLOCK, 128, 64, 16, 256)
    return next((size for size in sizes if tuple(num_blocks(each, size) for each in weight.shape) == scale.shape), None)
