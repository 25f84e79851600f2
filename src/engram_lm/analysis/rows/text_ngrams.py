"""The frequent N-grams of a text, counted once for everything that asks for them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engram_lm.analysis.subject import Subject
from engram_lm.analysis.token_text import text_tokens
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import FrequentNgrams, frequent_ngrams

__all__ = ["TextNgrams"]


class TextNgrams:
    """Counts the N-grams of a text when they are first asked for, once for each way of telling N-grams apart.

    Args:
        tokens: The text, raw tokens, integers ``[num_tokens]``; a memory-mapped array will do.
        max_ngrams: N-grams of each order that are kept, the most frequent ones.
    """

    def __init__(self, tokens: Any, *, max_ngrams: int = 1 << 16) -> None:
        self.tokens, self.max_ngrams = np.asanyarray(tokens), max_ngrams
        self._counted: dict[Any, dict[int, FrequentNgrams]] = {}

    @classmethod
    def of(cls, subject: Subject, text: Any, max_ngrams: int = 1 << 16) -> "TextNgrams":
        """Take a text, its tokens, or what this call returned for them before."""
        if isinstance(text, TextNgrams):
            return text
        return cls(text_tokens(subject.tokenizer, text) if isinstance(text, str) else text, max_ngrams=max_ngrams)

    def frequent(self, spec: HashSpec, num_ngrams: int | None = None) -> Mapping[int, FrequentNgrams]:
        """Return the most frequent N-grams of each order.

        Args:
            spec: The hash. Two hashes that see the same N-grams and differ only in their rows share one count.
            num_ngrams: N-grams of each order, at most; None means all that are kept.

        Raises:
            DataError: The text has no tokens.
            TokenError: A token is outside the vocabulary.
        """
        key = (spec.orders, spec.token_map_digest, spec.fill, spec.segments)
        if key not in self._counted:
            self._counted[key] = frequent_ngrams(spec, self.tokens, num_ngrams=self.max_ngrams)
        return {order: ngrams.first(num_ngrams or self.max_ngrams) for order, ngrams in self._counted[key].items()}
