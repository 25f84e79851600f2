"""kNN-LM: what a trained model says, mixed with what followed the most similar contexts of its training text."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import DataError
from engram_lm.studies.study import TrainedArm
from engram_lm.training.data.text import TrainingText
from engram_lm.training.loss import token_losses
from engram_lm.training.recipe_trainer import batches_of

# Dimension key: N entries of the store, Q queries, K neighbors, D width of a key.

_KEYS_AT_ONCE, _QUERIES_AT_ONCE = 1 << 16, 256
"""Distances that are in memory at a time: 64 MiB."""
_TEST_TOKENS, _VALIDATION_TOKENS = 1 << 14, 1 << 12
"""Tokens that are searched for: of each text that a loss is reported of, and of validation text for the choices."""
_NEIGHBORS = (8, 32, 128, 512)
_TEMPERATURES = tuple(2.0**power for power in range(-6, 5))
"""Temperatures to choose from, as multiples of the mean distance to the nearest neighbor."""
_SHARES = np.linspace(0.0, 0.98, 50)
_TOKEN_BYTES, _NUMBER_BYTES = 4, 2


def entry_bytes(width: int) -> int:
    """Bytes of one entry: its key, in float16, and its token."""
    return _NUMBER_BYTES * width + _TOKEN_BYTES


class Neighbors(NamedTuple):
    """The entries nearest to each query, the nearest first."""

    distances: Tensor
    """Squares of the Euclidean distances, float32 ``[Q, K]``."""
    tokens: Tensor
    """The token that followed each, int64 ``[Q, K]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Datastore:
    """Contexts of a text and the token that followed each, searched exactly."""

    keys: Tensor
    """Float16 ``[N, D]``."""
    tokens: Tensor
    """Int32 ``[N]``."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return sum(one.numel() * one.element_size() for one in (self.keys, self.tokens))

    def nearest(self, queries: Tensor, number: int) -> Neighbors:
        """Find the nearest entries of every query, float32 ``[Q, D]``, by all distances."""
        parts = [self._nearest(some, number) for some in queries.split(_QUERIES_AT_ONCE)]
        return Neighbors(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _nearest(self, queries: Tensor, number: int) -> Neighbors:
        best = Neighbors(torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64))
        for keys, tokens in zip(self.keys.split(_KEYS_AT_ONCE), self.tokens.split(_KEYS_AT_ONCE), strict=True):
            numbers = keys.float()
            # |q - k|² without |q|², which is the same for all keys of a query.
            far = torch.addmm((numbers * numbers).sum(-1), queries, numbers.T, alpha=-2)
            near, places = far.topk(min(number, len(keys)), largest=False)
            joined = torch.cat([best.distances, near], 1), torch.cat([best.tokens, tokens.long()[places]], 1)
            near, places = joined[0].topk(min(number, joined[0].shape[1]), largest=False)
            best = Neighbors(near, joined[1].gather(1, places))
        return Neighbors((best.distances + (queries * queries).sum(-1, keepdim=True)).clamp(min=0), best.tokens)


def neighbor_probabilities(found: Neighbors, targets: Tensor, number: int, temperature: float) -> np.ndarray:
    """Say how likely each target ``[Q]`` is by its neighbors: ``p(w) ∝ Σ exp(-d / temperature)`` over those with w.

    Only the nearest ``number`` count. Returns float64 ``[Q]``.
    """
    weights = torch.softmax(-found.distances[:, :number].double() / temperature, dim=-1)
    return (weights * (found.tokens[:, :number] == targets[:, None])).sum(-1).numpy()


class Contexts(NamedTuple):
    """What a model says of some tokens, and the key of each one's context."""

    keys: Tensor
    """Float32 ``[Q, D]``."""
    targets: Tensor
    """Int64 ``[Q]``."""
    nats: np.ndarray
    """The model's own, float64 ``[Q]``."""


@torch.no_grad()
def contexts(model: Any, inputs: Tensor, targets: Tensor) -> Contexts:
    """Read sequences ``[B, L]``. The key of a context is what the last feed-forward network is given.

    Source: Khandelwal et al., “Generalization through memorization: nearest neighbor language models”, ICLR 2020,
    section 2 and 4 (keys: the input of the last layer's feed-forward network, after its norm; squared distances).
    """
    seen: list[Tensor] = []
    hook = model.model.layers[-1].post_attention_layernorm.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    try:
        nats = token_losses(model, inputs, targets)
    finally:
        hook.remove()
    (keys,) = seen
    return Contexts(keys.float().flatten(0, 1), targets.flatten(), nats.double().flatten().numpy())


