"""Retrieval against its published formulas: nearest neighbors of contexts, mixed with what a trained model says."""

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from tests.adapt.patched_models import trained_model
from tests.adapt.small_models import TEXT, TOKENIZER
from tests.small_model import BACKBONE
from tests.studies.test_study import some_text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.memory import EngramConfig
from engram_lm.memory.interface import build_layer
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.studies.budget import check_budget
from engram_lm.studies.rivals import knn
from engram_lm.studies.rivals.study import RivalsStudy
from engram_lm.training.dry_run import priced_config


def plain_neighbors(keys, tokens, query, number):
    """The formula, written as a loop."""
    found = sorted(
        (sum((a - b) ** 2 for a, b in zip(key, query, strict=True)), token)
        for key, token in zip(keys.tolist(), tokens.tolist(), strict=True)
    )
    return found[:number]


def test_the_search_is_exact_and_its_probabilities_are_the_published_ones(monkeypatch):
    monkeypatch.setattr(knn, "_KEYS_AT_ONCE", 7)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 3)
    store = knn.Datastore(torch.randn(40, 5).half(), torch.randint(6, (40,), dtype=torch.int32))
    queries, targets = torch.randn(8, 5), torch.randint(6, (8,))
    for number in (1, 9, 100):
        found = store.nearest(queries, number)
        near = knn.neighbor_probabilities(found, targets, number, 1.7)
        for place, (query, target) in enumerate(zip(queries.tolist(), targets.tolist(), strict=True)):
            wanted = plain_neighbors(store.keys, store.tokens, query, number)
            assert found.distances[place].tolist() == pytest.approx([far for far, _ in wanted], abs=1e-4)
            assert found.tokens[place].tolist() == [token for _, token in wanted]
            weights = [math.exp(-far / 1.7) for far, _ in wanted]
            right = sum(weight for weight, (_, token) in zip(weights, wanted, strict=True) if token == target)
            assert near[place] == pytest.approx(right / sum(weights), abs=1e-5)
    fewer = knn.neighbor_probabilities(store.nearest(queries, 9), targets, 4, 1.7)
    assert fewer == pytest.approx(knn.neighbor_probabilities(store.nearest(queries, 4), targets, 4, 1.7))
    assert store.num_bytes == 40 * knn.entry_bytes(5)


def test_keys_are_what_the_last_feed_forward_network_is_given_and_depend_on_no_later_token():
    model = trained_model(kind="reference").eval()
    windows = torch.tensor(TOKENIZER(TEXT).input_ids[:49]).view(1, -1)
    read = knn.contexts(model, windows[:, :-1], windows[:, 1:])
    block = model.model.layers[-1]
    seen = []
    hook = block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(input_ids=windows[:, :-1]).logits[0]
    hook.remove()
    if model.config.num_streams == 1:
        assert torch.allclose(read.keys, seen[0][0], atol=1e-5)
    nats = -logits.log_softmax(-1).gather(1, windows[0, 1:, None])[:, 0]
    assert read.nats == pytest.approx(nats.detach().numpy(), abs=1e-4)
    changed = windows.clone()
    changed[0, 30:] = 7
    again = knn.contexts(model, changed[:, :-1], changed[:, 1:])
    assert torch.equal(again.keys[:30], read.keys[:30]) and not torch.equal(again.keys[30:], read.keys[30:])


def test_a_text_that_was_stored_is_recalled_and_the_choices_say_so():
    model = trained_model(kind="reference").eval()
    windows = torch.tensor(TOKENIZER(TEXT).input_ids[: 8 * 32 + 1])
    sequences = windows[:-1].view(8, 32), windows[1:].view(8, 32)
    store = knn.build_store(model, iter([sequences]))
    read = knn.contexts(model, *sequences)
    choice = knn.choose(store.nearest(read.keys, 64), read)
    assert choice["share"] > 0.5
    other = knn.Datastore(store.keys, torch.full_like(store.tokens, 299))  # a token that never follows
    assert knn.choose(other.nearest(read.keys, 64), read)["share"] == 0
    assert (store.nearest(read.keys, 1).distances < 1e-2).all()


