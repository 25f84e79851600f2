"""Checkpoints are read to the bit or refused in words, and tables stay where they were put."""

import copy
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.small_model import VARIANTS
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import LoadStateDictConfig

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.model import EngramForCausalLM, EngramModel
from engram_lm.tables import MappedTable, ParameterTable

IDS = torch.arange(2, 42).view(2, 20)
INDEX = "model.safetensors.index.json"
TABLE = "model.memory_tables.0.weight"
# accelerate tells of what it moved, transformers of what it saves from elsewhere.
MOVED = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@pytest.fixture
def everything(build):
    """Experts, four streams and YaRN in one model."""
    backbone, memory = VARIANTS["all"]
    return build(backbone=backbone, memory=memory)


@pytest.fixture
def sharded(everything, tmp_path):
    """A checkpoint of many small files."""
    everything.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    return tmp_path


def rewrite(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_checkpoint_in_many_files_loads_to_the_same_bits(build, tmp_path, name, tied):
    backbone, memory = VARIANTS[name]
    model = build(backbone={**backbone, "tie_word_embeddings": tied}, memory=memory)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(stored.values())) > 4 and ("lm_head.weight" in stored) != tied
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def damage_missing(folder, file):
    file.unlink()
    return "missing"


def damage_truncated(folder, file):
    file.write_bytes(file.read_bytes()[:-3])
    return "truncated"


def damage_empty(folder, file):
    file.write_bytes(b"")
    return "truncated"


def damage_header(folder, file):
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    data[8 + length // 2] ^= 0xFF
    file.write_bytes(data)
    return "header|JSON"


def damage_header_length(folder, file):
    data = bytearray(file.read_bytes())
    data[5] ^= 0xFF
    file.write_bytes(data)
    return "header length"


def damage_index(folder, file):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][TABLE] = "model-00099-of-00099.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    return "model-00099-of-00099.safetensors is missing"


def damage_index_text(folder, file):
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-10])
    return INDEX


def damage_places(folder, file):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"][TABLE]
    (folder / INDEX).write_text(json.dumps(index))
    return "does not hold model.norm.weight"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("device_map", [None, {"": "cpu", "model.memory_tables": "disk"}], ids=["whole", "apart"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(sharded, damage, device_map, monkeypatch):
    file = sorted(sharded.glob("*.safetensors"))[-1]
    message = damage(sharded, file)
    if device_map is not None:
        pytest.importorskip("accelerate")

    def load(*args, **kwargs):
        raise AssertionError("weights are being loaded")

    monkeypatch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", load)
    with pytest.raises(CheckpointError, match=message) as refusal:
        AutoModelForCausalLM.from_pretrained(sharded, device_map=device_map)
    assert str(sharded) in str(refusal.value) or "model-000" in str(refusal.value)


def test_a_damaged_file_is_refused_even_where_the_type_of_the_weights_must_be_read_from_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="download"):
        EngramForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "lost",
    [
        TABLE,
        "model.token_map",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.memory.conv_weight",
        "model.layers.0.attention_streams.fn",
        "model.embed_tokens.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(everything, tmp_path, lost):
    everything.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda weights: weights.pop(lost))
    with pytest.raises(CheckpointError, match=lost):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_new_weights_come_only_where_they_are_asked_for(everything, tmp_path):
    everything.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda weights: weights.pop(TABLE))
    for device_map in (None, "auto"):
        if device_map is not None:
            pytest.importorskip("accelerate")
        loaded = EngramForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, device_map=device_map)
        assert 0.9 < loaded.tables["0"].weight.std() < 1.1
        assert torch.equal(loaded.tables["2"].weight, everything.tables["2"].weight)


def test_tables_cannot_be_left_on_a_disk_that_does_not_have_them(model, tmp_path):
    pytest.importorskip("accelerate")
    places = {"": "cpu", "model.memory_tables": "disk"}
    with pytest.raises(CheckpointError, match="safetensors files only"):
        EngramForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict(), device_map=places)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda weights: weights.pop(TABLE))
    with pytest.raises(CheckpointError, match="from disk"):
        EngramForCausalLM.from_pretrained(tmp_path, device_map=places, ignore_mismatched_sizes=True)


def test_an_adapter_for_the_model_need_not_hold_the_model(model):
    """How transformers' `load_adapter` loads the weights of PEFT: with the names that it expects."""
    settings = LoadStateDictConfig(dtype=torch.float32)
    info, _ = model._load_pretrained_model(model, {}, None, settings, expected_keys=["model.norm.weight"])
    assert model.state_dict().keys() >= info.missing_keys


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_and_a_model_with_its_head_load_each_other_s_checkpoints(build, tmp_path, tied):
    model = build(backbone={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path / "head")
    base = EngramModel.from_pretrained(tmp_path / "head")
    expected = model.model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = EngramForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model(IDS).last_hidden_state, expected)
    rewrite(tmp_path / "base" / "model.safetensors", lambda weights: weights.pop("memory_tables.0.weight"))
    with pytest.raises(CheckpointError, match=TABLE):
        EngramForCausalLM.from_pretrained(tmp_path / "base")


def test_a_lost_head_is_refused_where_the_checkpoint_had_one(build, tmp_path):
    build(backbone={"tie_word_embeddings": False}).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        EngramForCausalLM.from_pretrained(tmp_path)


