"""CKA of a text in minibatches is the unbiased one, and says which layers are alike."""

import json

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.analysis.looking import layer_similarity
from tests.small_model import BACKBONE, MEMORY, VARIANTS

import engram_lm
from engram_lm.analysis import Analysis, find_subject, read_text
from engram_lm.analysis.cka.cka import Cka, CkaMap, centered_gram, soft_alignment
from engram_lm.analysis.protocol import NotApplicable
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.tokenizing import text_tokens

TOKENS = np.random.default_rng(0).permutation(text_tokens(TOKENIZER, TEXT))[:300]
LENGTH = 20


def own_model(variant="plain"):
    torch.manual_seed(0)
    backbone, changes = VARIANTS[variant]
    memory = engram_lm.EngramConfig(**{**MEMORY, **changes})
    config = engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, memory, **{**BACKBONE, **backbone})
    model = engram_lm.EngramForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


class Kept(Analysis):
    """Keeps all hidden states of a short text: by model, one [P, S, D] for each entry."""

    wants = frozenset({"hidden"})

    def start(self, subjects):
        self.states = {subject.name: [[] for _ in range(subject.num_layers + 1)] for subject in subjects}

    def update(self, readings):
        for reading in readings:
            for place, hidden in zip(self.states[reading.subject.name], reading.hidden, strict=True):
                place.append(hidden.flatten(0, 1).double().numpy())

    def result(self):
        return {name: [np.concatenate(parts) for parts in entries] for name, entries in self.states.items()}


def hidden_states(models, tokens=TOKENS):
    subjects = [find_subject(model, TOKENIZER, name=name) for name, model in models.items()]
    return read_text(subjects, tokens, {"it": Kept()}, length=LENGTH)["it"]


