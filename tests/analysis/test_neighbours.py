"""Neighbours are those of all rows compared one by one, on every tier; what they promote is the model's own doing."""

import io
import json

import numpy as np
import pytest
import rich.console
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY

import engram_lm
from engram_lm.analysis import find_subject, nearest_ngrams, nearest_rows
from engram_lm.analysis.rows.collisions import TextNgrams
from engram_lm.analysis.rows.neighbours import _Memory
from engram_lm.errors import ConfigError, DataError, MismatchError, RowRangeError
from engram_lm.hashing.counting import frequent_ngrams
from engram_lm.tokenizing import text_tokens

TOKENS = np.random.default_rng(0).permutation(text_tokens(TOKENIZER, TEXT))[:400]


def randomize(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not isinstance(model, engram_lm.EngramForCausalLM) or ".memory." in name or "tables" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.7)
    return model


def own_subject(memory=True, backbone=(), **changes):
    config = engram_lm.EngramConfig(**{**MEMORY, **changes}) if memory else None
    config = engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, config, **{**BACKBONE, **dict(backbone)})
    return find_subject(randomize(engram_lm.EngramForCausalLM(config).eval()), TOKENIZER)


def attached_subject():
    model = small_model("gemma3")
    adapter = engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    randomize(adapter)
    return find_subject(model, TOKENIZER)


def file_subject(tmp_path):
    own_subject().model.save_pretrained(tmp_path)
    return find_subject(engram_lm.EngramForCausalLM.from_pretrained(tmp_path, table_tier="file").eval(), TOKENIZER)


@pytest.fixture(params=["own", "attached", "shared", "file"])
def subject(request, tmp_path):
    if request.param == "file":
        return file_subject(tmp_path)
    return (
        attached_subject()
        if request.param == "attached"
        else own_subject(tables={"own": "per_layer"}.get(request.param, request.param))
    )


def table_of(subject, block):
    table = subject.memories[block].table
    return table.gather(torch.arange(table.num_rows)).detach().numpy().astype(np.float64)


def cosine(a, b):
    return a @ b.T / np.linalg.norm(a, axis=-1)[:, None] / np.linalg.norm(b, axis=-1)


def test_nearest_rows_are_those_of_the_head_compared_one_by_one(subject, monkeypatch):
    spec, row = subject.spec, 97 + 40  # in the second column: order 2, head 1
    rows = table_of(subject, 2)
    first, end = spec.offsets(2)[1:3]
    assert first <= row < end
    cosines = cosine(rows[row][None], rows[first:end])[0]
    wanted = [one + first for one in np.argsort(-cosines) if one + first != row][:7]
    found = nearest_rows(subject, row, TOKENS, block=2, k=7)
    assert (found.block, found.order, found.head) == (2, 2, 1)
    assert found.rows[:, 0].tolist() == [row, *wanted]
    np.testing.assert_allclose(found.cosines, [1, *(cosines[one - first] for one in wanted)], atol=1e-6)
    assert (found.num_searched, found.num_left_out) == (end - first - 1, 0)
    # The piece that is read at a time changes nothing.
    seen, gather = [], _Memory.gather
    monkeypatch.setattr(_Memory, "gather", lambda memory, rows: seen.append(len(rows)) or gather(memory, rows))
    pieces = nearest_rows(subject, row, TOKENS, block=2, k=7, budget_bytes=500)
    assert pieces.rows.tolist() == found.rows.tolist()
    # Besides, the query is read, and the rows that were found.
    assert (sum(seen) - 1 - 8, len(seen) > 20) == (end - first - 1, True)


