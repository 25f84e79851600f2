"""Candidates for a better layer, each against its formula written as loops, and in a model: counted, decoded, saved."""

import math

import numpy as np
import pytest
import torch
from tests.small_model import BACKBONE, TEXT, perturbed
from torch.utils.flop_counter import FlopCounterMode

from engram_lm.errors import ConfigError
from engram_lm.hashing.counting import frequent_ngrams, ngram_rows
from engram_lm.memory import EngramConfig
from engram_lm.memory.interface import build_layer
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.sizes import model_sizes
from engram_lm.studies.rivals.addresses import fingerprints, scattered
from engram_lm.tables import ParameterTable
from engram_lm.training.data.tokenizer import train_tokenizer

GEOMETRY = {"hidden_size": 32, "layers": (1,), "num_heads": 2, "memory_dim": 24, "rows_per_head": 97}
CANDIDATES = {
    "per_order": {},
    "sink": {},
    "segment_gate": {},
    "factor_engram": {},
    "slots": {"memory_dim": 72, "layer_options": {"slots": 3, "chosen": 2}},
    "back_off": {"layer_options": {"filter_bits": 4096}},
    "pooled": {},
    "counted_gate": {"layer_options": {"count_bytes": 1024}},
}


def built(name, num_streams=1, **options):
    """A layer and its table, with every weight away from its first value, and something to read."""
    config = EngramConfig(**{**GEOMETRY, "layer": name, **CANDIDATES[name], "num_streams": num_streams, **options})
    torch.manual_seed(0)
    layer = build_layer(config, ParameterTable(config.num_table_rows()[0], config.head_dim, gradient="dense"))
    perturbed(layer, 0.5)
    torch.nn.init.normal_(layer.table.weight)
    hidden = torch.randn(2, 5, num_streams, 32)
    rows = torch.randint(layer.table.num_rows, (2, 5, config.num_heads_total))
    active = torch.ones(2, 5, dtype=torch.bool)
    active[0, :2] = False
    return layer, hidden, rows, active


def rms(x, weight=1.0):
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def signed_sqrt(x):
    return torch.sign(x) * torch.sqrt(x.abs())


def each_token(layer, hidden, rows, active, expected_of):
    """Compare a layer without its convolution with what a function gives for each token and stream."""
    found = layer(hidden, rows, active=active)
    vectors = layer.table.gather(rows)  # [B, L, H, E]
    for place in np.ndindex(*hidden.shape[:3]):
        expected = expected_of(hidden[place], vectors[place[:2]], place[2]) if active[place[:2]] else torch.zeros(32)
        torch.testing.assert_close(found[place], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("name", ["per_order", "sink"])
def test_each_order_has_its_own_key_value_and_gate(name, num_streams):
    layer, hidden, rows, active = built(name, num_streams, kernel_size=0)
    weight = layer.key_value.weight

    def expected(h, read, stream):
        scores, values = [], []
        for order in range(2):
            own = weight[:, order * 12 : (order + 1) * 12]  # columns of the order's two heads
            part = read[2 * order : 2 * order + 2].flatten()
            key, value = own[32 * stream : 32 * (stream + 1)] @ part, own[32 * num_streams :] @ part
            query = rms(h, layer.query_norm[stream])
            scores.append(signed_sqrt(query @ rms(key, layer.key_norm[stream]) / math.sqrt(32)))
            values.append(value)
        if name == "per_order":
            shares = [1 / (1 + torch.exp(-score)) for score in scores]
        else:
            shares = [torch.exp(score) / (1 + sum(map(torch.exp, scores))) for score in scores]
        return sum(share * value for share, value in zip(shares, values, strict=True))

    each_token(layer, hidden, rows, active, expected)


@pytest.mark.parametrize("name", ["per_order", "sink"])
def test_with_a_single_order_it_is_the_paper_s_layer(name):
    layer, hidden, rows, active = built(name, 2, orders=(3,), memory_dim=12)
    paper = build_layer(EngramConfig(**{**layer.config.to_dict(), "layer": "engram"}), layer.table)
    paper.load_state_dict(layer.state_dict())
    theirs = paper(hidden, rows, active=active, return_gates=True)
    for found, expected in zip(layer(hidden, rows, active=active, return_gates=True), theirs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_each_head_has_its_own_gate(num_streams):
    layer, hidden, rows, active = built("segment_gate", num_streams, kernel_size=0)

    def expected(h, read, stream):
        gates = torch.sigmoid(layer.query.weight @ rms(h, layer.query_norm[stream]))
        return layer.value.weight @ torch.cat([gate * row for gate, row in zip(gates, read, strict=True)])

    each_token(layer, hidden, rows, active, expected)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_factor_engram_is_its_published_formula(num_streams):
    layer, hidden, rows, active = built("factor_engram", num_streams, kernel_size=0)
    dictionary = layer.dictionary.weight  # one row for each coefficient

    def expected(h, read, stream):
        q = rms(layer.query.weight @ rms(h, layer.query_norm[stream]))
        z, e = read.flatten(), torch.zeros(dictionary.shape[1])
        for coefficient, entry in zip(z, dictionary, strict=True):
            e = e + coefficient * torch.sigmoid(entry @ q / math.sqrt(len(q))) * entry
        return layer.value.weight @ e

    each_token(layer, hidden, rows, active, expected)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_the_best_slots_of_a_row_are_mixed_for_the_paper_s_layer(num_streams):
    layer, hidden, rows, active = built("slots", num_streams)
    read, mixed = layer.table.gather(rows), torch.zeros(2, 5, 24)
    for b, t in np.ndindex(2, 5):
        scores = (layer.router.weight @ rms(hidden[b, t].mean(0))).view(4, 3)
        for head in range(4):
            slots, best = read[b, t, head].view(3, 6), sorted(range(3), key=lambda j: -scores[head, j])[:2]
            total = sum(torch.exp(scores[head, j]) for j in best)
            mixed[b, t, 6 * head : 6 * head + 6] = sum(torch.exp(scores[head, j]) / total * slots[j] for j in best)
    paper = EngramConfig(**{**layer.config.to_dict(), "layer": "engram", "layer_options": {}, "memory_dim": 24})
    plain = build_layer(paper)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "router.weight"})
    expected = plain(hidden, mixed, active=active)
    torch.testing.assert_close(layer(hidden, rows, active=active), expected, atol=1e-4, rtol=1e-4)


