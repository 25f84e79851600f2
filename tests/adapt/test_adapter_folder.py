"""An adapter's folder gives the same logits again, on every tier, and is believed in nothing."""

import json
import os
import signal
import sys
import traceback

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.adapt.small_models import CONFIGS, TOKENIZER, small_model
from tests.tables.tiers import serving
from transformers import AutoModelForCausalLM

from engram_lm import HashSpec, MemoryAdapter, TokenMap, open_table
from engram_lm.adapt import attached_adapters
from engram_lm.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram_lm.files import _exchange_in_steps
from engram_lm.tables import table_layouts
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import build_packed, build_random


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


def test_what_is_saved_in_the_home_folder_is_loaded_from_there(tmp_path, monkeypatch, adapted):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, adapter = adapted()
    adapter.save_pretrained("~/memory")
    adapter.detach()
    MemoryAdapter.from_pretrained(model, "~/memory")
    adapter.spec.save("~/spec.json")
    assert HashSpec.load("~/spec.json").digest == adapter.spec.digest
    adapter.spec.token_map.save("~/map.safetensors")
    assert TokenMap.load("~/map.safetensors") == adapter.spec.token_map.made
    build_random("~/packed/table.safetensors", 8, RowCodec(4, torch.float32), seed=0)
    assert open_table("~/packed/table.safetensors").num_rows == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.safetensors", "memory", "packed", "spec.json"]


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
        "README.md",
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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_again_replaces_the_earlier_adapter_and_nothing_else(saved, adapted, tmp_path):
    folder, _ = saved
    model, other = adapted(seed=5)
    other.save_pretrained(folder)
    again = small_model()
    MemoryAdapter.from_pretrained(again, folder)
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    # What would be lost is kept: tables, files that are not an adapter's, and folders of something else.
    before = contents(folder)
    with pytest.raises(FileExistsError, match=r"holds tables.*tables=False"):
        other.save_pretrained(folder, tables=False)
    (folder / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds results.json.*another folder"):
        other.save_pretrained(folder)
    (folder / "results.json").unlink()
    assert contents(folder) == before
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match=r"holds no adapter.*another folder"):
        other.save_pretrained(folder)
    with pytest.raises(FileExistsError, match="not empty"):
        other.save_pretrained(folder / "config.json")
    assert (folder / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_process_that_is_killed_while_it_saves_again_leaves_the_old_adapter_or_the_new_one(saved, adapted, tmp_path):
    folder, _ = saved
    _, other = adapted(seed=5)
    other.save_pretrained(tmp_path / "other")
    old, new = contents(folder), contents(tmp_path / "other")
    # Killed at every point at which Python touches a file, one after another, until a save is through.
    left, point, status = [], 0, -1
    while status:
        point += 1
        pid = os.fork()
        if not pid:
            try:
                _die_at(point)
                other.save_pretrained(folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        left.append(contents(folder))
        if left[-1] == new:
            adapted()[1].save_pretrained(folder)
    assert all(found in (old, new) for found in left)
    assert left[0] == old and left[-2] == left[-1] == new and len(left) > 20


def _die_at(point):
    passed = 0

    def hook(event, args):
        nonlocal passed
        if event.split(".")[0] in ("open", "os", "shutil", "tempfile", "ctypes"):
            passed += 1
            if passed == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_folders_change_places_in_steps_where_the_file_system_cannot_exchange_them(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    _exchange_in_steps(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        _exchange_in_steps(tmp_path / "none", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
    assert (tmp_path / "other" / "one").exists()


@pytest.mark.parametrize("tier", ["mmap", "file", "host"])
def test_an_adapter_can_be_saved_where_its_tables_are_read_from(tier, saved):
    folder, expected = saved
    model = small_model()
    adapter = MemoryAdapter.from_pretrained(model, folder, table_tier=tier)
    before = contents(folder)
    adapter.save_pretrained(folder)
    assert contents(folder) == before
    assert torch.equal(whole(model, tokens()), expected)
    adapter.close()


def test_cached_tables_of_another_kind_are_saved_as_they_are_read(saved, tmp_path):
    folder, _ = saved
    for block, layout in table_layouts(folder).items():
        build_packed(tmp_path / f"packed_{block}.safetensors", layout, codec=RowCodec.named("int8", 6))
    model = small_model()
    adapter = MemoryAdapter.from_pretrained(
        model, folder, table_source=str(tmp_path / "packed_{table}.safetensors"), table_cache_bytes=4096
    )
    adapter.save_pretrained(tmp_path / "copy")
    again = small_model()
    MemoryAdapter.from_pretrained(again, tmp_path / "copy")
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))
    adapter.close()


def test_the_card_says_what_it_is_and_shows_no_name_that_is_none(adapted, tmp_path):
    model, adapter = adapted()
    hostile = "x\n---\n# <script>`rm`</script>"
    for name, shown in {"meta-llama/Llama-3": True, hostile: False, "/home/me/secret": False, "": False}.items():
        adapter.base = type(adapter.base)(**{**vars(adapter.base), "name": name})
        adapter.save_pretrained(tmp_path / "adapter", license="apache-2.0", extra="## Results\n\nloss 1.5")
        text = (tmp_path / "adapter" / "README.md").read_text()
        header = yaml.safe_load(text.split("---")[1])
        assert header.get("base_model") == (name if shown else None)
        assert header["license"] == "apache-2.0" and header["tags"] == ["engram", "conditional-memory"]
        assert "script" not in text and "secret" not in text
    assert "# Conditional memory for a llama model" in text and text.endswith("## Results\n\nloss 1.5\n")
    assert adapter.spec.digest in text and adapter.spec.token_map_digest in text
    rows = adapter.spec.num_rows(2)
    assert f"| 2 | layer 2 | {rows:,} | 6 | float32 | {rows * 24:,} |" in text
    with pytest.raises(ConfigError, match="license is an identifier"):
        adapter.save_pretrained(tmp_path / "adapter", license="mit\nbase_model: x")
    # The code in it works, once its names are filled in.
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("BASE_MODEL", str(tmp_path / "base")).replace(
        "THIS_FOLDER_OR_REPOSITORY", str(tmp_path / "adapter")
    )
    names = {}
    exec(code, names)
    assert torch.equal(whole(names["model"].eval(), tokens()), whole(model, tokens()))


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
    with pytest.raises(MismatchError, match="283 tokens, the model embeds 141"):
        load(vocab_size=141)
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
    "another token map": lambda f: edit_tensors(
        f / "adapter.safetensors", lambda t: t.update(token_map=t["token_map"].flip(0).contiguous())
    ),
    "base of other types": lambda f: edit(f / "config.json", lambda v: v["base_model"].update(name=["x"])),
    "sizes as text": lambda f: edit(f / "config.json", lambda v: v["hash_spec"].update(num_tokens="283")),
    "several streams": lambda f: edit(f / "config.json", lambda v: v["memory"].update(num_streams=4)),
    "cut in the header": lambda f: (f / "adapter.safetensors").write_bytes(
        (f / "adapter.safetensors").read_bytes()[:50]
    ),
    "empty": lambda f: (f / "adapter.safetensors").write_bytes(b""),
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
    "token map of numbers that NumPy lacks": lambda f: edit_tensors(
        f / "adapter.safetensors", lambda t: t.update(token_map=t["token_map"].bfloat16())
    ),
    "numbers that nothing computes with": lambda f: edit_tensors(
        f / "adapter.safetensors",
        lambda t: t.update({name: value.to(torch.float8_e5m2) for name, value in t.items() if name != "token_map"}),
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


def absurd_rows(values):
    spec = values["hash_spec"]
    spec["primes"][0][0] = 2**61 - 1
    spec["padded_rows"][0] = sum(spec["primes"][0])


ABSURD = {
    "tokens": (
        lambda v: v["hash_spec"].update(num_tokens=2**31 - 1, vocab_size=2**31 - 1),
        "2147483647 tokens, the mod",
    ),
    "memory": (lambda v: v["memory"].update(memory_dim=2**60), "configuration describes"),
    "kernel": (lambda v: v["memory"].update(kernel_size=2**60), "configuration describes"),
    "rows": (absurd_rows, "expected .2305843009213694"),
    "layers": (lambda v: v["memory"].update(layers=[0, 2**60]), "describe different layers"),
    "heads": (lambda v: v["memory"].update(num_heads=2**40), "heads over all orders and layers"),
}


@pytest.mark.parametrize("size", ABSURD)
def test_absurd_sizes_are_refused_and_nothing_of_that_size_is_allocated(size, saved):
    folder, _ = saved
    change, message = ABSURD[size]
    edit(folder / "config.json", change)
    with pytest.raises(EngramError, match=message):
        MemoryAdapter.from_pretrained(small_model(), folder)
