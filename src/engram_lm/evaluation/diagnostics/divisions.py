"""Divides the tokens of a text: by frequency, by what is known of their word, by whether their N-gram is known."""

# Dimension key: N tokens of the text.

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from engram_lm.evaluation.diagnostics.reference import ReferenceText, same_word
from engram_lm.evaluation.token_text import WORD, text_places, token_texts

FREQUENCIES = ("0", "1-9", "10-99", "100-999", "1,000-9,999", "10,000 and more")
"""Occurrences in the reference."""
WORDS = ("no word", "frequent word", "rare, only once", "rare, first time", "rare, again, near", "rare, again, far")
"""What the word of a token is. Occurrences are counted within its document; again is near where an earlier occurrence
stands in the same sequence, which is all that a model sees, and far where none does."""
NGRAMS = ("known", "unknown", "none in sight")
"""Whether the reference has the N-gram before a token; none is in sight at the start of a sequence."""
ORDERS = (2, 3)
"""Orders of the N-grams that are looked for."""

_FREQUENCY_BEGINS = (1, 10, 100, 1_000, 10_000)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Division:
    """Groups of tokens, of which each token is in exactly one."""

    name: str
    """Key in a result."""
    title: str
    """What people read."""
    groups: tuple[str, ...]
    """Names of the groups."""
    of_token: np.ndarray
    """Index of each token's group, int64 ``[N]``."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SpelledText:
    """What the tokens of a text spell."""

    num_bytes: np.ndarray
    """Bytes of UTF-8 that each token adds to the text, int64 ``[N]``; 0 for special tokens."""
    words: tuple[str, ...]
    """The different words, whatever their case."""
    word_of_occurrence: np.ndarray
    """For each occurrence of a word, in the order of the text, its index in ``words``, int64."""
    first_token: np.ndarray
    """For each occurrence the place of its first token, int64."""
    occurrence: np.ndarray
    """For each token the occurrence of a word that it belongs to, -1 for none, int64 ``[N]``."""


def spell(tokenizer: Any, tokens: np.ndarray, document: np.ndarray) -> SpelledText:
    """Find the words of a text, each of which is within one document.

    A word is a run of letters. A token that spells the end of one word and the beginning of another belongs to the
    latter.

    Args:
        tokenizer: What made the tokens.
        tokens: Raw tokens, integers ``[N]``.
        document: The number of each token's document, ascending, int64 ``[N]``.
    """
    num_bytes, occurrence = np.zeros(len(tokens), np.int64), np.full(len(tokens), -1, np.int64)
    words: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    bounds = np.flatnonzero(np.diff(document, prepend=-1, append=-1))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        ids = tokens[begin:end].tolist()
        places = text_places(tokenizer, ids)
        texts = ["\n"] * len(ids)  # a special token ends a word
        for place, text in zip(places, token_texts(tokenizer, [ids[place] for place in places]), strict=True):
            texts[place] = text
            num_bytes[begin + place] = len(text.encode("utf-8", "replace"))
        stops = np.cumsum([len(text) for text in texts])
        # A token that spells no character yet belongs to the character that follows.
        starts = stops - [len(text) for text in texts]
        for match in WORD.finditer("".join(texts)):
            first = int(np.searchsorted(stops, match.start(), side="right"))
            while first and starts[first - 1] == stops[first - 1] == match.start():
                first -= 1
            last = int(np.searchsorted(starts, match.end(), side="left"))
            occurrence[begin + first : begin + last] = len(found)
            found.append((words.setdefault(same_word(match.group()), len(words)), begin + first))
    word, first_token = np.array(found, np.int64).reshape(-1, 2).T
    return SpelledText(
        num_bytes=num_bytes,
        words=tuple(words),
        word_of_occurrence=word,
        first_token=first_token,
        occurrence=occurrence,
    )


def divide(
    tokens: np.ndarray,
    spelled: SpelledText,
    *,
    document: np.ndarray,
    in_sight: np.ndarray,
    tokenizer: Any,
    reference: ReferenceText | None,
    canonical: Callable[[np.ndarray], np.ndarray],
    vocab_size: int,
    rare_below: int,
) -> Iterator[Division]:
    """Divide a text in every way.

    Args:
        tokens: Raw tokens, int64 ``[N]``.
        spelled: What they spell.
        document: The number of each token's document, int64 ``[N]``.
        in_sight: Place of the first token that is seen when each token is predicted, int64 ``[N]``.
        tokenizer: What made the tokens.
        reference: Where frequencies are counted. Where None, they are counted in the other documents of the text, or,
            if it is one document, at its other tokens; then no N-gram is known.
        canonical: Turns raw tokens into those that N-grams are made of.
        vocab_size: Number of tokens that ``canonical`` knows.
        rare_below: A word is rare if it occurs less often than this.
    """
    words = spelled.word_of_occurrence
    if reference is None:
        token_counts = _elsewhere(tokens, document)
        word_counts = _elsewhere(words, document[spelled.first_token])
    else:
        token_counts = reference.count_tokens(tokens)
        word_counts = reference.count_words(spelled.words, tokenizer)[words]
    yield _by_frequency("token_frequency", "token frequency", token_counts)
    yield _by_frequency("word_frequency", "word frequency", _of_tokens(word_counts, spelled), no_word=True)
    yield _by_word(spelled, word_counts, document, in_sight, rare_below)
    if reference is None:
        return
    seen, places = canonical(tokens), np.arange(len(tokens))
    for order in ORDERS:
        known = np.full(len(tokens), 2)
        # The N-gram ends at the token before, where memory is asked for what helps to predict this one.
        before = places[(places - order >= in_sight) & (places >= order)]
        ngrams = seen[before[:, None] + np.arange(-order, 0)]
        before, ngrams = before[(ngrams >= 0).all(-1)], ngrams[(ngrams >= 0).all(-1)]
        known[before] = np.where(reference.knows_ngrams(ngrams, canonical, vocab_size), 0, 1)
        yield Division(name=f"ngrams_{order}", title=f"{order}-gram before", groups=NGRAMS, of_token=known)


def _elsewhere(things: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Count the occurrences of each thing in other documents; or its other occurrences, if there is one document."""
    _, kind, counts = np.unique(things, return_inverse=True, return_counts=True)
    if len(things) == 0 or (document == document[0]).all():
        return counts[kind] - 1
    pair = document * (int(kind.max()) + 1) + kind
    _, within, own = np.unique(pair, return_inverse=True, return_counts=True)
    return np.asarray(counts[kind] - own[within])