def test_the_study_measures_models_with_their_neighbors_and_measures_them_once(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(f"{number} " + some_text(300)[number:])
    options = {
        "out": tmp_path / "out", "data": (text,), "vocab_size": 300, "tokens": 4096, "sequence_length": 32,
        "rows_per_head": 997, "arms": ("knn_bytes", "knn", "retro", "realm", "none"), "seeds": 1, "mode": "one_by_one",
    }  # fmt: skip
    assert RivalsStudy(**options).run() == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    arms = result["arms"]
    assert arms["knn"]["searches"][0]["num_entries"] == 4096 and arms["none"]["searches"] == []
    few = arms["knn_bytes"]["searches"][0]
    assert few["num_bytes"] <= arms["knn_bytes"]["cost"]["bytes"] - arms["none"]["cost"]["bytes"]
    assert few["num_entries"] % 32 == 0
    assert arms["engram"]["cost"]["bytes"] == pytest.approx(arms["knn_bytes"]["cost"]["bytes"], rel=0.02)
    for name in ("retro", "realm"):
        assert arms[name]["runs"][0]["loss"] is not None
        assert arms[name]["cost"]["flops"] > arms["none"]["cost"]["flops"]
    # The same model: what its loss changes by is what its neighbors change.
    change = arms["knn"]["runs"][0]["loss"] - arms["none"]["runs"][0]["loss"]
    assert change != 0 or arms["knn"]["searches"][0]["share"] == 0
    assert "What searching takes" in (tmp_path / "out/report.html").read_text()
    (path,) = (tmp_path / "out/seed-0").glob("knn.evaluated-*.json")
    stamp = path.stat().st_mtime_ns
    assert RivalsStudy(**options, resume=True).run() == 0 and path.stat().st_mtime_ns == stamp
    assert np.isfinite(change)


# RETRO, and what it shares with REALM ---------------------------------------------------------------------------------

CHUNK, END = 4, 0


def retro_layer(text, **options):
    """RETRO, for tokens up to 49."""
    return stored_text_layer("retro", text, **{"vocabulary": 50, **options})


def realm_layer(text, **options):
    """REALM, with weights at which documents differ in how probable they are."""
    return stored_text_layer("realm", text, **options)


def stored_text_layer(name, text, chunks=30, neighbors=2, hidden=32, **options):
    """A layer that has stored a text, with weights away from their first values."""
    config = EngramConfig(
        hidden_size=hidden, layers=(0,), num_heads=2, memory_dim=24, rows_per_head=1, layer=name, token_map="raw",
        layer_options={"chunk": CHUNK, "chunks": chunks, "neighbors": neighbors, **options},
    )  # fmt: skip
    layer = build_layer(config)
    layer.embedding = torch.nn.Embedding(50, hidden)
    layer.prepare(None, np.asarray(text))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def joined(texts):
    return [*itertools.chain.from_iterable(texts)]


def documents(number, length, seed=0):
    """Documents without repetition between them; each ends with the end token."""
    chance = random.Random(seed)
    return [[chance.randrange(1, 50) for _ in range(length - 1)] + [END] for _ in range(number)]


def heads_of(attention, queries, read):
    """Attention with two heads or one, written out."""
    width, heads = queries.shape[-1], attention.num_heads
    q, k, v = attention.in_proj_weight.chunk(3)
    parts = []
    for head in range(heads):
        rows = slice(head * width // heads, (head + 1) * width // heads)
        scores = (queries @ q[rows].T) @ (read @ k[rows].T).T / math.sqrt(width // heads)
        parts.append(scores.softmax(-1) @ (read @ v[rows].T))
    return torch.cat(parts, -1) @ attention.out_proj.weight.T


def test_retro_is_chunked_cross_attention_to_encoded_neighbors():
    texts = documents(8, 12)
    layer = retro_layer(joined(texts), hidden=64)
    tokens = torch.tensor([random.Random(5).choices(range(1, 50), k=11)])
    hidden = torch.randn(1, 11, 64)
    found = layer(hidden, torch.stack([tokens] * 3, -1))
    places = layer.neighbors(tokens[:, :8])
    query, stored = layer.norms["query"](hidden)[0], layer.text.long()
    expected = torch.zeros(11, 64)
    for u in range(2):
        encoded = []
        for place in places.places[0, u].tolist():
            state = layer.embedding(stored[place * CHUNK : (place + 2) * CHUNK]) + layer.neighbor_position.weight
            own = layer.norms["own"](state)
            state = state + heads_of(layer.own, own, own)
            state = state + heads_of(layer.about, layer.norms["about"](state), query[u * CHUNK : (u + 1) * CHUNK])
            state = state + layer.wide(layer.norms["wide"](state))
            encoded.append(layer.norms["found"](state))
        for offset in range(CHUNK):
            place = u * CHUNK + CHUNK - 1 + offset
            if place < 11:
                reader = (query[place] + layer.query_position.weight[offset])[None]
                expected[place] = heads_of(layer.found, reader, torch.cat(encoded))[0]
    assert torch.allclose(found[0], expected, atol=1e-4)
    assert not found[0, : CHUNK - 1].any() and found[0, CHUNK - 1 :].any(-1).all()


def test_neighbors_are_the_most_similar_chunks_by_the_rarity_of_their_tokens():
    layer = retro_layer(joined(documents(9, 12)), neighbors=3)
    tokens = torch.tensor([random.Random(1).choices(range(1, 50), k=8)])
    found = layer.neighbors(tokens)
    stored = layer.text.view(-1, CHUNK).tolist()[:-1]
    count = {token: sum(token in chunk for chunk in stored) for token in range(50)}
    signs = layer.index.weights.sign()

    def embedded(chunk):
        vector = sum(math.log((1 + len(stored)) / (1 + count[token])) * signs[token] for token in chunk)
        return vector / vector.norm()

    for u in range(2):
        query = embedded(tokens[0, u * CHUNK : (u + 1) * CHUNK].tolist())
        usable = [place for place in range(len(stored)) if min(stored[place]) >= 0 and layer.stored.is_text[place]]
        ranked = sorted(usable, key=lambda place: -float(embedded(stored[place]) @ query))
        near = [float(embedded(stored[place]) @ query) for place in found.places[0, u].tolist()]
        assert near == pytest.approx([float(embedded(stored[place]) @ query) for place in ranked[:3]], abs=2e-3)
        for place, neighbor in zip(found.places[0, u].tolist(), found.tokens[0, u].tolist(), strict=True):
            assert neighbor == stored[place] + layer.text.view(-1, CHUNK).tolist()[place + 1]


BOTH = pytest.mark.parametrize("made", [retro_layer, realm_layer])


@BOTH
def test_no_output_depends_on_a_later_token(made):
    layer = made(joined(documents(8, 12)))
    tokens = torch.tensor([random.Random(2).choices(range(1, 50), k=14)])
    hidden = torch.randn(1, 14, 32)
    before = layer(hidden, tokens[..., None])
    for place in range(14):
        changed, other = tokens.clone(), hidden.clone()
        changed[0, place:] = torch.tensor(random.Random(place).choices(range(1, 50), k=14 - place))
        other[0, place:] += 1
        after = layer(other, changed[..., None])
        assert torch.equal(after[:, :place], before[:, :place])
    assert not torch.allclose(after, before)


@BOTH
def test_a_sequence_finds_nothing_of_its_own_documents(made):
    texts = documents(8, 13)  # no multiple of a chunk, so chunks cross documents
    text = joined(texts)
    layer = made(text, neighbors=2)
    layer.find(torch.tensor([text[:CHUNK]]))  # builds an index where there is one to build
    owner = [number for number, document in enumerate(texts) for _ in document]
    for start in range(0, len(text) - 12, 5):
        sequence = torch.tensor([text[start : start + 12]])
        own = set(owner[start : start + 12 + CHUNK])
        found = layer.neighbors(sequence)
        assert found.is_found.all()
        for place in found.places.flatten().tolist():
            assert not own & set(owner[place * CHUNK : (place + 2) * CHUNK]), start
    # The same tokens in another place are found: what is excluded is excluded for its document.
    other = torch.tensor([[49, 48, 47, 46, *text[CHUNK * 3 : CHUNK * 4], 1, 2, 3, 4]])
    found = made(text, neighbors=30).neighbors(other)
    assert found.is_found[0, 1][found.places[0, 1] == 3].all()
    assert made is realm_layer or layer.neighbors(other).places[0, 1, 0] == 3


@BOTH
def test_where_nothing_may_be_found_nothing_is_added(made):
    layer = made(documents(1, 24)[0])
    tokens = torch.tensor([layer.text[:12].tolist()])
    assert not layer.neighbors(tokens).is_found.any()
    update = layer(torch.randn(1, 12, 32, requires_grad=True), tokens[..., None])
    assert not update.any()
    update.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters() if parameter.grad is not None)
    assert not layer(torch.randn(1, 3, 32), tokens[:, :3, None]).any()  # less than a chunk
    with pytest.raises(MismatchError, match="does not decode"):
        layer(torch.randn(1, 12, 32), tokens[..., None], torch.zeros(1, 0, 32))


def test_retro_counts_its_numbers_and_stores_whole_documents_of_as_many_bytes_as_the_table():
    layer = retro_layer(joined(documents(9, 15)), chunks=20)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert type(layer).count_parameters(layer.config) == weights
    assert type(layer).count_kept(layer.config) == layer.text.numel() + 20 * 64 // 2
    kept = layer.text[layer.text >= 0]
    assert len(kept) == 75 and kept[-1] == END  # 84 tokens have room, which are five documents and a part
    study = RivalsStudy().study()
    costs = check_budget(study)
    assert costs["retro"].bytes == pytest.approx(costs["engram"].bytes, rel=0.001)
    assert costs["retro"].active < 2 * costs["engram"].active
    (larger,) = (arm for arm in RivalsStudy(vocab_size=8192, arms=("retro",)).study().arms if arm.name == "retro")
    assert priced_config(larger.recipe).memory_config.option("vocabulary") == 8192
    layer.prepare(None, np.array([60, 1, 2, 3] * 3))
    with pytest.raises(ConfigError, match="vocabulary"):
        layer.neighbors(torch.ones(1, 4, dtype=torch.int64))


NEVER = {retro_layer: {}, realm_layer: {"refresh_tokens": 1 << 60}}
"""Options with which an index is never rebuilt."""


@BOTH
def test_the_operations_of_products_are_counted_and_they_compile_to_one_graph(made):
    layer = made(joined(documents(9, 12)), hidden=64)
    tokens = torch.randint(1, 50, (2, 16, 1))
    hidden = torch.randn(2, 16, 64)
    layer.read(tokens)  # builds the index
    # The counter does not know the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        expected = layer(hidden, tokens)
    reading, search = (count(layer.config) for count in (type(layer)._reading_flops, type(layer)._search_flops))
    assert counter.get_total_flops() == pytest.approx(32 * (reading + search), rel=0.02)
    trained = type(layer).count_flops(
        dataclasses.replace(layer.config, layer_options={**layer.config.layer_options, **NEVER[made]})
    )
    assert trained == pytest.approx(reading + search / 3, abs=2)
    respond = torch.compile(type(layer).respond, backend="aot_eager", fullgraph=True)
    assert torch.allclose(respond(layer, hidden, layer.read(tokens), None, None, None).update, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [("retro", {"vocabulary": 300}, "found.out_proj"), ("realm", {"refresh_tokens": 50}, "reader_output")],
)
def test_a_model_learns_from_what_it_finds_and_is_loaded_as_it_was(tmp_path, name, options, last):
    memory = EngramConfig(
        hidden_size=32, layers=(1,), num_heads=2, memory_dim=24, rows_per_head=1, layer=name, token_map="raw",
        layer_options={"chunk": 4, "chunks": 40, "neighbors": 2, **options},
    )  # fmt: skip
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(TOKENIZER, memory, **{**BACKBONE, "num_streams": 1}))
    tokens = np.array(TOKENIZER(TEXT).input_ids)
    layer = model.model.layers[1].memory
    tokens[39:120:40] = END
    layer.prepare(model.hash_spec, tokens[:120])
    ids = torch.randint(2, 280, (1, 33))
    before = model(input_ids=ids, use_cache=False).logits
    torch.nn.init.normal_(layer.get_submodule(last).weight)
    model.train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    model.eval()
    after = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(after[:, :3], before[:, :3]) and not torch.allclose(after[:, 3:], before[:, 3:])
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, after)
    for key, value in layer.state_dict().items():  # how old an index is as well
        assert torch.equal(loaded.model.layers[1].memory.state_dict()[key], value), key


