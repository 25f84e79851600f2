"""How often tokens, words and N-grams of a text occur in a reference: in a text that a model was trained on, say."""

# Dimension key: N tokens of the text, M tokens of the reference, O tokens of an N-gram.

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from engram_lm.evaluation.token_text import WORD
from engram_lm.hashing.counting import ngram_keys

_CHUNK_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceText:
    """A text in which things are counted."""

    name: str
    """What people call it."""
    tokens: Any
    """Raw tokens ``[M]``, of which slices are taken: an array, or `TokenShards`."""
    num_tokens: int
    """How many of them are looked at, from the first on."""
    every: int = 1
    """Of how many pieces of 65,536 tokens one is counted, so that a sample comes from everywhere in a long text."""

    @classmethod
    def sample(cls, *, name: str, tokens: Any, num_tokens: int, at_most: int) -> "ReferenceText":
        """Take a text, or a sample that is spread over it and has about ``at_most`` tokens, which its name says."""
        every = max(1, -(-num_tokens // max(at_most, _CHUNK_TOKENS)))
        return cls(name=f"a sample of {name}" if every > 1 else name, tokens=tokens, num_tokens=num_tokens, every=every)

    @property
    def num_counted(self) -> int:
        """Tokens that are counted."""
        return sum(min(_CHUNK_TOKENS, self.num_tokens - start) for start in self._starts())

    def _starts(self) -> range:
        return range(0, self.num_tokens, _CHUNK_TOKENS * self.every)

    def pieces(self, overlap: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens piece by piece, int64, each with the ``overlap`` tokens before it."""
        for start in self._starts():
            stop = min(start + _CHUNK_TOKENS, self.num_tokens)
            yield np.asarray(self.tokens[max(0, start - overlap) : stop]).astype(np.int64)

    def count_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Count how often each of ``tokens [N]`` occurs, int64 ``[N]``."""
        counts = np.zeros(int(tokens.max(initial=0)) + 1, np.int64)
        for piece in self.pieces():
            counts += np.bincount(piece[piece < len(counts)], minlength=len(counts))
        return counts[tokens]

    def count_words(self, words: Sequence[str], tokenizer: Any) -> np.ndarray:
        """Count how often each word occurs, whatever its case, int64 ``[len(words)]``.

        ``words`` are all different and spelled by `same_word`. A word across two pieces of 65,536 tokens is missed.
        """
        places = {word: place for place, word in enumerate(words)}
        counts = np.zeros(len(words), np.int64)
        for piece in self.pieces():
            text = tokenizer.decode(piece.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for word, number in Counter(map(same_word, WORD.findall(text))).items():
                if word in places:
                    counts[places[word]] += number
        return counts

    def knows_ngrams(
        self, ngrams: np.ndarray, canonical: Callable[[np.ndarray], np.ndarray], vocab_size: int
    ) -> np.ndarray:
        """Say which of ``ngrams``, int64 ``[N, O]``, occur, bool ``[N]``.

        ``canonical`` turns raw tokens ``[M]`` into the tokens that the N-grams are made of, which are below
        ``vocab_size``. What is held is as large as ``ngrams``, however long the reference is.
        """
        wanted, places = np.unique(ngram_keys(ngrams, vocab_size), return_inverse=True)
        seen, order = np.zeros(len(wanted), bool), ngrams.shape[1]
        for piece in self.pieces(overlap=order - 1):
            if len(wanted) and len(piece) >= order:
                found = np.lib.stride_tricks.sliding_window_view(canonical(piece), order)
                keys = np.unique(ngram_keys(found, vocab_size))
                near = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
                seen[near[wanted[near] == keys]] = True
        return seen[places]


def same_word(word: str) -> str:
    """Spell a word as all its spellings with capitals are spelled."""
    return word.casefold()
