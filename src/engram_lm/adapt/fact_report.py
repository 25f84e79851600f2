"""What a patch makes of its facts, and what is left of a fact that is taken out: a report in numbers."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.edits.expressions import read_wordings
from engram_lm.adapt.edits.scoring import score_wordings
from engram_lm.adapt.patchable import PatchableMemory
from engram_lm.adapt.row_change import RowChange
from engram_lm.adapt.row_patch import RowPatch
from engram_lm.errors import ConfigError
from engram_lm.hashing.collisions import row_collisions


@dataclasses.dataclass(frozen=True)
class WordingReport:
    """How one wording of a fact is answered."""

    text: str
    """The wording."""
    probability_before: float
    """Probability of the answer without the patch."""
    probability_with: float
    """The same with the whole patch."""
    probability_without_fact: float
    """The same with the patch solved again without the fact: what is left of it."""


@dataclasses.dataclass(frozen=True)
class FactReport:
    """What a patch makes of one fact, and what would be left of it if it were taken out."""

    prompt: str
    """The fact's prompt."""
    answer: str
    """Its answer."""
    wordings: tuple[WordingReport, ...]
    """Its wordings."""
    num_rows: int
    """Rows that the fact uses, over all tables."""
    num_shared_rows: int
    """Those of them that other facts of the patch use too: they stay changed when the fact is taken out."""
    num_other_ngrams: int
    """Pairs of one of these rows and another N-gram of the reference text that reads it; 0 without a reference."""

    def __str__(self) -> str:
        lines = [
            f"{self.prompt!r} → {self.answer!r}: {self.num_rows} rows, {self.num_shared_rows} of them shared with "
            f"other facts, {self.num_other_ngrams} collisions with N-grams of the text"
        ]
        lines += [
            f"  {one.text!r}: {one.probability_before:.4f} before, {one.probability_with:.4f} with the patch, "
            f"{one.probability_without_fact:.4f} without the fact"
            for one in self.wordings
        ]
        return "\n".join(lines)


def report_facts(
    memory: PatchableMemory,
    tokenizer: Any,
    patch: RowPatch,
    prompts: Sequence[str],
    *,
    reference: np.ndarray | None = None,
) -> list[FactReport]:
    """Report facts of a joint edit: how they are answered before, with the patch, and with them taken out.

    The memory holds the patch or the rows before it; afterwards it holds the same bits.

    Raises:
        ConfigError: The patch is no joint edit, or has no such fact.
    """
    edit = patch.edit
    if edit is None:
        raise ConfigError("the patch is no joint edit of facts, so single facts of it cannot be reported")
    reports = []
    for prompt in prompts:
        rest = patch.without([prompt])
        number = next(place for place, fact in enumerate(edit.facts) if fact.prompt == prompt)
        fact = edit.facts[number]
        wordings = read_wordings(tokenizer, [fact])
        before = {name: change.before for name, change in patch.tables.items()}
        states = [before, {name: change.after for name, change in patch.tables.items()}]
        states.append(_with_rest(patch.tables, rest))
        scores = []
        for state in states:
            with _holding(memory, patch.tables, state):
                scores.append([one.probability for one in score_wordings(memory, wordings)])
        used, shared, others = 0, 0, 0
        for name in dict.fromkeys(edit.tables):
            expression, _, rows = edit.uses(name)
            own = rows[edit.fact[expression] == number].unique()
            used += len(own)
            shared += int(torch.isin(own, rows[edit.fact[expression] != number]).sum())
            if reference is not None:
                besides = [one.tokens for one in wordings]
                for layer in memory.layers_of(name):
                    found = row_collisions(memory.spec, layer, reference, own.numpy(), besides=besides)
                    others += int(found.num_ngrams.sum())
        reports.append(
            FactReport(
                prompt,
                fact.answer,
                tuple(WordingReport(one.text, *values) for one, *values in zip(wordings, *scores, strict=True)),
                used,
                shared,
                others,
            )
        )
    return reports


def _with_rest(tables: Mapping[str, RowChange], rest: RowPatch | None) -> dict[str, Tensor]:
    """The rows of a patch with what remains of it: those that it no longer changes are as before."""
    result = {name: change.before.clone() for name, change in tables.items()}
    for name, change in ({} if rest is None else rest.tables).items():
        result[name][torch.searchsorted(tables[name].rows, change.rows)] = change.after
    return result


@contextlib.contextmanager
def _holding(memory: PatchableMemory, tables: Mapping[str, RowChange], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the layers read other numbers in the rows of a patch, inside a ``with`` block."""
    with memory.reading({name: change.rows for name, change in tables.items()}, values):
        yield
