"""Rows from hidden states: against plain loops, on real models, and what must not change."""

import copy
import json

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm
from engram_lm.adapt import transfer
from engram_lm.adapt.decoder import find_decoder
from engram_lm.adapt.transfer import mean_states, reduced, transfer_rows
from engram_lm.errors import ConfigError, DataError, TokenError
from engram_lm.hashing import Segments
from engram_lm.hashing.counting import frequent_ngrams

DEAD, END = 40, 50


def text(num_tokens=600, seed=0):
    """Few words in many orders, with dead tokens, ends of segments and what stands for nothing among them."""
    generator = np.random.default_rng(seed)
    tokens = (generator.random(num_tokens) ** 2 * 30 + 35).astype(np.int64)
    # The pad token as text reads like a dead position, but is alive.
    tokens = np.where(generator.random(num_tokens) < 0.15, TOKENIZER.pad_token_id, tokens)
    return np.where(generator.random(num_tokens) < 0.05, DEAD, tokens)


@pytest.fixture
def attached(config):
    def build(name="llama", dtype=torch.float32, model_dtype=torch.float32, **changes):
        model = small_model(name).to(model_dtype)
        torch.manual_seed(5)
        segments = Segments(end_tokens=(END,), dead_tokens=(DEAD,))
        return model, engram_lm.attach(model, TOKENIZER, config(**changes), dtype=dtype, segments=segments)

    return build


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(text(40, seed=9))[None]).logits


def ngram_at(spec, tokens, t, order):
    """Canonical tokens that a position's N-gram is made of, oldest first."""
    seen = [int(spec.token_map.canonical[tokens[t]])]
    while len(seen) < order and t >= len(seen) and tokens[t - len(seen)] not in (DEAD, END):
        seen.append(int(spec.token_map.canonical[tokens[t - len(seen)]]))
    return tuple([spec.fill] * (order - len(seen)) + seen[::-1])


