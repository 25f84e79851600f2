"""One pass over the text: one forward pass for all analyses, in bounded memory, whatever the batch size."""

import gc
import weakref

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.beginnings import with_template
from tests.small_model import BACKBONE, MEMORY, VARIANTS

import engram_lm
from engram_lm.analysis import Analysis, NotApplicable, find_subject, read_text
from engram_lm.analysis.reading import bytes_per_token, choose_batch_size, visible_tokens
from engram_lm.analysis.recording import not_finite, recording
from engram_lm.errors import ConfigError, DataError, MismatchError, TokenError
from engram_lm.hashing import Segments
from engram_lm.tokenizing import text_tokens

TOKENS = text_tokens(TOKENIZER, TEXT)[:203]


def own_model(variant="plain", memory=True, segments=None):
    torch.manual_seed(0)
    backbone, changes = VARIANTS[variant]
    config = engram_lm.EngramConfig(**{**MEMORY, **changes}) if memory else None
    return engram_lm.EngramForCausalLM(
        engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, config, segments=segments, **{**BACKBONE, **backbone})
    ).eval()


def attached_model():
    model = small_model()
    adapter = engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    with torch.no_grad():
        for parameter in adapter.layers.parameters():  # some start at zero, so that nothing would be added
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


class Everything(Analysis):
    """Keeps all of a short text, as arrays over its positions."""

    wants = frozenset({"hidden", "logits", "order_scores", "gates"})

    def start(self, subjects):
        self.parts, self.starts = [], []

    def update(self, readings):
        for reading in readings:
            kept = {
                "tokens": reading.tokens,
                "logits": reading.logits,
                "visible": reading.visible,
                "finite": reading.finite,
                "active": reading.active,
            }
            kept |= {f"hidden{place}": hidden for place, hidden in enumerate(reading.hidden)}
            for name in ("rows", "gates", "order_scores", "bias_scores"):
                kept |= {f"{name}{block}": values for block, values in getattr(reading, name).items()}
            self.parts.append({name: values.flatten(0, 1).numpy() for name, values in kept.items()})
            self.starts.append(reading.start)

    def result(self):
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}


class Lengths(Analysis):
    """Keeps the shapes of the windows."""

    def __init__(self, wants=(), scratch=0):
        self.wants, self.scratch, self.shapes = frozenset(wants), scratch, []

    def scratch_bytes_per_token(self, subjects):
        return self.scratch

    def update(self, readings):
        self.shapes.append(tuple(readings[0].tokens.shape))
        self.reading = readings[0]

    def result(self):
        return self.shapes


def read_everything(model, tokens=TOKENS, length=20, **options):
    return read_text([find_subject(model, TOKENIZER)], tokens, {"all": Everything()}, length=length, **options)["all"]


@pytest.mark.parametrize("variant", ["plain", "streams", "single"])
def test_a_reading_holds_what_the_model_itself_says_of_its_forward_pass(variant):
    model = own_model(variant)
    found = read_everything(model, TOKENS[:20])
    with torch.no_grad():
        said = model(torch.from_numpy(TOKENS[None, :20]), output_gates=True, output_hidden_states=True)
    np.testing.assert_array_equal(found["logits"], said.logits[0])
    for place, hidden in enumerate(said.hidden_states[:-1]):  # the last one is normed
        np.testing.assert_array_equal(found[f"hidden{place}"], hidden[0].reshape(found["hidden0"].shape))
    for block, gates in zip((0, 2), said.gates):
        np.testing.assert_array_equal(found[f"gates{block}"], gates[0])
        expected = model.hash_spec.rows(torch.from_numpy(TOKENS[None, :20]), block)[0]
        np.testing.assert_array_equal(found[f"rows{block}"], expected)
        assert found[f"order_scores{block}"].shape == (20, 2, gates.shape[-1])


