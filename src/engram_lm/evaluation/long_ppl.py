"""LongPPL: the perplexity of a model at those tokens that a long context makes much more likely.

Most tokens of a long text can be predicted from the last few sentences, so its perplexity says little of what a model
makes of the rest. An evaluator, any good model, says which tokens do need it: it reads each with everything before it
and with a short context, and calls a token a *key token* if the whole text is what makes it likely.

Source: Fang et al., “What is Wrong with Perplexity for Long-context Language Modeling?” (arXiv 2410.23771), and
PKU-ML/LongPPL, with these differences: a window in the middle of a text begins as the evaluator's tokenizer begins
texts, not with the bare token that stands there; and a first token that nothing predicts is left out, where the
published code takes the loss of the last one for it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import ConfigError, MismatchError, check_whole
from engram_lm.hashing.token_map import check_tokens
from engram_lm.model import EngramForCausalLM
from engram_lm.model.cache import CACHE_NAME
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.loss import token_losses

_TOKENS_AT_ONCE = 1024
"""Tokens whose logits a model of others has in memory at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyTokens:
    """When a token needs a long context."""

    short_context: int = 4096
    """Tokens of the evaluator that it certainly sees of a short context (also called ``trunc_len``), at least 1; up to
    ``step`` - 1 more."""
    step: int = 1024
    """Tokens from one short context to the next (also called ``sliding_window``), at least 1."""
    gain: float = 2.0
    """Nats that the whole text must save at a key token, more than this (also called alpha)."""
    most_loss: float = 2.0
    """Nats that a key token still costs with the whole text, less than this (also called -beta)."""

    def __post_init__(self) -> None:
        check_whole(short_context=self.short_context, step=self.step)
        if not (math.isfinite(self.gain) and math.isfinite(self.most_loss)):
            raise ConfigError(f"gain and most_loss are finite numbers of nats, not {self.gain} and {self.most_loss}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongPpl:
    """How well a model predicts what needs a long context."""

    long_ppl: float | None
    """exp of the mean loss at key tokens; None where there are none."""
    loss: float | None
    """That mean, in nats per token."""
    num_key_tokens: int
    """Key tokens, in tokens of the model."""
    perplexity: float | None
    """exp of the mean loss at all tokens of the same documents; None where no document is long enough."""
    num_tokens: int
    """Tokens of these documents that are predicted."""
    num_documents: int
    """Documents that are longer than the short context. Others have no key tokens and are not read."""
    num_cut: int
    """Documents of them that were cut, because they are longer than a model sees or than was asked for."""


class _Read(NamedTuple):
    """A text as a model reads it."""

    tokens: list[int]
    """Its tokens, without what its tokenizer puts before it."""
    spans: np.ndarray
    """First character of each and one past its last, int64 ``[len(tokens), 2]``."""


def long_ppl(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    evaluator: Any = None,
    evaluator_tokenizer: Any = None,
    options: KeyTokens | None = None,
    max_length: int | None = None,
    on_progress: Callable[[int], None] = lambda num_texts: None,
) -> LongPpl:
    """Measure LongPPL on documents.

    Args:
        model: An `EngramForCausalLM` or any causal language model of transformers, with memory attached or without.
        tokenizer: Its tokenizer, a fast one: characters are what both models have in common.
        texts: The documents.
        evaluator: The model that finds the key tokens; ``model`` itself where None.
        evaluator_tokenizer: Its tokenizer, a fast one.
        options: When a token is a key token; as published where None.
        max_length: Tokens of either model that are read of a document at most; what both see where None.
        on_progress: Called with 1 after each document.

    Raises:
        ConfigError: An evaluator without its tokenizer, or a length that leaves nothing beyond the short context.
        MismatchError: A tokenizer cannot say which characters a token stands for.
        TokenError: A model does not embed one of the tokens.

    Cost: a pass of the model and one of the evaluator over each document, and one of the evaluator over windows of
    ``short_context + step`` tokens for every ``step`` tokens beyond the first ``short_context``. Logits of at most
    1,024 tokens of a model of others are in memory at a time, if it keeps a cache; else those of a whole document.
    """
    options = options or KeyTokens()
    limits = document_limits(
        model,
        tokenizer,
        evaluator=evaluator,
        evaluator_tokenizer=evaluator_tokenizer,
        options=options,
        max_length=max_length,
    )
    own = evaluator is None or evaluator is model
    judge, judge_tokenizer = (model, tokenizer) if own else (evaluator, evaluator_tokenizer)
    key_nats, all_nats = 0.0, 0.0
    num_keys = num_tokens = num_documents = num_cut = 0
    with evaluating(model), evaluating(judge), torch.no_grad():
        for text in texts:
            read, cut = _read_at_most(text, tokenizer, limits[0])
            judged = read
            if not own:
                text = text[: int(read.spans[-1, 1])] if cut else text
                judged, shorter = _read_at_most(text, judge_tokenizer, limits[1])
                if shorter:
                    text, cut = text[: int(judged.spans[-1, 1])], True
                    read = _read(text, tokenizer)
            if len(judged.tokens) > options.short_context:
                losses = _text_losses(model, read.tokens, beginning_tokens(tokenizer))
                known = losses if own else _text_losses(judge, judged.tokens, beginning_tokens(judge_tokenizer))
                keys = _key_tokens(judge, judged.tokens, beginning_tokens(judge_tokenizer), known, options)
                if not own:
                    keys = _touched(judged.spans[keys], read.spans, len(text))
                scored = np.isfinite(losses)
                keys &= scored
                key_nats, all_nats = key_nats + float(losses[keys].sum()), all_nats + float(losses[scored].sum())
                num_keys, num_tokens = num_keys + int(keys.sum()), num_tokens + int(scored.sum())
                num_documents, num_cut = num_documents + 1, num_cut + cut
            on_progress(1)
    loss = key_nats / num_keys if num_keys else None
    return LongPpl(
        long_ppl=None if loss is None else math.exp(min(loss, 700.0)),
        loss=loss,
        num_key_tokens=num_keys,
        perplexity=math.exp(min(all_nats / num_tokens, 700.0)) if num_tokens else None,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_cut=num_cut,
    )


def document_limits(
    model: Any,
    tokenizer: Any,
    *,
    evaluator: Any,
    evaluator_tokenizer: Any,
    options: KeyTokens,
    max_length: int | None,
) -> tuple[int, int]:
    """Return how many tokens of a document the model and the evaluator read at most.

    The arguments and errors are those of `long_ppl`, which has all its own checks here, before it reads anything.
    """
    if (evaluator is None) != (evaluator_tokenizer is None):
        raise ConfigError("give an evaluator together with its tokenizer")
    judge, judge_tokenizer = (model, tokenizer) if evaluator is None else (evaluator, evaluator_tokenizer)
    limits = _limit(model, tokenizer, max_length), _limit(judge, judge_tokenizer, max_length)
    if limits[1] <= options.short_context:
        raise ConfigError(
            f"the evaluator reads {limits[1]:,} tokens of a document, and a short context has "
            f"{options.short_context:,} of them; take a shorter short context, or an evaluator that reads more"
        )
    return limits


def _limit(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """Tokens of a document that a model reads at most."""
    if not getattr(tokenizer, "is_fast", False):
        raise MismatchError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for; use a fast tokenizer"
        )
    config = model.config.get_text_config()
    sees = getattr(config, "max_position_embeddings", None) or 1 << 30
    return int(min(sees, max_length or sees)) - len(beginning_tokens(tokenizer))


def _read(text: str, tokenizer: Any) -> _Read:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return _Read(list(found["input_ids"]), spans)


def _read_at_most(text: str, tokenizer: Any, number: int) -> tuple[_Read, bool]:
    """Read the first ``number`` tokens of a text, and say whether it has more."""
    read = _read(text, tokenizer)
    return _Read(read.tokens[:number], read.spans[:number]), len(read.tokens) > number


def _key_tokens(
    evaluator: Any, tokens: Sequence[int], beginning: Sequence[int], known: np.ndarray, options: KeyTokens
) -> np.ndarray:
    """Mark the key tokens of a text, bool ``[len(tokens)]``, given what each costs with everything before it."""
    short = np.full(len(tokens), np.nan, dtype=np.float32)
    for start in range(0, len(tokens) - options.short_context, options.step):
        first, stop = start + options.short_context, min(start + options.short_context + options.step, len(tokens))
        if start == 0:
            short[first:stop] = known[first:stop]  # everything before these tokens is their short context
            continue
        short[first:stop] = _text_losses(evaluator, tokens[start:stop], beginning)[options.short_context :]
    with np.errstate(invalid="ignore"):
        keys: np.ndarray = (short - known > options.gain) & (known < options.most_loss)
    return keys


def _touched(parts: np.ndarray, spans: np.ndarray, num_characters: int) -> np.ndarray:
    """Mark the tokens, bool ``[len(spans)]``, that have a character in one of the parts, int64 ``[n, 2]``."""
    marked = np.zeros(num_characters, dtype=bool)
    for start, stop in parts.tolist():
        marked[start:stop] = True
    before = np.concatenate([[0], marked.cumsum()])
    return before[spans[:, 1]] > before[spans[:, 0]]


def _text_losses(model: Any, tokens: Sequence[int], beginning: Sequence[int]) -> np.ndarray:
    """Nats of each token of a text, float32 ``[len(tokens)]``; NaN for the first one where nothing stands before it."""
    check_tokens(np.array(tokens), model.get_input_embeddings().num_embeddings)
    ids = torch.tensor([[*beginning, *tokens]], device=next(model.parameters()).device)
    losses = _losses(model, ids[:, :-1], ids[:, 1:])[0].float().cpu().numpy()
    losses = losses[max(0, len(beginning) - 1) :]
    return losses if beginning else np.concatenate([np.full(1, np.nan, dtype=np.float32), losses])


def _losses(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, ``[1, L]``, with the logits of few tokens in memory at a time."""
    if isinstance(model, EngramForCausalLM) or inputs.shape[1] <= _TOKENS_AT_ONCE:
        return token_losses(model, inputs, targets)
    parts, cache = [], None
    pieces = zip(inputs.split(_TOKENS_AT_ONCE, dim=1), targets.split(_TOKENS_AT_ONCE, dim=1), strict=True)
    for some, following in pieces:
        out = model(input_ids=some, use_cache=True, **({} if cache is None else {CACHE_NAME: cache}))
        cache = getattr(out, CACHE_NAME, None)
        if cache is None:  # a model that keeps no state reads a text in one piece
            return token_losses(model, inputs, targets)
        nats = torch.nn.functional.cross_entropy(out.logits[0].float(), following[0], reduction="none")
        parts.append(nats[None])
    return torch.cat(parts, dim=1)