def states_by_plain_loops(model, spec, tokens, place, length, beginning=()):
    """Sum and count of the hidden states that N-grams (order and canonical tokens) end with, one window at a time."""
    length -= len(beginning)
    overlap, measured, found = max(1, length // 8), max(1, length // 8), {}
    layer = model.model.layers[place]
    seen = []
    hook = (
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
        if place == -1
        else layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    )
    while measured < len(tokens):
        stop = min(max(measured - overlap + length, length), len(tokens))
        start = max(0, stop - length)
        with torch.no_grad():
            model(input_ids=torch.tensor([[*beginning, *tokens[start:stop]]]), use_cache=False)
        for t in range(measured, stop):
            if tokens[t] == DEAD:
                continue
            for order in spec.orders:
                ngram = ngram_at(spec, tokens, t, order)
                total = found.setdefault((order, ngram), [torch.zeros(32, dtype=torch.float64), 0])
                total[0] += seen[-1][0, len(beginning) + t - start].double()
                total[1] += 1
        measured = stop
    hook.remove()
    return found


@pytest.mark.parametrize(
    ("source", "length", "batch_size", "beginning"),
    [
        ("last", 64, 3, ()),
        ("block", 17, 4, ()),
        ("block", 1000, 1, ()),
        ("last", 64, 3, (7,)),
        ("block", 17, 4, (7, 8)),
    ],
)
def test_mean_states_are_those_of_plain_loops(attached, source, length, batch_size, beginning):
    model, adapter = attached()
    tokens, done = text(), []
    ngrams = frequent_ngrams(adapter.spec, tokens, num_ngrams=90)
    states = mean_states(
        find_decoder(model), adapter.spec, tokens, ngrams, source=source, length=length, batch_size=batch_size,
        max_bytes=1 << 20, beginning=beginning, on_progress=done.append,
    )  # fmt: skip
    for block in adapter.spec.blocks:
        plain = states_by_plain_loops(model, adapter.spec, tokens, -1 if source == "last" else block, length, beginning)
        for order, found in ngrams.items():
            for place, ngram in enumerate(found.canonical.tolist()):
                total, count = plain.get((order, tuple(ngram)), (torch.zeros(32), 0))
                assert states.counts[order][place] == count
                torch.testing.assert_close(
                    states.means[block, order][place], (total / max(count, 1)).float(), rtol=1e-4, atol=1e-5
                )
    assert sum(done) == states.num_positions == len(tokens) - max(1, (length - len(beginning)) // 8)


@pytest.mark.parametrize(("width", "num_vectors"), [(12, 500), (80, 500), (24, 9)])
def test_what_is_kept_has_equal_variance_in_all_heads_and_the_strongest_directions(width, num_vectors):
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -1, 32)
    vectors = torch.randn(num_vectors, 32, generator=generator) * spread + 5
    met = torch.ones(num_vectors, dtype=torch.bool)
    met[3] = False
    pieces, share = reduced(vectors, met, width, torch.Generator().manual_seed(1))
    assert pieces.shape == (num_vectors, width)
    assert not pieces[3].any()
    kept = pieces[met].double()
    num_kept = min(width, 32, num_vectors - 2)
    spectrum = torch.linalg.eigvalsh(kept.T @ kept / len(kept)).flip(0)
    expected = torch.zeros(width, dtype=torch.float64)
    expected[:num_kept] = width / num_kept
    torch.testing.assert_close(spectrum, expected, rtol=1e-5, atol=1e-5)
    half = kept[:, : width // 2].square().sum() / kept.square().sum()
    assert 0.35 < half < 0.65
    # Plain principal components say how much lies in so many directions.
    values = torch.linalg.svdvals(vectors[met].double() - vectors[met].double().mean(0)).square()
    assert share == pytest.approx(float(values[:num_kept].sum() / values.sum()), abs=1e-6)


def test_vectors_without_any_difference_give_nothing():
    pieces, share = reduced(torch.ones(4, 8), torch.ones(4, dtype=torch.bool), 6, torch.Generator())
    assert (pieces.abs().max(), share) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rows_per_head": 7}, {"tables": "shared", "rows_per_head": 31}, {"signs": "hashed", "rows_per_head": 31}],
)
@pytest.mark.parametrize("source", ["last", "block"])
def test_rows_are_weighted_means_of_what_reads_them(attached, changes, source):
    model, adapter = attached(**changes)
    spec, config, tokens = adapter.spec, adapter.config, text()
    before = copy.deepcopy(adapter.tables)
    report = transfer_rows(adapter, tokens, num_ngrams=70, source=source, length=64, seed=3)
    ngrams = frequent_ngrams(spec, tokens, num_ngrams=70)
    states = mean_states(
        find_decoder(model), spec, tokens, ngrams, source=source, length=64, batch_size=16, max_bytes=1 << 20
    )
    # Where each N-gram is read in the text itself; its rows are taken from there.
    rows = spec.rows_for_layers(spec.encode(tokens[None]))
    places = {}
    for order in spec.orders:
        for t in range(len(tokens)):
            if tokens[t] != DEAD:
                places.setdefault((order, ngram_at(spec, tokens, t, order)), t)
    sums = {}
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        name = "shared" if spec.shared_table else str(block)
        for o, order in enumerate(spec.orders):
            count = states.counts[order]
            generator = torch.Generator().manual_seed(3 * 1009 + order)
            pieces, _ = reduced(states.means[block, order], count > 0, 2 * config.head_dim, generator)
            for k, ngram in enumerate(ngrams[order].canonical.tolist()):
                if not count[k]:
                    continue
                read = rows[layer][0, places[order, tuple(ngram)]]
                for head in range(2):
                    column = 2 * o + head
                    other = read[2 * o + (head + 1) % 2]
                    sign = -1 if config.signs == "hashed" and other % 2 else 1
                    part = sign * pieces[k, head * config.head_dim : (head + 1) * config.head_dim]
                    entry = sums.setdefault((name, column), {}).setdefault(int(read[column]), [0, 0])
                    entry[0], entry[1] = entry[0] + part * count[k], entry[1] + count[k]
    for name, table in adapter.tables.items():
        untouched = set(range(table.num_rows))
        for column in range(4):
            written = sums[name, column]
            mean = torch.stack([total / weight for total, weight in written.values()])
            mean *= config.table_std / mean.square().mean().sqrt()
            torch.testing.assert_close(table.weight[list(written)].detach(), mean, rtol=1e-4, atol=1e-5)
            untouched -= written.keys()
        left = sorted(untouched)
        assert torch.equal(table.weight[left], before[name].weight[left])
        assert report.num_rows_written[name] == table.num_rows - len(left)
        assert report.rows_written[name] == report.num_rows_written[name] / table.num_rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_says_what_it_said_before_and_is_left_as_it_was(attached, name, dtype):
    model, adapter = attached(name, dtype=dtype, model_dtype=dtype, table_gradient="dense")
    expected = logits(model)
    model.train()
    find_decoder(model).layers[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    others = {key: value.clone() for key, value in model.state_dict().items() if "memory_tables" not in key}
    report = transfer_rows(adapter, text(), num_ngrams=50, length=32)
    assert [module.training for module in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert adapter.enabled
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in others.items())
    model.eval()
    assert torch.equal(logits(model), expected)
    # And the memory learns from there.
    with torch.no_grad():
        adapter.layers["0"].key_value.weight.normal_()
    assert not torch.equal(logits(model), expected)
    weight = adapter.tables["0"].weight
    assert weight.dtype == dtype
    assert weight.isfinite().all()
    assert weight.requires_grad
    assert weight.is_leaf
    assert 0.9 < weight.float().std() < 1.1
    values = json.loads(json.dumps(report.to_dict()))
    assert values["num_positions"] == values["num_tokens"] - 4
    assert set(values["covered"]) == {"2", "3"}


def test_the_seed_decides_and_the_batch_size_does_not(attached):
    def rows(**options):
        _, adapter = attached()
        transfer_rows(adapter, text(), num_ngrams=60, length=40, **options)
        return adapter.tables["0"].weight.detach()

    first = rows(batch_size=2)
    assert torch.equal(rows(batch_size=2), first)
    torch.testing.assert_close(rows(batch_size=7), first, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rows(seed=1), first, atol=0.1)


def test_the_memory_itself_is_not_heard_but_others_are(attached, config):
    def rows(loud, other):
        model, adapter = attached()
        if other:
            beside = engram_lm.attach(model, TOKENIZER, config(layers=(0,)), name="beside")
            with torch.no_grad():
                beside.layers["0"].key_value.weight.normal_()
        if loud:
            with torch.no_grad():
                adapter.layers["0"].key_value.weight.normal_()
        transfer_rows(adapter, text(), num_ngrams=60, length=40)
        return adapter.tables["2"].weight.detach()

    assert torch.equal(rows(loud=True, other=False), rows(loud=False, other=False))
    assert not torch.equal(rows(loud=False, other=True), rows(loud=False, other=False))


def test_ngrams_with_one_continuation_get_rows_that_are_near(config):
    """A model that has learned which words follow which; its rows then tell, though the words differ."""
    model = small_model()
    classes = torch.arange(40, 80).view(4, 10)  # a word of one class is followed by one of the next

    def sample(generator, *shape):
        kind = torch.randint(4, (shape[0], 1), generator=generator) + torch.arange(shape[1])
        return classes[kind % 4, torch.randint(10, shape, generator=generator)]

    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        tokens = sample(generator, 16, 32)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    adapter = engram_lm.attach(model, TOKENIZER, config(layers=(1,), rows_per_head=4001))
    corpus = sample(generator, 1, 8000)[0].numpy()

    def nearness():
        ngrams = frequent_ngrams(adapter.spec, corpus, num_ngrams=100)[2]
        rows = torch.from_numpy(adapter.spec.rows(ngrams.tokens, adapter.spec.layers[0])[:, -1])
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(adapter.tables["1"].gather(rows[:, :2]).flatten(1), dim=1)
        alike = torch.from_numpy((ngrams.tokens[:, -1] - 40) // 10)
        same = alike[:, None] == alike
        products = vectors @ vectors.T
        return float(products[same & ~torch.eye(len(same), dtype=torch.bool)].mean() - products[~same].mean())

    assert abs(nearness()) < 0.05
    transfer_rows(adapter, corpus, num_ngrams=500, length=64)
    assert nearness() > 0.15, nearness()


def test_what_cannot_be_transferred_is_refused_and_nothing_is_written(attached, tmp_path):
    model, adapter = attached()
    before = adapter.tables["0"].weight.detach().clone()
    with pytest.raises(ConfigError, match="N-grams fit: lower num_ngrams, or raise max_bytes"):
        transfer_rows(adapter, text(), max_bytes=10_000)
    with pytest.raises(ConfigError, match="source"):
        transfer_rows(adapter, text(), source="first")
    with pytest.raises(ConfigError, match="length"):
        transfer_rows(adapter, text(), length=1)
    with pytest.raises(DataError, match="8 tokens"):
        transfer_rows(adapter, text(8), length=64)
    with pytest.raises(TokenError, match="outside"):
        transfer_rows(adapter, np.array([1, 2, 320]))
    with torch.no_grad():
        kept = model.model.layers[1].mlp.down_proj.weight.clone()
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
        with pytest.raises(ConfigError, match="not finite"):
            transfer_rows(adapter, text())
        model.model.layers[1].mlp.down_proj.weight.copy_(kept)
    assert torch.equal(adapter.tables["0"].weight, before)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.detach()
    with pytest.raises(ConfigError, match="detached"):
        transfer_rows(adapter, text())
    read_only = engram_lm.MemoryAdapter.from_pretrained(model, tmp_path / "adapter", table_tier="mmap")
    with pytest.raises(ConfigError, match='table_tier="device"'):
        transfer_rows(read_only, text())
    read_only.close()


@pytest.mark.parametrize(("num_tokens", "length"), [(9, 8), (64, 64), (65, 64), (63, 64), (1000, 64), (5, 2), (2, 9)])
def test_windows_measure_every_position_once_after_the_first_few(num_tokens, length):
    windows = transfer._windows(num_tokens, length)
    overlap = max(1, length // 8)
    assert [t for start, stop in windows for t in range(start, stop)] == list(range(overlap, num_tokens))
    # Every position has at least the overlap before it in its window.
    assert all(start - max(0, stop - length) >= overlap for start, stop in windows)