def test_an_attached_memory_shows_its_gates_and_changes_nothing_by_being_watched():
    model = attached_model()
    tokens = torch.from_numpy(TOKENS[None, :20])
    with torch.no_grad():
        expected = model(tokens).logits[0]
    found = read_everything(model, TOKENS[:20])
    np.testing.assert_array_equal(found["logits"], expected)
    scores = torch.from_numpy(found["order_scores2"].sum(1) + found["bias_scores2"])
    recovered = torch.sigmoid(scores.sign() * scores.abs().clamp_min(1e-6).sqrt())
    np.testing.assert_allclose(found["gates2"], recovered, atol=2e-4)
    # The first hidden state is what enters the layers, before the memory that is added in front of the first of them.
    np.testing.assert_array_equal(found["hidden0"][:, 0], model.model.embed_tokens(tokens)[0].detach())


def test_a_memory_layer_that_is_watched_gives_its_caller_what_was_asked_for():
    subject = find_subject(attached_model(), TOKENIZER)
    layer, hidden, rows = subject.memories[2], torch.randn(1, 3, 32), torch.ones(1, 3, 4, dtype=torch.int64)
    with torch.no_grad(), recording(subject, hidden=False, order_scores=True):
        assert torch.equal(layer(hidden, rows), layer(hidden, rows, return_gates=True).update)


def test_hidden_states_stay_as_they_were_when_a_later_layer_changes_them_in_place():
    model = own_model()
    clean = read_everything(model)

    def overwrite(module, args, output):
        args[0].zero_()

    model.model.layers[1].register_forward_hook(overwrite)
    np.testing.assert_array_equal(read_everything(model)["hidden1"], clean["hidden1"])


@pytest.mark.parametrize("make", [own_model, attached_model])
def test_results_do_not_depend_on_how_many_windows_are_read_at_once(make):
    model = make()
    alone, together = read_everything(model, max_batch_size=1), read_everything(model, max_batch_size=7)
    assert alone["tokens"].tolist() == TOKENS.tolist()
    for name, values in alone.items():
        np.testing.assert_allclose(together[name], values, atol=1e-5, err_msg=name)


def test_windows_do_not_see_each_other_and_say_where_they_are():
    model = own_model()
    analysis = Everything()
    subject = find_subject(model, TOKENIZER)
    whole = read_text([subject], TOKENS[:50], {"all": analysis}, length=20, max_batch_size=1)["all"]
    assert analysis.starts == [0, 20, 40]
    parts = [read_everything(model, TOKENS[start : min(start + 20, 50)]) for start in (0, 20, 40)]
    for name in ("logits", "rows0", "visible"):
        np.testing.assert_allclose(whole[name], np.concatenate([part[name] for part in parts]), atol=1e-5)


def test_there_is_one_forward_pass_per_model_and_batch_whatever_is_asked():
    models = [own_model(), own_model(memory=False)]
    calls = []
    for model in models:
        model.register_forward_hook(lambda *_, model=model: calls.append(models.index(model)))
    subjects = [find_subject(model, TOKENIZER, name=str(index)) for index, model in enumerate(models)]
    wanted = [(), ("hidden",), ("logits", "order_scores"), ("hidden", "predict")]
    analyses = {str(wants): Lengths(wants) for wants in wanted}
    progress = []
    shapes = read_text(subjects, TOKENS, analyses, length=20, max_batch_size=4, on_progress=progress.append)
    assert calls == [0, 1] * 4  # windows 4, 4 and 2, then the rest of three tokens
    assert list(shapes.values()) == [[(4, 20), (4, 20), (2, 20), (1, 3)]] * 4
    assert progress == [80, 80, 40, 3]


def test_nothing_is_kept_or_computed_that_nobody_wants():
    model = own_model()
    lengths = Lengths()
    kept = []
    model.lm_head.register_forward_hook(lambda module, args, output: kept.append(output.shape[1]))
    read_text([find_subject(model, TOKENIZER)], TOKENS, {"it": lengths}, length=20)
    assert kept == [1, 1]
    reading = lengths.reading
    assert (reading.hidden, reading.logits, dict(reading.order_scores)) == ((), None, {})
    assert list(reading.gates) == list(reading.rows) == [0, 2]


