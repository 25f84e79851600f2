"""Every token is in one group of each division: by what is counted in a reference, and by what its document holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.adapt.small_models import TEXT, TOKENIZER

from engram_lm.evaluation.diagnostics import reference as reference_module
from engram_lm.evaluation.diagnostics.divisions import FREQUENCIES, NGRAMS, WORDS, divide, documents_of, spell
from engram_lm.evaluation.diagnostics.reference import ReferenceText
from engram_lm.training.data.documents import Document, pack


def packed(*texts):
    parts = [pack([Document(str(number), text)], TOKENIZER) for number, text in enumerate(texts)]
    ends = np.cumsum([len(part) for part in parts])
    tokens = np.concatenate(parts).astype(np.int64)
    return tokens, documents_of(len(tokens), ends)


def divided(tokens, document, *, reference=None, in_sight=0, rare_below=3):
    found = divide(
        tokens,
        spell(TOKENIZER, tokens, document),
        document=document,
        in_sight=np.broadcast_to(in_sight, tokens.shape),
        tokenizer=TOKENIZER,
        reference=reference,
        canonical=lambda part: part,
        vocab_size=len(TOKENIZER),
        rare_below=rare_below,
    )
    return {one.name: [one.groups[group] for group in one.of_token] for one in found}


def by_word(tokens, document, groups):
    """The groups of the words, each by its first token."""
    spelled = spell(TOKENIZER, tokens, document)
    return [
        (spelled.words[word], groups[first])
        for word, first in zip(spelled.word_of_occurrence, spelled.first_token, strict=True)
    ]


@given(st.lists(st.text(alphabet="abé ü—日\n'd1😀", max_size=12), min_size=1, max_size=4))
def test_bytes_of_tokens_add_up_and_words_are_those_of_the_text(texts):
    tokens, document = packed(*texts)
    spelled = spell(TOKENIZER, tokens, document)
    assert spelled.num_bytes.sum() == sum(len(text.encode()) for text in texts)
    found = [spelled.words[word] for word in spelled.word_of_occurrence]
    expected = [word.casefold() for text in texts for word in reference_module.WORD.findall(text)]
    assert found == expected
    assert (spelled.first_token >= 0).all() and (document[spelled.first_token] < len(texts)).all()


def test_rare_words_are_told_apart_by_what_their_document_holds_before_them():
    reference = ReferenceText(name="", tokens=packed("the the the mat mat mat")[0], num_tokens=10**6)
    tokens, document = packed("The rat, the Zoë. Zoë the rat", "a zoë")
    reference = ReferenceText(name="", tokens=reference.tokens, num_tokens=len(reference.tokens))
    groups = divided(tokens, document, reference=reference)["rare_words"]
    assert by_word(tokens, document, groups) == [
        ("the", WORDS[1]),
        ("rat", WORDS[3]),
        ("the", WORDS[1]),
        ("zoë", WORDS[3]),
        ("zoë", WORDS[4]),
        ("the", WORDS[1]),
        ("rat", WORDS[4]),
        ("a", WORDS[2]),
        ("zoë", WORDS[2]),  # in another document
    ]
    second = spell(TOKENIZER, tokens, document).first_token[3]  # the first Zoë is the first that is seen
    groups = divided(tokens, document, reference=reference, in_sight=second)["rare_words"]
    assert by_word(tokens, document, groups)[4:7] == [("zoë", WORDS[4]), ("the", WORDS[1]), ("rat", WORDS[5])]


def test_without_a_reference_the_other_documents_are_counted():
    tokens, document = packed("rat rat rat cat", "mat rat cat", "mat cat")
    groups = divided(tokens, document, rare_below=2)["word_frequency"]
    found = by_word(tokens, document, groups)
    assert found == [
        *[("rat", "1-9")] * 3,
        ("cat", "1-9"),
        ("mat", "1-9"),
        ("rat", "1-9"),  # three times in the first document
        ("cat", "1-9"),
        ("mat", "1-9"),
        ("cat", "1-9"),
    ]
    groups = divided(tokens, document, rare_below=2)["rare_words"]
    assert [group for word, group in by_word(tokens, document, groups) if word == "rat"] == [
        WORDS[3], WORDS[4], WORDS[4], WORDS[1]
    ]  # fmt: skip
    assert "ngrams_2" not in divided(tokens, document)
    tokens, document = packed("rat rat cat")
    assert [group for _, group in by_word(tokens, document, divided(tokens, document)["word_frequency"])] == [
        "1-9", "1-9", "0"
    ]  # fmt: skip


@pytest.mark.parametrize("chunk", [3, 7, 1 << 16])
def test_counts_and_known_ngrams_are_those_of_a_plain_count(monkeypatch, chunk):
    monkeypatch.setattr(reference_module, "_CHUNK_TOKENS", chunk)
    known = packed(TEXT[:200])[0]
    tokens, document = packed("the rat saw the mat; the cat ran to a mat.", "The cat sat on the mat. the")
    in_sight = np.arange(len(tokens)) // 8 * 8
    found = divided(
        tokens,
        document,
        reference=ReferenceText(name="", tokens=known, num_tokens=len(known)),
        in_sight=in_sight,
    )
    counts = [known.tolist().count(token) for token in tokens.tolist()]
    begins = (0, 1, 10, 100)
    assert found["token_frequency"] == [FREQUENCIES[sum(count >= least for least in begins) - 1] for count in counts]
    for order in (2, 3):
        grams = {tuple(known[start : start + order]) for start in range(len(known) - order + 1)}
        expected = [
            NGRAMS[2] if place - order < in_sight[place] else NGRAMS[tuple(tokens[place - order : place]) not in grams]
            for place in range(len(tokens))
        ]
        assert found[f"ngrams_{order}"] == expected
        assert len(set(expected)) == 3
    words = spell(TOKENIZER, tokens, document).words
    text = ReferenceText(name="", tokens=known, num_tokens=len(known))
    if chunk > len(known):
        plain = [reference_module.WORD.findall(TEXT[:200].casefold()).count(word) for word in words]
        assert text.count_words(words, TOKENIZER).tolist() == plain


def test_a_sample_comes_from_everywhere_in_a_long_text_and_says_so(monkeypatch):
    monkeypatch.setattr(reference_module, "_CHUNK_TOKENS", 10)
    tokens = np.arange(95)
    found = ReferenceText.sample(name="a text", tokens=tokens, num_tokens=95, at_most=40)
    assert found.name == "a sample of a text" and found.num_counted == 35 <= 40
    assert [piece.tolist() for piece in found.pieces()] == [
        tokens[start : start + 10].tolist() for start in (0, 30, 60, 90)
    ]
    assert found.count_tokens(np.array([5, 15, 35, 94])).tolist() == [1, 0, 1, 1]
    known = found.knows_ngrams(np.array([[29, 30], [39, 40], [60, 61]]), lambda part: part, 95)
    assert known.tolist() == [True, False, True]
    whole = ReferenceText.sample(name="a text", tokens=tokens, num_tokens=95, at_most=95)
    assert whole.name == "a text" and whole.num_counted == 95
    assert np.concatenate(list(whole.pieces())).tolist() == tokens.tolist()