def evaluate(trained: TrainedArm, text: TrainingText) -> dict[str, Any]:
    """Measure the loss of a trained model with its neighbors among the contexts that it was trained on.

    Neighbors, temperature and share are chosen on validation text. The loss is that of the model alone on all held-out
    tokens, as training measured it, and the mean difference that neighbors make to it on the first 16,384 of them.

    Args:
        trained: The model. As many contexts are kept as fit the ``extra_bytes`` of its arm, in sequences that lie
            evenly in what it was trained on.
        text: Its text.

    Returns:
        ``loss``, ``texts`` (the loss of each other text), and ``search``: what was chosen, what the store takes, and
        the seconds for each token of the model alone and of the search.

    Raises:
        DataError: There is no validation text, or no held-out text.
    """
    model, tokenizer = trained.load()
    length = trained.arm.recipe.data.sequence_length
    if "validation" not in text.texts or text.held_out is None:
        raise DataError("neighbors are chosen on validation text and measured on held-out text, and there is none")
    num_entries = trained.arm.extra_bytes // entry_bytes(model.config.hidden_size)
    store = build_store(model, _sequences(trained, text, tokenizer, num_entries))
    chosen_on = _read(model, text.texts["validation"].tokens, length, _VALIDATION_TOKENS)
    choice = choose(store.nearest(chosen_on.keys, max(_NEIGHBORS)), chosen_on)
    started = time.perf_counter()
    held_out = _read(model, text.held_out, length, _TEST_TOKENS)
    read, started = time.perf_counter() - started, time.perf_counter()
    gain = _gain(store, held_out, choice)
    searched = time.perf_counter() - started
    texts = {
        name: {
            "loss": known["loss"] + _gain(store, _read(model, text.texts[name].tokens, length, _TEST_TOKENS), choice)
        }
        for name, known in (trained.result.get("texts") or {}).items()
        if name != "validation"
    }
    search = {
        **choice,
        "num_entries": len(store.tokens),
        "num_bytes": store.num_bytes,
        "num_tokens": len(held_out.nats),
        "model_seconds": read / len(held_out.nats),
        "search_seconds": searched / len(held_out.nats),
    }
    return {"loss": trained.result["held_out"]["loss"] + gain, "texts": texts, "search": search}


def build_store(model: Any, sequences: Iterator[tuple[Tensor, Tensor]]) -> Datastore:
    """Keep every context of sequences, given as inputs and the tokens that follow, both ``[B, L]``."""
    parts = [contexts(model, inputs, targets) for inputs, targets in sequences]
    return Datastore(
        torch.cat([part.keys.half() for part in parts]), torch.cat([part.targets.to(torch.int32) for part in parts])
    )


def choose(found: Neighbors, read: Contexts) -> dict[str, float]:
    """Choose ``neighbors``, ``temperature`` and ``share``, under which a text is likeliest."""
    model = np.exp(-read.nats)
    nearest = float(found.distances[:, 0].mean()) or 1.0
    best: tuple[float, dict[str, float]] = (math.inf, {})
    for number in dict.fromkeys(min(number, found.distances.shape[1]) for number in _NEIGHBORS):
        for factor in _TEMPERATURES:
            near = neighbor_probabilities(found, read.targets, number, factor * nearest)
            nats = -np.log(np.maximum(model + _SHARES[:, None] * (near - model), 1e-300)).mean(1)
            place = int(nats.argmin())
            if nats[place] < best[0]:
                share = float(_SHARES[place])
                best = (nats[place], {"neighbors": number, "temperature": factor * nearest, "share": share})
    return best[1]


def _gain(store: Datastore, read: Contexts, choice: Mapping[str, float]) -> float:
    """The mean change of the loss by neighbors, in nats per token."""
    number, share = int(choice["neighbors"]), choice["share"]
    near = neighbor_probabilities(store.nearest(read.keys, number), read.targets, number, choice["temperature"])
    return float((-np.log((1 - share) * np.exp(-read.nats) + share * near) - read.nats).mean())


def _read(model: Any, tokens: np.ndarray, length: int, most: int) -> Contexts:
    """Read the beginning of a text in whole sequences, as its loss is measured."""
    number = min(most, len(tokens) - 1) // length
    if not number:
        raise DataError(f"a text to search for has {len(tokens)} tokens, less than one sequence of {length}")
    windows = torch.from_numpy(tokens[: number * length + 1].astype(np.int64))
    inputs, targets = windows[:-1].view(number, length), windows[1:].view(number, length)
    parts = [contexts(model, *some) for some in zip(inputs.split(16), targets.split(16), strict=True)]
    return Contexts(
        torch.cat([part.keys for part in parts]),
        torch.cat([part.targets for part in parts]),
        np.concatenate([part.nats for part in parts]),
    )


def _sequences(
    trained: TrainedArm, text: TrainingText, tokenizer: Any, num_entries: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The sequences that a model was trained on, each once, or some of them that lie evenly in its training."""
    recipe = trained.arm.recipe
    batches = batches_of(recipe, text, tokenizer, recipe.train.batch_size)
    steps = min(recipe.train.num_steps, batches.num_sequences // recipe.train.batch_size)
    length, size = recipe.data.sequence_length, recipe.train.batch_size
    wanted = max(1, min(steps * size, num_entries // length))
    kept = np.unique(np.arange(wanted) * (steps * size) // wanted)
    for step in range(steps):
        places = kept[(kept >= step * size) & (kept < (step + 1) * size)] - step * size
        if len(places):
            inputs, targets = batches[step]
            yield inputs[places], targets[places]
