"""Text → tokens as a model read them in its training: the one place that decides what a text begins with.

Some tokenizers put special tokens around a text: Llama and Gemma begin it with a beginning-of-text token, GLM with two
tokens, T5 ends it with one. A model that has always seen such a beginning predicts badly without it. Ours, GPT-2's and
Qwen's add nothing.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engram_lm.errors import DataError

_NUM_SAMPLES = 100


def beginning_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Find the special tokens that a tokenizer puts before a text; none for most.

    Args:
        tokenizer: A tokenizer of transformers, or a ``tokenizers.Tokenizer``.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    for text in _samples(tokenizer):
        if hasattr(backend, "post_processor"):
            # Not by calling the tokenizer, which would change how its user had it cut and pad.
            encoding, processor = backend.encode(text, add_special_tokens=False), backend.post_processor
            plain = encoding.ids
            whole = plain if processor is None else processor.process(encoding, None, True).ids
        else:
            plain, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        places = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        if plain and len(places) == 1:  # Several if the sample is itself what stands around texts.
            return tuple(whole[: places[0]])
    return ()


def _samples(tokenizer: Any) -> Iterator[str]:
    """Name short texts, of which the first has tokens in nearly every tokenizer; one for genes may know no ``a``."""
    yield "a"
    yield from itertools.islice(tokenizer.get_vocab(), _NUM_SAMPLES)


def text_tokens(tokenizer: Any, text: str) -> np.ndarray:
    """Tokenize a text as its model reads it, int64 ``[num_tokens]``: with what the tokenizer puts before it.

    What the tokenizer puts behind a text is left out, because that would end what is to be continued. A text that
    spells its own beginning, such as one from a chat template, is not given a second one.
    """
    tokens = begin(beginning_tokens(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"])
    return np.array(tokens, dtype=np.int64)


def prompt_tokens(tokenizer: Any, text: str) -> np.ndarray:
    """Tokenize a text that will be continued, int64 ``[num_tokens]``, at least one token: see `text_tokens`.

    A text without any gets the token of `token_before`.

    Raises:
        DataError: There is no such token either.
    """
    tokens = text_tokens(tokenizer, text)
    if len(tokens):
        return tokens
    before = token_before(tokenizer)
    if before is None:
        raise DataError("the prompt is empty, and the tokenizer has no token that begins or ends a text; give a prompt")
    return np.array([before], dtype=np.int64)


def begin(beginning: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Put a text's beginning before its tokens, unless they have it already."""
    found = list(tokens)
    return found if found[: len(beginning)] == list(beginning) else [*beginning, *found]


def token_before(tokenizer: Any) -> int | None:
    """Choose the token that the first token of a text is predicted from, where its tokenizer puts nothing before it.

    It is the beginning-of-text token if the tokenizer has one, or else its end-of-text token, which stands before all
    documents but the first in training; None without both.

    Source: ``prefix_token_id`` of EleutherAI/lm-evaluation-harness.
    """
    bos, eos = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos"))
    return eos if bos is None else bos


def starts_of(beginning: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """Mark the tokens that are part of a beginning, bool ``[num_tokens]``; none if the beginning is empty.

    Such tokens are given and never predicted when a loss is measured.
    """
    marked = np.zeros(len(tokens), dtype=bool)
    if beginning and len(tokens) >= len(beginning):
        found = np.lib.stride_tricks.sliding_window_view(tokens, len(beginning)) == np.asarray(beginning)
        for place in range(len(beginning)):
            marked[place : len(tokens) - len(beginning) + 1 + place] |= found.all(-1)
    return marked