def test_every_row_of_a_pooled_table_is_read_and_an_n_gram_always_reads_the_same():
    layer, _, _, _ = built("pooled")
    rows = torch.stack([torch.randint(97, (4000,)) + 97 * head for head in range(4)], dim=-1)[None]
    seen = []
    layer.table.gather = lambda wanted: seen.append(wanted) or torch.zeros(*wanted.shape, 6)
    layer.read(rows)
    layer.read(rows.flip(1))
    first, again = seen
    assert torch.equal(first, again.flip(1))
    for column in first[0].T:
        counts = torch.bincount(column, minlength=layer.table.num_rows)
        assert (counts > 0).float().mean() > 0.99 and counts.max() < 40  # 10 on average


def test_fingerprints_tell_n_grams_apart_and_scatter_them_evenly():
    rows = torch.cartesian_prod(torch.arange(97), torch.arange(97) + 97)
    found = fingerprints(torch.cat([rows, rows.flip(0)], dim=-1), 2)
    assert found.shape == (97 * 97, 2) and len(found[:, 0].unique()) == 97 * 97
    assert torch.equal(found[:, 0], found[:, 1].flip(0))
    # The finalizer of splitmix64 in plain Python.
    mask, number = (1 << 64) - 1, 12345
    mixed = (number + 3 * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    assert int(scattered(torch.tensor([number]), 2)) & mask == mixed ^ (mixed >> 31)


def test_an_n_gram_that_is_not_frequent_reads_rows_of_the_bigram_inside_it():
    tokenizer = train_tokenizer([TEXT], 300)
    memory = EngramConfig(**{**GEOMETRY, "layer": "back_off", "layer_options": {"filter_bits": 1024}})
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory, **BACKBONE))
    layer, spec = model.model.layers[1].memory, model.hash_spec
    generator = np.random.default_rng(0)
    common, rare = generator.integers(20, 280, 3), generator.integers(2, 14, 5000)
    text = np.concatenate([np.tile(common, 20), rare])
    before = layer.known.clone()
    layer.prepare(spec, text)
    # At most one of 8 bits for each N-gram that was put in: 128 of them, and those that occur once are left out.
    assert not before.any() and 0 < sum(int(word).bit_count() & 63 for word in layer.known) < 1024
    counted = frequent_ngrams(spec, text, num_ngrams=128)[3]
    rows = torch.from_numpy(spec.rows(text[None], 1))
    read = layer.backed_off(rows)
    assert torch.equal(read[..., :2], rows[..., :2])  # bigrams are always known
    is_own = (read == rows).all(-1)[0].numpy()
    frequent = torch.from_numpy(ngram_rows(spec, counted.first(int((counted.counts > 1).sum())), 1))
    known = (rows[0][:, None, 2:] == frequent[None]).all(-1).any(-1).numpy()
    assert is_own[known].all() and 0 < is_own[~known].mean() < 0.1  # a few pass for known
    # Others read rows of their own heads' ranges that depend on the bigram alone.
    sizes, starts = spec.primes[0], spec.offsets(1)
    for column in (2, 3):
        inside = read[..., column] - starts[column]
        assert inside.min() >= 0 and inside.max() < sizes[column]
    bigrams = {}
    for place in np.flatnonzero(~is_own):
        bigram = tuple(rows[0, place, :2].tolist())
        assert bigrams.setdefault(bigram, read[0, place, 2:].tolist()) == read[0, place, 2:].tolist()
    assert len({tuple(one) for one in bigrams.values()}) > 0.9 * len(bigrams)


