"""Published checkpoints: read, they compute what the publishers' code computes; written, that code reads them back."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.own_memory import own_memory
from tests.raw_safetensors import e4m3, e8m0, random_e4m3, write_raw
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from engram_lm.errors import CheckpointError, ConfigError, MismatchError, TableClosedError
from engram_lm.hashing import HashSpec, Segments, TokenMap
from engram_lm.memory import EngramLayer, read_memory, write_memory
from engram_lm.tables import MappedTable, ParameterTable, ResidentTable
from engram_lm.tables.block_float8 import dequantize, quantize

INDEX = "model.safetensors.index.json"
GOLDEN = Path(__file__).parent.parent / "golden"


def write_json(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")


def read_all(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def same_bytes(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


# Qwen: transformers' own layer is the oracle ---------------------------------------------------------------------

END, VOCABULARY, HIDDEN, STREAMS, SHARDS = 7, 97, 16, 3, 12
QWEN = {
    "ple_layer_ids": [1, 3],
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 101,
    "make_ngram_vocab_size_divisible_by": 24,
    "split_ngram_parts": SHARDS,
    "seed": 1234,
    "vocab_size": VOCABULARY,
    "eos_token_id": END,
    "ple_embed_dim": 24,
    "ple_conv_kernel_size": 4,
    "hidden_size": HIDDEN,
    "hc_count": STREAMS,
    "rms_norm_eps": 1e-5,
}
PREFIX = "model.language_model."


@pytest.fixture(scope="module")
def oracles():
    config = Qwen4ExpTextConfig(**QWEN, num_hidden_layers=3, layer_types=["linear_attention"] * 3)
    torch.manual_seed(3)
    layers = {2 * ordinal: Qwen4ExpTextPLELayer(config, 2 * ordinal, ordinal) for ordinal in range(2)}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.parameters():
                parameter.copy_((torch.randn_like(parameter) * 0.5).bfloat16())
    return layers


def published_qwen(oracles, prefix=PREFIX, num_shards=SHARDS, scale=None):
    """The state of the oracles under the published names and in the published types."""
    tensors = {}
    for block, layer in oracles.items():
        for name, tensor in layer.state_dict().items():
            name = f"{prefix}layers.{block}.ple.{name}"
            tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor.clone()
            if name.endswith("ngram_embedding.weight") and scale is not None:
                tensors[name.removesuffix("weight") + "weight_scale"] = torch.tensor(scale)
                tensor = (tensor.float() / scale).to(torch.float8_e4m3fn)
            if name.endswith("ngram_embedding.weight") and num_shards > 1:
                for number, shard in enumerate(tensor.chunk(num_shards)):
                    tensors[f"{name.removesuffix('weight')}shard_{number}.weight"] = shard.contiguous()
            else:
                tensors[name] = tensor.contiguous()
    return tensors


def save(folder, tensors, config, num_files=4):
    """Write a checkpoint with the official writer, its tensors dealt over several files."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    places = {name: f"model-{1 + number % num_files}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    return folder


def qwen_config(**changes):
    text = {"model_type": "qwen4_exp_text", **QWEN} | changes
    return {"model_type": "qwen4_exp", "text_config": {key: value for key, value in text.items() if value is not None}}


@pytest.fixture
def qwen_folder(tmp_path, oracles):
    return save(tmp_path / "qwen", published_qwen(oracles), qwen_config())


def sample(vocabulary=VOCABULARY, streams=STREAMS, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(vocabulary, (3, 25), generator=generator)
    tokens[0, 4] = tokens[1, 20] = tokens[1, 21] = END
    return tokens, torch.randn(3, 25, streams, hidden, generator=generator)


def update(memory, block):
    """What a memory adds at a block to the sample."""
    tokens, hidden = sample(memory.spec.num_tokens, memory.config.num_streams, memory.config.hidden_size)
    codes = memory.spec.encode(tokens)
    rows = memory.spec.rows_for_layers(codes)[block + memory.spec.layer_base]
    with torch.no_grad():
        return memory.layers[block](hidden, rows, active=codes >= 0)


def oracle_update(oracle):
    tokens, hidden = sample()
    with torch.no_grad():
        return oracle(hidden.flatten(-2), tokens, None).view(hidden.shape)


@pytest.mark.parametrize(
    ("prefix", "num_shards", "composite"),
    [(PREFIX, SHARDS, True), ("model.", 1, False), ("", 5, True)],
    ids=["release", "text model", "bare"],
)
def test_qwen_read_in_place_equals_transformers(tmp_path, oracles, prefix, num_shards, composite):
    config = qwen_config() if composite else qwen_config()["text_config"]
    memory = read_memory(save(tmp_path, published_qwen(oracles, prefix, num_shards), config), dtype=torch.float32)
    assert (memory.variant, memory.config.layers, set(memory.layers)) == ("qwen_ple", (0, 2), {0, 2})
    for block, oracle in oracles.items():
        assert isinstance(memory.layers[block].table, MappedTable)
        torch.testing.assert_close(update(memory, block), oracle_update(oracle), atol=1e-5, rtol=1e-5)


def test_qwen_keeps_its_stored_types_unless_told_otherwise(qwen_folder, oracles):
    memory = read_memory(qwen_folder)
    for block, oracle in oracles.items():
        layer = memory.layers[block]
        assert {weight.dtype for weight in layer.parameters()} == {torch.bfloat16}
        rows = layer.table.gather(torch.arange(layer.table.num_rows))
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows.float(), oracle.ple_embedding.ngram_embedding.weight)
        assert all(weight.requires_grad and not weight.is_meta for weight in layer.parameters())


