"""An adapter's folder gives the same logits again, on every tier, and is believed in nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapt.small_models import CONFIGS, TOKENIZER, small_model
from tests.tables.tiers import serving
from transformers import AutoModelForCausalLM

from engram import HashSpec, MemoryAdapter
from engram.adapt import attached_adapters
from engram.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram.tables import table_layouts


def tokens(batch=2, length=20, seed=2):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def saved(adapted, tmp_path):
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", whole(model, tokens())


@pytest.mark.parametrize("tier", [None, "device", "mmap", "file", "host"])
@pytest.mark.parametrize("tables", ["per_layer", "shared"])
def test_a_loaded_adapter_gives_the_same_logits_from_every_tier(tier, tables, adapted, tmp_path):
    model, adapter = adapted(tables=tables, table_gradient="dense")
    adapter.save_pretrained(tmp_path / "adapter")
    again = small_model()
    loaded = MemoryAdapter.from_pretrained(again, tmp_path / "adapter", tokenizer=TOKENIZER, table_tier=tier)
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))
    assert bool(list(loaded.memory_tables.parameters())) == (tier in (None, "device"))
    assert all(table.gradient == "dense" for table in loaded.memory_tables.values())
    # What is read from a file is copied from there, and detached and closed it leaves no trace.
    loaded.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tables.safetensors").read_bytes() == (
        tmp_path / "adapter" / "tables.safetensors"
    ).read_bytes()
    loaded.close()
    assert torch.equal(whole(again, tokens()), whole(small_model(), tokens()))


def test_the_folder_is_a_source_of_rows_and_of_tables(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "config.json",
        "tables.safetensors",
    ]
    spec = HashSpec.from_config(folder, TOKENIZER)
    assert {block: layout.num_rows for block, layout in table_layouts(folder).items()} == {
        0: spec.num_rows(0),
        2: spec.num_rows(2),
    }


def test_tables_may_stay_elsewhere(saved, adapted, tmp_path):
    folder, expected = saved
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path / "small", tables=False)
    model = small_model()
    with pytest.raises(CheckpointError, match=r"without its tables.*table_source="):
        MemoryAdapter.from_pretrained(model, tmp_path / "small")
    assert not attached_adapters(model)
    MemoryAdapter.from_pretrained(model, tmp_path / "small", table_source=folder)
    assert torch.equal(whole(model, tokens()), expected)


def test_tables_on_another_machine_are_read_but_not_copied_from_there(saved, tmp_path):
    folder, expected = saved
    model = small_model()
    with serving(folder.parent) as server:
        source = f"{server.address}/{folder.name}/tables.safetensors"
        adapter = MemoryAdapter.from_pretrained(model, folder, table_source=source)
        assert torch.equal(whole(model, tokens()), expected)
        with pytest.raises(ConfigError, match=r"another machine.*tables=False"):
            adapter.save_pretrained(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        adapter.save_pretrained(tmp_path / "copy", tables=False)
        adapter.close()


def test_the_type_is_the_stored_one_unless_asked_for(saved, adapted, tmp_path):
    folder, _ = saved
    adapter = MemoryAdapter.from_pretrained(small_model(), folder, dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    adapter.save_pretrained(tmp_path / "half")
    again = MemoryAdapter.from_pretrained(small_model(), tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_folder_with_something_in_it_is_left_alone(saved, adapted):
    folder, _ = saved
    with pytest.raises(FileExistsError, match="not empty"):
        adapted()[1].save_pretrained(folder)


def test_another_model_or_tokenizer_is_refused_with_both_values(saved, other_tokenizer):
    folder, _ = saved

    def load(tokenizer=None, **shape):
        config = CONFIGS["llama"]()
        for name, value in shape.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_config(config)
        try:
            MemoryAdapter.from_pretrained(model, folder, tokenizer=tokenizer)
        finally:
            assert not attached_adapters(model)

    with pytest.raises(MismatchError, match=r"hidden size of 32.* has 64"):
        load(hidden_size=64)
    with pytest.raises(MismatchError, match=r"number of decoder layers of 3.* has 4"):
        load(num_hidden_layers=4)
    with pytest.raises(MismatchError, match="283 tokens, the model embeds 256"):
        load(vocab_size=256)
    digest = HashSpec.from_config(folder).token_map_digest
    with pytest.raises(MismatchError, match=f"{digest}.*the given map is [0-9a-f]{{64}}"):
        load(tokenizer=other_tokenizer)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


DAMAGE = {
    "no config": lambda f: (f / "config.json").unlink(),
    "no layers": lambda f: (f / "adapter.safetensors").unlink(),
    "not JSON": lambda f: (f / "config.json").write_text("[" * 100_000),
    "another format": lambda f: edit(f / "config.json", lambda v: v.update(format="other")),
    "no memory": lambda f: edit(f / "config.json", lambda v: v.pop("memory")),
    "unknown field": lambda f: edit(f / "config.json", lambda v: v["memory"].update(surprise=1)),
    "other layers": lambda f: edit(f / "config.json", lambda v: v["memory"].update(layers=[0, 1])),
    "base is a list": lambda f: edit(f / "config.json", lambda v: v.update(base_model=[])),
    "cut": lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-8]),
    "cut table": lambda f: (f / "tables.safetensors").write_bytes((f / "tables.safetensors").read_bytes()[:-8]),
    "another shape": lambda f: edit_tensors(
        f / "adapter.safetensors", lambda t: t.update({"0.conv_weight": torch.zeros(1, 4)})
    ),
    "integers": lambda f: edit_tensors(
        f / "adapter.safetensors", lambda t: t.update({"0.conv_weight": t["0.conv_weight"].long()})
    ),
    "a tensor missing": lambda f: edit_tensors(f / "adapter.safetensors", lambda t: t.pop("0.conv_weight")),
    "a tensor too many": lambda f: edit_tensors(f / "adapter.safetensors", lambda t: t.update(more=torch.zeros(1))),
    "token map of floats": lambda f: edit_tensors(
        f / "adapter.safetensors", lambda t: t.update(token_map=t["token_map"].float())
    ),
    "fewer rows": lambda f: edit_tensors(
        f / "tables.safetensors", lambda t: t.update({"memory_tables.0.weight": torch.zeros(3, 6)})
    ),
    "integer rows": lambda f: edit_tensors(
        f / "tables.safetensors", lambda t: t.update({"memory_tables.0.weight": t["memory_tables.0.weight"].long()})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_left_alone(damage, saved):
    folder, _ = saved
    if damage == "another token map":
        edit_tensors(folder / "adapter.safetensors", lambda t: t.update(token_map=t["token_map"].flip(0).contiguous()))
    else:
        DAMAGE[damage](folder)
    model = small_model()
    with pytest.raises(EngramError):
        MemoryAdapter.from_pretrained(model, folder)
    assert not attached_adapters(model)


def test_a_taken_name_and_an_impossible_tier_are_refused(saved, adapted):
    folder, _ = saved
    model, _ = adapted()
    with pytest.raises(ConfigError, match="already has"):
        MemoryAdapter.from_pretrained(model, folder)
    with pytest.raises(ConfigError, match="table_tier is one of"):
        MemoryAdapter.from_pretrained(model, folder, name="second", table_tier="tape")
    MemoryAdapter.from_pretrained(model, folder, name="second")
    assert list(attached_adapters(model)) == ["default", "second"]