def hsic(x, y):
    """Song et al. 2012, equation 5, entry by entry."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    trace = sum(k[i, j] * m[j, i] for i in range(n) for j in range(n))
    cross = sum(k[i].sum() * m[i].sum() for i in range(n))
    return (trace + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def cka_map(rows, columns, parts=(slice(None),)):
    """The ratio of HSIC summed over minibatches, [R, C]."""
    flat = [[entry.reshape(len(entry), -1) for entry in model] for model in (rows, columns)]

    def total(x, y):
        return sum(hsic(x[part], y[part]) * len(x[part]) * (len(x[part]) - 3) for part in parts)

    return np.array([[total(x, y) / np.sqrt(total(x, x) * total(y, y)) for y in flat[1]] for x in flat[0]])


@pytest.fixture(scope="module")
def pair():
    """A baseline and a model of more streams, and their hidden states."""
    models = {"plain": small_model(), "memory": own_model("streams")}
    return models, hidden_states(models)


def test_the_product_of_centered_grams_is_the_unbiased_hsic():
    generator = np.random.default_rng(0)
    x, y = generator.normal(3, 1, (9, 4)), generator.normal(-1, 2, (9, 6))
    y[:, :2] += x[:, :2]
    grams = [centered_gram(torch.from_numpy(z)) for z in (x, y)]
    assert float(grams[0] @ grams[1]) / (9 * 6) == pytest.approx(hsic(x, y), rel=1e-10)


def test_hsic_of_independent_samples_is_zero_on_average_with_few_samples_too():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([
        float(torch.dot(*(centered_gram(torch.randn(6, 3, generator=generator)) for _ in "xy"))) for _ in range(4000)
    ])  # fmt: skip
    assert abs(values.mean()) < 3 * values.std() / 4000**0.5


def test_one_large_channel_costs_no_precision():
    states = torch.randn(64, 8)
    shifted = states + torch.tensor([0.0, 4096.0, *[0.0] * 6])
    for other in (shifted, shifted - torch.tensor([0.0, 4096.0, *[0.0] * 6])):
        gram, expected = centered_gram(other), centered_gram(other - other.double().mean(0))
        torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-9)


def test_one_minibatch_is_the_unbiased_value_of_the_whole_text(pair):
    models, states = pair
    found = layer_similarity(models, TOKENIZER, TOKENS[:100], length=LENGTH)
    (result,) = found.maps
    head = {name: [entry[:100] for entry in entries] for name, entries in states.items()}
    assert (found.num_minibatches, found.num_positions, result.similarity.shape) == (1, 100, (4, 4))
    assert (result.row_model, result.column_model) == ("plain", "memory")
    assert (result.row_memory_blocks, result.column_memory_blocks) == ((), (0, 2))
    np.testing.assert_allclose(result.similarity, cka_map(head["plain"], head["memory"]), rtol=1e-6)
    np.testing.assert_allclose(result.within_rows, cka_map(head["plain"], head["plain"]), rtol=1e-6)


def test_minibatches_are_summed_and_the_last_one_is_not_all_that_counts(pair):
    models, states = pair
    options = {"length": LENGTH, "minibatch_size": 25, "pool_size": 60}
    found = layer_similarity(models, TOKENIZER, TOKENS[:107], **options)
    # The pool was full once and half full at the end.
    parts = [
        begin + part.numpy()
        for begin, size, seed in ((0, 60, 0), (60, 47, 3))
        for part in torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tensor_split(-(-size // 25))
    ]
    assert [len(part) for part in parts] == [20, 20, 20, 24, 23]
    assert (found.num_minibatches, found.num_positions, found.pool_size) == (5, 107, 60)
    np.testing.assert_allclose(found.maps[0].similarity, cka_map(states["plain"], states["memory"], parts), rtol=1e-6)
    last = cka_map(states["plain"], states["memory"], parts[-1:])
    assert np.abs(found.maps[0].similarity - last).max() > 0.05
    again = layer_similarity(models, TOKENIZER, TOKENS[:107], **options)
    np.testing.assert_array_equal(found.maps[0].similarity, again.maps[0].similarity)


def test_many_minibatches_come_close_to_the_whole_text_because_each_sees_all_of_it(pair):
    models, _ = pair
    tokens = np.random.default_rng(1).permutation(np.tile(TOKENS, 5))

    def similarity(**options):
        return layer_similarity(models, TOKENIZER, tokens, length=LENGTH, **options).maps[0].similarity

    whole = similarity(minibatch_size=1500)
    assert np.abs(similarity(minibatch_size=50) - whole).max() < 0.02
    # The positions of a window have much in common. Minibatches of neighbours would say something else:
    assert np.abs(similarity(minibatch_size=50, pool_size=50) - whole).max() > 0.1


def test_the_map_does_not_depend_on_how_many_windows_are_read_at_once(pair):
    subjects = [find_subject(model, TOKENIZER, name=name) for name, model in pair[0].items()]

    def read(batch_size, positions):
        analysis = Cka(minibatch_size=15, pool_size=40, one_in=2, positions=positions, min_count=2)
        found = read_text(subjects, TOKENS, {"it": analysis}, length=LENGTH, max_batch_size=batch_size)["it"]
        return found.num_positions, found.maps[0].similarity

    for positions in ("all", "ngrams", "word_ends"):
        (count, together), (other, alone) = read(16, positions), read(1, positions)
        assert count == other > 10
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


def test_rotation_and_scale_change_nothing_and_the_rest_does(pair):
    _, states = pair
    x = torch.from_numpy(states["plain"][2][:, 0])
    rotation = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]

    def cka(y):
        a, b = centered_gram(x), centered_gram(y)
        return float(a @ b / (a.norm() * b.norm()))

    assert cka(x) == pytest.approx(1)
    assert cka(3.5 * x @ rotation + 7) == pytest.approx(1)
    assert cka(x @ torch.diag(torch.linspace(0, 2, 32, dtype=torch.float64))) < 0.99


def test_a_model_is_compared_with_itself_where_it_is_alone():
    found = layer_similarity(small_model(), TOKENIZER, TOKENS, length=LENGTH)
    (result,) = found.maps
    assert result.row_model == result.column_model == "LlamaForCausalLM"
    np.testing.assert_allclose(np.diag(result.similarity), 1)
    np.testing.assert_allclose(result.similarity, result.similarity.T)
    np.testing.assert_allclose(result.gain(2), 0, atol=1e-12)


def test_the_baseline_is_the_first_model_without_memory_unless_it_is_named(pair):
    models = {"memory": pair[0]["memory"], "plain": pair[0]["plain"], "third": small_model("qwen3")}

    def pairs(**options):
        found = layer_similarity(models, TOKENIZER, TOKENS, length=LENGTH, **options)
        return [(one.row_model, one.column_model) for one in found.maps]

    assert pairs() == [("plain", "memory"), ("plain", "third")]
    assert pairs(baseline="third") == [("third", "memory"), ("third", "plain")]
    with pytest.raises(ConfigError, match="no model is called 'x'; there are memory, plain, third"):
        pairs(baseline="x")


def test_streams_are_compared_side_by_side(pair):
    models, states = pair
    found = layer_similarity(models, TOKENIZER, TOKENS[:60], length=LENGTH)
    expected = cka_map([entry[:60] for entry in states["plain"]], [entry[:60] for entry in states["memory"]])
    np.testing.assert_allclose(found.maps[0].similarity, expected, rtol=1e-4)


def test_the_soft_alignment_is_the_centroid_of_the_most_similar_rows():
    similarity = np.array([[0.9, 0.1, -0.5], [0.6, 0.2, -0.1], [0.3, 0.8, -0.2], [0.1, 0.4, -0.3]])
    found = soft_alignment(similarity, 2)
    np.testing.assert_allclose(found[:2], [0.6 / 1.5, (2 * 0.8 + 3 * 0.4) / 1.2])
    assert np.isnan(found[2])
    assert soft_alignment(similarity, 1)[:2].tolist() == [0, 2]
    mixed = np.array([[-0.5], [0.5], [-0.1], [-0.2]])
    assert soft_alignment(mixed, 3).tolist() == [1.0]  # what is below 0 draws nothing away
    np.testing.assert_array_equal(soft_alignment(similarity, 9), soft_alignment(similarity, 4))
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        soft_alignment(similarity, 0)


def test_the_gain_is_measured_against_a_control_that_saturates_as_much():
    depth = np.arange(13)
    within = np.exp(-np.abs(depth[:, None] - depth) / 3)
    ahead = np.exp(-np.abs(depth[:, None] - np.minimum(depth + 3, 12)) / 3)  # each layer is like one three layers on
    result = CkaMap(
        row_model="a", column_model="b", row_memory_blocks=(), column_memory_blocks=(1,), similarity=ahead,
        within_rows=within,
    )  # fmt: skip
    assert result.control()[12] < 11 < result.control(1)[12] == 12  # five layers cannot lie at the end
    np.testing.assert_allclose(result.gain()[3:8], 3, atol=0.01)
    assert abs(result.gain()[12]) < 1e-9
    halved = CkaMap(
        row_model="a", column_model="b", row_memory_blocks=(), column_memory_blocks=(1,), similarity=within[:, ::2],
        within_rows=within,
    )  # fmt: skip
    np.testing.assert_allclose(halved.gain(), 0, atol=1e-12)  # a model of half the layers, at the same relative depth
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["top_k"] == 5 and len(plain["gain"]) == len(plain["alignment"]) == 13


def test_positions_that_are_not_finite_are_left_out_for_all_models_and_counted(pair):
    models = {"plain": small_model(), "memory": pair[0]["memory"]}

    def spoil(module, args, output):
        output = output.clone()
        output[:, -1, 5] = torch.nan
        return output

    models["plain"].model.layers[2].register_forward_hook(spoil)
    found = layer_similarity(models, TOKENIZER, TOKENS[:100], length=LENGTH)
    assert (found.num_not_finite, found.num_positions) == (5, 95)
    kept = np.arange(100) % LENGTH != LENGTH - 1
    states = hidden_states(models, TOKENS[:100])
    expected = cka_map(*([entry[kept] for entry in states[name]] for name in ("plain", "memory")))
    np.testing.assert_allclose(found.maps[0].similarity, expected, rtol=1e-6)


def test_a_layer_that_says_the_same_everywhere_is_like_none():
    model = small_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(320, 32))
    found = layer_similarity(model, TOKENIZER, TOKENS, length=LENGTH)
    assert np.isnan(found.maps[0].similarity[0]).all()
    assert found.to_dict()["maps"][0]["similarity"][0] == [None] * 4


def test_models_of_different_vocabularies_are_refused_with_both_digests(other_tokenizer):
    models = {"a": small_model(), "b": small_model("qwen3")}
    digests = r"a has [0-9a-f]{64}, b has [0-9a-f]{64}; analyze them one after the other"
    with pytest.raises(MismatchError, match=digests):
        layer_similarity(models, {"a": TOKENIZER, "b": other_tokenizer}, TEXT)


def test_too_few_positions_and_impossible_requests_are_refused():
    model = small_model()
    with pytest.raises(MismatchError, match="at least 4 positions with finite hidden states, and the text has 3"):
        layer_similarity(model, TOKENIZER, TOKENS[:3])
    found = read_text([find_subject(model, TOKENIZER)], "a cat", {"it": Cka(positions="names")}, length=9)["it"]
    assert isinstance(found, NotApplicable) and "(names;" in found.reason
    assert layer_similarity(model, TOKENIZER, TOKENS[:4]).num_positions == 4
    with pytest.raises(ConfigError, match="at least 4 positions, not 3"):
        Cka(minibatch_size=3)
    with pytest.raises(DataError, match="at least one token"):
        layer_similarity(model, TOKENIZER, "")
    with pytest.raises(ConfigError, match="a larger budget"):
        layer_similarity(model, TOKENIZER, TOKENS, budget_bytes=Cka().held_bytes([find_subject(model, TOKENIZER)]))


def test_a_long_text_is_thinned_out_as_asked_for():
    tokens = np.tile(TOKENS, 60)
    assert layer_similarity(small_model(), TOKENIZER, tokens, length=200, one_in=2).num_positions == 9_000
    found = layer_similarity(small_model(), TOKENIZER, tokens, length=200, positions=np.ones(18_000, bool))
    assert found.num_positions == 18_000


def test_what_is_held_stays_within_what_is_stated_and_results_can_be_asked_for_again(pair):
    subjects = [find_subject(model, TOKENIZER, name=name) for name, model in pair[0].items()]

    class Weighed(Cka):
        def update(self, readings):
            with torch.profiler.profile(profile_memory=True) as profile:
                super().update(readings)
            changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            sizes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
            self.peak = np.cumsum(sizes).max()

    analysis = Weighed(minibatch_size=96, pool_size=192)
    read_text(subjects, np.tile(TOKENS, 4), {"it": analysis}, length=100)
    stated = analysis.held_bytes(subjects) + 1200 * analysis.scratch_bytes_per_token(subjects)
    assert stated / 2 < analysis.peak < stated
    # Asking for the result takes nothing from what waits and adds nothing to what was summed.
    first, second = analysis.result(), analysis.result()
    assert first.num_positions == second.num_positions == 1200
    np.testing.assert_array_equal(first.maps[0].similarity, second.maps[0].similarity)
