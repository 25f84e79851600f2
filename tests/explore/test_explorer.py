"""What the page says of a model is what the model does, and visitors do not see each other's facts."""

import dataclasses
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.explore.conftest import explorer_of, make_llama, make_model
from tests.small_model import TEXT
from tests.training.test_loop import TOKENIZER

import engram_lm
from engram_lm.adapt import FactEdit
from engram_lm.adapt.patchable import patchable_memory
from engram_lm.analysis import gate_trace
from engram_lm.errors import ConfigError, DataError, TokenError
from engram_lm.evaluation.suppressing import suppressed, without_ngrams
from engram_lm.explore.explorer import BEFORE_EDITS, WITH, WITHOUT, Edits, Explorer
from engram_lm.hashing import HashSpec, TokenMap

SENTENCE = "The cat saw the rat"
FACT = FactEdit(prompt="the cat sat on", answer=" rat")


def logits_of(model, text):
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENIZER(text).input_ids])).logits[0].float()


def best(logits):
    return [one.topk(8).indices.tolist() for one in logits]


def tokens_of(predictions):
    return [[candidate.token for candidate in one.candidates] for one in predictions]


def test_predictions_are_the_models_own_with_memory_and_without(explorer):
    view = explorer.read(SENTENCE)
    with_memory = logits_of(explorer.model, SENTENCE)
    with suppressed(explorer.model):
        without = logits_of(explorer.model, SENTENCE)
    assert tokens_of(view.predictions[WITH]) == best(with_memory)
    assert tokens_of(view.predictions[WITHOUT]) == best(without)
    first = view.predictions[WITH][2].candidates[0]
    assert first.probability == pytest.approx(float(with_memory[2].softmax(-1).max()), abs=1e-6)
    divergence = torch.nn.functional.kl_div(
        without.log_softmax(-1), with_memory.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    np.testing.assert_allclose(view.changed, divergence.numpy(), atol=1e-5)
    assert view.changed.max() > 1e-3
    np.testing.assert_array_equal(view.trace.gates, gate_trace(explorer.model, TOKENIZER, SENTENCE).gates)
    assert "".join(view.texts) == SENTENCE


def test_a_prediction_without_an_ngram_is_that_of_a_table_whose_rows_for_it_are_zero(explorer):
    text = "The cat saw the rat; the cat saw a mat"
    view = explorer.read(text)
    spec = view.addresses.spec

    def rows_of(places):
        return {block: np.unique(view.addresses.rows[block][places][:, : spec.num_heads]) for block in spec.blocks}

    def alone(place):
        """Whether a 2-gram occurs again, and no other one reads any of its rows."""
        same = view.addresses.same_ngram(place, 2)
        own, others = rows_of(same), rows_of(~same)
        return same.sum() > 1 and not any(np.isin(own[block], others[block]).any() for block in spec.blocks)

    place = next(place for place in range(1, len(view.tokens)) if alone(place))
    same = view.addresses.same_ngram(place, 2)
    mask = np.zeros((len(view.tokens), len(spec.orders)), bool)
    mask[same, spec.orders.index(2)] = True
    memory = patchable_memory(explorer.model)
    rows = {str(block): torch.from_numpy(rows) for block, rows in rows_of(same).items()}
    zeros = {name: torch.zeros(len(wanted), memory.tables[name].width) for name, wanted in rows.items()}
    with memory.reading(rows, zeros):
        expected = logits_of(explorer.model, text)
    with without_ngrams(explorer.subjects[""], torch.from_numpy(mask)):
        found = logits_of(explorer.model, text)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found[place], logits_of(explorer.model, text)[place])
    look = explorer.look(view, place)
    assert tokens_of([look.predictions["without the 2-gram"]])[0] == best(expected)[place]


def test_a_token_view_names_what_lies_nearest_and_what_it_promotes(explorer):
    view = explorer.read(SENTENCE)
    for block in view.addresses.spec.blocks:
        look = explorer.look(view, 4, block=block)
        assert {lookup.block for lookup in look.lookups} == {block}
        assert look.neighbours[2].cosines[0] == 1
        assert len(look.neighbours[2].promoted[0]) == 5
    assert "cut" in explorer.look(view, 0).neighbours[3]
    with pytest.raises(ConfigError, match="block 1 reads no memory"):
        explorer.look(view, 4, block=1)
    with pytest.raises(ConfigError, match="there is no token 99"):
        explorer.look(view, 99)


