"""The study of rows that are written while a model runs, and the cache of counts that it is compared with."""

import fractions
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.adapt.patched_models import trained_model
from tests.adapt.small_models import TOKENIZER
from tests.studies.test_study import some_text

from engram_lm.errors import ConfigError, DataError
from engram_lm.studies.writing.count_cache import CacheReading, CountCache, fit_shares, follow, mix
from engram_lm.studies.writing.measure import ways
from engram_lm.studies.writing.reader import UPDATES, Reader, best_rate, read_stream, tune, updates_of
from engram_lm.studies.writing.streams import ask, invent_facts, open_domain, tell
from engram_lm.studies.writing.study import WritingStudy
from engram_lm.studies.writing.summary import summarize
from engram_lm.tables.tiers.device import ParameterTable

VOCAB = 5


def plain_probability(history, context, word, order):
    """Witten and Bell's formula, read off the text itself."""
    if len(context) >= order:
        context = context[len(context) - order + 1 :]
    found = fractions.Fraction(1, VOCAB)
    for length in range(len(context) + 1):
        wanted = tuple(context[len(context) - length :])
        after = [
            history[place] for place in range(length, len(history)) if tuple(history[place - length : place]) == wanted
        ]
        if after:
            different = len(set(after))
            found = (after.count(word) + different * found) / (len(after) + different)
    return found


def test_the_cache_gives_witten_and_bells_probabilities_and_they_add_up_to_one():
    chance = random.Random(0)
    for order in (1, 2, 4):
        text = [chance.randrange(VOCAB - 1) for _ in range(60)]
        cache = CountCache(VOCAB, order)
        cache.add(text, 0)
        for context in ((), (0,), (1, 2), (0, 3, 1), tuple(text[:5]), (VOCAB - 1, 0)):
            each = [cache.read([*context, word], len(context)).probabilities[0] for word in range(VOCAB)]
            assert sum(each) == pytest.approx(1)
            wanted = [plain_probability(text, list(context), word, order) for word in range(VOCAB)]
            assert each == pytest.approx([float(one) for one in wanted])
    grams = {tuple(text[place - n : place + 1]) for n in range(4) for place in range(n, len(text))}
    assert cache.num_counts == len(grams)


def test_a_cache_knows_what_stood_before_a_chunk_and_nothing_of_the_chunk():
    chance = random.Random(1)
    text = [chance.randrange(VOCAB) for _ in range(50)]
    found = follow(CountCache(VOCAB, 3), text, chunk=8)
    quick = follow(CountCache(VOCAB, 3), text, chunk=1)
    assert len(found.probabilities) == len(quick.known) == 49
    # The first token of a stream is read, and neither predicted nor counted.
    for place in range(1, len(text)):
        chunk_start = 1 + (place - 1) // 8 * 8
        for reading, counted in ((found, chunk_start), (quick, place)):
            cache = CountCache(VOCAB, 3)
            cache.add(text[:counted], 1)
            wanted = cache.read(text[: place + 1], place)
            assert reading.probabilities[place - 1] == wanted.probabilities[0]
            assert reading.known[place - 1] == wanted.known[0]
    assert not found.known[:8].any() and (found.probabilities[:8] == 1 / VOCAB).all()


def test_shares_are_the_likeliest_of_their_grid():
    chance = np.random.default_rng(0)
    nats, known = chance.exponential(2.0, 400), chance.integers(0, 3, 400)
    reading = CacheReading(chance.random(400) * known / 3, known)
    shares = fit_shares(nats, reading, order=3)
    assert shares[0] == shares[3] == 0 and 0 < shares[1] < shares[2]
    best = mix(nats, reading, shares).sum()
    for steps in itertools.product((-0.01, 0, 0.01), repeat=2):
        other = shares + np.array([0, *steps, 0])
        assert mix(nats, reading, other).sum() >= best
    # A share of nothing is the model alone; probabilities are mixed, not nats.
    assert mix(nats, reading, np.zeros(4)) == pytest.approx(nats)
    one = mix(np.array([math.log(4)]), CacheReading(np.array([0.75]), np.array([1])), np.array([0, 0.5]))
    assert one == pytest.approx([-math.log(0.5)])


