"""Fit many facts together: expressions → shifts → rows, and again for the facts that their neighbors have disturbed."""

# Dimension key: F facts, P expressions, K heads of all orders and all blocks, E row width, N rows.

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.edits.expressions import Wording, find_expressions, read_wordings
from engram_lm.adapt.edits.scoring import AnswerScore, score_wordings
from engram_lm.adapt.edits.shifts import Bases, FactRows, ShiftOptions, fit_shifts
from engram_lm.adapt.fact_edit import FactEdit, check_distinct
from engram_lm.adapt.joint_edit import JointEdit, changed_rows, row_penalties
from engram_lm.adapt.patchable import PatchableMemory
from engram_lm.adapt.row_change import Fact, RowChange
from engram_lm.errors import ConfigError, check_whole
from engram_lm.hashing.collisions import row_collisions
from engram_lm.model.table_place import table_name
from engram_lm.tokenizing import begin, beginning_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointFitOptions:
    """How facts are fitted together.

    Raises:
        ConfigError: A value is impossible.
    """

    max_steps: int = 20
    """The most gradient steps (Adam) on the shift of a fact in a round, from 1."""
    learning_rate: float = 0.25
    """Step size, above 0; 1 changes a hidden state by as much as it is large."""
    margin: float = 2.0
    """A fact is fitted once every token of its answer is ahead of the likeliest other by this much in all of its
    wordings, in nats, from 0."""
    decay: float = 1e-4
    """How strongly shifts are drawn towards zero, from 0."""
    penalty: float = 0.01
    """λ: what every row costs, in uses of a row, from 0."""
    reuse_penalty: float = 0.05
    """λ_reuse: what a row costs for other text that reads it, from 0; see `row_penalties`."""
    num_prefixes: int = 2
    """Copies of a fact's wordings, the first ones in turn, that are fitted too, each behind a few words of the
    reference text, from 0."""
    prefix_tokens: int = 8
    """Tokens of such a beginning, from 1."""
    num_contexts: int = 256
    """Words before a subject of one token whose N-grams are changed too, from 0."""
    rounds: int = 2
    """How often the facts that are not there yet are fitted again, with all others in place, from 1."""
    facts_at_once: int = 8
    """Facts that are fitted side by side, from 1."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "prefix_tokens", "rounds", "facts_at_once")
        check_whole(**{name: getattr(self, name) for name in counts})
        check_whole(at_least=0, num_prefixes=self.num_prefixes, num_contexts=self.num_contexts)
        for name in ("learning_rate", "margin", "decay", "penalty", "reuse_penalty"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is a number from 0, got {value!r}")
        if not self.learning_rate:
            raise ConfigError("learning_rate is a number above 0, got 0")


@dataclasses.dataclass(frozen=True)
class JointFitProgress:
    """What a fit reports as it goes on."""

    round: int
    """The round, from 0."""
    num_facts: int
    """Facts that this round fits."""
    num_done: int
    """How many of them it has been through."""


def fit_joint(
    memory: PatchableMemory,
    tokenizer: Any,
    facts: Sequence[FactEdit],
    options: JointFitOptions,
    *,
    reference: np.ndarray | None = None,
    earlier: JointEdit | None = None,
    held: Mapping[str, RowChange] | None = None,
    known_facts: Sequence[Fact] = (),
    on_progress: Callable[[JointFitProgress], None] = lambda progress: None,
) -> tuple[JointEdit, dict[str, RowChange], tuple[Fact, ...]]:
    """Do the work of `RowPatch.fit_facts`.

    ``earlier`` holds facts that stay, and ``held`` the rows of their patch, which the memory holds before or after,
    and ``known_facts`` how its prompts were answered. Returned are the facts with what they want of the rows, the rows,
    and how the prompts of all facts are answered with them, the earlier ones first.
    """
    check_distinct((*(() if earlier is None else earlier.facts), *facts))
    first = 0 if earlier is None else len(earlier.facts)
    edit = _unfitted(memory, tokenizer, facts, options, reference)
    if earlier is not None:
        edit = earlier.joined(edit)
    before = _rows_before(memory, edit, held or {})
    plain = read_wordings(tokenizer, edit.facts)
    texts = _with_prefixes(plain, tokenizer, reference, options)
    start = score_wordings(
        memory, [one for one in plain if one.fact >= first and one.text == edit.facts[one.fact].prompt]
    )
    settings = ShiftOptions(
        **{name: getattr(options, name) for name in ("max_steps", "learning_rate", "margin", "decay")}
    )
    waiting = list(range(first, len(edit.facts)))
    scores: list[AnswerScore] = []
    known: Bases = {}
    for number in range(options.rounds):
        rows = _rows_of_facts(memory, edit)
        shifts = edit.shifts.clone()
        solved = edit.solve()
        places, values = _read_as(solved, before)
        with memory.reading(places, values):
            for at in range(0, len(waiting), options.facts_at_once):
                group = waiting[at : at + options.facts_at_once]
                shifts[group] = fit_shifts(
                    memory,
                    [texts[fact] for fact in group],
                    [rows[fact] for fact in group],
                    edit.shifts[group],
                    [edit.facts[fact].forget for fact in group],
                    settings,
                    known=known,
                )
                on_progress(JointFitProgress(number, len(waiting), at + len(group)))
        edit = dataclasses.replace(edit, shifts=shifts)
        places, values = _read_as(edit.solve(), before)
        with memory.reading(places, values):
            scores = score_wordings(memory, plain)
        behind = {one.fact for one, score in zip(plain, scores, strict=True) if not _holds(edit, one, score, options)}
        waiting = sorted(behind)
        if not waiting:
            break
    changes = changed_rows(edit.solve(), before)
    tables = {name: RowChange(rows, before[name], changes[name]) for name, (rows, _) in edit.solve().items()}
    final = {one.fact: (one, score) for one, score in reversed(list(zip(plain, scores, strict=True)))}
    now = {edit.facts[fact].prompt: score for fact, (_, score) in final.items()}
    learned = [
        dataclasses.replace(fact, loss_after=now[fact.prompt].loss, is_greedy=now[fact.prompt].lead > 0)
        if fact.prompt in now
        else fact
        for fact in known_facts
    ]
    for fact, begin_score in zip(range(first, len(edit.facts)), start, strict=True):
        one, score = final[fact]
        learned.append(
            Fact(
                prompt=edit.facts[fact].prompt,
                target=edit.facts[fact].answer,
                prompt_tokens=one.prompt,
                target_tokens=one.answer,
                loss_before=begin_score.loss,
                loss_after=score.loss,
                is_greedy=score.lead > 0,
            )
        )
    return edit, tables, tuple(learned)


def _unfitted(
    memory: PatchableMemory,
    tokenizer: Any,
    facts: Sequence[FactEdit],
    options: JointFitOptions,
    reference: np.ndarray | None,
) -> JointEdit:
    """Find the rows of facts and their penalties; their shifts are zero."""
    spec = memory.spec
    found = find_expressions(memory, tokenizer, facts, num_contexts=options.num_contexts, reference=reference)
    counts = np.zeros(found.rows.shape, np.int64)
    each = spec.num_heads_total
    if reference is not None:
        for place, layer in enumerate(spec.layers):
            heads = slice(place * each, (place + 1) * each)
            rows, where = np.unique(found.rows[:, heads], return_inverse=True)
            readers = np.zeros(len(rows), np.int64)
            readers[rows >= 0] = row_collisions(spec, layer, reference, rows[rows >= 0]).num_positions
            counts[:, heads] = readers[where].reshape(counts[:, heads].shape)
    orders = np.tile(np.repeat(spec.orders, spec.num_heads), len(spec.blocks))
    penalty = row_penalties(
        torch.from_numpy(orders).expand(counts.shape),
        torch.from_numpy(counts),
        penalty=options.penalty,
        reuse_penalty=options.reuse_penalty,
        highest_order=spec.orders[-1],
    )
    width = next(iter(memory.tables.values())).width
    return JointEdit(
        facts=tuple(facts),
        tables=tuple(table_name(spec, block) for block in spec.blocks),
        fact=torch.from_numpy(found.fact),
        rows=torch.from_numpy(found.rows),
        penalty=penalty,
        shifts=torch.zeros(len(facts), found.rows.shape[1], width),
    )


def _rows_before(memory: PatchableMemory, edit: JointEdit, held: Mapping[str, RowChange]) -> dict[str, Tensor]:
    """Read the rows that an edit uses as they were before any of its facts, ``[N, E]`` by table."""
    before = {}
    for name in dict.fromkeys(edit.tables):
        rows = edit.uses(name)[2].unique()
        if not len(rows):
            continue
        memory.check_rows(name, rows)
        numbers = memory.read(name, rows)
        if name in held:
            change = held[name]
            known = torch.isin(rows, change.rows)
            numbers[known] = change.before[torch.searchsorted(change.rows, rows[known])]
        before[name] = numbers
    return before


def _read_as(
    solved: Mapping[str, tuple[Tensor, Tensor]], before: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: rows for name, (rows, _) in solved.items()}, changed_rows(solved, before)


def _rows_of_facts(memory: PatchableMemory, edit: JointEdit) -> list[dict[int, FactRows]]:
    """For each fact, its rows and the share of its shift that each of them gets, by block."""
    blocks, each = memory.spec.blocks, memory.spec.num_heads_total
    shares = edit.shares()
    order = edit.fact.argsort(stable=True)
    ends = torch.bincount(edit.fact, minlength=len(edit.facts)).cumsum(0).tolist()
    result = []
    for start, stop in zip([0, *ends], ends, strict=False):
        own = order[start:stop]
        by_block = {}
        for place, block in enumerate(blocks):
            heads = slice(place * each, (place + 1) * each)
            rows, share = edit.rows[own, heads], shares[own, heads]
            used = rows >= 0
            distinct, where = rows[used].unique(return_inverse=True)
            by_block[block] = FactRows(distinct, torch.zeros(len(distinct)).index_copy_(0, where, share[used]))
        result.append(by_block)
    return result


def _with_prefixes(
    wordings: Sequence[Wording], tokenizer: Any, reference: np.ndarray | None, options: JointFitOptions
) -> dict[int, list[Wording]]:
    """Collect the texts of each fact, and copies of some that begin with a piece of the reference text."""
    result: dict[int, list[Wording]] = {}
    beginning = beginning_tokens(tokenizer)
    generator = np.random.default_rng(0)
    for one in wordings:
        result.setdefault(one.fact, []).append(one)
    if reference is None or len(reference) <= options.prefix_tokens:
        return result
    for texts in result.values():
        for one in itertools.islice(itertools.cycle(tuple(texts)), options.num_prefixes):
            start = int(generator.integers(len(reference) - options.prefix_tokens))
            prefix = reference[start : start + options.prefix_tokens].tolist()
            own = one.prompt[len(beginning) :] if one.prompt[: len(beginning)] == beginning else one.prompt
            texts.append(dataclasses.replace(one, prompt=tuple(begin(beginning, [*prefix, *own]))))
    return result


def _holds(edit: JointEdit, wording: Wording, score: AnswerScore, options: JointFitOptions) -> bool:
    """Whether a fact is where it should be with all facts in place: by half of the margin, in this wording."""
    lead = -score.lead if edit.facts[wording.fact].forget else score.lead
    return lead >= options.margin / 2