def test_facts_belong_to_their_visitor_and_are_taken_back_without_a_trace():
    model = make_model(rows_per_head=5_003)
    explorer = explorer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    plain = explorer.read(FACT.prompt)
    mine = explorer.add_fact(FACT, Edits())
    view = explorer.read(FACT.prompt, mine)
    assert view.edited.any()
    assert tokens_of(view.predictions[BEFORE_EDITS]) == tokens_of(plain.predictions[WITH])
    assert tokens_of(view.predictions[WITH]) != tokens_of(plain.predictions[WITH])
    (answer,) = explorer.answers(mine).values()
    assert answer.is_as_asked
    assert answer.now.candidates[0].text == FACT.answer
    assert answer.now.candidates[0] == view.predictions[WITH][-1].candidates[0]
    assert answer.before.candidates[0] == plain.predictions[WITH][-1].candidates[0]
    # Another visitor, and the model itself, are as they were.
    assert tokens_of(explorer.read(FACT.prompt).predictions[WITH]) == tokens_of(plain.predictions[WITH])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    two = explorer.add_fact(FactEdit(prompt="the rat ran to the", answer=" cat"), mine)
    assert two.prompts == (FACT.prompt, "the rat ran to the")
    proof = explorer.proof(two)
    assert proof.num_windows_changed == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rest = explorer.take_back([FACT.prompt], two)
    assert rest.prompts == ("the rat ran to the",)
    assert explorer.take_back(rest.prompts, rest) == Edits()
    with pytest.raises(ConfigError, match="no fact has been added"):
        explorer.take_back([FACT.prompt], Edits())


def test_visitors_at_the_same_time_get_what_each_gets_alone():
    explorer = explorer_of(make_model())
    mine = explorer.add_fact(FACT, Edits())

    def ask(edits):
        view = explorer.read(FACT.prompt, edits)
        return tokens_of(view.predictions[WITH]), explorer.look(view, 2, edits).predictions

    alone = [ask(edits) for edits in (mine, Edits())]
    assert alone[0] != alone[1]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(ask, (mine, Edits()) * 4)) == alone * 4
    finally:
        sys.setswitchinterval(interval)


def test_a_text_longer_than_the_page_or_the_model_is_cut_and_that_is_said(explorer):
    short = explorer_of(explorer.model, max_tokens=10)
    view = short.read(TEXT)
    whole = len(TOKENIZER(TEXT).input_ids)
    assert len(view.tokens) == 10
    assert f"The text has {whole:,} tokens. The page reads the first 10." in view.notes
    endless = short.read(TEXT * 1000)
    assert endless.tokens.tolist() == view.tokens.tolist()
    assert f"The text has {1000 * len(TEXT):,} characters. The page reads the first 10 tokens." in endless.notes
    llama = explorer_of(make_llama(max_position_embeddings=16), max_tokens=256)
    assert len(llama.read(TEXT).tokens) == 16


def test_a_model_without_memory_predicts_and_has_nothing_to_look_up():
    explorer = explorer_of(make_llama())
    view = explorer.read(SENTENCE)
    assert view.addresses is None
    assert view.changed is None
    assert list(view.predictions) == ["the model"]
    look = explorer.look(view, 2)
    assert look.lookups == ()
    assert look.predictions["the model"].candidates
    with pytest.raises(ConfigError, match="has none"):
        explorer.add_fact(FACT, Edits())


def test_numbers_that_are_not_finite_are_said_and_shown_as_none():
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER(" rat").input_ids[-1]] = math.nan
    explorer = explorer_of(model)
    view = explorer.read(SENTENCE)
    place = view.texts.index(" rat") if " rat" in view.texts else len(view.texts) - 1
    assert view.predictions[WITH][place].candidates == ()
    assert math.isnan(view.changed[place])
    assert "not finite" in view.notes[-1]
    assert explorer.look(view, place).predictions[WITH].candidates == ()
    with pytest.raises(ConfigError, match="numbers after 'the rat sat on' are not finite"):
        explorer.add_fact(FactEdit(prompt="the rat sat on", answer=" cat"), Edits())


