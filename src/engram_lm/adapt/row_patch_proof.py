"""The proof of a row patch: its rows, what else reads them, and that text which does not read them has not changed."""

# Dimension key: W windows, L tokens of one, V vocabulary.

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.adapt.patchable import PatchableMemory
from engram_lm.adapt.row_change import Fact, RowChange, same_bits
from engram_lm.adapt.row_patch_fit import score_fact
from engram_lm.errors import DataError, check_whole
from engram_lm.hashing.collisions import row_collisions
from engram_lm.model.table_place import table_name

_WINDOWS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class PatchedRow:
    """One row that a patch changes, and what reads it in the reference text."""

    table: str
    """Its table: a block number, or ``shared``."""
    row: int
    """Its number."""
    order: int
    """Tokens in the N-grams that can read it."""
    head: int
    """Their hash head, from 0."""
    num_other_ngrams: int
    """Its collisions: distinct N-grams of the reference that read it, without those of the facts. In a table that
    several layers share, the sum over the layers."""
    num_positions: int
    """Positions of the reference that read it, the facts' own N-grams included; summed over layers in the same way."""


@dataclasses.dataclass(frozen=True)
class FactProof:
    """How the model answers one fact, without and with the patch."""

    prompt: str
    """The text before."""
    target: str
    """The text that should follow."""
    loss_before: float
    """Mean loss of the target's tokens without the patch, nats per token."""
    loss_after: float
    """The same with the patch."""
    is_greedy_before: bool
    """Whether the target is the greedy continuation without the patch."""
    is_greedy_after: bool
    """Whether it is the greedy continuation with the patch."""