def test_rows_are_named_by_the_ngrams_that_read_them(subject):
    spec = subject.spec
    blocks = (0, 2) if spec.shared_table else (0,)
    canonical = spec.token_map.apply(TOKENS)
    readers, spelled = {}, {}
    for block in blocks:
        rows = spec.rows(TOKENS, block)[:, 2]  # the first head of order 3
        for position in range(2, len(TOKENS)):
            key = (tuple(canonical[position - 2 : position + 1]), block)
            spelled.setdefault(key, TOKENIZER.decode(TOKENS[position - 2 : position + 1]))
            counts = readers.setdefault(int(rows[position]), {})
            counts[key] = counts.get(key, 0) + 1
    beginnings = set(spec.rows(TOKENS, 0)[:2, 2].tolist()) | set(spec.rows(TOKENS, 2)[:2, 2].tolist())
    row = next(row for row in readers if len(readers[row]) > 2 and row not in beginnings)
    found = nearest_rows(subject, row, TOKENS, k=4, num_ngrams=2, among="text")
    for place, one in enumerate(found.rows[:, 0].tolist()):
        if one in beginnings:
            continue
        assert found.num_ngrams[place] == len(readers[one]) > 0  # among rows that the text reads
        best = sorted(readers[one].values(), reverse=True)[:2]
        assert [ngram.num_positions for ngram in found.ngrams[place]] == best
        for ngram in found.ngrams[place]:
            assert (ngram.order, ngram.text) in {(3, spelled[key]) for key in readers[one] if key[1] == ngram.block}
    assert len(found.ngrams[0]) == 2
    silent = nearest_rows(subject, row, k=1)
    assert silent.ngrams == ((), ())
    assert silent.num_ngrams.tolist() == [0, 0]


@pytest.mark.parametrize("signs", ["none", "hashed"])
def test_nearest_ngrams_compare_all_heads_of_the_order_as_the_layer_reads_them(signs):
    subject = own_subject(signs=signs)
    layer, spec = subject.memories[2], subject.spec
    counted = frequent_ngrams(spec, TOKENS, num_ngrams=1000)
    ngram = TOKENS[100:103]
    # What the layer itself reads at the end of each N-gram, without what comes before.
    inside = [tokens for tokens in counted[3].tokens if (tokens >= 0).all()]
    with torch.no_grad():
        read = [layer.read(torch.from_numpy(spec.rows(tokens, 2)))[-1, 12:].numpy() for tokens in [ngram, *inside]]
    cosines = cosine(np.array(read[:1]), np.array(read[1:]))[0]
    own = [spec.token_map.apply(tokens).tolist() == spec.token_map.apply(ngram).tolist() for tokens in inside]
    assert sum(own) == 1
    cosines[own] = -2
    found = nearest_ngrams(subject, ngram, TextNgrams(TOKENS), block=2, k=5)
    assert (found.block, found.order, found.head, found.rows.shape) == (2, 3, None, (6, 2))
    np.testing.assert_allclose(found.cosines, [1, *np.sort(cosines)[::-1][:5]], atol=1e-6)
    nearest = inside[int(cosines.argmax())]
    assert found.ngrams[1][0].text == TOKENIZER.decode(nearest)
    assert found.rows[1].tolist() == spec.rows(nearest, 2)[-1, 2:].tolist()
    assert found.num_searched == counted[3].num_distinct - 1
    assert found.shared_heads.tolist() == [2, *(int((rows == found.rows[0]).sum()) for rows in found.rows[1:])]
    tiny = nearest_ngrams(subject, ngram, TextNgrams(TOKENS), block=2, k=5, budget_bytes=1)
    assert tiny.rows.tolist() == found.rows.tolist()
    unknown = nearest_ngrams(subject, [END := TOKENIZER.eos_token_id, END], TOKENS)
    assert unknown.ngrams[0][0].num_positions == 0
    assert found.ngrams[0][0].num_positions == counted[3].counts[counted[3].find(spec.token_map.apply(ngram)[None])[0]]