def test_a_rate_is_found_from_either_side_even_where_the_first_one_diverges():
    def valley(at):
        return lambda rate: math.inf if rate > 100 * at else (math.log(rate) - math.log(at)) ** 2

    for at in (0.01, 1.0, 20.0):
        tried = tune(valley(at), 1.0)
        assert abs(math.log(best_rate(tried) / at)) <= math.log(3) / 2 + 1e-9
        assert len(set(tried)) == len(tried)
    assert math.isfinite(tune(valley(0.001), 1.0)[best_rate(tune(valley(0.001), 1.0))])


def updates():
    return {update.name: update for update in UPDATES}


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_table(model, name):
    return isinstance(model.get_submodule(name.rpartition(".")[0]), ParameterTable)


@pytest.fixture(scope="module", name="model")
def model_fixture():
    model = trained_model(kind="reference").eval()
    for table in model.tables.values():
        table.gradient = "sparse"
    return model


def test_each_update_is_one_step_on_what_it_may_change_after_the_loss_was_taken(model):
    tokens = np.array([5, 9, 31, 9, 31, 77, 5, 9, 31])
    before = weights_of(model)
    ids = torch.from_numpy(tokens)[None]
    wanted = F.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    gradients = torch.autograd.grad(wanted.mean(), list(model.parameters()), allow_unused=True)
    gradients = {
        name: None if gradient is None else gradient.to_dense()
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
    }
    for name, update in updates().items():
        reader = Reader(model, update, 0.5)
        assert reader.read(tokens) == pytest.approx(wanted.detach().numpy(), abs=1e-5)
        for key, now in weights_of(reader.model).items():
            changed = update.what == "everything" or (update.what == "rows" and is_table(model, key))
            if not changed or gradients[key] is None:
                assert torch.equal(now, before[key]), (name, key)
            elif update.optimizer == "sgd":
                assert torch.allclose(now, before[key] - 0.5 * gradients[key], atol=1e-6)
            else:  # the first step of Adam is as large as its rate, in rows that the chunk read
                moved = (now - before[key]).abs()
                read = gradients[key].abs() > 1e-6
                assert read.any() and torch.allclose(moved[read], torch.tensor(0.5), atol=0.01)
                assert not moved[~gradients[key].any(-1)].any()
    assert all(torch.equal(now, before[key]) for key, now in weights_of(model).items())


def test_a_stream_that_repeats_itself_is_learned_by_every_update_and_by_the_cache(model):
    tokens = np.tile(np.array([5, 9, 31, 77, 120, 44, 12, 8]), 12)[: 8 * 11 + 1]
    readers = {
        update.name: Reader(model, update, rate) for update, rate in zip(UPDATES, (0, 3.0, 0.1, 0.3), strict=True)
    }
    nats = read_stream(readers, tokens, chunk=8)
    first, last = slice(0, 8), slice(-8, None)
    for name, each in nats.items():
        assert len(each) == len(tokens) - 1
        assert each[first] == pytest.approx(nats["none"][first], abs=1e-5)
        assert (each[last].mean() < each[first].mean() - 0.05) == (name != "none"), name
    assert readers["none"].losses(tokens, chunk=8) == pytest.approx(nats["none"], abs=1e-5)
    reading = follow(CountCache(300, 4), tokens, chunk=8)
    assert mix(nats["none"], reading, np.array([0, 0.9, 0.9, 0.9, 0.9]))[last].mean() < 0.2


def test_a_model_without_memory_has_no_rows_to_write():
    assert [update.name for update in updates_of(torch.nn.Linear(2, 2))] == ["none", "all"]
    assert set(ways(updates_of(torch.nn.Linear(2, 2)))) == {"none", "all", "cache", "quick_cache", "all_and_cache"}


def test_facts_are_told_once_at_the_beginning_of_a_chunk_and_asked_for_with_the_same_tokens():
    facts = invent_facts(5, seed=3)
    assert facts == invent_facts(5, seed=3) != invent_facts(5, seed=4)
    text = np.array(TOKENIZER("many other words " * 200).input_ids, dtype=np.int32)
    told = tell(facts, text, TOKENIZER, chunk=48)
    assert len(told) == 2 * 5 * 48 + 1
    for number, (fact, questions) in enumerate(zip(facts, ask(facts, TOKENIZER), strict=True)):
        start = 1 + 2 * number * 48
        true = questions[0]
        assert told[start : start + len(true.tokens)].tolist() == true.tokens.tolist()
        assert TOKENIZER.decode(true.tokens[true.first :]) == fact.choices[0]
        assert len({TOKENIZER.decode(one.tokens) for one in questions}) == len(fact.choices) == 4
        assert TOKENIZER.decode(told.tolist()).count(fact.prompt) == 1


