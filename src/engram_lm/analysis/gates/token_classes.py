"""What the tokens of a vocabulary are made of: letters, digits, punctuation or space."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["TOKEN_CLASSES", "token_classes"]

TOKEN_CLASSES = ("letters", "digits", "punctuation", "space", "other")
"""``other`` are tokens that mix the classes, special tokens, and pieces of a character."""

_OF_CATEGORY = {"L": 0, "M": 0, "N": 1, "P": 2, "S": 2, "Z": 3}
_OTHER = 4
_REPLACEMENT = "\ufffd"


def token_classes(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Find the class of each token. Space around a token does not count, unless there is nothing else.

    Args:
        tokenizer: A Hugging Face tokenizer.
        tokens: Raw ids ``[n]``; ids that no tokenizer produces are ``other``.

    Returns:
        Indices into `TOKEN_CLASSES`, int64 ``[n]``.
    """
    ids, special = np.asarray(tokens, np.int64), set(tokenizer.all_special_ids)
    known = [token for token in ids.tolist() if token < len(tokenizer) and token not in special]
    # A tokenizer makes a batch of one out of no tokens.
    texts = known and tokenizer.batch_decode(
        [[token] for token in known], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    classes = {token: _class_of(text) for token, text in zip(known, texts, strict=True)}
    return np.array([classes.get(token, _OTHER) for token in ids.tolist()], np.int64)


def _class_of(text: str) -> int:
    inside = text.strip()
    if not inside:
        return _OF_CATEGORY["Z"]  # a token that is a space alone may be decoded to nothing
    if _REPLACEMENT in inside:
        return _OTHER
    found = {_OF_CATEGORY.get(unicodedata.category(character)[0], _OTHER) for character in inside}
    return found.pop() if len(found) == 1 else _OTHER
