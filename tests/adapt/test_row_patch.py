"""A fact is added by changing the rows its N-grams address, shipped as kilobytes, and removed without trace."""

import numpy as np
import pytest
import torch
from tests.adapt.patched_models import (
    FACT,
    OTHER_FACT,
    bits,
    greedy,
    memory_config,
    same_state,
    trained_model,
)
from tests.adapt.small_models import TOKENIZER, small_model
from tests.beginnings import with_template

import engram_lm
from engram_lm import MemoryAdapter, RowPatch
from engram_lm.adapt import FitOptions, applied_patches, attached_adapters
from engram_lm.adapt.row_patch_fit import read_facts, reference_tokens
from engram_lm.errors import ConfigError, MismatchError, RowRangeError
from engram_lm.hashing.collisions import row_collisions

FAST = {"learning_rate": 0.3, "margin": 0.2}
KINDS = {
    "adapter": {"kind": "adapter"},
    "shared table": {"kind": "adapter", "tables": "shared"},
    "bfloat16": {"kind": "adapter", "dtype": torch.bfloat16},
    "reference model": {"kind": "reference"},
}


def table_of(model, name):
    tables = model.tables if hasattr(model, "tables") else attached_adapters(model)["default"].tables
    return tables[name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_becomes_the_greedy_continuation_and_leaves_no_trace(kind, tmp_path):
    model = trained_model(**KINDS[kind])
    before = bits(model)
    assert greedy(model, FACT[0], 2) != FACT[1]
    patch = RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(orders=(2, 3), **FAST), title="a rat")
    assert patch.is_learned
    assert same_state(bits(model), before)
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    assert path.stat().st_size < 4096

    other = trained_model(**KINDS[kind])
    RowPatch.load(path).apply(other)
    assert greedy(other, FACT[0], 2) == FACT[1]
    # Nothing but the patch's rows has changed.
    for name, change in patch.tables.items():
        weight = table_of(other, name).weight.detach()
        assert torch.equal(weight[change.rows], change.after)
        weight[change.rows] = change.before
    assert same_state(bits(other), before)
    for name, change in patch.tables.items():
        table_of(other, name).weight.detach()[change.rows] = change.after
    assert [one.title for one in applied_patches(other)] == ["a rat"]
    if adapters := attached_adapters(other):  # what its tables' files do not hold must not be lost
        with pytest.raises(ConfigError, match=r"row patches change rows.*tables=False would leave them out"):
            adapters["default"].save_pretrained(tmp_path / "small", tables=False)
    patch.revert(other)
    for adapter in attached_adapters(other).values():
        adapter.save_pretrained(tmp_path / "small", tables=False)
    assert same_state(bits(other), before)
    assert applied_patches(other) == ()
    assert greedy(other, FACT[0], 2) == greedy(model, FACT[0], 2)


