"""Sparse writing: only the rows whose use in a domain stands out against a reference text are trained.

The other rows are read as ever and get no gradient, so no optimizer moves them and nothing counts them as trained.
Which rows may be written is decided once, before the first step, from how often each row is read in both texts.

Source: 2510.15103 (TF-IDF of the use of memory slots), 2604.05248 (their contribution to a KL divergence).
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError, RunFolderError, check_whole
from engram_lm.files import replacing
from engram_lm.hashing import HashSpec
from engram_lm.memory.step import RowMap, begin_step
from engram_lm.model.table_place import table_name
from engram_lm.tables.files.safetensors_file import local_header
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.occupancy import TrainedTable
from engram_lm.training.data.batches import Batches
from engram_lm.training.distribution import Ranks, agree

WRITABLE = "writable.safetensors"
"""File of a run folder that keeps the rows that may be written."""

_FORMAT = "engram.writable.1"

# Dimension key: B batch, L length, H heads of all orders, R rows of a table.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """Which rows of memory are trained."""

    rule: Literal["all", "tf_idf", "kl"] = "all"
    """``all`` trains every row that is read. ``tf_idf`` and ``kl`` train those whose use in the text that is trained on
    stands out against ``data.general``: by the share of reads that go to a row, times the logarithm of how few
    sequences of the general text read it; or by what the row adds to the KL divergence between the two distributions
    of reads."""
    share: float = 0.1
    """Share of the rows that the text reads which are trained at most, above 0 and up to 1; of each table."""
    num_rows: int | None = None
    """Rows of each table that are trained at most, in place of ``share``; at least 1."""
    max_tokens: int = 4_194_304
    """Tokens of each of the two texts that are counted at most: whole sequences, spread over the text."""

    def __post_init__(self) -> None:
        check_whole(num_rows=self.num_rows, max_tokens=self.max_tokens)
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is a share above 0 and up to 1, not {self.share}")


@dataclasses.dataclass(frozen=True, eq=False)
class RowUse:
    """How often a text reads the rows of one table."""

    num_reads: Tensor
    """Reads of each row, over all heads and layers, int64 ``[R]``."""
    num_readers: Tensor
    """Sequences that read each row at least once, int64 ``[R]``."""
    num_sequences: int
    """Sequences that were counted."""


@dataclasses.dataclass(frozen=True, eq=False)
class WritableRows:
    """The rows that may be trained."""

    masks: Mapping[str, Tensor]
    """By table, whether each row may be trained, bool ``[R]`` on the host."""
    facts: Mapping[str, Any]
    """For reports: ``rule``, ``domain_tokens`` and ``reference_tokens`` that were counted, the ``seconds`` that it
    took, and for each table of ``tables`` its ``rows``, the ``read`` ones and the ``writable`` ones."""

    def save(self, path: Path, key: str) -> None:
        """Write the choice into a file, whole or not at all; ``key`` says what it was made from."""
        metadata = {"format": _FORMAT, "key": key, "facts": json.dumps(dict(self.facts))}
        promised = {name: (torch.uint8, tuple(mask.shape)) for name, mask in self.masks.items()}
        with replacing(path) as aside, TensorWriter(aside, promised, metadata=metadata) as writer:
            for name, mask in self.masks.items():
                writer.append(name, mask.to(torch.uint8))

    @classmethod
    def load(cls, path: Path, key: str) -> Self | None:
        """Read what `save` wrote; None where there is no file, or one that was made from something else.

        Raises:
            CheckpointError: The file is damaged.
        """
        if not path.is_file():
            return None
        whole = local_header(path)
        if whole.metadata.get("format") != _FORMAT or whole.metadata.get("key") != key:
            return None
        try:
            facts = json.loads(whole.metadata["facts"])
            masks = {name: stored.load() != 0 for name, stored in whole.tensors.items()}
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!s:.200}); delete it, and it is made again") from error
        return cls(masks, facts)

    def restrict(self, tables: Mapping[str, TrainedTable]) -> contextlib.ExitStack:
        """Let no gradient reach the other rows of these trainable tables, until what is returned is closed.

        `TrainedTable.trained_rows` says so to the tables, which with occupancy read the others as never written.
        Gradients lose those rows as soon as a backward pass has made them: before they are clipped, averaged over
        processes, counted as use, or given to an optimizer. A table of which this process has some rows only is
        restricted in those.

        Raises:
            MismatchError: The tables are others than those that were chosen from.
        """
        stack = contextlib.ExitStack()
        shapes = {name: (table.num_rows,) for name, table in tables.items()}
        ours = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        if shapes != ours:
            raise MismatchError(f"rows were chosen of tables with {ours} rows, the memory's have {shapes}")
        for name, table in tables.items():
            weight, mask = table.weight, self.masks[name].to(table.weight.device)
            own = mask[table.first_row : table.first_row + len(weight)]
            handle: RemovableHandle = weight.register_hook(functools.partial(_without_other_rows, own))
            stack.callback(handle.remove)
            stack.callback(setattr, table, "trained_rows", table.trained_rows)
            table.trained_rows = mask
        return stack


def _without_other_rows(mask: Tensor, gradient: Tensor) -> Tensor:
    """Take the rows out of a table's gradient ``[R, width]`` for which ``mask`` is False, bool ``[R]``."""
    if not gradient.is_sparse:
        return gradient.masked_fill(~mask[:, None], 0)
    rows, values = gradient._indices()[0], gradient._values()
    kept = mask[rows]
    return torch.sparse_coo_tensor(
        rows[kept][None],
        values[kept],
        gradient.shape,
        is_coalesced=gradient.is_coalesced(),
        check_invariants=False,
    )