def test_of_several_memories_one_is_looked_at_and_the_others_stay_on():
    model = make_llama(2)
    explorer = explorer_of(model)
    assert explorer.memories == ("m0", "m1")
    first, second = (explorer.read(SENTENCE, Edits(name)) for name in explorer.memories)
    assert tokens_of(first.predictions[WITH]) == tokens_of(second.predictions[WITH]) == best(logits_of(model, SENTENCE))
    assert tokens_of(first.predictions[WITHOUT]) != tokens_of(second.predictions[WITHOUT])
    assert not np.array_equal(first.addresses.rows[1], second.addresses.rows[1])
    with pytest.raises(ConfigError, match="no memory called 'm2'"):
        explorer.read(SENTENCE, Edits("m2"))
    mine = explorer.add_fact(FACT, Edits("m1"))
    assert explorer.read(FACT.prompt, mine).edited.any()


def test_a_models_own_memory_stands_beside_those_that_were_attached_to_it():
    model = make_model("plain")
    alone = explorer_of(model).read(SENTENCE)
    adapter = engram_lm.attach(model, TOKENIZER, layers=(1,), num_heads=2, memory_dim=24, rows_per_head=89, name="late")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    explorer = explorer_of(model)
    assert explorer.memories == ("late", "")
    assert explorer.spec("").blocks == (0, 2)
    assert explorer.spec("late").blocks == (1,)
    late, own = (explorer.read(SENTENCE, Edits(name)) for name in explorer.memories)
    np.testing.assert_array_equal(own.addresses.rows[0], alone.addresses.rows[0])
    assert tokens_of(own.predictions[WITH]) == tokens_of(late.predictions[WITH]) == best(logits_of(model, SENTENCE))
    with adapter.disabled():
        assert tokens_of(late.predictions[WITHOUT]) == best(logits_of(model, SENTENCE))
    assert explorer.read(FACT.prompt, explorer.add_fact(FACT, Edits(""))).edited.any()


def test_whether_a_fact_is_written_is_what_the_model_says_now():
    explorer = explorer_of(make_model(rows_per_head=5_003))
    mine = explorer.add_fact(FACT, Edits())
    # As after a change that this fact did not survive: its patch says that it is learned, and its rows are as before.
    tables = {name: dataclasses.replace(one, after=one.before) for name, one in mine.patch.tables.items()}
    lost = dataclasses.replace(mine, patch=dataclasses.replace(mine.patch, tables=tables))
    assert lost.patch.is_as_asked == (True,)
    assert [answer.is_as_asked for answer in explorer.answers(lost).values()] == [False]


def test_a_fact_longer_than_the_model_reads_is_refused():
    with pytest.raises(ConfigError, match="at most 16 can be read"):
        explorer_of(make_llama(1, max_position_embeddings=16)).add_fact(
            FactEdit(prompt=TEXT[:200].strip(), answer=" rat"), Edits("m0")
        )


def test_a_hash_alone_shows_addresses_and_takes_ids_without_a_tokenizer():
    spec = HashSpec.build(
        TokenMap.identity(50), layers=(3, 9), orders=(2, 3), heads=2, rows_per_head=97, pad_token_id=0
    )
    explorer = Explorer(name="hash", tokenizer=None, spec=spec)
    view = explorer.read("7, 8 7,8")
    assert view.predictions == {}
    np.testing.assert_array_equal(view.addresses.rows[3], spec.rows(np.array([7, 8, 7, 8]), 3))
    look = explorer.look(view, 3, block=9)
    assert look.lookups[0].rows == tuple(spec.rows(np.array([7, 8, 7, 8]), 9)[3, :2].tolist())
    for text, error in (("seven", "type token ids"), ("50", "50"), ("9" * 30, "token ids")):
        with pytest.raises(TokenError, match=error):
            explorer.read(text)
    with pytest.raises(DataError, match="no text to read"):
        explorer.read("  ")
    with pytest.raises(ConfigError, match="without weights"):
        explorer.add_fact(FACT, Edits())
    with pytest.raises(ConfigError, match="one of model and spec"):
        Explorer(name="both", tokenizer=None)
