"""Sparse writing: the rows that stand out are found, and no other row is ever trained."""

import collections
import math

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.training.test_base_model import MEMORY, material, table
from tests.training.test_run import cache, measured, run, run_on_rank, text, weights
from tests.training.test_run import table as own_table

import engram_lm
from engram_lm.adapt.controls import permuted_hash
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.tables.files.safetensors_file import TensorFolder
from engram_lm.training import job as job_module
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.data.batches import Batches
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer
from engram_lm.training.recipe import Recipe
from engram_lm.training.writing import WRITABLE, WritingOptions, choose_rows, count_use, trained_tables

__all__ = ["cache", "material", "text"]

GENERAL = "a dog ran after the cat. the mat sat on a rat and the dog saw it. " * 40
LENGTH = 12


def tokens_of(text):
    return np.array(TOKENIZER.encode(text), dtype=np.int64)


def sequences(tokens):
    return [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH, LENGTH)]


def plainly_chosen(adapter, rule, limit, domain, general, row_map=None):
    """The rows by table, counted one read at a time."""
    spec = adapter.spec

    def counted(tokens):
        reads, readers = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
        for sequence in sequences(tokens):
            seen = collections.defaultdict(set)
            rows = spec.rows_for_layers(spec.encode(torch.from_numpy(sequence)[None]))
            for block, layer in zip(spec.blocks, spec.layers, strict=True):
                name = "shared" if spec.shared_table else str(block)
                found = rows[layer] if row_map is None else row_map(block, rows[layer])
                reads[name].update(found.flatten().tolist())
                seen[name].update(found.flatten().tolist())
            for name, some in seen.items():
                readers[name].update(some)
        return reads, readers, len(sequences(tokens))

    (ours, _, _), (theirs, readers, count) = counted(domain), counted(general)
    chosen = {}
    for name, reads in ours.items():
        num_rows, total, others = adapter.tables[name].num_rows, sum(reads.values()), sum(theirs[name].values())
        scores = {}
        for row, number in reads.items():
            share = number / total
            if rule == "tf_idf":
                scores[row] = share * math.log((count + 1) / (readers[name][row] + 1))
            else:
                scores[row] = share * math.log(share / ((theirs[name][row] + 1) / (others + num_rows)))
        best = sorted((row for row, score in scores.items() if score > 1e-15), key=lambda row: (-scores[row], row))
        chosen[name] = set(best[: limit.get("num_rows") or math.ceil(limit["share"] * len(reads))])
    return chosen