def test_a_fit_leaves_the_model_as_it_was():
    model = trained_model()
    model.train()
    model.model.layers[1].eval()
    frozen = [name for name, _ in model.named_parameters() if "mlp" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    tables = {block: layer.table for block, layer in attached_adapters(model)["default"].layers.items()}
    before = bits(model)
    steps = []
    with torch.inference_mode():
        RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(max_steps=3), on_step=lambda *step: steps.append(step))
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert steps[-1][1] < steps[0][1]
    assert same_state(bits(model), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {block: layer.table for block, layer in attached_adapters(model)["default"].layers.items()} == tables


def test_the_same_call_gives_the_same_file(tmp_path):
    for name in ("one", "two"):
        model = trained_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train(name == "two")  # nothing is dropped in a fit
        RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(max_steps=5)).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def addressed(model, fact, positions, orders):
    """Rows of a fact's N-grams by table, one position at a time."""
    spec = attached_adapters(model)["default"].spec
    prompt, tokens = TOKENIZER(fact[0])["input_ids"], TOKENIZER(fact[0] + fact[1])["input_ids"]
    first = 0 if positions == "all" else len(prompt) - 1
    return {
        str(layer): {
            int(spec.rows(tokens, layer)[t, column])
            for t in range(first, len(tokens) - 1)
            for column in range(spec.num_heads_total)
            if spec.orders[column // spec.num_heads] in orders
        }
        for layer in spec.layers
    }


@pytest.mark.parametrize(("positions", "orders"), [("target", None), ("target", (2,)), ("all", (2, 3))])
def test_only_rows_of_the_chosen_positions_and_orders_change(positions, orders):
    model = trained_model()
    options = FitOptions(positions=positions, orders=orders, max_steps=2)
    patch = RowPatch.fit(model, TOKENIZER, [FACT], options)
    expected = addressed(model, FACT, positions, orders or (3,))
    assert {name: set(change.rows.tolist()) for name, change in patch.tables.items()} == expected


def lead_of(model, fact):
    """By how much the least sure target token leads the likeliest other one, and the mean loss, in nats."""
    prompt, tokens = TOKENIZER(fact[0])["input_ids"], TOKENIZER(fact[0] + fact[1])["input_ids"]
    target = torch.tensor(tokens[len(prompt) :])[:, None]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = chances.gather(-1, target)
    others = chances.scatter(-1, target, -torch.inf).amax(-1, keepdim=True)
    return (own - others).min().item(), -own.mean().item()


def test_a_fit_stops_at_the_margin():
    model, steps = trained_model(), []
    options = FitOptions(orders=(2, 3), **FAST)
    patch = RowPatch.fit(model, TOKENIZER, [FACT], options, on_step=lambda *step: steps.append(step))
    assert len(steps) < options.max_steps
    assert steps[0][1] == patch.facts[0].loss_before == pytest.approx(lead_of(model, FACT)[1], abs=1e-6)
    patch.apply(model)
    lead, loss = lead_of(model, FACT)
    assert lead >= 0.2
    assert steps[-1][1] == patch.facts[0].loss_after == pytest.approx(loss, abs=1e-6)
    with pytest.raises(ConfigError, match=r"hold already: every target token leads by 0.2 nats"):
        RowPatch.fit(model, TOKENIZER, [FACT], options)


def test_steps_that_overshoot_do_not_spoil_the_rows_found_before():
    model, leads = trained_model(), []
    for max_steps in range(1, 6):
        patch = RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(max_steps=max_steps, learning_rate=2.0))
        patch.apply(model)
        leads.append(lead_of(model, FACT)[0])
        patch.revert(model)
    assert leads == sorted(leads)
    assert len(set(leads)) < len(leads)


def test_rows_that_many_other_ngrams_read_are_left_alone():
    model = trained_model()
    own = TOKENIZER(FACT[0] + FACT[1])["input_ids"]
    # The fact's own N-grams are in the text too, and count for nothing.
    reference = np.concatenate([np.random.default_rng(0).integers(2, 280, 3000), own])
    spec = attached_adapters(model)["default"].spec
    every = addressed(model, FACT, "target", (3,))
    counts = {
        (name, row): int(row_collisions(spec, int(name), reference, [row], besides=[own]).num_ngrams[0])
        for name, rows in every.items()
        for row in rows
    }
    limit = sorted(counts.values())[len(counts) // 2 - 1]
    quiet = {name: {row for row in rows if counts[name, row] <= limit} for name, rows in every.items()}
    assert 0 < sum(map(len, quiet.values())) < len(counts)
    options = FitOptions(max_steps=2, max_collisions=limit)
    patch = RowPatch.fit(model, TOKENIZER, [FACT], options, reference=reference)
    found = {name: set(change.rows.tolist()) for name, change in patch.tables.items()}
    assert found == {name: rows for name, rows in quiet.items() if rows}
    with pytest.raises(ConfigError, match=r"8 rows, all of them read by more than 0 other N-grams.*raise max_coll"):
        RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(max_collisions=0), reference=reference)
    with pytest.raises(ConfigError, match="belong together"):
        RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(max_collisions=1))


def handmade(model, rows, value, table="0", title=""):
    return RowPatch.from_rows(model, {table: (rows, torch.full((len(rows), 6), float(value)))}, title=title)