@dataclasses.dataclass(frozen=True)
class RowPatchProof:
    """What a patch touches in a reference text, and proof that it touches nothing else."""

    title: str
    """The patch's title."""
    num_bytes: int
    """Bytes of the patch's row numbers and rows."""
    rows: tuple[PatchedRow, ...]
    """Every row that the patch changes."""
    num_reference_tokens: int
    """Tokens of the reference."""
    num_touched_positions: int
    """Positions of the reference that read at least one of the rows, in any layer."""
    window_tokens: int
    """Length of the windows in which the reference was computed, in tokens."""
    num_windows_apart: int
    """Number of windows compared that read none of the rows."""
    num_windows_changed: int
    """Number of those whose logits differ in any bit. If it is not 0, the proof has failed."""
    max_difference_apart: float
    """Largest difference of a logit in them; 0.0 if the proof holds."""
    num_windows_touched: int
    """Number of windows compared that read one or more of the rows."""
    max_difference_touched: float
    """Largest difference of a logit in those, caused by collisions and by the facts' own N-grams."""
    facts: tuple[FactProof, ...]
    """How the model answers the patch's facts."""

    @property
    def holds(self) -> bool:
        """Whether there were windows that read none of the rows, and all their outputs are the same bit for bit."""
        return self.num_windows_apart > 0 and self.num_windows_changed == 0

    @property
    def touched_share(self) -> float:
        """Share of the reference's positions that read one of the rows."""
        return self.num_touched_positions / self.num_reference_tokens

    @property
    def num_other_ngrams(self) -> int:
        """Sum of the rows' collisions."""
        return sum(row.num_other_ngrams for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        shares = {name: getattr(self, name) for name in ("holds", "touched_share", "num_other_ngrams")}
        return {**dataclasses.asdict(self), **shares}

    def __str__(self) -> str:
        crowded = sum(row.num_other_ngrams > 0 for row in self.rows)
        if self.num_windows_changed:
            verdict = f"{self.num_windows_changed} CHANGED, by up to {self.max_difference_apart:.3g}"
        else:
            verdict = "all logits the same bit for bit" if self.holds else "so nothing could be compared"
        tables = len({row.table for row in self.rows})
        lines = [
            f"patch {self.title!r}: {len(self.rows)} rows of {tables} {'table' if tables == 1 else 'tables'}, "
            f"{self.num_bytes} bytes",
            f"collisions: in a text of {self.num_reference_tokens} tokens {crowded} of the rows are read by other "
            f"N-grams too, {self.num_other_ngrams} pairs of a row and an N-gram",
            f"touched: {self.num_touched_positions} positions ({self.touched_share:.4%}) read one of the rows",
            f"untouched text: {self.num_windows_apart} windows of {self.window_tokens} tokens that read none, "
            f"{verdict}",
            f"touched text: {self.num_windows_touched} windows that read one, logits differ by up to "
            f"{self.max_difference_touched:.3g}",
        ]
        for fact in self.facts:
            answers = " → ".join(
                f"{loss:.3f} nats, {'greedy' if greedy else 'not greedy'}"
                for loss, greedy in (
                    (fact.loss_before, fact.is_greedy_before),
                    (fact.loss_after, fact.is_greedy_after),
                )
            )
            lines.append(f"fact {fact.prompt!r} + {fact.target!r}: {answers}")
        return "\n".join(lines)


@torch.no_grad()
def prove(
    memory: PatchableMemory,
    tables: Mapping[str, RowChange],
    reference: np.ndarray,
    *,
    title: str,
    facts: Sequence[Fact],
    window_tokens: int,
    max_windows: int,
) -> RowPatchProof:
    """Compute the proof of `RowPatch.proof`. It writes rows; the caller restores what was there."""
    check_whole(at_least=2, window_tokens=window_tokens)
    check_whole(max_windows=max_windows)
    if len(reference) < 2:
        raise DataError(f"a reference text needs at least 2 tokens, this one has {len(reference)}")
    length = min(window_tokens, len(reference))
    windows_WL = reference[: len(reference) // length * length].reshape(-1, length)
    touched_W = _touched(memory, tables, windows_WL).any(-1)
    apart, touched = (windows_WL[_spread(np.flatnonzero(chosen), max_windows)] for chosen in (~touched_W, touched_W))
    with evaluating(memory.model):
        _write(memory, tables, "before")
        without = [_logits(memory, windows) for windows in (apart, touched)]
        first = [score_fact(memory.logits(fact.tokens), fact)[1] for fact in facts]
        _write(memory, tables, "after")
        num_changed, difference_apart = _compare(memory, apart, without[0])
        _, difference_touched = _compare(memory, touched, without[1])
        last = [score_fact(memory.logits(fact.tokens), fact)[1] for fact in facts]
    return RowPatchProof(
        title=title,
        num_bytes=sum(change.num_bytes for change in tables.values()),
        rows=tuple(row for name, change in tables.items() for row in _rows(memory, name, change, reference, facts)),
        num_reference_tokens=len(reference),
        num_touched_positions=int(_touched(memory, tables, reference[None]).sum()),
        window_tokens=length,
        num_windows_apart=len(apart),
        num_windows_changed=num_changed,
        max_difference_apart=difference_apart,
        num_windows_touched=len(touched),
        max_difference_touched=difference_touched,
        facts=tuple(
            FactProof(fact.prompt, fact.target, begin.loss, end.loss, begin.lead > 0, end.lead > 0)
            for fact, begin, end in zip(facts, first, last, strict=True)
        ),
    )


def _rows(
    memory: PatchableMemory, table: str, change: RowChange, reference: np.ndarray, facts: Sequence[Fact]
) -> list[PatchedRow]:
    numbers = change.rows.numpy()
    besides = [fact.tokens for fact in facts]
    layers = memory.layers_of(table)
    others = [row_collisions(memory.spec, layer, reference, numbers, besides=besides) for layer in layers]
    every = [row_collisions(memory.spec, layer, reference, numbers) for layer in layers]
    columns = (
        numbers,
        others[0].orders,
        others[0].heads,
        np.sum([found.num_ngrams for found in others], axis=0),
        np.sum([found.num_positions for found in every], axis=0),
    )
    return [PatchedRow(table, *values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _touched(memory: PatchableMemory, tables: Mapping[str, RowChange], tokens: np.ndarray) -> np.ndarray:
    """Find the positions that read one of the rows, bool in the shape of the tokens ``[B, L]``.

    Dead positions count too, although their gate is closed, so that no window is compared that could differ.
    """
    spec = memory.spec
    rows = spec.rows_for_layers(spec.encode(tokens))
    touched = np.zeros(tokens.shape, dtype=bool)
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        name = table_name(spec, block)
        if name in tables:
            touched |= np.isin(rows[layer], tables[name].rows.numpy()).any(-1)
    return touched


def _spread(places: np.ndarray, most: int) -> np.ndarray:
    """Choose at most ``most`` of the places, evenly."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).round().astype(np.int64)]


def _write(memory: PatchableMemory, tables: Mapping[str, RowChange], what: str) -> None:
    for name, change in tables.items():
        memory.write(name, change.rows, getattr(change, what))


def _batches(windows: np.ndarray) -> list[np.ndarray]:
    return [windows[start : start + _WINDOWS_AT_ONCE] for start in range(0, len(windows), _WINDOWS_AT_ONCE)]


def _logits(memory: PatchableMemory, windows: np.ndarray) -> list[Tensor]:
    return [memory.logits(batch).cpu() for batch in _batches(windows)]


def _compare(memory: PatchableMemory, windows: np.ndarray, without: list[Tensor]) -> tuple[int, float]:
    """Compute windows again; return how many of them differ in any bit, and the largest difference."""
    num_changed, worst = 0, 0.0
    for batch, expected in zip(_batches(windows), without, strict=True):
        found = memory.logits(batch).cpu()
        num_changed += sum(not same_bits(one, other) for one, other in zip(found, expected, strict=True))
        worst = max(worst, float((found.double() - expected.double()).abs().max()))
    return num_changed, worst