# REALM ----------------------------------------------------------------------------------------------------------------


def plain_realm(layer, tokens, hidden):
    """What each position reads, ``[L, D]``, a position and a document at a time; with p(z|x) and what each z gave."""
    stored, query, width = layer.text.long(), layer.norms["query"](hidden), hidden.shape[-1]
    updates, shares, given = torch.zeros_like(hidden), [], {}

    def encoded(words):
        state = layer.embedding(words) + layer.token_position.weight[: len(words)]
        own = layer.norms["own"](state)
        state = state + heads_of(layer.own, own, own)
        return layer.norms["found"](state + layer.wide(layer.norms["wide"](state)))

    for u, found in enumerate(layer.neighbors(tokens[None, : len(tokens) // CHUNK * CHUNK]).places[0].tolist()):
        asked = layer.embed_input.weight @ encoded(tokens[u * CHUNK : (u + 1) * CHUNK]).mean(0)
        documents = [encoded(stored[place * CHUNK : (place + 2) * CHUNK]) for place in found]
        scores = [asked @ (layer.embed_document.weight @ document.mean(0)) for document in documents]
        scores = torch.stack([*scores, asked @ layer.empty_document]) / math.sqrt(len(asked))
        shares.append(scores.exp() / scores.exp().sum())
        for offset in range(CHUNK):
            place = u * CHUNK + CHUNK - 1 + offset
            if place >= len(tokens):
                continue
            reader = layer.reader.weight @ (query[place] + layer.query_position.weight[offset])
            for number, document in enumerate(documents):
                parts = []
                for head in range(layer.num_heads):
                    rows = slice(head * width // layer.num_heads, (head + 1) * width // layer.num_heads)
                    keys, values = (each.weight[rows] for each in (layer.document_key, layer.document_value))
                    looks = (document @ keys.T @ reader[rows] / math.sqrt(width // layer.num_heads)).softmax(0)
                    parts.append(looks @ (document @ values.T))
                given[place, number] = layer.reader_output.weight @ torch.cat(parts)
                updates[place] = updates[place] + shares[u][number] * given[place, number]
    return updates, shares, given


def test_realm_averages_what_documents_give_by_their_probability_and_its_gradient_is_that_of_the_average():
    layer = realm_layer(joined(documents(8, 12)), hidden=64)
    tokens = torch.tensor(random.Random(5).choices(range(1, 50), k=11))
    hidden, weights = torch.randn(11, 64), torch.randn(11, 64)
    asked = []
    hook = layer.embed_input.register_forward_hook(lambda module, args, out: asked.append(out))
    update = layer(hidden[None], tokens[None, :, None].expand(1, 11, 3))[0]
    hook.remove()
    expected, shares, given = plain_realm(layer, tokens, hidden)
    assert torch.allclose(update, expected, atol=1e-4)
    assert all(0.01 < float(share.detach().max()) < 0.999 for share in shares)
    parameters = dict(layer.named_parameters())
    loss, plain = ((each * weights).sum() for each in (update, expected))
    ours = torch.autograd.grad(loss, [*parameters.values(), asked[-1]])
    for name, grad, wanted in zip(parameters, ours, torch.autograd.grad(plain, [*parameters.values()]), strict=False):
        assert torch.allclose(grad, wanted, atol=1e-3, rtol=1e-3), name
    # dL/dq = Σ p(z|x) (gain of z - mean gain) d(z): what gains more than the others becomes more probable.
    found = layer.find(tokens[None, :8])[0, :, 1:]
    for u, share in enumerate(shares):
        readers = range(u * CHUNK + CHUNK - 1, min(u * CHUNK + 2 * CHUNK - 1, 11))
        gains = torch.stack([sum(given[place, k] @ weights[place] for place in readers) for k in range(2)])
        gains = torch.cat([gains, torch.zeros(1)])  # the empty document gives nothing
        vectors = torch.cat([layer.embed_documents(layer.encode(found[u])), layer.empty_document[None]])
        wanted = (share * (gains - share @ gains)) @ vectors / math.sqrt(64)
        assert torch.allclose(ours[-1][u], wanted, atol=1e-3, rtol=1e-3)


def test_documents_are_the_best_of_the_index_which_is_stale_until_it_is_rebuilt():
    layer = realm_layer(joined(documents(9, 12)), neighbors=3, refresh_tokens=24)
    tokens = torch.tensor([random.Random(1).choices(range(1, 50), k=12)])

    def best_by(index):
        scores = layer.embed_query(tokens.view(-1, CHUNK)) @ index.float().T
        return scores.masked_fill(~layer.stored.is_text, -torch.inf).topk(3).indices[None]

    layer.find(tokens)
    first = layer.index.clone()
    assert torch.equal(layer.neighbors(tokens).places, best_by(first)) and int(layer.tokens_since) == 12
    before = layer(torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)), tokens[..., None])
    assert int(layer.tokens_since) == 24
    torch.nn.init.normal_(layer.embed_document.weight, std=0.3)
    assert torch.equal(layer.neighbors(tokens).places, best_by(first))  # stale: the same documents,
    layer.eval()
    layer.tokens_since.fill_(12)
    after = layer(torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)), tokens[..., None])
    assert int(layer.tokens_since) == 12 and torch.equal(layer.index, first)  # evaluation changes nothing
    assert not torch.allclose(before, after)  # but their probabilities are those of the new weights
    layer.train()
    layer.find(tokens)
    layer.find(tokens)
    assert not torch.equal(layer.index, first) and int(layer.tokens_since) == 12
    assert torch.equal(layer.neighbors(tokens).places, best_by(layer.index))
    assert not torch.equal(best_by(layer.index), best_by(first))
    fresh = layer.embed_documents(layer.encode(layer.stored.take(torch.arange(30))))
    assert torch.allclose(layer.index.float(), fresh, atol=0.02)
    # What training left to rebuild, the next search rebuilds, in evaluation as well.
    layer.tokens_since.fill_(24)
    torch.nn.init.normal_(layer.embed_document.weight, std=0.3)
    layer.eval().find(tokens)
    assert int(layer.tokens_since) == 0
    assert torch.equal(layer.neighbors(tokens).places, best_by(layer.index))
    # In a low type too.
    low = layer.to(torch.bfloat16)
    low.embedding = low.embedding.to(torch.bfloat16)
    assert torch.isfinite(low(torch.randn(1, 12, 32, dtype=torch.bfloat16), tokens[..., None])).all()


def test_realm_counts_its_numbers_and_what_rebuilding_its_index_takes():
    layer = realm_layer(joined(documents(9, 15)), chunks=20)
    kept = layer.text.numel() + layer.index.numel() // 2 + layer.tokens_since.numel()
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert type(layer).count_parameters(layer.config) == weights and type(layer).count_kept(layer.config) == kept
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer.refresh()
    often, seldom, never = (
        type(layer).count_flops(
            dataclasses.replace(layer.config, layer_options={**layer.config.layer_options, "refresh_tokens": tokens})
        )
        for tokens in (1, 1_000, 1 << 60)
    )
    assert counter.get_total_flops() == pytest.approx(3 * (often - never), rel=0.02)
    assert seldom - never == pytest.approx((often - never) / 1_000, abs=1)
    # Searching counts a third of what it takes, since no gradient goes through it.
    tokens = torch.randint(1, 50, (8, 60), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer.neighbors(tokens)
    found = counter.get_total_flops() / tokens.numel()
    assert found == pytest.approx(type(layer)._search_flops(layer.config), rel=0.02)
    costs = check_budget(RivalsStudy(arms=("realm",)).study())
    assert costs["realm"].bytes == pytest.approx(costs["engram"].bytes, rel=0.001)
