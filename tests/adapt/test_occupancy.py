"""With occupancy, memory speaks only where training has written rows, and wherever the rows go, they say so."""

import contextlib
import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tests.adapt.conftest import MEMORY, speak
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.tables.tiers import serving

import engram_lm
from engram_lm import EngramConfig, MemoryAdapter, RowPatch
from engram_lm.adapt.transfer import transfer_rows
from engram_lm.errors import ConfigError
from engram_lm.tables import open_table, table_layouts
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import build_packed
from engram_lm.tables.occupancy import num_written_rows
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer

DOMAIN = torch.tensor([TOKENIZER(TEXT).input_ids[:96]])
RULES = ["rows", "ngrams"]


def other_text(batch=2, length=24):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(4))


def begin(occupancy="rows", seed=1, model=None, dtype=torch.float32, **changes):
    """A small model with a memory that would speak everywhere if its rows had been written; nothing is trained yet."""
    model = small_model() if model is None else model
    options = {**MEMORY, "rows_per_head": 4999, "occupancy": occupancy, **changes}
    adapter = engram_lm.attach(model, TOKENIZER, EngramConfig(**options), dtype=dtype)
    speak(adapter, seed)
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    return model, adapter


def train(model, optimizer=None, num_steps=3, ids=DOMAIN, mask=None):
    optimizer = optimizer or build_optimizer(model, OptimizerOptions(backbone="adamw", lr=1e-2))
    model.train()
    for _ in range(num_steps):
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def rows_of(adapter, ids):
    """Rows that a text reads, by table, as a set."""
    found = adapter.spec.rows_for_layers(adapter.spec.encode(ids))
    return {
        str(block): set(found[layer].flatten().tolist())
        for block, layer in zip(adapter.spec.blocks, adapter.spec.layers, strict=True)
    }


def written(table):
    return set((table.stored(torch.arange(table.num_rows)) != 0).any(-1).nonzero()[:, 0].tolist())


def shared_rows(adapter, ids):
    """Rows ``[B, L, H]`` of a text that the domain reads too, by block."""
    domain = rows_of(adapter, DOMAIN)
    found = adapter.spec.rows_for_layers(adapter.spec.encode(ids))
    return {
        str(block): torch.isin(found[layer], torch.tensor(sorted(domain[str(block)])))
        for block, layer in zip(adapter.spec.blocks, adapter.spec.layers, strict=True)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("occupancy", RULES)
def test_text_whose_rows_were_never_written_is_untouched_to_the_bit(occupancy, dtype):
    base = small_model().to(dtype)
    model, adapter = begin(occupancy, model=small_model().to(dtype), dtype=dtype)
    train(model)
    assert not torch.equal(logits(model, DOMAIN), logits(base, DOMAIN))
    untouched = [
        row[None]
        for row in other_text(batch=24, length=12)
        if not any(one.any() for one in shared_rows(adapter, row[None]).values())
    ]
    assert len(untouched) >= 4
    for ids in untouched:
        assert torch.equal(logits(model, ids), logits(base, ids))
    # Where a text goes on after the domain, its tokens may have lost their own updates, but not the convolution's.
    both = torch.cat([DOMAIN[:, :20], untouched[0]], dim=1)
    with recorded_updates(adapter) as updates:
        logits(model, both)
    for block, update in updates.items():
        silent = ~shared_rows(adapter, both)[block].any(-1)
        assert silent[0, 24:].all()
        assert (update[silent] == 0).all()
        assert update[~silent].any()


@contextlib.contextmanager
def recorded_updates(adapter):
    """What each layer adds, ``[B, L, D]`` by block."""
    found = {}

    def keep(block):
        return lambda layer, args, output: found.__setitem__(block, output.detach().clone())

    hooks = [layer.register_forward_hook(keep(block)) for block, layer in adapter.layers.items()]
    yield found
    for hook in hooks:
        hook.remove()


def test_without_occupancy_the_same_training_changes_other_text():
    base, (model, _) = small_model(), begin("none")
    train(model)
    assert not torch.equal(logits(model, other_text()), logits(base, other_text()))


def test_by_ngrams_a_token_that_shares_single_rows_by_chance_is_silent_too():
    # So few rows that every unknown N-gram meets a row of the domain, and hardly any meets two.
    found = {}
    for occupancy in RULES:
        model, adapter = begin(occupancy, rows_per_head=199)
        train(model)
        shares = shared_rows(adapter, other_text())["2"].unflatten(-1, (2, 2))
        with recorded_updates(adapter) as updates:
            logits(model, other_text())
        found[occupancy] = (updates["2"] != 0).any(-1)
        heard = shares.any(-1).any(-1) if occupancy == "rows" else shares.all(-1).any(-1)
        assert torch.equal(found[occupancy], heard)
    assert found["ngrams"].sum() < found["rows"].sum()


def test_training_reads_what_evaluation_reads_after_it_and_evaluation_writes_nothing():
    model, adapter = begin()
    before = copy.deepcopy(adapter.state_dict())
    logits(model, other_text())
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
    assert not any(num_written_rows(table) for table in adapter.tables.values())
    optimizer = train(model)
    logits(model, other_text())
    for block, table in adapter.tables.items():
        assert written(table) == rows_of(adapter, DOMAIN)[block]
    # A step of size 0 leaves all as it is, and both modes compute the same for a text that is known.
    with torch.no_grad():
        model.train()
        trained = model(input_ids=DOMAIN, use_cache=False).logits
        model.eval()
    assert torch.equal(trained, logits(model, DOMAIN))
    del optimizer


def test_padding_and_frozen_tables_are_not_written():
    padded = torch.full((2, 40), 1)
    mask = torch.zeros_like(padded)
    padded[0, 10:], mask[0, 10:] = DOMAIN[0, :30], 1
    padded[1, :20], mask[1, :20] = DOMAIN[0, 40:60], 1
    model, adapter = begin()
    train(model, ids=padded, mask=mask)
    for block, table in adapter.tables.items():
        assert written(table) == rows_of(adapter, DOMAIN[:, :30])[block] | rows_of(adapter, DOMAIN[:, 40:60])[block]
    model, adapter = begin()
    adapter.memory_tables.requires_grad_(False)
    base = small_model()
    train(model)
    assert torch.equal(logits(model, DOMAIN), logits(base, DOMAIN))


def test_rows_that_may_not_be_trained_stay_silent_and_get_no_gradient():
    model, adapter = begin()
    chosen = {}
    for block, table in adapter.tables.items():
        rows = torch.tensor(sorted(rows_of(adapter, DOMAIN)[block]))[::3]
        chosen[block] = set(rows.tolist())
        table.trained_rows = torch.zeros(table.num_rows, dtype=torch.bool).index_fill_(0, rows, True)
    train(model)
    for block, table in adapter.tables.items():
        assert written(table) == chosen[block]
    with torch.no_grad():
        model.train()
        trained = model(input_ids=DOMAIN, use_cache=False).logits
        model.eval()
    assert torch.equal(trained, logits(model, DOMAIN))


def test_gradient_checkpointing_trains_the_same_rows():
    def trained(**options):
        model, adapter = begin()
        if options:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)
        train(model)
        return adapter.state_dict()

    plain, checkpointed = trained(), trained(use_reentrant=False)
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-6, rtol=1e-5)
    assert any("memory_tables" in name for name in plain)


