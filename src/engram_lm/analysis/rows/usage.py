"""Which rows a text reads: how full the tables are, how hot their hottest rows, and which N-grams share rows."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from engram_lm.analysis.plain_values import plain
from engram_lm.analysis.reading import Analysis, Reading, read_text, text_tokens
from engram_lm.analysis.rows.collisions import NgramCollisions, ngram_collisions
from engram_lm.analysis.rows.hits import HitCounter, RowHits, log_ranks, zipf_exponent
from engram_lm.analysis.subject import Subject, find_subject
from engram_lm.errors import ConfigError, MismatchError, TokenError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import FrequentNgrams, frequent_ngrams

__all__ = ["RowFindings", "RowUsage", "RowUse", "row_use"]

# Dimension key: G blocks with memory, O orders, K heads of one order, T tables, R ranks.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RowUsage:
    """The rows that one model read in a text. What has no value is NaN (None in `to_dict`)."""

    blocks: tuple[int, ...]
    """Blocks that read memory, from 0: axis G."""
    orders: tuple[int, ...]
    """N-gram orders: axis O."""
    num_heads: int
    """Hash heads per order: axis K."""
    tables: tuple[tuple[int, ...], ...]
    """Blocks that read each table, axis T: one block each, or all of them where they share one."""
    num_positions: int
    """Positions at which rows were read."""
    num_dead: int
    """Positions left out because no N-gram ends there."""
    row_share: float
    """Share of the rows that was counted: 1, or less where not all that were read could be held. Numbers of rows are
    then estimates from that share, and ranks and `covered` too."""
    num_rows: np.ndarray
    """Rows of each head, int64 ``[G, O, K]``."""
    num_rows_hit: np.ndarray
    """Those of them that the block read at least once, float64 ``[G, O, K]``."""
    num_table_rows: np.ndarray
    """Rows of each table, without padding, int64 ``[T]``."""
    num_table_rows_hit: np.ndarray
    """Those that any of its blocks read, float64 ``[T]``."""
    ranks: np.ndarray
    """Ranks of rows, from 1 for the one that is read most often, spread evenly on a logarithmic axis, int64 ``[R]``."""
    hits: np.ndarray
    """Times that the row of each rank is read, over all heads of a table, int64 ``[T, R]``."""
    hits_by_order: np.ndarray
    """The same among the rows of one order, int64 ``[T, O, R]``."""
    covered: np.ndarray
    """Share of all reads that go to the rows up to a rank: what a cache of so many rows would answer at best, float64
    ``[T, R]``."""
    zipf_exponent: np.ndarray
    """s in hits ~ rank**-s, fitted to `hits`; see `engram_lm.analysis.rows.hits.zipf_exponent`; float64 ``[T]``."""
    zipf_exponent_by_order: np.ndarray
    """The same for one order, float64 ``[T, O]``."""
    collisions: NgramCollisions | None
    """Collisions among the frequent N-grams; None where the text's tokens were not given or hold ids that no tokenizer
    makes."""

    @property
    def occupancy(self) -> np.ndarray:
        """Share of each head's rows that was read, float64 ``[G, O, K]``."""
        occupancy: np.ndarray = self.num_rows_hit / self.num_rows
        return occupancy

    @property
    def occupancy_by_block(self) -> np.ndarray:
        """Share of the rows of all heads that the block read, float64 ``[G]``."""
        occupancy: np.ndarray = self.num_rows_hit.sum((1, 2)) / self.num_rows.sum((1, 2))
        return occupancy

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        values["collisions"] = None if self.collisions is None else self.collisions.to_dict()
        return {**values, "occupancy": plain(self.occupancy), "occupancy_by_block": plain(self.occupancy_by_block)}