def test_norms_and_taps_stored_wider_than_the_projections_are_not_rounded_on_the_way_in_and_out(tmp_path, oracles):
    tensors = published_qwen(oracles)
    for name in list(tensors):
        if name.endswith(("norm_key.weight", "norm_conv.weight", "value_proj.weight")):
            tensors[name] = torch.randn(tensors[name].shape)
        elif name.endswith("conv1d.weight"):
            tensors[name] = tensors[name].half()
    memory = read_memory(save(tmp_path / "qwen", tensors, qwen_config()))
    wide = STREAMS * HIDDEN
    for block, layer in memory.layers.items():
        stem = f"{PREFIX}layers.{block}.ple."
        assert torch.equal(layer.key_norm.flatten(), tensors[f"{stem}norm_key.weight"])
        assert torch.equal(layer.conv_norm.flatten(), tensors[f"{stem}norm_conv.weight"])
        assert layer.query_norm.dtype == layer.table.dtype == torch.bfloat16
        assert layer.conv_weight.dtype == torch.float16
        # One matrix of two: the type that holds both.
        assert torch.equal(layer.key_value.weight[wide:], tensors[f"{stem}value_proj.weight"])
        assert torch.equal(layer.key_value.weight[:wide], tensors[f"{stem}key_proj.weight"].float())
        assert update(memory, block).isfinite().all()
    write_memory(tmp_path / "written", memory)
    written = read_all(tmp_path / "written")
    assert all(same_bytes(written[name], tensors[name]) for name in tensors if not name.endswith("key_proj.weight"))
    half = read_memory(tmp_path / "qwen", dtype=torch.float16).layers[0]
    assert {weight.dtype for weight in half.parameters()} == {half.table.dtype} == {torch.float16}


def test_keys_that_transformers_leaves_out_have_its_defaults(tmp_path, oracles):
    config = qwen_config(ple_embed_dim=None, ple_conv_kernel_size=None, rms_norm_eps=None, hc_count=None)
    with pytest.raises(CheckpointError, match=r"key_proj.weight .*expected .* \[64, 16\]"):
        read_memory(save(tmp_path, published_qwen(oracles), config))