@pytest.mark.parametrize("rule", ["tf_idf", "kl"])
@pytest.mark.parametrize("shape", [{"tables": "per_layer"}, {"tables": "shared"}, {"permuted": True}])
def test_the_choice_is_that_of_a_plain_count(rule, shape):
    options = {"layers": ["early", 2], "num_heads": 2, "memory_dim": 32, "rows_per_head": 97, "table_std": 0.02}
    adapter = engram_lm.attach(small_model(), TOKENIZER, tables=shape.get("tables", "per_layer"), **options)
    row_map = permuted_hash(adapter.spec) if "permuted" in shape else None
    domain, general = tokens_of(TEXT), tokens_of(GENERAL)
    for limit in ({"share": 0.3}, {"num_rows": 7}, {"share": 1.0}):
        found = choose_rows(
            adapter.spec,
            Batches(domain, 5, LENGTH, seed=3),
            Batches(general, 7, LENGTH, seed=4),
            WritingOptions(rule=rule, **limit),
            row_map=row_map,
        )
        expected = plainly_chosen(adapter, rule, limit, domain, general, row_map)
        assert {name: set(mask.nonzero()[:, 0].tolist()) for name, mask in found.masks.items()} == expected
        assert all(facts["writable"] == len(expected[name]) for name, facts in found.facts["tables"].items())
    assert found.facts["domain_tokens"] == len(sequences(domain)) * LENGTH
    few = WritingOptions(rule=rule, max_tokens=3 * LENGTH)
    batches = Batches(domain, 5, LENGTH, seed=3)
    assert choose_rows(adapter.spec, batches, batches, few).facts["reference_tokens"] == 3 * LENGTH


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
@pytest.mark.parametrize("optimizer", ["row_adam", "row_wise_adam", "row_wise_adagrad", "sinkhorn"])
def test_no_optimizer_moves_another_row(optimizer, gradient):
    if gradient == "dense" and optimizer != "row_adam":
        pytest.skip("tables with dense gradients have AdamW")
    model = small_model()
    adapter = engram_lm.attach(
        model, TOKENIZER, layers=(0, 2), num_heads=2, memory_dim=32, rows_per_head=97, tables="shared",
        table_gradient=gradient,
    )  # fmt: skip
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.key_value.weight.normal_()
    domain = tokens_of(TEXT)
    batches = Batches(domain, 4, LENGTH, seed=0)
    chosen = choose_rows(
        adapter.spec, batches, Batches(tokens_of(GENERAL), 4, LENGTH, seed=0), WritingOptions(rule="kl")
    )
    weight, mask = adapter.tables["shared"].weight, chosen.masks["shared"]
    before = weight.detach().clone()
    made = build_optimizer(model, OptimizerOptions(backbone="adamw", tables=optimizer, lr=1e-2))
    with chosen.restrict(trained_tables(adapter.tables)):
        for step in range(3):
            for half in (0, 2):  # accumulated
                part = batches.part(step, half, half + 2)
                model(input_ids=part.inputs, labels=part.inputs).loss.backward()
            made.step()
            made.zero_grad()
    moved = (weight.detach() != before).any(1)
    assert not bool(moved[~mask].any()) and bool(moved[mask].all())
    part = batches.part(3, 0, 4)
    model(input_ids=part.inputs, labels=part.inputs).loss.backward()
    made.step()
    assert bool((weight.detach() != before).any(1)[~mask].any())  # the restriction has ended
    with pytest.raises(MismatchError, match="rows were chosen of tables"):
        chosen.restrict({"1": adapter.tables["shared"]})


def sections(material, **more):
    general = material / "general.txt"
    general.write_text(GENERAL)
    found = table(material, adapter=MEMORY, writing={"rule": "tf_idf", "share": 0.2}, **more)
    found["data"]["general"] = [str(general)]
    return found


def test_a_run_trains_the_chosen_rows_alone_and_goes_on_as_if_it_had_not_stopped(material, tmp_path, monkeypatch):
    values = sections(material)
    result = run(tmp_path / "whole", values)
    facts = result["writing"]
    assert facts["rule"] == "tf_idf" and facts["domain_tokens"] > 0 and facts["seconds"] > 0
    run(tmp_path / "stopped", values, stop_after=3)
    with monkeypatch.context() as patched:
        patched.setattr(job_module, "choose_rows", None)  # the choice is read, not made again
        run(tmp_path / "stopped", values, resume=True)
    assert measured(tmp_path / "stopped") == measured(tmp_path / "whole")
    start = run(tmp_path / "start", values | {"optimizer": {"backbone": "adamw", "lr": 0.0}})
    assert start["writing"]["tables"] == facts["tables"]
    kept = TensorFolder(tmp_path / "whole", WRITABLE)
    first, last = (TensorFolder(tmp_path / name / "memory", "tables.safetensors") for name in ("start", "whole"))
    for block in ("0", "2"):
        mask = kept.load(block) != 0
        name = next(name for name in last.names if block in name.split("."))
        moved = (first.load(name) != last.load(name)).any(1)
        assert facts["tables"][block]["writable"] == int(mask.sum()) < facts["tables"][block]["read"]
        assert bool(moved.any()) and not bool(moved[~mask].any())