def test_only_the_beginning_is_read_when_so_many_tokens_are_asked_for():
    assert read_everything(own_model(), max_tokens=33)["tokens"].tolist() == TOKENS[:33].tolist()
    assert read_everything(own_model(), TEXT, max_tokens=33)["tokens"].tolist() == TOKENS[:33].tolist()


def test_as_many_windows_are_read_at_once_as_the_budget_allows():
    subjects = [find_subject(own_model("streams"), TOKENIZER)]
    num_layers, streams, width, vocab = 3, 4, 32, len(TOKENIZER)
    hidden, rows, gates = (num_layers + 1) * streams * width * 4, 2 * 4 * 8, 2 * streams * 4
    assert bytes_per_token(subjects, [Lengths(["hidden"], scratch=70)]) == hidden + rows + gates + 70
    assert bytes_per_token(subjects, [Lengths(["logits"], 5), Lengths((), 9)]) == vocab * 4 + rows + gates + 9
    split, splitting = 2 * streams * 3 * 4, 4 * (3 * streams * width + 2 * streams * 24 + 24)
    assert bytes_per_token(subjects, [Lengths(["order_scores"])]) == rows + gates + split + splitting
    half = [find_subject(own_model("streams").bfloat16(), TOKENIZER)]
    assert bytes_per_token(half, [Lengths(["hidden"])]) == hidden / 2 + rows + gates
    each = bytes_per_token(subjects, [Lengths(["hidden", "logits"])])
    asked = {"it": Lengths(["hidden", "logits"])}
    shapes = read_text(subjects, TOKENS, asked, length=10, budget_bytes=each * 10 * 3 + 1)["it"]
    assert shapes[0] == (3, 10)
    assert choose_batch_size(subjects, [asked["it"]], length=10, budget_bytes=each * 10) == 1
    with pytest.raises(ConfigError, match="a length of at most 9, a larger budget"):
        choose_batch_size(subjects, [asked["it"]], length=10, budget_bytes=each * 10 - 1)


def test_memory_stays_within_the_budget_and_does_not_grow_with_the_text():
    models = [own_model("streams"), own_model(memory=False)]
    budget, alive = 600_000, []

    def nothing_is_alive(*_):
        assert all(reference() is None for reference in alive), "tensors of earlier windows are still alive"

    class Weigher(Analysis):
        wants = frozenset({"hidden", "logits"})

        def start(self, subjects):
            self.heaviest = self.batches = 0

        def update(self, readings):
            tensors = [tensor for reading in readings for tensor in (*reading.hidden, reading.logits)]
            alive[:] = map(weakref.ref, tensors)
            self.heaviest = max(self.heaviest, sum(tensor.nbytes for tensor in tensors))
            self.batches += 1

        def result(self):
            return self.batches, self.heaviest

    models[0].register_forward_pre_hook(nothing_is_alive)
    subjects = [find_subject(model, TOKENIZER, name=str(place)) for place, model in enumerate(models)]
    tokens = np.tile(TOKENS, 20)
    gc.disable()  # what is let go must be gone at once, not when the collector comes by
    try:
        batches, heaviest = read_text(subjects, tokens, {"it": Weigher()}, length=30, budget_bytes=budget)["it"]
    finally:
        gc.enable()
    assert batches > 20
    assert budget / 2 < heaviest <= budget


def test_hooks_are_removed_and_modes_put_back_even_after_an_error():
    model = attached_model().train()
    model.lm_head.eval()

    class Broken(Analysis):
        wants = frozenset({"hidden", "order_scores"})

        def update(self, readings):
            assert not readings[0].subject.model.training
            raise KeyError("broken")

    def hooks():
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    before = hooks()
    with pytest.raises(KeyError, match="broken"):
        read_text([find_subject(model, TOKENIZER)], TOKENS, {"it": Broken()}, length=20)
    assert hooks() == before
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_positions_that_are_not_finite_are_marked_and_the_pass_goes_on():
    model = own_model()
    tokens = np.concatenate([TOKENS[:27], TOKENIZER("R;S").input_ids, TOKENS[:30]])
    rows = read_everything(model, tokens)["rows2"]
    row = min(set(rows[28]) - set(rows[:20].flat) - set(rows[40:].flat))
    with torch.no_grad():
        model.model.memory_tables["2"].weight[int(row)] = torch.nan
    found = read_everything(model, tokens, length=20)
    broken = np.isnan(found["logits"]).any(-1)
    # Attention carries a NaN over all of its window, backwards too: a weight of 0 times NaN.
    assert broken[20:40].all() and broken.sum() == 20
    np.testing.assert_array_equal(found["finite"], ~broken)