def test_patches_that_share_rows_are_reverted_in_reverse_order_and_others_in_any():
    model = trained_model()
    before = bits(model)
    first = handmade(model, [7, 3], 1, title="first")
    first.apply(model)
    second = handmade(model, [3, 40], 2, title="second")
    second.apply(model)
    apart = handmade(model, [5], 3, title="apart")
    apart.apply(model)
    assert [patch.title for patch in applied_patches(model)] == ["first", "second", "apart"]
    assert first.tables["0"].rows.tolist() == [3, 7]
    applied = bits(model)
    with pytest.raises(MismatchError, match=r"'first' shares rows with the patch 'second'.*reverse order"):
        first.revert(model, force=True)
    with pytest.raises(MismatchError, match="'second' is applied to this model already"):
        second.apply(model)
    assert same_state(bits(model), applied)
    second.revert(model)
    first.revert(model)
    assert [patch.title for patch in applied_patches(model)] == ["apart"]
    apart.revert(model)
    assert same_state(bits(model), before)
    with pytest.raises(MismatchError, match=r"1 of 1 rows.*row 5.*they hold the numbers without the patch"):
        apart.revert(model)


def test_rows_that_changed_since_are_refused_or_forced_and_come_back_as_they_were():
    model = trained_model()
    patch = handmade(model, [3, 7], 1)
    with torch.no_grad():
        table_of(model, "0").weight[7] += 0.5
    trained_on = bits(model)
    with pytest.raises(MismatchError, match=r"1 of 2 rows of table 0 \(first: row 7\) do not hold.*force=True"):
        patch.apply(model)
    assert same_state(bits(model), trained_on)
    patch.apply(model, force=True)
    patch.revert(model)
    assert same_state(bits(model), trained_on)
    patch.apply(model, force=True)
    with torch.no_grad():
        table_of(model, "0").weight[3] += 0.5
    with pytest.raises(MismatchError, match=r"row 3\) do not hold.*force=True"):
        patch.revert(model)
    patch.revert(model, force=True)
    assert same_state(bits(model), trained_on)


def test_a_patch_is_reverted_after_the_model_was_saved_with_it(tmp_path):
    model = trained_model()
    before = bits(model)
    patch = handmade(model, [3, 7], -0.0)
    patch.apply(model)
    attached_adapters(model)["default"].save_pretrained(tmp_path / "patched")
    again = small_model()
    MemoryAdapter.from_pretrained(again, tmp_path / "patched")
    assert applied_patches(again) == ()
    patch.revert(again)
    assert same_state(bits(again), before)


def test_a_memory_that_says_nothing_yet_is_refused():
    model = small_model()
    engram_lm.attach(model, TOKENIZER, memory_config())
    with pytest.raises(ConfigError, match=r"value projections.*still zero.*train"):
        RowPatch.fit(model, TOKENIZER, [FACT])


def test_rows_without_effect_are_refused():
    model = trained_model()
    adapter = attached_adapters(model)["default"]
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.key_value.weight[-32:] = 0
            layer.key_value.weight[-32:, :3] = 1  # a head of the lower order is heard, the higher order is not
            layer.key_value.weight[:32, 12:] = 0
    with pytest.raises(ConfigError, match=r"no effect.*orders="):
        RowPatch.fit(model, TOKENIZER, [FACT])


def test_the_memory_that_is_meant_must_be_clear_and_read():
    model = trained_model()
    patch = handmade(model, [3], 1)
    adapter = attached_adapters(model)["default"]
    with adapter.disabled(), pytest.raises(ConfigError, match="'default' is disabled"):
        patch.apply(adapter)
    second = engram_lm.attach(model, TOKENIZER, memory_config(), name="second")
    with pytest.raises(ConfigError, match=r"\['default', 'second'\]; pass one of these MemoryAdapters"):
        patch.apply(model)
    patch.apply(adapter)
    assert applied_patches(second) == ()
    adapter.detach()
    with pytest.raises(ConfigError, match="'default' is detached"):
        patch.revert(adapter)
    with pytest.raises(ConfigError, match=r"has none: name a memory with --adapter"):
        patch.apply(small_model())