def _of_tokens(values: np.ndarray, spelled: SpelledText) -> np.ndarray:
    """Give each token the value of its occurrence of a word, -1 without."""
    return np.append(values, -1)[spelled.occurrence]


def _by_frequency(name: str, title: str, counts: np.ndarray, *, no_word: bool = False) -> Division:
    group = np.searchsorted(_FREQUENCY_BEGINS, counts, side="right")
    if no_word:
        return Division(
            name=name,
            title=title,
            groups=(*FREQUENCIES, WORDS[0]),
            of_token=np.where(counts < 0, len(FREQUENCIES), group),
        )
    return Division(name=name, title=title, groups=FREQUENCIES, of_token=group)


def _by_word(
    spelled: SpelledText, counts: np.ndarray, document: np.ndarray, in_sight: np.ndarray, rare_below: int
) -> Division:
    """Divide by whether a word is rare, and what its document holds of it before."""
    words, first, own = spelled.word_of_occurrence, spelled.first_token, document[spelled.first_token]
    # Occurrences of a word in a document follow each other.
    order = np.lexsort([first, words, own])
    same = np.zeros(len(order), bool)
    same[1:] = (words[order[1:]] == words[order[:-1]]) & (own[order[1:]] == own[order[:-1]])
    before, repeated = np.full(len(order), -1), np.zeros(len(order), bool)
    before[order[1:][same[1:]]] = first[order[:-1][same[1:]]]  # where the one before begins
    repeated[order[:-1]] = same[1:]
    of_token, earlier = spelled.occurrence, _of_tokens(before, spelled)
    rare = of_token >= 0
    rare[rare] = counts[of_token[rare]] < rare_below
    group = np.where(of_token < 0, 0, 1)
    group[rare & (earlier < 0)] = 2
    group[rare & (earlier < 0) & (_of_tokens(repeated.astype(np.int64), spelled) == 1)] = 3
    group[rare & (earlier >= 0)] = np.where(earlier >= in_sight, 4, 5)[rare & (earlier >= 0)]
    return Division(name="rare_words", title="rare words", groups=WORDS, of_token=group)


def documents_of(num_tokens: int, document_ends: np.ndarray) -> np.ndarray:
    """Number the documents, int64 ``[num_tokens]``; ``document_ends`` are one past the last token of each."""
    return np.searchsorted(np.asarray(document_ends), np.arange(num_tokens), side="right")