def test_a_logit_that_is_not_finite_marks_its_position_alone():
    model = own_model()

    def spoil(module, args, output):
        output[:, 3, 5] = torch.nan

    model.lm_head.register_forward_hook(spoil)
    assert np.flatnonzero(~read_everything(model, TOKENS[:40])["finite"]).tolist() == [3, 23]


def test_infinities_are_not_finite_and_large_numbers_are():
    tensor = torch.tensor([[[60000.0, 60000.0], [torch.inf, 1.0], [0.0, -torch.inf], [1.0, torch.nan]]])
    assert not_finite(tensor.half()).tolist() == [[False, True, True, True]]


def test_dead_positions_are_inactive_and_segments_are_respected():
    dead, end = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
    model = own_model(segments=Segments(dead_tokens=(dead,), end_tokens=(end,)))
    a = int(TOKENS[0])
    found = read_everything(model, [a, a, a, a, dead, a, a, end, a, a])
    assert found["active"].tolist() == [True] * 4 + [False] + [True] * 5
    assert found["visible"].tolist() == [1, 2, 3, 3, 0, 1, 2, 3, 1, 2]
    assert not found["gates0"][4].any()


def test_visible_tokens_are_those_back_to_the_start_of_the_segment():
    generator = np.random.default_rng(0)
    codes = np.where(generator.random((40, 30)) < 0.1, -1, generator.integers(0, 4, (40, 30)) * 4)
    codes = np.where(codes < 0, -1, codes | (generator.random(codes.shape) < 0.2) | (codes * 0 + 2) * (codes % 3 == 1))
    expected = np.zeros_like(codes)
    for row, values in enumerate(codes.tolist()):
        for place, code in enumerate(values):
            if code < 0:
                continue
            before = expected[row, place - 1] if place else 0
            stops = not before or values[place - 1] & 2 or code & 1
            expected[row, place] = 1 if stops else before + 1
    assert expected.max() > 4
    np.testing.assert_array_equal(visible_tokens(torch.from_numpy(codes), 4), expected.clip(max=4))


def test_models_without_memory_have_neither_rows_nor_ngrams():
    lengths = Lengths()
    read_text([find_subject(small_model(), TOKENIZER)], TOKENS, {"it": lengths}, length=20)
    reading = lengths.reading
    assert (dict(reading.rows), dict(reading.gates), reading.codes) == ({}, {}, None)
    assert bool(reading.active.all()) and not bool(reading.visible.any())


def test_an_analysis_that_does_not_apply_is_reported_and_the_others_run():
    class Never(Analysis):
        def start(self, subjects):
            return f"not for {subjects[0].name}"

        def update(self, readings):
            raise AssertionError

    model = own_model()
    found = read_text([find_subject(model, TOKENIZER)], TOKENS, {"a": Never(), "b": Lengths()}, length=300)
    assert found == {"a": NotApplicable("not for EngramForCausalLM"), "b": [(1, 203)]}
    model.register_forward_hook(lambda *_: pytest.fail("nothing applies, so nothing is computed"))
    assert list(read_text([find_subject(model, TOKENIZER)], TOKENS, {"a": Never()}, length=20)) == ["a"]


def test_what_relies_on_the_head_is_left_out_where_the_head_is_not_understood():
    model = own_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    model.register_forward_hook(lambda module, args, output: output.__class__(logits=output.logits * 1.5))
    found = read_text(
        [find_subject(model, TOKENIZER, name="odd")],
        TOKENS,
        {"lens": Lengths(["predict"]), "other": Lengths(["hidden"])},
        length=20,
    )
    assert "the last layer of odd" in found["lens"].reason
    assert len(found["other"]) == 2