def test_counts_of_frequent_n_grams_are_added_to_the_score_of_the_gate(tokenizer):
    memory = EngramConfig(**{**GEOMETRY, "layer": "counted_gate", **CANDIDATES["counted_gate"], "kernel_size": 0})
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory, **BACKBONE))
    layer, spec = model.model.layers[1].memory, model.hash_spec
    perturbed(layer, 0.5)
    text = np.concatenate([np.tile([30, 40, 50], 20), np.random.default_rng(0).integers(60, 280, 300)])
    layer.prepare(spec, text)
    rows, hidden = torch.from_numpy(spec.rows(text[None], 1)), torch.randn(1, len(text), 32)
    with torch.no_grad():
        vectors = layer.read(rows)
        assert vectors[0, 20:40, 24:].eq(5).all()  # 20 times, or 19: a logarithm of 4, and one more
        assert vectors[0, 80:, 24:].lt(5).float().mean() > 0.95  # a few share their places
        plain = build_layer(EngramConfig(**GEOMETRY, kernel_size=0), layer.table)
        plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "count" not in name})
        _, theirs = plain(hidden, vectors[..., :24], return_gates=True)
        _, found = layer(hidden, rows, return_gates=True)
    term = (vectors[..., 24:] / 8 * layer.count_weight).sum(-1, keepdim=True) + layer.count_bias
    torch.testing.assert_close(found, torch.sigmoid(torch.logit(theirs) + term))
    assert (found - theirs).abs().max() > 0.05


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_model_with_it_counts_itself_decodes_and_saves(name, num_streams, tokenizer, tmp_path):
    memory = EngramConfig(
        **{**GEOMETRY, "layer": name, **CANDIDATES[name], "value_init": "zero", "num_streams": num_streams}
    )
    backbone = {**BACKBONE, "num_streams": num_streams}
    torch.manual_seed(0)
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory, **backbone)).eval()
    layer = model.model.layers[1].memory
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        assert not layer(torch.randn(2, 20, num_streams, 32), torch.zeros(2, 20, 4, dtype=torch.int64)).any()
        layer.prepare(model.hash_spec, ids.flatten().repeat(2).numpy())
        perturbed(model)
        # Of what is known of the text, four bytes count as one number.
        filters = sum(buffer.numel() * buffer.element_size() // 4 for buffer in layer.buffers())
        total = sum(weight.numel() for weight in model.parameters()) + filters
        assert total == model_sizes(model.config, context=1).total
        whole, first = model(ids).logits, model(ids[:, :12], use_cache=True)
        rest = [first.logits]
        for position in range(12, 20):
            step = model(ids[:, position : position + 1], past_key_values=first.past_key_values)
            rest.append(step.logits)
        torch.testing.assert_close(torch.cat(rest, 1), whole, atol=2e-4, rtol=1e-4)
        model.save_pretrained(tmp_path)
        assert torch.equal(EngramForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, whole)


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_training_compiles_is_one_graph_with_the_same_gradients(name):
    layer, hidden, rows, active = built(name)
    vectors = layer.read(rows).detach().requires_grad_()
    found = []
    for respond in (type(layer).respond, torch.compile(type(layer).respond, backend="aot_eager", fullgraph=True)):
        update = respond(layer, hidden, vectors, None, active, None).update
        weights = [vectors, *layer.parameters()]
        found.append([update, *torch.autograd.grad(update.square().sum(), weights, allow_unused=True)])
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("name", CANDIDATES)
def test_counted_operations_are_at_least_those_of_its_products_and_not_many_more(name):
    layer, hidden, rows, _ = built(name, hidden_size=32, num_streams=1, kernel_size=0)
    with FlopCounterMode(display=False) as counter:
        layer(hidden, rows)
    products, counted = counter.get_total_flops(), 10 * layer.config.flops_per_token()
    assert products <= counted <= 1.35 * products


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("per_order", {"bias": True}, "without a bias"),
        ("sink", {"gate": "none"}, "another gate"),
        ("slots", {"layer_options": {"slots": 5, "chosen": 2}}, "do not divide into 5 slots"),
        ("slots", {"layer_options": {"slots": 3, "chosen": 4}}, "4 are chosen"),
        ("back_off", {"orders": (2,)}, "two orders"),
        ("back_off", {"layers": (0, 1)}, "one layer"),
        ("back_off", {"layer_options": {"filter_bits": 33}}, "multiple of 32"),
        ("counted_gate", {"layer_options": {"count_bytes": 6}}, "multiple of 4 bytes"),
        ("counted_gate", {"occupancy": "rows"}, "occupancy='rows'"),
    ],
)
def test_what_a_layer_does_not_have_is_refused(name, options, message):
    config = EngramConfig(**{**GEOMETRY, "layer": name, **CANDIDATES[name], **options})
    with pytest.raises(ConfigError, match=message):
        config.num_parameters()
    with pytest.raises(ConfigError, match=message):
        build_layer(config)
