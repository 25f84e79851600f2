"""A causal language model as EleutherAI's lm-evaluation-harness asks it: log-probabilities, whole texts, generation.

The harness's own class for models of transformers, ``HFLM``, answers the same questions in the same way at batch size
1. This one differs where a batch, or the beginning of a text, would change the answer:

- Padding is always masked, so that no N-gram reaches into it.
- Two requests with the same tokens share one forward pass, each with its own split between context and continuation.
  ``HFLM`` of lm-eval 0.4.13 returns wrong values where the splits differ.
- A text begins as its model's tokenizer begins it (`engram_lm.tokenizing`), once.
- A row that has reached its stop word, or the end of its text, ends there, whatever the rest of the batch does.
- Probabilities are computed in float32, also for a model in bfloat16.
- The model and the tokenizer are left as they were.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import DataError
from engram_lm.evaluation.batching import Batches, keeps_fewer_logits
from engram_lm.hashing.token_map import check_tokens
from engram_lm.tokenizing import begin, beginning_tokens, token_before

_MAX_NEW_TOKENS = 256
"""Tokens to generate where a task does not say how many, as in ``HFLM``."""


class _Scored(NamedTuple):
    """A continuation to score."""

    tokens: tuple[int, ...]
    """What the model reads: context and continuation without its last token."""
    targets: tuple[int, ...]
    """The continuation's tokens, the last of which is predicted from the end of `tokens`."""