def test_qwen_written_by_us_is_read_by_transformers(tmp_path, qwen_folder, oracles):
    memory = read_memory(qwen_folder)
    write_memory(tmp_path / "written", memory)
    written = read_all(tmp_path / "written")
    expected = published_qwen(oracles)
    assert set(written) == set(expected)
    assert all(same_bytes(written[name], expected[name]) for name in expected)
    for block, oracle in oracles.items():
        stem = f"{PREFIX}layers.{block}.ple."
        state = {name.removeprefix(stem): tensor for name, tensor in written.items() if name.startswith(stem)}
        table = "ple_embedding.ngram_embedding."
        shards = [state.pop(f"{table}shard_{number}.weight") for number in range(SHARDS)]
        other = copy.deepcopy(oracle)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict({**state, f"{table}weight": torch.cat(shards)})
        assert torch.equal(oracle_update(other), oracle_update(oracle))
    keys = json.loads((tmp_path / "written" / "config.json").read_text())["text_config"]
    assert {key: keys[key] for key in QWEN} == QWEN
    Qwen4ExpTextConfig(**keys, num_hidden_layers=3, layer_types=["linear_attention"] * 3)
    index = json.loads((tmp_path / "written" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert all(name in load_file(tmp_path / "written" / file) for name, file in index["weight_map"].items())
    again = read_memory(tmp_path / "written")
    assert (again.config, again.spec) == (memory.config, memory.spec)


@pytest.mark.parametrize("num_shards", [1, 7, 300])
def test_a_table_is_resharded_when_asked(tmp_path, qwen_folder, num_shards):
    memory = read_memory(qwen_folder)
    write_memory(tmp_path / "written", memory, num_shards=num_shards)
    again = read_memory(tmp_path / "written")
    for block, layer in memory.layers.items():
        rows = torch.arange(layer.table.num_rows)
        assert torch.equal(again.layers[block].table.gather(rows), layer.table.gather(rows))
        sizes = [shard.shape[0] for shard in again.layers[block].table.layout.tensors]
        assert len(sizes) == num_shards and max(sizes) - min(sizes) <= 1
    keys = json.loads((tmp_path / "written" / "config.json").read_text())["text_config"]
    assert keys["split_ngram_parts"] == num_shards


def test_an_eight_bit_qwen_table_is_scaled_and_copied_byte_for_byte(tmp_path, oracles):
    scale = 0.0137
    tensors = published_qwen(oracles, scale=scale)
    memory = read_memory(save(tmp_path / "qwen", tensors, qwen_config()))
    for block in oracles:
        stem = f"{PREFIX}layers.{block}.ple.ple_embedding.ngram_embedding."
        stored = torch.cat([tensors[f"{stem}shard_{number}.weight"] for number in range(SHARDS)])
        rows = memory.layers[block].table.gather(torch.arange(len(stored)))
        assert torch.equal(rows, (stored.float() * scale).bfloat16())
    write_memory(tmp_path / "written", memory)
    written = read_all(tmp_path / "written")
    assert set(written) == set(tensors)
    assert all(same_bytes(written[name], tensors[name]) for name in tensors)


def quantized_qwen(oracles, dtype, scale_dtype, kind):
    """Published tensors with 8-bit tables under scales of another kind, and the rows they mean, by block."""
    tensors, meant = published_qwen(oracles, num_shards=1), {}
    for block in oracles:
        stem = f"{PREFIX}layers.{block}.ple.ple_embedding.ngram_embedding."
        rows = tensors.pop(f"{stem}weight").float()
        largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        parts = []
        for number, part in enumerate(rows.chunk(SHARDS)):
            # A scale of its own for each shard, each row, or each square of 16 x 16 (width 6 is one of it).
            tall = {"shard": len(part), "row": 1, "square": 16}[kind]
            pieces = [piece.abs().max() for piece in part.split(tall)]
            scales = (torch.stack(pieces) / largest).to(scale_dtype).unsqueeze(1)
            wide = scales.float().repeat_interleave(tall, dim=0)[: len(part)]
            numbers = (
                (part / wide).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else (part / wide).to(dtype)
            )
            tensors[f"{stem}shard_{number}.weight"] = numbers
            name = "weight_scale_inv" if kind == "square" else "weight_scale"
            tensors[f"{stem}shard_{number}.{name}"] = scales[0] if kind == "shard" else scales
            parts.append(numbers.float() * wide)
        meant[block] = torch.cat(parts)
    return tensors, meant


@pytest.mark.parametrize(("dtype", "scale_dtype", "kind"), [
    (torch.float8_e4m3fn, torch.bfloat16, "row"),
    (torch.float8_e5m2, torch.float16, "row"),
    (torch.int8, torch.float32, "row"),
    (torch.int8, torch.bfloat16, "shard"),
    (torch.float8_e4m3fn, torch.float32, "square"),
])  # fmt: skip
def test_qwen_tables_under_scales_of_any_kind_are_read_exactly_and_copied(tmp_path, oracles, dtype, scale_dtype, kind):
    tensors, meant = quantized_qwen(oracles, dtype, scale_dtype, kind)
    folder = save(tmp_path / "qwen", tensors, qwen_config())
    memory = read_memory(folder, dtype=torch.float32)
    for block, rows in meant.items():
        assert torch.equal(memory.layers[block].table.gather(torch.arange(len(rows))), rows)
    write_memory(tmp_path / "written", memory)
    written, again = read_all(tmp_path / "written"), read_memory(tmp_path / "written", dtype=torch.float32)
    for block, rows in meant.items():
        assert torch.equal(again.layers[block].table.gather(torch.arange(len(rows))), rows)
        assert torch.equal(update(again, block), update(memory, block))
    if kind == "row":
        tables = [name for name in tensors if "ngram_embedding." in name]
        assert set(written) == set(tensors)
        assert all(same_bytes(written[name], tensors[name]) for name in tables)
    for dtype in (None, torch.bfloat16):  # the layer computes in its own type, whatever the rows are returned in
        assert update(read_memory(folder, dtype=dtype), 0).isfinite().all()


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


QWEN_DAMAGE = {
    "multipliers": (MismatchError, r"layers.2.ple.ple_embedding.layer_multipliers .*config gives"),
    "primes": (MismatchError, "ngram_heads_vocab_sizes"),
    "offsets": (MismatchError, "ngram_heads_offsets"),
    "shape": (CheckpointError, r"layers.2.ple.conv1d.weight .*expected .*\[48, 1, 4\]"),
    "type": (CheckpointError, r"layers.2.ple.norm_key.weight \(I64 .*expected BF16"),
    "width": (CheckpointError, r"shard_11.weight .*differs in width or type from the shard before it"),
    "rows": (CheckpointError, r"and 11 more shards: found \[500, 6\] rows and width in all, expected \[528, 6\]"),
    "gap": (CheckpointError, r"lacks .*layers.2.ple.ple_embedding.ngram_embedding.shard_10.weight, of 12 or more"),
    "no table": (CheckpointError, r"layers.2.ple.ple_embedding.ngram_embedding.weight is missing"),
    "no scale": (CheckpointError, r"has no scale that engram-lm finds: expected .*ngram_embedding.weight_scale or"),
    "both": (CheckpointError, "both in one tensor and in shards"),
    "two memories": (CheckpointError, "several memories, under the prefixes 'model.language_model.', 'mtp.'"),
    "none": (CheckpointError, "holds no memory of block 0"),
}


@pytest.mark.parametrize("damage", QWEN_DAMAGE)
def test_a_damaged_qwen_checkpoint_is_refused_by_the_name_of_the_tensor(tmp_path, oracles, damage):
    tensors = published_qwen(oracles, scale=0.1 if damage == "no scale" else None)
    stem = f"{PREFIX}layers.2.ple."
    table = f"{stem}ple_embedding.ngram_embedding."
    constants = {
        "multipliers": "layer_multipliers",
        "primes": "ngram_heads_vocab_sizes",
        "offsets": "ngram_heads_offsets",
    }
    if damage in constants:
        tensors[f"{stem}ple_embedding.{constants[damage]}"][-1] += 2
    elif damage == "shape":
        tensors[f"{stem}conv1d.weight"] = tensors[f"{stem}conv1d.weight"][:, :, :3].contiguous()
    elif damage == "type":
        tensors[f"{stem}norm_key.weight"] = tensors[f"{stem}norm_key.weight"].long()
    elif damage == "width":
        tensors[f"{table}shard_11.weight"] = tensors[f"{table}shard_11.weight"][:, :5].contiguous()
    elif damage == "rows":
        tensors[f"{table}shard_11.weight"] = tensors[f"{table}shard_11.weight"][:16].contiguous()
    elif damage == "gap":
        del tensors[f"{table}shard_10.weight"]
    elif damage == "no table":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{table}shard")}
    elif damage == "no scale":
        tensors = without(tensors, "weight_scale")
    elif damage == "both":
        tensors[f"{table}weight"] = torch.zeros(1, 6)
    elif damage == "two memories":
        tensors["mtp.layers.0.ple.key_proj.weight"] = torch.zeros(1)
    elif damage == "none":
        tensors = {"model.embed_tokens.weight": torch.zeros(1)}
    error, message = QWEN_DAMAGE[damage]
    with pytest.raises(error, match=message):
        read_memory(save(tmp_path, tensors, qwen_config()))


def test_every_missing_tensor_and_file_is_named(tmp_path, oracles):
    tensors = published_qwen(oracles)
    for name in sorted(tensors):
        if "layers.0" in name and "shard" not in name:
            save(tmp_path, {key: tensor for key, tensor in tensors.items() if key != name}, qwen_config())
            with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
                read_memory(tmp_path)
    save(tmp_path, tensors, qwen_config())
    path = tmp_path / "model-2.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-2.safetensors is truncated: expected \d+ bytes, found \d+"):
        read_memory(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"model-2.safetensors is missing: {INDEX} says that it holds"):
        read_memory(tmp_path)


# DeepSeek-V4.1: an independent reference from the raw bytes -------------------------------------------------------

IMAGE, D, S, DIM, HEADS, ORDERS = 5, 48, 2, 40, 2, (2, 3, 4)
TOKENS = TokenMap([0, 1, 2, 3, 4, 5, 1, 6, 2, 7, 8, 3, 9])
COLUMNS = HEADS * len(ORDERS)


def deepseek_config(**changes):
    built = HashSpec.build(
        TOKENS, layers=(1, 4), orders=ORDERS, heads=HEADS, rows_per_head=50, pad_token_id=2, variant="deepseek_v41"
    )
    text = {
        "model_type": "deepseek_v41_text",
        "engram_layer_ids": [1, 4],
        "engram_num_embeddings": [sum(primes) for primes in built.primes],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 50,
        "engram_n_heads": HEADS,
        "engram_head_dim": DIM,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": len(TOKENS),
        "hidden_size": D,
        "hc_mult": S,
        "rms_norm_eps": 1e-20,
        "vocab_size": TOKENS.num_tokens,
    } | changes
    return {"model_type": "deepseek_v41", "image_token_id": IMAGE, "text_config": text}


def deepseek_tensors(config, fill=None):
    """Random bytes under the published names; ``fill`` gives the table's bytes instead."""
    text, tensors = config["text_config"], {}
    generator = np.random.default_rng(8)
    wide = DIM * COLUMNS if fill is None else text["engram_head_dim"] * 24
    hidden, streams = text["hidden_size"], text["hc_mult"]
    projected = hidden * (streams + 1)

    def scales(*shape):
        return "F8_E8M0", shape, generator.integers(118, 126, shape, dtype=np.uint8).tobytes()

    for layer, rows in zip(text["engram_layer_ids"], text["engram_num_embeddings"]):
        stem, width = f"layers.{layer}.engram.", text["engram_head_dim"]
        tensors |= {
            f"{stem}wkv.weight": ("F8_E4M3", (projected, wide), random_e4m3(projected * wide, layer)),
            f"{stem}wkv.scale": scales(-(-projected // 32), -(-wide // 32)),
        }
        for name in ("q_weight", "k_weight"):
            norm = torch.from_numpy(generator.normal(1, 0.3, (streams, hidden))).bfloat16()
            tensors[stem + name] = ("BF16", (streams, hidden), norm.view(torch.uint8).numpy().tobytes())
        if fill is None:
            tensors[f"{stem}embed.weight"] = ("F8_E4M3", (rows, width), random_e4m3(rows * width, layer + 50))
            tensors[f"{stem}embed.scale"] = scales(rows, -(-width // 32))
        else:
            tensors[f"{stem}embed.weight"] = ("F8_E4M3", (rows, width), fill[layer][0])
            tensors[f"{stem}embed.scale"] = ("F8_E8M0", (rows, width // 32), fill[layer][1])
    return tensors


def save_deepseek(folder, config, tensors):
    """Two files, one per layer, without an index."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    for number, layer in enumerate(config["text_config"]["engram_layer_ids"]):
        part = {name: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layer}.")}
        write_raw(folder / f"model-0000{number}.safetensors", part)
    return folder


@pytest.fixture
def deepseek_folder(tmp_path):
    config = deepseek_config()
    return save_deepseek(tmp_path / "deepseek", config, deepseek_tensors(config))


def deepseek_reference(tensors, layer, rows, hidden, dead):
    """The update of DeepSeek-V4.1's memory, in float64 from the bytes of its tensors."""
    values = {}
    for name, (dtype, shape, data) in tensors.items():
        name = name.removeprefix(f"layers.{layer}.engram.")
        if dtype == "BF16":
            values[name] = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        else:
            values[name] = {"F8_E4M3": e4m3, "F8_E8M0": e8m0}[dtype](data).reshape(shape)
    weight = values["wkv.weight"].copy()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            weight[row, column] *= values["wkv.scale"][row // 32, column // 32]
    result = np.zeros(hidden.shape)
    for place in np.ndindex(rows.shape[:2]):
        parts = []
        for row in rows[place]:
            scale = np.repeat(values["embed.scale"][row], 32)[:DIM]
            parts.append(values["embed.weight"][row] * scale)
        kv = weight @ np.concatenate(parts)
        value = kv[S * D :]
        for stream in range(S):
            h, key = hidden[place][stream], kv[stream * D : (stream + 1) * D]
            dot = (h * values["q_weight"][stream] * values["k_weight"][stream] * key).sum()
            dot /= np.sqrt((h * h).mean() + 1e-20) * np.sqrt((key * key).mean() + 1e-20) * np.sqrt(D)
            gate = 1 / (1 + np.exp(-np.copysign(np.sqrt(max(abs(dot), 1e-6)), dot)))
            result[place][stream] = 0 if dead[place] else gate * value
    return torch.from_numpy(result)


def layer_bytes(tensors, layer):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layer}.")}


def test_deepseek_read_in_place_equals_the_reference_from_its_bytes(deepseek_folder):
    memory = read_memory(deepseek_folder, TOKENS, dtype=torch.float32)
    tensors = deepseek_tensors(deepseek_config())
    assert (memory.variant, memory.config.layers, memory.config.norm_eps) == ("deepseek_v41", (1, 4), 1e-20)
    tokens, hidden = sample(TOKENS.num_tokens, S, D)
    dead = (tokens == IMAGE).numpy()
    assert dead.any()
    for layer in (1, 4):
        rows = memory.spec.rows(tokens, layer).numpy()
        expected = deepseek_reference(layer_bytes(tensors, layer), layer, rows, hidden.numpy(), dead)
        found = update(memory, layer).double()
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_a_token_map_of_equal_size_is_told_apart_by_the_digest_that_is_expected(deepseek_folder):
    other = TokenMap([0, 1, 2, 3, 4, 5, 1, 6, 3, 7, 8, 2, 9])
    assert len(other) == len(TOKENS)
    assert read_memory(deepseek_folder, other).spec.token_map == other
    assert read_memory(deepseek_folder, TOKENS, token_map_digest=TOKENS.digest).spec.token_map == TOKENS
    with pytest.raises(MismatchError, match=f"{TOKENS.digest} is expected, this one is {other.digest}"):
        read_memory(deepseek_folder, other, token_map_digest=TOKENS.digest)
    promised = read_memory(deepseek_folder, token_map_digest=TOKENS.digest).spec
    assert promised.bind(TOKENS).token_map == TOKENS
    with pytest.raises(MismatchError, match=f"{TOKENS.digest}, the given map is {other.digest}"):
        promised.bind(other)


def test_deepseek_weights_and_rows_are_exact_in_bfloat16(deepseek_folder):
    memory, wide = read_memory(deepseek_folder), read_memory(deepseek_folder, dtype=torch.float32)
    assert memory.spec.token_map is None
    for layer in (1, 4):
        ours, exact = memory.layers[layer], wide.layers[layer]
        assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
        assert torch.equal(ours.key_value.weight.float(), exact.key_value.weight)
        rows = torch.arange(ours.table.num_rows)
        assert (ours.table.dtype, exact.table.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(ours.table.gather(rows).float(), exact.table.gather(rows))


def test_deepseek_norms_are_read_as_stored_and_written_as_the_format_has_them(tmp_path):
    config = deepseek_config()
    tensors = deepseek_tensors(config)
    norm = torch.randn(S, D)
    tensors["layers.4.engram.k_weight"] = ("F32", (S, D), norm.view(torch.uint8).numpy().tobytes())
    memory = read_memory(save_deepseek(tmp_path / "deepseek", config, tensors), TOKENS)
    write_memory(tmp_path / "written", memory)
    assert torch.equal(memory.layers[4].key_norm, norm)
    assert torch.equal(read_memory(tmp_path / "written").layers[4].key_norm, norm.bfloat16())
    layer = memory.layers[4]
    assert layer.query_norm.dtype == layer.key_value.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "", torch.int64, torch.float8_e4m3fn], ids=str)
def test_a_type_that_weights_cannot_have_is_refused(deepseek_folder, dtype):
    with pytest.raises(ConfigError, match="floats of 16 bits or more"):
        read_memory(deepseek_folder, dtype=dtype)


@pytest.mark.parametrize("source", ["in place", "gathered"])
def test_deepseek_written_again_has_equal_values(tmp_path, deepseek_folder, source):
    memory = read_memory(deepseek_folder, TOKENS)
    expected = {layer: update(memory, layer) for layer in (1, 4)}
    if source == "gathered":
        for layer in memory.layers.values():
            layer.table = ResidentTable(layer.table.gather(torch.arange(layer.table.num_rows)))
    write_memory(tmp_path / "written", memory)
    again = read_memory(tmp_path / "written", TOKENS)
    assert (again.config, again.spec) == (memory.config, memory.spec)
    for layer in (1, 4):
        assert torch.equal(update(again, layer), expected[layer])
        rows = torch.arange(memory.layers[layer].table.num_rows)
        assert torch.equal(again.layers[layer].table.gather(rows), memory.layers[layer].table.gather(rows))
    written, original = read_all(tmp_path / "written"), read_all(deepseek_folder)
    assert set(written) == set(original)
    for name, tensor in original.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        if "embed" in name and source == "in place":
            assert same_bytes(written[name], tensor)


DEEPSEEK_DAMAGE = [
    ("layers.4.engram.embed.weight", ("F8_E4M3", (3, DIM), b"\0" * 3 * DIM), r"\[3, 40\]"),
    ("layers.4.engram.embed.weight", ("BF16", (1, 1), b"\0\0"), r"\(BF16 .*not of 8 bits"),
    ("layers.4.engram.embed.scale", ("F8_E8M0", (7, 2), b"\0" * 14), "does not read scales of this"),
    ("layers.1.engram.wkv.weight", ("F8_E4M3", (1, 1), b"\0"), r"expected .*F8_E4M3 \[144, 240\]"),
    ("layers.1.engram.wkv.scale", ("F8_E8M0", (4, 7), b"\0" * 28), r"such as \[5, 8\] for blocks of 32 x 32"),
    ("layers.1.engram.q_weight", ("BF16", (2, 1), b"\0" * 4), r"expected BF16 .*\[2, 48\]"),
    ("lacks layers.4.engram.embed.weight", None, "without which it means nothing"),
    *((f"layers.4.engram.{name}", None, "is missing") for name in ("wkv.weight", "wkv.scale", "q_weight", "k_weight")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tensor", "message"), DEEPSEEK_DAMAGE)
def test_a_damaged_deepseek_checkpoint_is_refused_by_the_name_of_the_tensor(tmp_path, name, tensor, message):
    config = deepseek_config()
    tensors = deepseek_tensors(config)
    tensors[name.removeprefix("lacks ")] = tensor
    if tensor is None:
        del tensors[name.removeprefix("lacks ")]
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        read_memory(save_deepseek(tmp_path, config, tensors))


@pytest.mark.parametrize("projection", ["8 bits", "16 bits"])
def test_a_converted_deepseek_checkpoint_means_the_same(tmp_path, projection):
    config = deepseek_config()
    tensors, converted = deepseek_tensors(config), {}
    original = read_memory(save_deepseek(tmp_path / "release", config, tensors))
    for name, (dtype, shape, data) in tensors.items():
        if dtype == "F8_E8M0":  # as transformers and vLLM name them, in float32
            floats = e8m0(data).astype("f4").tobytes()
            converted[name.removesuffix("scale") + "weight_scale_inv"] = ("F32", shape, floats)
        else:
            converted[name] = (dtype, shape, data)
    if projection == "16 bits":
        for block, layer in original.layers.items():
            weight = layer.key_value.weight.detach()
            data = weight.view(torch.int16).numpy().tobytes()
            converted[f"layers.{block}.engram.wkv.weight"] = ("BF16", tuple(weight.shape), data)
            del converted[f"layers.{block}.engram.wkv.weight_scale_inv"]
    found = read_memory(save_deepseek(tmp_path / "converted", config, converted))
    for block, layer in original.layers.items():
        assert all(map(torch.equal, layer.state_dict().values(), found.layers[block].state_dict().values()))
        rows = torch.arange(layer.table.num_rows)
        assert torch.equal(layer.table.gather(rows), found.layers[block].table.gather(rows))
    # Scales in float32 are none of the format's own: writing rounds anew, to equal numbers.
    write_memory(tmp_path / "written", found)
    again = read_memory(tmp_path / "written")
    for block, layer in original.layers.items():
        rows = torch.arange(layer.table.num_rows)
        assert torch.equal(layer.table.gather(rows), again.layers[block].table.gather(rows))


def test_an_eight_bit_table_without_any_scale_is_refused(tmp_path):
    config = deepseek_config()
    tensors = deepseek_tensors(config)
    del tensors["layers.4.engram.embed.scale"]
    with pytest.raises(CheckpointError, match=r"embed.weight .*has no scale that engram-lm finds"):
        read_memory(save_deepseek(tmp_path, config, tensors))


def test_a_deepseek_table_of_other_rows_than_its_config_is_refused(tmp_path):
    config = deepseek_config()
    tensors = deepseek_tensors(config)
    for name, width in (("weight", DIM), ("scale", 2)):
        kind, (_, _), data = tensors[f"layers.4.engram.embed.{name}"]
        tensors[f"layers.4.engram.embed.{name}"] = (kind, (3, width), data[: 3 * width])
    with pytest.raises(CheckpointError, match=rf"layers.4.engram.embed.weight .*found \[3, {DIM}\].*expected \[\d+, "):
        read_memory(save_deepseek(tmp_path, config, tensors))


def test_a_config_without_a_needed_key_is_refused_by_its_name(tmp_path, deepseek_folder):
    for key in ("hidden_size", "hc_mult", "engram_head_dim", "rms_norm_eps"):
        config = deepseek_config()
        del config["text_config"][key]
        write_json(deepseek_folder / "config.json", config)
        with pytest.raises(ConfigError, match=f"'{key}'.* is missing"):
            read_memory(deepseek_folder)
    config = deepseek_config()
    text = config["text_config"]
    for key, other in (("hidden_size", "dim"), ("rms_norm_eps", "norm_eps"), ("engram_pad_token_id", "engram_pad_id")):
        text[other] = text.pop(key)
    write_json(deepseek_folder / "config.json", config)
    assert read_memory(deepseek_folder).config.hidden_size == D, "the names of the release's own inference code"
    write_json(tmp_path / "config.json", {"emb_neighbor_num": 4, "emb_split_num": 4, "vocab_size": 64,
                                          "eos_token_id": 2, "ngram_vocab_size_ratio": 2})  # fmt: skip
    with pytest.raises(ConfigError, match=r"longcat model; memory is read of qwen_ple and deepseek_v41"):
        read_memory(tmp_path)


def test_closing_a_memory_closes_its_tables(deepseek_folder):
    memory = read_memory(deepseek_folder)
    memory.close()
    for layer in memory.layers.values():
        with pytest.raises(TableClosedError):
            layer.table.gather(torch.tensor([0]))


def test_tables_of_the_released_size_open_in_place_at_once(tmp_path):
    """The geometry and row numbers of the release, in files that are holes but for the rows of one text."""
    golden = json.loads((GOLDEN / "deepseek_v41.json").read_text(encoding="utf-8"))
    config = copy.deepcopy(golden["config"])
    config["text_config"] |= {"hidden_size": 32, "hc_mult": 1}
    rows = {layer: np.array(golden["layers"][str(layer)]["rows"]) for layer in (1, 14)}
    fill, values, scales = {}, {}, {}
    for layer in rows:
        unique = np.unique(rows[layer])
        values[layer] = {int(row): random_e4m3(256, int(row)) for row in unique}
        scales[layer] = {int(row): bytes([120, 121, 122, 123, 124, 125, 126, int(row) % 100 + 60]) for row in unique}
        fill[layer] = (
            {row * 256: data for row, data in values[layer].items()},
            {row * 8: data for row, data in scales[layer].items()},
        )
    try:
        save_deepseek(tmp_path, config, deepseek_tensors(config, fill))
    except OSError as error:
        pytest.skip(f"no sparse files of 100 GB here: {error}")
    files = [path.stat() for path in tmp_path.glob("*.safetensors")]
    if any(file.st_blocks * 512 > 2**27 for file in files):
        pytest.skip("this file system fills holes")
    assert sum(file.st_size for file in files) > 202_000_000_000

    start = time.perf_counter()
    memory = read_memory(tmp_path)
    found = {layer: memory.layers[layer].table.gather(torch.from_numpy(rows[layer])) for layer in rows}
    seconds = time.perf_counter() - start
    for layer in rows:
        for place in np.ndindex(rows[layer].shape):
            row = int(rows[layer][place])
            expected = e4m3(values[layer][row]) * e8m0(scales[layer][row]).repeat(32)
            assert np.array_equal(found[layer][place].double().numpy(), expected)
        last = memory.layers[layer].table.num_rows - 1
        assert last > 384_000_000 and (memory.layers[layer].table.gather(torch.tensor(last)) == 0).all()
    assert seconds < 1
    memory.close()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # nobody should copy or back up 200 GB of zeros


# Writing: what the formats cannot hold, and kills -----------------------------------------------------------------


def test_a_memory_trained_here_is_written_for_qwen_and_read_back_equal(tmp_path):
    memory = own_memory("qwen_ple")
    write_memory(tmp_path / "written", memory)
    again = read_memory(tmp_path / "written")
    assert (again.spec.digest, again.spec.padded_rows) == (memory.spec.digest, memory.spec.padded_rows)
    for block in (0, 2):
        assert again.layers[block].table.dtype == torch.float32
        assert torch.equal(update(again, block), update(memory, block))


def test_a_memory_trained_here_is_rounded_to_eight_bits_for_deepseek(tmp_path):
    memory = own_memory("deepseek_v41", {"variant": "demo"})
    write_memory(tmp_path / "written", memory, variant="deepseek_v41")
    again = read_memory(tmp_path / "written", memory.spec.token_map, dtype=torch.float32)
    assert again.spec.digest == memory.spec.digest
    for block in (0, 2):
        ours, theirs = memory.layers[block], again.layers[block]
        rows = torch.arange(ours.table.num_rows)
        for found, exact in (
            (theirs.table.gather(rows), ours.table.gather(rows)),
            (theirs.key_value.weight, ours.key_value.weight),
        ):
            # Three bits behind the point: half a unit of the last is 2 ** -4 of the number; small ones share a step.
            error, largest = (found - exact).abs(), exact.abs().max()
            assert (error <= exact.abs() * 2**-4 + largest * 2**-16).all() and error.max() > 0
        assert torch.equal(theirs.query_norm, ours.query_norm.bfloat16().float())


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("qwen_ple", {"bias": True}, "bias=True, only False: its projections have no bias"),
        ("qwen_ple", {"signs": "hashed"}, "signs='hashed'"),
        ("qwen_ple", {"gate": "plain"}, "gate='plain', only 'signed_sqrt'"),
        ("qwen_ple", {"norm_weight": "plain"}, r"norm_weight='plain'.*1 \+ weight"),
        ("qwen_ple", {"kernel_size": 0}, "kernel_size=0: it always has a convolution"),
        ("qwen_ple", {"dilation": 2}, "dilation=2"),
        ("qwen_ple", {"tables": "shared"}, "tables='shared'"),
        ("qwen_ple", {"orders": (2, 4)}, r"orders=\(2, 4\): it has all orders"),
        ("qwen_ple", {"rows_per_head": (97, 53)}, r"rows_per_head=\(97, 53\): all orders have one number"),
        ("deepseek_v41", {"kernel_size": 4}, "kernel_size=4, only 0: it has no convolution"),
        ("deepseek_v41", {"norm_weight": "zero_centered"}, "norm_weight='zero_centered'"),
        ("deepseek_v41", {"bias": True}, "bias=True"),
        ("deepseek_v41", {"signs": "hashed"}, "signs='hashed'"),
        ("deepseek_v41", {"gate": "none"}, "gate='none'"),
        ("deepseek_v41", {"tables": "shared"}, "tables='shared'"),
    ],
    ids=str,
)
def test_an_option_that_a_format_cannot_hold_is_refused_with_the_reason(tmp_path, variant, options, message):
    orders = {"orders": options["orders"]} if "orders" in options else {}
    with pytest.raises(ConfigError, match=f"{variant} cannot hold {message}"):
        write_memory(tmp_path / "written", own_memory(variant, orders, **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variant", "target", "changes", "message"),
    [
        ("deepseek_v41", None, {"seed": 3}, "multipliers is"),
        ("deepseek_v41", None, {"segments": Segments(end_tokens=(3,))}, "segments is"),
        ("deepseek_v41", None, {"segments": Segments(dead_tokens=(3, 4))}, "segments is"),
        ("deepseek_v41", None, {"rows_per_head": 64}, "its config would be refused"),
        ("qwen_ple", None, {"segments": Segments()}, "segments is"),
        ("qwen_ple", None, {"rows_per_head": (60, 90)}, "primes is"),
        ("qwen_ple", None, {"layers": (3, 1)}, "has the blocks"),
    ],
    ids=str,
)
def test_a_hash_that_a_format_cannot_hold_is_refused(tmp_path, variant, target, changes, message):
    error = MismatchError if "layers" in changes else ConfigError
    with pytest.raises(error, match=message):
        write_memory(tmp_path / "written", own_memory(variant, changes), variant=target)
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    memory = own_memory("qwen_ple")
    layers, table = dict(memory.layers), memory.layers[2].table

    def refused(memory, error, message, **kwargs):
        with pytest.raises(error, match=message):
            write_memory(tmp_path / "written", memory, **kwargs)

    refused(dataclasses.replace(memory, layers={0: layers[0]}), MismatchError, "has the layers")
    other = EngramLayer(dataclasses.replace(memory.config, norm_eps=1e-3), table)
    refused(dataclasses.replace(memory, layers=layers | {2: other}), MismatchError, "block 2 was built for another")
    for wrong, error, message in (
        (None, MismatchError, "block 2 has no table"),
        (ParameterTable(9, 32), MismatchError, "block 2 has 9 rows, its hash asks for"),
        (ParameterTable(table.num_rows, 32, dtype=torch.float64), ConfigError, "rows of block 2 are torch.float64"),
    ):
        layers[2].table = wrong
        refused(memory, error, message)
    layers[2].table = table
    for variant in ("demo", ["qwen_ple"], ""):
        refused(memory, ConfigError, "not as ", variant=variant)
    most = min(layer.table.num_rows for layer in layers.values())
    for num_shards in (0, 2.0, most + 1):
        refused(memory, ConfigError, "num_shards", num_shards=num_shards)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["layer", "parameter table", "resident table"])
def test_what_is_on_the_meta_device_is_refused_before_anything_is_written(tmp_path, part):
    memory = own_memory("qwen_ple")
    layer = memory.layers[2]
    if part == "layer":
        layer.to("meta")
    elif part == "parameter table":
        layer.table.to("meta")
    else:
        layer.table = ResidentTable(torch.empty(layer.table.num_rows, layer.table.width, device="meta"))
    with pytest.raises(ConfigError, match=r"block 2 .* meta device; bring it to a device first"):
        write_memory(tmp_path / "written", memory)
    assert not list(tmp_path.iterdir())


class Watched(ResidentTable):
    """Notes the most rows that were asked for at once."""

    most_rows = 0

    def gather(self, rows, out=None):
        self.most_rows = max(self.most_rows, rows.numel())
        return super().gather(rows, out)


@pytest.mark.parametrize("variant", ["qwen_ple", "deepseek_v41"])
def test_tables_larger_than_a_piece_are_copied_in_pieces(tmp_path, variant):
    memory = own_memory(variant, rows_per_head=40_000)
    tables = {}
    for block, layer in memory.layers.items():
        tables[block] = layer.table = Watched(layer.table.weight.detach())
    write_memory(tmp_path / "first", memory)
    first = read_memory(tmp_path / "first", memory.spec.token_map)
    write_memory(tmp_path / "second", first, **({"num_shards": 3} if variant == "qwen_ple" else {}))
    second = read_memory(tmp_path / "second", memory.spec.token_map)
    for block, table in tables.items():
        rows = torch.arange(table.num_rows)
        assert table.num_rows > 2**24 // table.row_bytes >= table.most_rows > 1
        found = first.layers[block].table.gather(rows)
        if variant == "qwen_ple":
            assert torch.equal(found, table.gather(rows))
        else:
            values, scales = quantize(table.gather(rows))
            assert torch.equal(found, dequantize(values, scales, torch.bfloat16))
        assert torch.equal(second.layers[block].table.gather(rows), found)


@pytest.mark.parametrize("part", ["table", "projection"])
def test_weights_that_eight_bits_cannot_hold_are_refused_and_leave_nothing(tmp_path, part):
    memory = own_memory("deepseek_v41")
    layer = memory.layers[2]
    with torch.no_grad():
        (layer.table.weight if part == "table" else layer.key_value.weight)[11, 5] = float("inf")
    name = r"rows 0 to \d+ of layers.2.engram.embed.weight" if part == "table" else r"layers.2.engram.wkv.weight"
    with pytest.raises(CheckpointError, match=f"{name}: .*infinite or NaN"):
        write_memory(tmp_path / "written", memory)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "written").mkdir()
    write_memory(tmp_path / "written", own_memory("qwen_ple"))
    before = sorted(path.name for path in (tmp_path / "written").iterdir())
    with pytest.raises(FileExistsError, match="not empty"):
        write_memory(tmp_path / "written", own_memory("qwen_ple"))
    assert sorted(path.name for path in (tmp_path / "written").iterdir()) == before
    assert (tmp_path / "written").stat().st_mode & 0o777 == 0o755


def test_a_kill_while_a_table_is_written_leaves_no_checkpoint(tmp_path):
    program = """
import os, signal, sys, torch
from tests.own_memory import own_memory
from engram_lm.memory import write_memory
from engram_lm.tables import ResidentTable

class Deadly(ResidentTable):
    def gather(self, rows, out=None):
        if int(rows.min()) > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().gather(rows, out)

memory = own_memory("qwen_ple", rows_per_head=40_000)
memory.layers[2].table = Deadly(memory.layers[2].table.weight.detach())
write_memory(sys.argv[1], memory)
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, str(tmp_path / "written")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "written").exists()
    (aside,) = tmp_path.iterdir()
    assert list(aside.glob("*.safetensors")), "the table had been begun"