@pytest.mark.parametrize("kind", ["attached", "streams"])
def test_promoted_tokens_are_those_that_the_value_raises_through_the_models_own_head(kind):
    subject = attached_subject() if kind == "attached" else own_subject(backbone={"num_streams": 4}, num_streams=4)
    layer, channels = subject.memories[0], slice(6, 12)
    row = 97 + 5
    found = nearest_rows(subject, row, k=2, num_promoted=3)
    weight = layer.key_value.weight[-layer.config.hidden_size :, channels]
    vectors = torch.from_numpy(table_of(subject, 0)[found.rows[:, 0]]).float()
    with torch.no_grad():
        values = vectors @ weight.T
        state = values if subject.collapse is None else subject.collapse(values[None, :, None].expand(1, 3, 4, -1))[0]
        logits = subject.head(subject.norm(state))[:, : len(TOKENIZER)]
        limit = getattr(subject.model.config, "final_logit_softcapping", None)
        logits = logits if limit is None else torch.tanh(logits / limit) * limit
    for place, tokens in enumerate(found.promoted):
        best = logits[place].topk(3)
        assert [token.token for token in tokens] == best.indices.tolist()
        np.testing.assert_allclose([token.logit for token in tokens], best.values, rtol=1e-4, atol=1e-5)
        assert [token.text for token in tokens] == [TOKENIZER.decode([token]) for token in best.indices.tolist()]
    with torch.no_grad():
        layer.key_value.weight[-layer.config.hidden_size :] = 0
    assert nearest_rows(subject, row, k=2).promoted == ((), (), ())


def test_rows_without_a_direction_are_left_out():
    subject = own_subject()
    with torch.no_grad():
        weight = subject.memories[0].table.weight
        weight[3], weight[4, 1], weight[5], weight[6] = 0, torch.nan, 2 * weight[7], -weight[7]
    found = nearest_rows(subject, 7, k=200)
    assert (found.num_searched, found.num_left_out) == (94, 2)
    assert (found.rows[1, 0], found.rows[-1, 0]) == (5, 6)
    np.testing.assert_allclose(found.cosines[[0, 1, -1]], [1, 1, -1], atol=1e-6)
    for row in (3, 4):
        with pytest.raises(ConfigError, match="no direction"):
            nearest_rows(subject, row)


def test_neighbours_are_shown_as_a_table_in_which_text_steers_nothing():
    subject = own_subject()
    found = nearest_ngrams(subject, "[b]", "[b]\x1b" * 3, k=3)
    console = rich.console.Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(found)
    shown = console.file.getvalue()
    assert "order 3, all heads" in shown
    assert "'[b]' ×3" in shown
    assert "\\x1b" in shown
    assert "\x1b" not in shown
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["ngrams"][0][0]["num_positions"] == 3
    assert values["promoted"][1][0].keys() == {"token", "text", "logit"}


def test_what_cannot_be_compared_is_refused():
    subject = own_subject()
    spec = subject.spec
    for row in (-1, sum(spec.primes[0]), 1.5):
        with pytest.raises(RowRangeError, match="its rows go from 0 to"):
            nearest_rows(subject, row)
    with pytest.raises(ConfigError, match="block 1 reads no memory; those that do are 0, 2"):
        nearest_rows(subject, 0, block=1)
    with pytest.raises(ConfigError, match="with a text"):
        nearest_rows(subject, 0, among="text")
    with pytest.raises(ConfigError, match="reads N-grams of 2, 3"):
        nearest_ngrams(subject, TOKENS[:4], TOKENS)
    with pytest.raises(ConfigError, match="pass one, or its tokens"):
        nearest_ngrams(subject, TOKENS[:2], None)
    with pytest.raises(ConfigError, match="k is a whole number"):
        nearest_ngrams(subject, TOKENS[:2], TOKENS, k=0)
    with pytest.raises(DataError, match="no tokens"):
        nearest_rows(subject, 0, "")
    with pytest.raises(MismatchError, match="has no memory"):
        nearest_rows(own_subject(memory=False), 0)