class HarnessModel(TemplateLM):
    """A causal language model of any kind, for lm-evaluation-harness.

    Args:
        model: An `EngramForCausalLM` or any causal language model of transformers, with memory attached or without. It
            is put into evaluation mode for each call and back afterwards.
        tokenizer: Its tokenizer, which is left as it is.
        batch_size: Sequences at a time; None finds a size for each batch by the length of its sequences, and smaller
            ones where the device's memory is too small.
        max_length: Tokens that the model sees at most; what its configuration says where None.
        on_progress: Called with the number of requests that have just been answered.

    Raises:
        DataError: A continuation, or what is to be generated, does not fit into ``max_length``; or there is nothing
            that a first token could be predicted from.
        TokenError: The model has no embedding for a token.

    Source: the interface is ``lm_eval/api/model.py`` of EleutherAI/lm-evaluation-harness, the behaviour at batch size 1
    that of ``lm_eval/models/huggingface.py``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        on_progress: Callable[[int], None] = lambda num_requests: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = "auto" if batch_size is None else batch_size  # as HFLM calls it
        self.max_length = max_length or resolve_max_length(model.config, tokenizer)
        self.num_truncated = 0
        """Requests so far whose beginning was cut off, because they were longer than the model sees."""
        self._device = next(model.parameters()).device
        self._beginning = beginning_tokens(tokenizer)
        self._num_embeddings = model.get_input_embeddings().num_embeddings
        self._keeps_fewer_logits = keeps_fewer_logits(model)
        self._batches = Batches(batch_size, self._device, self._num_embeddings)
        self._on_progress = on_progress

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None if the tokenizer has none."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that the first token of a text is predicted from.

        Raises:
            DataError: The tokenizer has none.
        """
        return self._before()[-1]

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which the harness puts into the keys of its caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(next(self.model.parameters()).dtype),
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a chat as the tokenizer's template does."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text, with its beginning unless ``add_special_tokens`` is False or the text spells it itself."""
        tokens: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return tokens if add_special_tokens is False else begin(self._beginning, tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        Returns:
            For each request the log-probability of its continuation in nats, and whether greedy decoding gives it.
        """
        pairs = [request.args for request in requests]
        encoded = [
            ((context, continuation), *self.encode_pair(context, continuation)) for context, continuation in pairs
        ]
        return self._loglikelihood_tokens(encoded)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize a context and its continuation, at least one token each.

        They are tokenized together, and the continuation has the tokens behind as many as the context has by itself.

        Raises:
            DataError: There is nothing to predict the first token from, or the continuation has no tokens.
        """
        if context.strip():
            before, scored = self._encode_pair(context, continuation)
            if not scored:  # The last letters of the context and all of the continuation are one token.
                whole = self.tok_encode(context + continuation)
                pairs = enumerate(zip(before, whole, strict=False))
                start = next((place for place, (one, other) in pairs if one != other), len(whole))
                before, scored = whole[:start], whole[start:]
        else:
            before, scored = [], self.tok_encode(context + continuation, add_special_tokens=False)
        if not before:
            before = self._before()
            scored = begin(before, scored)[len(before) :]
        if not scored:
            raise DataError(f"the answer {continuation!r:.80} has no tokens of its own behind {context[-80:]!r}")
        return before, scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each token once, with as much context as the model sees.

        Returns:
            The log-probability of each text in nats; 0 for an empty one.
        """
        windows: list[_Scored] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            before = self._before()
            tokens = begin(before, self.tok_encode(text, add_special_tokens=False))[len(before) :]
            parts = get_rolling_token_windows(tokens, before[-1], self.max_length, context_len=1)
            for place, (context, scored) in enumerate(map(make_disjoint_window, parts)):
                windows.append(self._scored(context if place else before, scored))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._score(windows, lambda done: None), strict=True):
            sums[index] += value
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._on_progress(len(requests))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop word, which is left out.

        Returns:
            The continuation of each request.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for indices in groups.values():
            made = self._continue([requests[index] for index in indices])
            for index, text in zip(indices, made, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _continue(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests that have the same settings."""
        options = dict(normalize_gen_kwargs(requests[0].args[1], _MAX_NEW_TOKENS))
        until = handle_stop_sequences(list(options.pop("until")), self.tokenizer.eos_token)
        max_new_tokens = options.pop("max_gen_toks")
        longest = self.max_length - max_new_tokens
        if longest < 1:
            raise DataError(
                f"the task {requests[0].task_name} generates up to {max_new_tokens} tokens, and the model sees "
                f"{self.max_length} with the question; choose another task"
            )
        whole = [self.tok_encode(request.args[0]) or self._before() for request in requests]
        check_tokens(torch.tensor([max(map(max, whole))]), self._num_embeddings)
        self.num_truncated += sum(len(tokens) > longest for tokens in whole)
        contexts = [tokens[-longest:] for tokens in whole]
        # The longest first, so that there is little padding and a lack of memory shows at once.
        order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]), reverse=True)
        answers = [""] * len(requests)

        def run(start: int, stop: int) -> None:
            chosen = order[start:stop]
            made = self._generate([contexts[index] for index in chosen], until, max_new_tokens, options)
            for index, text in zip(chosen, made, strict=True):
                answers[index] = text
            self._on_progress(len(chosen))

        self._batches.each([len(contexts[index]) + max_new_tokens for index in order], [1] * len(order), run)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = self._score([self._scored(context, scored) for _, context, scored in requests], self._on_progress)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _before(self) -> list[int]:
        """What stands before the first token of a text that has nothing before it, at least one token."""
        if self._beginning:
            return list(self._beginning)
        token = token_before(self.tokenizer)
        if token is None:
            raise DataError(
                "there is nothing before the first token, and the tokenizer has no token that begins or ends a text; "
                "give the question a prompt"
            )
        return [token]

    def _scored(self, context: Sequence[int], scored: Sequence[int]) -> _Scored:
        if len(scored) > self.max_length:
            raise DataError(f"an answer has {len(scored):,} tokens, the model sees {self.max_length:,} at most")
        tokens = (*context, *scored)
        self.num_truncated += len(tokens) > self.max_length + 1
        return _Scored(tokens[-self.max_length - 1 : -1], tuple(scored))

    @torch.no_grad()
    def _score(self, requests: Sequence[_Scored], on_progress: Callable[[int], None]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is what greedy decoding gives."""
        same_input: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            same_input.setdefault(request.tokens, []).append(index)
        inputs = sorted(same_input, key=len, reverse=True)
        if inputs:
            highest = max(max(*one.tokens, *one.targets) for one in requests)
            check_tokens(torch.tensor([highest]), self._num_embeddings)
        num_kept = [max(len(requests[index].targets) for index in same_input[one]) for one in inputs]
        answers: list[tuple[float, bool] | None] = [None] * len(requests)

        def run(start: int, stop: int) -> None:
            batch = inputs[start:stop]
            longest = len(batch[0])
            # Rows are padded on the right, so a short row's continuation lies further from the end.
            needed = zip(batch, num_kept[start:stop], strict=True)
            keep = max(longest - len(one) + kept for one, kept in needed)
            logits = self._logits(batch, keep)
            skipped = longest - logits.shape[1]
            done = 0
            for tokens, row in zip(batch, logits, strict=True):
                for index in same_input[tokens]:
                    targets = torch.tensor(requests[index].targets, device=row.device)
                    end = len(tokens) - skipped
                    predicted = row[end - len(targets) : end].float()
                    nats = predicted.log_softmax(-1).gather(1, targets[:, None]).double().sum()
                    answers[index] = float(nats), bool((predicted.argmax(-1) == targets).all())
                done += len(same_input[tokens])
            on_progress(done)

        with evaluating(self.model):
            self._batches.each([len(one) for one in inputs], num_kept if self._keeps_fewer_logits else None, run)
        assert None not in answers
        return answers  # type: ignore[return-value]

    def _logits(self, batch: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Run inputs, the longest first; returns ``[len(batch), length, V]``: the last positions, at least ``keep``."""
        options = {"logits_to_keep": keep} if self._keeps_fewer_logits else {}
        tokens, mask = _padded(batch, left=False)
        logits: Tensor = self.model(
            input_ids=tokens.to(self._device), attention_mask=mask.to(self._device), use_cache=False, **options
        ).logits
        return logits

    def _generate(
        self, contexts: Sequence[Sequence[int]], until: Sequence[str], max_new_tokens: int, options: dict[str, Any]
    ) -> list[str]:
        tokens, mask = _padded(contexts, left=True)
        chosen = dict(options)
        if not chosen.get("do_sample") and not chosen.get("temperature"):
            chosen.pop("temperature", None)
            chosen["do_sample"] = False
        stop = StopWords(self.tokenizer, until, tokens.shape[1])
        # Any token of the vocabulary will do for padding, which is masked.
        pad = next((one for one in (self.tokenizer.pad_token_id, self.eot_token_id) if one is not None), 0)
        with evaluating(self.model):
            made = self.model.generate(
                input_ids=tokens.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=pad,
                use_cache=True,
                **chosen,
            )
        ends = {self.eot_token_id, *_ends(self.model.generation_config)}
        texts = []
        for row in made[:, tokens.shape[1] :].tolist():
            length = next((place for place, token in enumerate(row) if token in ends), len(row))
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, list(until), None))
        return texts


class StopWords(StoppingCriteria):
    """Ends each row of a batch once its new text holds a stop word.

    Args:
        tokenizer: Decodes the new tokens.
        words: The stop words.
        start: Number of tokens that each row began with, padding included; stop words in them do not count.
    """

    def __init__(self, tokenizer: Any, words: Iterable[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._words = [word for word in words if word]
        self._start = start
        # Every token of the text has at least one byte, so a stop word reaches back over this many at most.
        self._reach = max((len(word.encode()) for word in self._words), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Say which rows have ended, bool ``[B]``."""
        recent = input_ids[:, self._start :][:, -self._reach :]
        texts = self._tokenizer.batch_decode(recent)
        found = [any(word in text for word in self._words) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def _ends(config: Any) -> list[int]:
    ends = getattr(config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Put rows into one tensor ``[B, L]`` with zeros for padding, and make the mask of what is no padding."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        tokens[index, place], mask[index, place] = torch.tensor(row), 1
    return tokens, mask