def test_streams_of_a_kind_share_nothing_and_more_seeds_change_no_earlier_stream(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(some_text(400) + str(number))
    two, three = (
        open_domain(str(tmp_path), TOKENIZER, num_streams=count, num_tokens=63, max_bytes=10**6) for count in (2, 3)
    )
    assert all(len(stream) == 64 for stream in (three.validation, *three.streams)) and len(three.streams) == 3
    for ours, theirs in zip((two.validation, *two.streams), (three.validation, *three.streams), strict=False):
        assert (ours == theirs).all()
    with pytest.raises(DataError, match="--stream-tokens"):
        open_domain(str(tmp_path), TOKENIZER, num_streams=2, num_tokens=10**6, max_bytes=10**6)


def test_differences_are_paired_by_seed_and_stream():
    def run(shift):
        def way(loss):
            return {
                "loss": loss + shift, "old_before": 3.0, "old_after": 3.5, "back": 3.2, "seconds": loss, "kept": 7,
                "curve": [loss],
            }  # fmt: skip

        names = {"none": 4.0, "cache": 3.0}
        facts = {name: {"known_before": 0.25, "known": 0.5, "answer": 2.0} for name in names}
        domains = {"a": {name: way(loss) for name, loss in names.items()}}
        domains["b"] = {name: way(loss + 1 - 0.5 * (name == "cache")) for name, loss in names.items()}
        return {"arms": {"engram": {"domains": domains, "facts": facts}}}

    found = summarize([run(0.0), run(10.0)])["engram"]["cache"]
    assert sorted(found["loss"]["difference"]["per_seed"]) == [-1.5, -1.5, -1.0, -1.0]
    assert found["by_domain"]["b"]["difference"]["per_seed"] == [-1.5, -1.5]
    assert found["loss"]["to_cache"]["mean"] == 0 and found["forgotten"]["mean"] == 0.5
    assert found["slowness"] == pytest.approx((3.0 + 3.5) / (4.0 + 5.0))


def test_impossible_studies_are_refused():
    for options in ({"facts": 0}, {"facts": 2000}, {"order": 0}, {"stream_tokens": 100}, {"domains": ("a", "b/a")}):
        with pytest.raises(ConfigError):
            WritingStudy(**options)
    assert WritingStudy().sources == ("python:package-descriptions",)
    assert len(WritingStudy(data=("corpus",)).sources) == 2


def test_a_whole_study_is_trained_and_read_and_goes_on_where_it_was(tmp_path, capsys):
    text, other = tmp_path / "text", tmp_path / "other"
    for folder, words in ((text, 500), (other, 300)):
        folder.mkdir()
        for number in range(20):
            (folder / f"{number}.txt").write_text(f"{number} " + some_text(words)[number:])
    options = {
        "out": tmp_path / "out", "data": (text,), "domains": (str(other),), "vocab_size": 300, "tokens": 4096,
        "sequence_length": 32, "stream_tokens": 128, "facts": 2, "seeds": 1, "mode": "one_by_one",
    }  # fmt: skip
    assert WritingStudy(**options).run() == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    engram = result["reading"][0]["arms"]["engram"]
    assert set(engram["facts"]) == set(ways(UPDATES)) and engram["facts"]["none"]["known"] is not None
    plain, rows = (engram["domains"]["other"][way] for way in ("none", "rows"))
    assert plain["old_before"] == plain["old_after"] == rows["old_before"] != rows["old_after"]
    assert plain["kept"] == 0 < rows["kept"] < engram["domains"]["other"]["all"]["kept"]
    assert "count cache" in (tmp_path / "out/report.html").read_text() and (tmp_path / "out/writing.png").is_file()
    kept = sorted((tmp_path / "out/seed-0").glob("*.reading-*.json"))
    assert len(kept) == 2 and len(list((tmp_path / "out").glob("choices-*.json"))) == 1
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert WritingStudy(**options | {"seeds": 2}, resume=True).run() == 0
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    again = json.loads((tmp_path / "out/result.json").read_text())
    assert again["reading"][0] == result["reading"][0] and len(again["reading"]) == 2
    assert "changes the loss by" in capsys.readouterr().out
    with pytest.raises(DataError, match="lower --facts"):  # before anything is read
        WritingStudy(**options | {"facts": 1000}, resume=True).run()