@dataclasses.dataclass(frozen=True, eq=False)
class RowFindings:
    """The rows that several models read in one text."""

    models: Mapping[str, RowUsage]
    """By the model's name."""
    left_out: Mapping[str, str]
    """Models that read no rows, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "models": {name: usage.to_dict() for name, usage in self.models.items()},
            "left_out": dict(self.left_out),
        }


class RowUse(Analysis):
    """Counts the rows that models with memory read. Feed it with `engram_lm.analysis.read_text`.

    Every living position counts, NaN or not: which rows are read depends on the tokens alone.

    Args:
        tokens: The tokens of the text, integers ``[num_tokens]``, as `read_text` gets them; memory-mapped ones will do.
            They are needed for the collisions only, which belong to the text as a whole, not cut into windows.
        min_count: Positions at which a frequent N-gram occurs at least.
        max_ngrams: Take so many of the most frequent N-grams of each order at most.
        max_bytes: Budget of all counts together, in equal parts for each block of each model; see
            `engram_lm.analysis.rows.hits.HitCounter`.

    Raises:
        ConfigError: A number is below 1.
    """

    wants: frozenset[str] = frozenset()

    def __init__(
        self, tokens: Any = None, *, min_count: int = 2, max_ngrams: int = 1 << 16, max_bytes: int = 1 << 28
    ) -> None:
        for name, value in (("min_count", min_count), ("max_ngrams", max_ngrams), ("max_bytes", max_bytes)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is a whole number from 1, got {value!r}")
        self.tokens, self.min_count, self.max_ngrams, self.max_bytes = tokens, min_count, max_ngrams, max_bytes
        self._counts: dict[str, _Counts] = {}
        self._left_out: dict[str, str] = {}

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Apply to the models with memory."""
        readers = [subject for subject in subjects if subject.memories]
        num_counters = sum(len(subject.memories) for subject in readers)
        self._counts = {subject.name: _Counts(subject, self.max_bytes // num_counters) for subject in readers}
        self._left_out = {subject.name: "it has no memory" for subject in subjects if not subject.memories}
        if readers:
            return None
        reasons = set(self._left_out.values())
        # Who is meant need not be said where it is true of all.
        return reasons.pop() if len(reasons) == 1 else "; ".join(f"{n}: {why}" for n, why in self._left_out.items())

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """What counting the rows of one position and block takes."""
        return max((32 * subject.spec.num_heads_total for subject in subjects if subject.spec), default=0)

    def update(self, readings: Sequence[Reading]) -> None:
        """Count the rows of some windows."""
        for reading in readings:
            if reading.subject.name in self._counts:
                self._counts[reading.subject.name].add(reading)

    def result(self) -> RowFindings:
        """Return what was counted."""
        ngrams: dict[Any, dict[int, FrequentNgrams] | None] = {}
        models = {}
        for name, counts in self._counts.items():
            spec = counts.spec
            # What the N-grams of a text are does not depend on the rows, which models often differ in.
            key = (spec.orders, spec.token_map_digest, spec.fill, spec.segments)
            if self.tokens is not None and key not in ngrams:
                ngrams[key] = self._ngrams(spec)
            found = ngrams.get(key)
            collisions = None if found is None else ngram_collisions(spec, found, min_count=self.min_count)
            models[name] = counts.usage(collisions)
        return RowFindings(models, dict(self._left_out))

    def _ngrams(self, spec: HashSpec) -> dict[int, FrequentNgrams] | None:
        try:
            return frequent_ngrams(spec, self.tokens, num_ngrams=self.max_ngrams)
        except TokenError:
            # An attached memory takes ids that no tokenizer makes for no text; an N-gram cannot be said of them.
            return None


def row_use(
    model: Any,
    tokenizer: Any,
    text: Any,
    *,
    length: int = 512,
    adapter: str | None = None,
    max_tokens: int | None = None,
    **options: Any,
) -> RowUsage:
    """Count the rows that one model reads in a text of any length.

    Args:
        model: A model with memory, its own or attached.
        tokenizer: The tokenizer it was trained with.
        text: A text or token ids; see `engram_lm.analysis.read_text`.
        length: Tokens the model sees at once.
        adapter: Which attached memory to look at, where there are several.
        max_tokens: Read only so many tokens.
        **options: Of `RowUse`.

    Raises:
        MismatchError: The model has no memory, or another tokenizer.
        DataError: The text has no tokens.
        ConfigError: A number is impossible.
    """
    subject = find_subject(model, tokenizer, adapter=adapter)
    if not subject.memories:
        raise MismatchError(f"{subject.name} has no memory, so it reads no rows; pass a model with memory")
    tokens = text_tokens(tokenizer, text) if isinstance(text, str) else np.asanyarray(text)
    tokens = tokens[:max_tokens]
    analysis = RowUse(tokens, **options)
    read_text([subject], tokens, {"rows": analysis}, length=length)
    return analysis.result().models[subject.name]


class _Counts:
    """What is counted for one model."""

    def __init__(self, subject: Subject, max_bytes: int) -> None:
        assert subject.spec is not None
        self.spec, self.blocks = subject.spec, tuple(subject.memories)
        self.layers = {block: self.spec.layers[self.spec.blocks.index(block)] for block in self.blocks}
        self.counters = {block: HitCounter(self.spec.num_rows(self.layers[block]), max_bytes) for block in self.blocks}
        self.num_positions = self.num_dead = 0
        self.tables = (self.blocks,) if self.spec.shared_table else tuple((block,) for block in self.blocks)

    def add(self, reading: Reading) -> None:
        self.num_positions += int(reading.active.sum())
        self.num_dead += int((~reading.active).sum())
        for block in self.blocks:
            rows = _rows(reading, self.spec, block, self.layers[block])
            self.counters[block].add(rows[reading.active.to(rows.device)].flatten().cpu().numpy())

    def usage(self, collisions: NgramCollisions | None) -> RowUsage:
        spec, grid = self.spec, (len(self.spec.orders), self.spec.num_heads)
        primes = {block: spec.primes[spec.blocks.index(block)] for block in self.blocks}
        starts = {block: (*spec.offsets(self.layers[block]), sum(primes[block])) for block in self.blocks}
        hits = {block: counter.hits() for block, counter in self.counters.items()}
        of_table = [RowHits.joined([hits[block] for block in table]) for table in self.tables]
        of_order = [
            [
                rows.between(starts[table[0]][first], starts[table[0]][first + spec.num_heads])
                for first in range(0, spec.num_heads_total, spec.num_heads)
            ]
            for table, rows in zip(self.tables, of_table, strict=True)
        ]
        ranks = log_ranks(max(rows.num_rows_hit for rows in of_table))
        curves = [rows.at_ranks(ranks) for rows in of_table]
        by_order = np.array([[rows.at_ranks(ranks)[0] for rows in orders] for orders in of_order])
        return RowUsage(
            blocks=self.blocks,
            orders=spec.orders,
            num_heads=spec.num_heads,
            tables=self.tables,
            num_positions=self.num_positions,
            num_dead=self.num_dead,
            row_share=min(rows.share for rows in of_table),
            num_rows=np.array([primes[block] for block in self.blocks]).reshape(-1, *grid),
            num_rows_hit=np.array([_by_column(hits[block], starts[block]) for block in self.blocks]).reshape(-1, *grid),
            num_table_rows=np.array([sum(primes[table[0]]) for table in self.tables]),
            num_table_rows_hit=np.array([rows.num_rows_hit for rows in of_table]),
            ranks=ranks,
            hits=np.array([hits for hits, _ in curves]),
            hits_by_order=by_order,
            covered=np.array([covered for _, covered in curves]),
            zipf_exponent=np.array([zipf_exponent(ranks, hits) for hits, _ in curves]),
            zipf_exponent_by_order=np.array([[zipf_exponent(ranks, hits) for hits in orders] for orders in by_order]),
            collisions=collisions,
        )


def _rows(reading: Reading, spec: HashSpec, block: int, layer: int) -> Tensor:
    """Rows that a block read, int64 [B, L, H]."""
    if block in reading.rows:
        return reading.rows[block]
    # The model was handed memory vectors; the rows behind them follow from the tokens.
    rows: Tensor = spec.rows_for_layers(reading.codes)[layer]
    return rows


def _by_column(hits: RowHits, starts: Sequence[int]) -> list[float]:
    return [hits.between(first, end).num_rows_hit for first, end in itertools.pairwise(starts)]