def test_memory_that_is_switched_off_halfway_is_noticed():
    model = attached_model()
    subject = find_subject(model, TOKENIZER)
    adapter = engram_lm.adapt.attached_adapters(model)["default"]
    with adapter.disabled(), pytest.raises(MismatchError, match="did not read the memory of block 0"):
        read_text([subject], TOKENS, {"it": Lengths()}, length=20)


def test_models_of_different_vocabularies_are_refused_with_both_digests(other_tokenizer):
    model = small_model()
    subjects = [find_subject(model, TOKENIZER, name="a"), find_subject(model, other_tokenizer, name="b")]
    with pytest.raises(MismatchError, match=r"a has [0-9a-f]{64}, b has [0-9a-f]{64}"):
        read_text(subjects, TOKENS, {"it": Lengths()}, length=20)


def test_impossible_requests_are_refused():
    subject = find_subject(small_model(), TOKENIZER)

    def read(tokens=TOKENS, subjects=(subject,), analyses=None, length=20, **options):
        read_text(subjects, tokens, analyses or {"it": Lengths()}, length=length, **options)

    for empty in ("", [], np.zeros(0, np.int64)):
        with pytest.raises(DataError, match="at least one token"):
            read(empty)
    with pytest.raises(DataError, match=r"the shape \[1, 203\]"):
        read(TOKENS[None])
    with pytest.raises(TokenError, match="to 320, LlamaForCausalLM has 320"):
        read([3, 320])
    with pytest.raises(TokenError, match="from -1"):
        read([3, -1])
    with pytest.raises(TokenError, match="integers"):
        read([3.5])
    with pytest.raises(TokenError, match="integers"):
        read([[3, 4]])
    with pytest.raises(ConfigError, match="length is a whole number from 1, got 0"):
        read(length=0)
    with pytest.raises(ConfigError, match="told apart by their names"):
        read(subjects=[subject, subject])
    with pytest.raises(ConfigError, match="at least one"):
        read(subjects=[])
    with pytest.raises(ConfigError, match="wants 'attention'; known are gates, hidden"):
        read(analyses={"it": Lengths(["attention"])})
    with pytest.raises(ConfigError, match="learned 256 positions and cannot see 257"):
        read(subjects=[find_subject(small_model("gpt2"), TOKENIZER)], length=257)


class Windows(Analysis):
    """Keeps what a text is read as."""

    def start(self, subjects):
        self.windows, self.places, self.starts = [], [], []

    def update(self, readings):
        self.windows += readings[0].tokens.tolist()
        self.places += readings[0].places.tolist()
        self.starts.append(readings[0].start)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_window_begins_as_the_tokenizer_begins_a_text(batch_size):
    tokenizer = with_template(TOKENIZER, "<s> $A")
    model, bos = small_model(), tokenizer.bos_token_id
    text, plain = TEXT[:100], TOKENIZER(TEXT[:100]).input_ids
    for tokens, first in ((text, 1), (np.array(plain), 0)):
        seen, done = Windows(), []
        read_text(
            [find_subject(model, tokenizer)], tokens, {"it": seen}, length=8, max_batch_size=batch_size,
            on_progress=done.append,
        )  # fmt: skip
        assert {window[0] for window in seen.windows} == {bos} and {len(window) for window in seen.windows[:-1]} == {8}
        assert [token for window in seen.windows for token in window[1:]] == plain
        assert [place for places in seen.places for place in places[1:]] == list(range(first, first + len(plain)))
        assert [places[0] for places in seen.places] == [-1 + first, *[-1] * (len(seen.places) - 1)]
        assert sum(done) == len(plain) + first and seen.starts[:2] == [0, 8 * batch_size]
    with pytest.raises(DataError, match="the text has no tokens"):
        read_text([find_subject(model, tokenizer)], "", {"it": Windows()}, length=8)
    with pytest.raises(ConfigError, match="length is a whole number from 2"):
        read_text([find_subject(model, tokenizer)], text, {"it": Windows()}, length=1)