def test_hostile_choices_are_refused_before_anything_is_loaded(material):
    for bad, message in (
        ({"share": 0.0}, "share above 0"), ({"share": math.nan}, "share above 0"), ({"share": 1.5}, "up to 1"),
        ({"num_rows": 0}, "whole number from 1"), ({"max_tokens": -1}, "whole number from 1"),
        ({"rule": "bm25"}, "one of 'all', 'tf_idf', 'kl'"), ({"rows": 3}, "unknown key"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Recipe.from_dict(table(material, adapter=MEMORY, writing={"rule": "kl", **bad}))
    with pytest.raises(ConfigError, match=r"data.general"):
        Recipe.from_dict(table(material, adapter=MEMORY, writing={"rule": "kl"}))
    frozen = sections(material)
    frozen["model"]["frozen_tables"] = True
    for values in (frozen, sections(material) | {"adapter": {}}):
        with pytest.raises(ConfigError, match="none is trained"):
            Recipe.from_dict(values)
    # Every sequence of this text reads the same rows, so none of them stands out.
    adapter = engram_lm.attach(small_model(), TOKENIZER, layers=(1,), num_heads=1, memory_dim=2, rows_per_head=5)
    batches = Batches(np.full(200, 7), 4, LENGTH, seed=0)
    with pytest.raises(DataError, match="no row of the table"):
        choose_rows(adapter.spec, batches, batches, WritingOptions(rule="tf_idf"))


@pytest.mark.parametrize("initialization", ["random", "transfer"])
@pytest.mark.parametrize("occupancy", ["rows", "ngrams"])
@pytest.mark.parametrize("rule", ["tf_idf", "all"])
def test_with_occupancy_no_row_counts_as_written_that_may_not_be(rule, occupancy, initialization, material, tmp_path):
    """Neither the loss on general text writes a row, nor a row's beginning as a hidden state."""
    values = sections(material, retention={"weight": 1.0, "batch_size": 4})
    values["writing"]["rule"] = rule
    values["adapter"] = {**MEMORY, "occupancy": occupancy, "initialization": initialization, "transfer_tokens": 600}
    run(tmp_path / "whole", values)
    run(tmp_path / "stopped", values, stop_after=3)
    run(tmp_path / "stopped", values, resume=True)
    assert measured(tmp_path / "stopped") == measured(tmp_path / "whole")
    stored = TensorFolder(tmp_path / "whole" / "memory", "tables.safetensors")
    if rule == "all":
        recipe = Recipe.from_dict(values)
        tokenizer = find_tokenizer(recipe, tmp_path / "whole" / "tokenizer")
        text = open_text(recipe, tokenizer)
        adapter = engram_lm.attach(small_model(), tokenizer, recipe.adapter.for_base(32, 3))
        use = count_use(adapter.spec, Batches(text.train, 4, 32, seed=0, num_tokens=text.num_tokens))
        may = {name: counts.num_reads > 0 for name, counts in use.items()}
    else:
        may = {block: TensorFolder(tmp_path / "whole", WRITABLE).load(block) != 0 for block in ("0", "2")}
    for block in ("0", "2"):
        name = next(name for name in stored.names if block in name.split("."))
        written = (stored.load(name) != 0).any(1)
        assert bool(written.any()) and not bool(written[~may[block]].any())


def test_a_model_of_ours_on_two_processes_trains_the_rows_that_one_process_chooses(text, cache, rank_pools, tmp_path):
    (tmp_path / "general.txt").write_text(GENERAL * 3)
    values = own_table(text, cache, writing__rule="tf_idf", writing__share=0.3)
    values["data"]["general"] = [str(tmp_path / "general.txt")]
    values["train"]["num_steps"] = 4
    alone = run(tmp_path / "one", values)
    rank_pools(2).run(run_on_rank, str(tmp_path / "two"), values, {})
    start = run(tmp_path / "start", values | {"optimizer": {"lr": 0.0, "table_lr_multiplier": 0.0}})
    assert start["writing"]["tables"] == alone["writing"]["tables"]
    one, two = (TensorFolder(tmp_path / name, WRITABLE) for name in ("one", "two"))
    tables = [name for name in weights(tmp_path / "one") if "memory_tables" in name]
    first = weights(tmp_path / "start")
    for name in tables:
        mask = one.load(name.split(".")[-2]) != 0
        assert torch.equal(mask, two.load(name.split(".")[-2]) != 0) and bool(mask.any())
        for folder in ("one", "two"):
            moved = (weights(tmp_path / folder)[name] != first[name]).any(1)
            assert bool(moved.any()) and not bool(moved[~mask].any())
        torch.testing.assert_close(
            weights(tmp_path / "one")[name], weights(tmp_path / "two")[name], rtol=1e-3, atol=1e-3
        )