# What stands in the way of accelerate's own hooks is tested with them: they move whole modules at each forward.
PLACES = {
    "auto": ("auto", ParameterTable),
    "one device": ({"": "cpu"}, ParameterTable),
    "tables on disk": ({"": "cpu", "model.memory_tables": "disk"}, MappedTable),
    "all on disk": ({"": "disk"}, MappedTable),
    "all but tables on disk": ({"": "disk", "model.memory_tables": "cpu"}, ParameterTable),
    "mixed": (
        {
            "model": "cpu",
            "lm_head": "cpu",
            "model.memory_tables.0": "cpu",
            "model.memory_tables.2": "disk",
        },
        None,
    ),
    "blocks on disk": (
        {
            "model.embed_tokens": "cpu",
            "model.memory_tables": "disk",
            "model.layers.0": "disk",
            "model.layers.1": "cpu",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "model.stream_head": "disk",
            "lm_head": "cpu",
        },
        MappedTable,
    ),
}


@pytest.mark.parametrize("where", PLACES)
@MOVED
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # transformers before 5.23
def test_tables_stay_where_a_device_map_puts_them_and_change_nothing(everything, tmp_path, where):
    pytest.importorskip("accelerate")
    device_map, kind = PLACES[where]
    everything.save_pretrained(tmp_path / "first", max_shard_size="30KB")
    model, info = EngramForCausalLM.from_pretrained(tmp_path / "first", device_map=device_map, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    for name, table in model.tables.items():
        assert isinstance(table, kind or {"0": ParameterTable, "2": MappedTable}[name])
        assert not hasattr(table, "_hf_hook")
        if device_map != {"": "cpu"}:
            # generate() and Trainer ask this before they compile or move a model.
            place = "disk" if isinstance(table, MappedTable) else "cpu"
            assert model.hf_device_map[f"model.memory_tables.{name}"] == place
        if isinstance(table, ParameterTable):
            assert not table.training
        for block in model.config.memory_layers:
            assert (model.model.layers[block].memory.table is table) == (str(block) == name)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    assert torch.equal(model(IDS).logits, everything(IDS).logits)
    assert torch.equal(model.generate(IDS, **options), everything.generate(IDS, **options))
    assert model.hash_spec.digest == everything.hash_spec.digest
    model.save_pretrained(tmp_path / "second")
    again = EngramForCausalLM.from_pretrained(tmp_path / "second")
    for key, value in everything.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_space_that_tables_take_is_not_counted_against_the_backbone(build, tmp_path):
    """An automatic map sees the backbone only: huge tables drive no block out of memory."""
    pytest.importorskip("accelerate")
    maps = []
    for rows in (97, 9973):
        model = build(memory={"rows_per_head": rows})
        model.save_pretrained(tmp_path / str(rows))
        # Room for the whole backbone (under 200 KB) twice, not for the larger tables (over 1 MB).
        loaded = EngramForCausalLM.from_pretrained(
            tmp_path / str(rows), device_map="auto", max_memory={"cpu": 400_000}, offload_folder=tmp_path / "offload"
        )
        maps.append(loaded.hf_device_map)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert maps[0] == maps[1] and "disk" not in maps[1].values()


@MOVED
def test_an_automatic_map_that_divides_the_model_divides_it_without_the_tables(everything, tmp_path):
    pytest.importorskip("accelerate")
    everything.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": 150_000})
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    assert all(isinstance(table, ParameterTable) and not table.weight.is_meta for table in model.tables.values())
    assert torch.equal(model(IDS).logits, everything(IDS).logits)


def test_a_base_model_s_tables_are_placed_by_their_own_names(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    base = EngramModel.from_pretrained(tmp_path, device_map={"": "cpu", "memory_tables.2": "disk"})
    assert [type(table) for table in base.tables.values()] == [ParameterTable, MappedTable]
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_shared_table_on_disk_serves_all_its_blocks(build, tmp_path):
    pytest.importorskip("accelerate")
    model = build(memory={"tables": "shared", "signs": "hashed"})
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "model.memory_tables": "disk"})
    assert list(loaded.tables) == ["shared"]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@MOVED
def test_tables_on_disk_are_read_in_the_type_that_was_asked_for(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    expected = EngramForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(IDS).logits
    loaded = EngramForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": "cpu", "model.memory_tables": "disk"}
    )
    assert {table.dtype for table in loaded.tables.values()} == {torch.bfloat16}
    assert torch.equal(loaded(IDS).logits, expected)


@MOVED
def test_a_model_with_tables_on_disk_is_copied_and_not_saved_over_its_own_files(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = EngramForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "model.memory_tables": "disk"})
    with pytest.raises(ConfigError, match="another folder"):
        loaded.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    copied = copy.deepcopy(loaded)
    assert copied.tables["0"] is copied.model.layers[0].memory.table is not loaded.tables["0"]
    assert torch.equal(copied(IDS).logits, model(IDS).logits)


def test_tables_of_another_size_are_refused_where_they_stand_apart_too(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)

    def shorten(weights):
        weights[TABLE] = weights[TABLE][:-1].clone()

    rewrite(tmp_path / "model.safetensors", shorten)
    with pytest.raises(MismatchError, match=model.config.spec.digest):
        EngramForCausalLM.from_pretrained(tmp_path, device_map="auto")


def test_hooks_that_take_a_table_s_rows_away_are_found_out(model):
    """`dispatch_model` by hand offloads the table and serves it at ``forward`` only, which nothing calls."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    table = model.tables["0"]
    add_hook_to_module(table, AlignDevicesHook("cpu", offload=True))
    with pytest.raises(ConfigError, match="from_pretrained"):
        model(IDS)
    accelerate.hooks.remove_hook_from_module(table)
    assert model(IDS).logits.isfinite().all()


def test_trained_tables_on_the_host_learn_with_the_rest(everything, tmp_path):
    pytest.importorskip("accelerate")
    everything.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, device_map="auto").train()
    everything.train()
    for each in (model, everything):
        each(IDS, labels=IDS).loss.backward()
    expected = dict(everything.named_parameters())
    assert set(expected) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