def test_another_hash_type_or_tokenizer_is_refused_with_both_values(other_tokenizer):
    patch = handmade(trained_model(), [3], 1)
    half, other = trained_model(dtype=torch.bfloat16), small_model()
    adapter = engram_lm.attach(other, TOKENIZER, memory_config(rows_per_head=97))
    with pytest.raises(MismatchError, match=f"{patch.spec_digest}.*{adapter.spec.digest}"):
        patch.apply(other)
    with pytest.raises(MismatchError, match=r"6 torch.float32 numbers.*6 torch.bfloat16"):
        patch.apply(half)
    with pytest.raises(MismatchError, match="token map"):
        RowPatch.fit(half, other_tokenizer, [FACT])


def test_impossible_facts_options_and_rows_are_refused():
    model = trained_model()
    for facts, message in (
        ([], "no facts"),
        ([("the cat", "")], "at least one token each"),
        (["ab"], "a fact is a pair"),
    ):
        with pytest.raises(ConfigError, match=message):
            RowPatch.fit(model, TOKENIZER, facts)
    for options, message in (
        ({"positions": "last"}, "positions is"),
        ({"orders": ()}, "orders is a tuple"),
        ({"max_steps": 0}, "max_steps is a whole number from 1"),
        ({"margin": float("nan")}, "margin is a number from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            FitOptions(**options)
    with pytest.raises(ConfigError, match=r"orders \(4,\) are asked for, the hash has \(2, 3\)"):
        RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(orders=(4,)))
    with pytest.raises(MismatchError, match=r"no table '1'; its tables are 0, 2"):
        handmade(model, [3], 1, table="1")
    with pytest.raises(RowRangeError, match=r"row 9999999 is outside table 0"):
        handmade(model, [3, 9_999_999], 1)
    with pytest.raises(ConfigError, match=r"row numbers of table 0 are integers, got torch.float32"):
        handmade(model, torch.tensor([3.9]), 1)
    with pytest.raises(ConfigError, match="ascend and differ"):
        handmade(model, [3, 3], 1)
    with pytest.raises(ConfigError, match=r"take numbers \[1, 6\], got \[1, 5\]"):
        RowPatch.from_rows(model, {"0": ([3], torch.zeros(1, 5))})
    with pytest.raises(ConfigError, match="not finite"):
        handmade(model, [3], float("inf"))


def test_several_facts_are_fitted_together_and_a_second_patch_goes_on_the_first():
    model = trained_model()
    before = bits(model)
    first = RowPatch.fit(model, TOKENIZER, [FACT, OTHER_FACT], FitOptions(positions="all", orders=(2, 3), **FAST))
    assert first.is_learned
    first.apply(model)
    for prompt, target in (FACT, OTHER_FACT):
        assert greedy(model, prompt, len(TOKENIZER(target)["input_ids"])) == target
    second = RowPatch.fit(model, TOKENIZER, [(FACT[0], ";")], FitOptions(orders=(2, 3), **FAST))
    assert second.overlaps(first)
    second.apply(model)
    assert greedy(model, FACT[0], 1) == ";"
    assert [patch.num_rows for patch in applied_patches(model)] == [first.num_rows, second.num_rows]
    assert "→ ';': learned" in str(second)
    second.revert(model)
    first.revert(model)
    assert same_state(bits(model), before)


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_fact_begins_as_the_tokenizer_begins_its_prompt_and_does_not_end(template):
    tokenizer = with_template(TOKENIZER, template)
    first = [tokenizer.bos_token_id] if template.startswith("<s>") else []
    prompt, target = FACT
    (fact,) = read_facts(tokenizer, [FACT])
    assert list(fact.prompt_tokens) == [*first, *TOKENIZER(prompt).input_ids]
    assert [*fact.prompt_tokens, *fact.target_tokens] == [*first, *TOKENIZER(prompt + target).input_ids]
    assert reference_tokens(prompt, tokenizer).tolist() == list(fact.prompt_tokens)