def count_use(
    spec: HashSpec, batches: Batches, *, row_map: RowMap | None = None, max_tokens: int | None = None
) -> dict[str, RowUse]:
    """Count how often a text reads each row, in sequences as training sees them.

    Takes 16 bytes per row, and as much as one batch has reads; the order of the sequences does not change the counts.

    Args:
        spec: The hash, bound to its token map.
        batches: The text. One pass through it is counted.
        row_map: As for `engram_lm.memory.step.begin_step`.
        max_tokens: Count this many tokens at most, in whole sequences, at least one; all where None.

    Returns:
        The counts by table.
    """
    total = batches.num_sequences
    if max_tokens is not None:
        total = max(1, min(total, max_tokens // batches.length))
    use: dict[str, tuple[Tensor, Tensor]] = {}
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        num_rows = spec.num_rows(layer)
        use.setdefault(
            table_name(spec, block),
            (torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)),
        )
    for step in range(math.ceil(total / batches.batch_size)):
        batch = batches.part(step, 0, min(batches.batch_size, total - step * batches.batch_size))
        found = begin_step(
            spec,
            {},
            batch.inputs,
            position_ids=batch.position_ids if spec.looks_at_positions else None,
            row_map=row_map,
        )
        read: dict[str, list[Tensor]] = {}
        for block, rows in found.rows.items():
            # One number for a row and the sequence that reads it, so that one sort finds the different ones.
            places = torch.arange(len(rows))[:, None, None] * len(use[table_name(spec, block)][0]) + rows
            read.setdefault(table_name(spec, block), []).append(places[found.active].flatten())
        for name, parts in read.items():
            num_reads, num_sequences = use[name]
            different, counts = torch.unique(torch.cat(parts), return_counts=True)
            rows = different % len(num_reads)
            num_reads.index_add_(0, rows, counts)
            num_sequences.index_add_(0, rows, torch.ones_like(counts))
    return {name: RowUse(*counts, total) for name, counts in use.items()}


def row_scores(rule: Literal["tf_idf", "kl"], domain: RowUse, reference: RowUse) -> Tensor:
    """Score how far the use of each row in a domain stands out against a reference, float64 ``[R]``.

    With reads ``c`` and sequences that read the row ``n``, of ``N``, in the domain (d) and in the reference (r):

    - ``tf_idf``: ``c_d / sum(c_d) * log((N_r + 1) / (n_r + 1))``;
    - ``kl``: ``p * log(p / q)`` with ``p = c_d / sum(c_d)`` and ``q = (c_r + 1) / (sum(c_r) + R)``.

    A row that the domain does not read has a score of 0. It is 0 or less for one that does not stand out.

    Source: after arXiv 2510.15103 (``tf_idf``) and 2604.05248 (``kl``), of which the abstracts were read: their exact
    forms and the smoothing by 1 are ours.
    """
    reads = domain.num_reads.double()
    share = reads / reads.sum().clamp(min=1)
    if rule == "tf_idf":
        return share * torch.log((reference.num_sequences + 1) / (reference.num_readers.double() + 1))
    smoothed = (reference.num_reads.double() + 1) / (reference.num_reads.sum().double() + len(reads))
    return torch.where(reads > 0, share * torch.log(share / smoothed), 0.0)


def choose_rows(
    spec: HashSpec,
    domain: Batches,
    reference: Batches,
    options: WritingOptions,
    *,
    row_map: RowMap | None = None,
) -> WritableRows:
    """Choose the rows of each table that may be trained: those with the highest scores, all of them above 0.

    Of rows with equal scores those with the lower numbers are taken, so the same texts always give the same rows.

    Args:
        spec: The hash, bound to its token map.
        domain: What is trained on.
        reference: General text that the model knows.
        options: How rows are chosen.
        row_map: As for `engram_lm.memory.step.begin_step`.

    Raises:
        ConfigError: ``options.rule`` chooses nothing.
        DataError: No row of a table stands out.
    """
    if options.rule == "all":
        raise ConfigError("rule='all' trains every row, so there is nothing to choose; use 'tf_idf' or 'kl'")
    started = time.perf_counter()
    most = options.max_tokens
    domain_use, reference_use = (
        count_use(spec, batches, row_map=row_map, max_tokens=most) for batches in (domain, reference)
    )
    masks, tables = {}, {}
    for name, use in domain_use.items():
        scores, num_read = row_scores(options.rule, use, reference_use[name]), int((use.num_reads > 0).sum())
        candidates = (scores > 0).nonzero()[:, 0]
        most_rows = math.ceil(options.share * num_read) if options.num_rows is None else options.num_rows
        best = torch.sort(scores[candidates], descending=True, stable=True).indices[:most_rows]
        if not len(best):
            raise DataError(
                f"no row of the table {name} is read more often in the text to train on than the general text lets "
                "expect, so none would be trained; give other text as data.general, or writing.rule = 'all'"
            )
        masks[name] = torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, candidates[best], True)
        tables[name] = {"rows": len(scores), "read": num_read, "writable": len(best)}
    any_table = next(iter(domain_use))
    facts = {
        "rule": options.rule,
        "domain_tokens": domain_use[any_table].num_sequences * domain.length,
        "reference_tokens": reference_use[any_table].num_sequences * reference.length,
        "tables": tables,
        "seconds": time.perf_counter() - started,
    }
    return WritableRows(masks, facts)


def kept_choice(
    path: Path, choose: Callable[[], WritableRows], *, made_from: Mapping[str, Any], ranks: Ranks
) -> WritableRows:
    """Read the choice that a run folder keeps, or make it on the first process and keep it; collective.

    Args:
        path: Its file.
        choose: Makes it.
        made_from: What it depends on, plain values. A file that was made from something else is made again.
        ranks: The processes, which see the same file.

    Raises:
        RunFolderError: A process does not see what the first one wrote.
        CheckpointError: The file is damaged.
    """
    key = json.dumps(made_from, sort_keys=True)
    with agree(ranks):
        if ranks.is_first and WritableRows.load(path, key) is None:
            choose().save(path, key)
    with agree(ranks):
        found = WritableRows.load(path, key)
        if found is None:
            raise RunFolderError(f"{path}, which the first process wrote, is not there; all processes need the folder")
    return found


def trained_tables(tables: Mapping[str, Any]) -> dict[str, TrainedTable]:
    """Those of the tables that are trained."""
    return {
        name: table for name, table in tables.items() if isinstance(table, TrainedTable) and table.weight.requires_grad
    }
