"""A model that reads a stream chunk by chunk: it says how likely a chunk is, then learns from it."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from engram_lm.tables.tiers.device import ParameterTable
from engram_lm.training.loss import token_losses
from engram_lm.training.optimizers.rows import RowAdam

# Dimension key: N predicted tokens, V vocabulary.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What a model learns from a chunk that it has just read: one step of gradient descent on the chunk's mean loss."""

    name: str
    """Its key in the result."""
    title: str
    """What a reader sees."""
    what: Literal["nothing", "rows", "everything"]
    """What is changed. ``rows`` are those that the chunk read; no others have a gradient."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """How: by the gradient, or by Adam, which corrects its bias for each row by that row's own steps."""
    first_rate: float = 0.0
    """The learning rate that tuning begins with."""


UPDATES = (
    Update(name="none", title="no update", what="nothing"),
    Update(name="rows", title="rows, SGD", what="rows", first_rate=1000.0),
    Update(name="rows_adam", title="rows, Adam", what="rows", optimizer="adam", first_rate=1.0),
    Update(name="all", title="all weights, SGD", what="everything", first_rate=0.3),
)
"""What is compared; a model without memory has no rows."""


class Reader:
    """A copy of a model that is updated while it reads.

    Args:
        model: The model, which stays as it is.
        update: What it learns from a chunk.
        rate: The learning rate.
    """

    def __init__(self, model: Any, update: Update, rate: float = 0.0) -> None:
        self.model = copy.deepcopy(model).eval()
        tables = [module.weight for module in self.model.modules() if isinstance(module, ParameterTable)]
        chosen = {"nothing": [], "rows": tables, "everything": [*self.model.parameters()]}[update.what]
        self.model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.optimizer: torch.optim.Optimizer | None = None
        if chosen:
            adam = update.optimizer == "adam"
            self.optimizer = (
                RowAdam(chosen, lr=rate, betas=(0.9, 0.95), bias_correction="row")
                if adam
                else torch.optim.SGD(chosen, lr=rate)
            )
        self.seconds = 0.0
        """What reading took."""

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Return the nats ``[N]`` of a chunk's tokens ``[N + 1]`` but the first, then learn from them."""
        started = time.perf_counter()
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        if self.optimizer is None:
            nats = token_losses(self.model, ids[:, :-1], ids[:, 1:])[0]
        else:
            logits_NV = self.model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
            nats = F.cross_entropy(logits_NV, ids[0, 1:], reduction="none")
            nats.mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        found: np.ndarray = nats.detach().numpy().astype(np.float64)
        self.seconds += time.perf_counter() - started
        return found

    def losses(self, tokens: np.ndarray, *, chunk: int) -> np.ndarray:
        """Return the nats of a text's tokens but the first, each chunk by itself; nothing is learned."""
        found = []
        for start in range(0, len(tokens) - 1, chunk):
            ids = torch.from_numpy(tokens[start : start + chunk + 1].astype(np.int64))[None]
            found.append(token_losses(self.model, ids[:, :-1], ids[:, 1:])[0].numpy())
        return np.concatenate(found).astype(np.float64)


def read_stream(
    readers: Mapping[str, Reader],
    tokens: np.ndarray,
    *,
    chunk: int,
    on_chunk: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Let several models read a stream, each chunk one after the other, so that their times can be compared.

    A chunk sees nothing of the chunks before it, as in training; what is left of them is what a model has learned.

    Returns:
        The nats of every token but the first, by reader.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in readers}
    for start in range(0, len(tokens) - 1, chunk):
        on_chunk()
        for name, reader in readers.items():
            found[name].append(reader.read(tokens[start : start + chunk + 1]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def tune(loss_at: Callable[[float], float], first: float, *, factor: float = 3.0, most: int = 12) -> dict[float, float]:
    """Find the rate at which a loss is lowest, by steps of a factor from the first one, as long as it falls.

    Args:
        loss_at: The loss at a rate; infinite or NaN where it diverged.
        first: Where to begin.
        factor: Between two rates.
        most: Rates to try at most.

    Returns:
        Every rate that was tried, and its loss, in the order in which they were tried.
    """
    tried: dict[float, float] = {}

    def attempt(rate: float) -> float:
        loss = loss_at(rate)
        tried[rate] = loss if np.isfinite(loss) else float("inf")
        return tried[rate]

    best, lowest = first, attempt(first)
    for towards in (factor, 1 / factor):
        rate = best * towards
        while len(tried) < most:
            loss = attempt(rate)
            if loss < lowest:
                best, lowest = rate, loss
            elif towards > 1 or np.isfinite(loss):  # a smaller rate may still help where this one diverged
                break
            rate *= towards
        if best != first:
            break
    return tried


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the lowest loss."""
    return min(tried, key=lambda rate: tried[rate])


def updates_of(model: Any) -> Sequence[Update]:
    """Those of `UPDATES` that a model can have."""
    has_rows = any(isinstance(module, ParameterTable) for module in model.modules())
    return [update for update in UPDATES if has_rows or update.what != "rows"]