@torch.no_grad()
@pytest.mark.parametrize("occupancy", RULES)
def test_decoding_equals_the_whole_forward_where_written_and_unwritten_text_meet(occupancy):
    model, _ = begin(occupancy)
    with torch.enable_grad():
        train(model)
    known, strange = DOMAIN[:, 3:15].expand(2, -1), other_text(length=9)
    ids = torch.cat([strange[:, :5], known, strange[:, 5:], known[:, :4]], dim=1)
    cache, pieces = None, []
    for piece in ids.split([7, 1, 1, 9, 1, 6], dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), atol=2e-5, rtol=1e-5)


def test_assisted_decoding_takes_back_silent_tokens_too():
    model, _ = begin()
    train(model)
    draft = small_model()
    prompt = torch.cat([other_text(1, 6), DOMAIN[:, :9]], dim=1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    alone = model.generate(input_ids=prompt, **options)
    assert torch.equal(model.generate(input_ids=prompt, assistant_model=draft, **options), alone)


@pytest.mark.parametrize("tables", ["per_layer", "shared"])
def test_a_saved_adapter_has_zeros_where_nothing_was_written_and_every_tier_reads_them_alike(tables, tmp_path):
    model, adapter = begin("ngrams", tables=tables)
    train(model)
    model.train()  # saving does not depend on the mode
    adapter.save_pretrained(tmp_path / "adapter")
    model.eval()
    text = torch.cat([DOMAIN[:, :30].expand(2, -1), other_text()], dim=1)
    expected = logits(model, text)
    for name, rows in load_file(tmp_path / "adapter" / "tables.safetensors").items():
        table = adapter.tables[name.split(".")[1]]
        assert set((rows != 0).any(-1).nonzero()[:, 0].tolist()) == written(table)
        assert 0 < num_written_rows(table) < table.num_rows // 4
    number = sum(map(num_written_rows, adapter.tables.values())) if tables == "shared" else None
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "## Occupancy" in card and (number is None or f"Written rows: {number:,} of" in card)
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["memory"]["occupancy"] == "ngrams"
    for tier in ("device", "mmap", "file", "host"):
        again = small_model()
        loaded = MemoryAdapter.from_pretrained(again, tmp_path / "adapter", table_tier=tier)
        assert torch.equal(logits(again, text), expected)
        loaded.save_pretrained(tmp_path / "copy")
        ours, theirs = (tmp_path / name / "tables.safetensors" for name in ("copy", "adapter"))
        assert ours.read_bytes() == theirs.read_bytes()
        loaded.close()
    again = small_model()
    with serving(tmp_path / "adapter") as server:
        source = {"table_tier": "remote", "table_source": f"{server.address}/tables.safetensors"}
        loaded = MemoryAdapter.from_pretrained(again, tmp_path / "adapter", **source)
        assert torch.equal(logits(again, text), expected)
        loaded.close()


@pytest.mark.parametrize("codec", ["int4", "int8", "float8_e4m3", "bfloat16"])
def test_a_quantized_table_has_the_same_unwritten_rows(codec, tmp_path):
    model, adapter = begin(layers=(1,))
    train(model)
    adapter.save_pretrained(tmp_path / "adapter")
    (layout,) = table_layouts(tmp_path / "adapter").values()
    build_packed(tmp_path / "packed.safetensors", layout, codec=RowCodec.named(codec, layout.codec.width))
    with contextlib.closing(open_table(tmp_path / "packed.safetensors")) as packed:
        assert written(packed) == written(adapter.tables["1"]) != set()
        source = {"table_tier": "mmap", "table_source": tmp_path / "packed.safetensors"}
        again, base = small_model(), small_model()
        MemoryAdapter.from_pretrained(again, tmp_path / "adapter", **source)
        assert torch.equal(logits(again, other_text(1, 3)), logits(base, other_text(1, 3)))
        assert not torch.equal(logits(again, DOMAIN), logits(base, DOMAIN))


def test_a_loaded_adapter_trains_on_as_the_one_that_was_saved(tmp_path):
    model, adapter = begin()
    train(model)
    adapter.save_pretrained(tmp_path / "adapter")
    again = small_model()
    loaded = MemoryAdapter.from_pretrained(again, tmp_path / "adapter")
    again.requires_grad_(False)
    loaded.requires_grad_(True)
    more = torch.cat([other_text(1, 60), DOMAIN[:, :36]], dim=1)
    for one in (model, again):
        train(one, ids=more)
    assert torch.equal(logits(again, more), logits(model, more))
    for name, value in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert all(written(table) > rows_of(adapter, DOMAIN)[block] for block, table in loaded.tables.items())


def test_first_numbers_survive_changes_of_type_and_a_state_dict():
    model, adapter = begin()
    train(model)
    known = {block: written(table) for block, table in adapter.tables.items()}
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        adapter.memory_tables.to(dtype)
        assert {block: written(table) for block, table in adapter.tables.items()} == known
    state = adapter.state_dict()
    for block, rows in known.items():
        assert set((state[f"memory_tables.{block}.weight"] != 0).any(-1).nonzero()[:, 0].tolist()) == rows
    other, fresh = begin()
    fresh.load_state_dict(state)
    assert {block: written(table) for block, table in fresh.tables.items()} == known
    # And what is trained next begins with first numbers, not with zeros.
    other.train()
    assert all(bool(table.weight.any(-1).all()) for table in fresh.tables.values())


def test_a_row_patch_writes_rows_and_takes_them_back():
    model, adapter = begin("ngrams")
    train(model)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    strange = TOKENIZER.decode(other_text(1, 6)[0])
    patch = RowPatch.fit(model, TOKENIZER, [(strange, " rat")])
    ids = torch.tensor([TOKENIZER(strange).input_ids])
    assert not any(one[0, -1].all() for one in shared_rows(adapter, ids).values())
    known = {block: written(table) for block, table in adapter.tables.items()}
    base = small_model()
    assert torch.equal(logits(model, ids), logits(base, ids))
    patch.apply(model)
    for block, change in patch.tables.items():
        assert written(adapter.tables[block]) == known[block] | set(change.rows.tolist())
        assert (change.before == 0).all(-1).any()
    assert TOKENIZER.decode(logits(model, ids)[0, -1].argmax()) == " rat"
    patch.revert(model)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
    assert torch.equal(logits(model, ids), logits(base, ids))
    empty = {block: (change.rows, torch.zeros_like(change.after)) for block, change in patch.tables.items()}
    patch.apply(model)
    RowPatch.from_rows(model, empty).apply(model)  # forgotten
    assert {block: written(table) for block, table in adapter.tables.items()} == known


def test_rows_of_hidden_states_are_written():
    model, adapter = begin()
    report = transfer_rows(adapter, DOMAIN[0].numpy(), num_ngrams=20, length=32)
    assert {block: num_written_rows(table) for block, table in adapter.tables.items()} == report.num_rows_written
    assert not torch.equal(logits(model, DOMAIN), logits(small_model(), DOMAIN))


def test_what_cannot_have_occupancy_is_refused_in_words():
    with pytest.raises(ConfigError, match="occupancy='rows' needs table_gradient='sparse'"):
        begin(table_gradient="dense")
    with pytest.raises(ConfigError, match="occupancy must be one of 'none', 'rows', 'ngrams', not True"):
        begin(True)
    model, _ = begin()
    with pytest.raises(ConfigError, match="they would count as written; set it to 0"):
        build_optimizer(model, OptimizerOptions(table_weight_decay=0.1))


def test_training_in_evaluation_mode_which_could_write_nothing_is_noticed():
    model, _ = begin()
    with pytest.warns(UserWarning, match="call model.train\\(\\) before training"):
        model(input_ids=DOMAIN, labels=DOMAIN).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(input_ids=DOMAIN, labels=DOMAIN).loss.backward()
