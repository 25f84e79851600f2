"""A table in front of another that keeps records it has read, in bounded bytes.

Hash tables of memory are read unevenly, because some N-grams come again and again. Whether a cache pays depends on the
text and on the table below (the statistics say so), so nothing is cached unless it is asked for.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.tables.table import Ticket
from engram_lm.tables.tiers.record_table import RecordTable

Policy = Literal["clock", "lru"]

_WAYS = 16
"""Places of a set: enough that the bound on a set costs few hits, few enough to be compared in one go."""
_EMPTY = -1
_GOLDEN, _HALF_BITS = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_PINNED_AT_ONCE = 1 << 16
"""Rows loaded at a time when the pinned set is filled."""


class CachedTable(RecordTable):
    """Records of another table, kept as they are stored, in bounded bytes. Never changes what is returned.

    The cache is set-associative: a row number belongs to one set of a few places, so any number of rows is looked up by
    one comparison of matrices, without a loop. The policy decides which record of a full set gives way. Rows that a
    request names several times are read from below once.

    Args:
        table: Where records come from. The cache owns it from now on and closes it.
        capacity_bytes: Most bytes that the cache holds: records, their row numbers and the policy's notes.
        policy: ``"clock"`` (a record gives way if it was not read since the hand last passed it, so records that are
            read once do not push out those that are read often) or ``"lru"`` (the record gives way whose last read is
            longest ago).
        pinned_rows: Row numbers that are loaded at the start and never give way, such as `most_frequent` finds.

    Raises:
        ConfigError: No record fits into the capacity, the pinned rows do not, or the policy is unknown.
        RowRangeError: A pinned row is outside the table.
    """

    def __init__(
        self,
        table: RecordTable,
        capacity_bytes: int,
        *,
        policy: Policy = "clock",
        pinned_rows: Tensor | np.ndarray | Sequence[int] | None = None,
    ) -> None:
        super().__init__(table.codec, table.num_rows, table.dtype)
        if policy not in get_args(Policy):
            raise ConfigError(f"a cache's policy is one of {', '.join(get_args(Policy))}, not {policy!r}")
        self.table, self.capacity_bytes, self.policy, self._held = table, capacity_bytes, policy, table
        record_bytes = table.codec.record_bytes
        self._pinned_rows = np.unique(np.asarray([] if pinned_rows is None else pinned_rows, dtype=np.int64))
        pinned_bytes = len(self._pinned_rows) * (record_bytes + 8)
        place_bytes = record_bytes + 8 + (8 if policy == "lru" else 1)
        # The clock's hand takes one more byte for each set, and there are no more sets than places.
        num_places = max(0, capacity_bytes - pinned_bytes) // (place_bytes + (policy == "clock"))
        num_places = min(num_places, 2 * table.num_rows)
        if pinned_bytes > capacity_bytes or (num_places == 0 and not len(self._pinned_rows)):
            raise ConfigError(
                f"{len(self._pinned_rows)} pinned rows take {pinned_bytes} bytes, and a further record of "
                f"{record_bytes} bytes takes {place_bytes + 1}; the cache has {capacity_bytes} bytes. Give it more, or "
                "pin fewer rows"
            )
        self._pinned = self._load_pinned()
        self._ways = max(1, min(_WAYS, num_places))
        self._num_sets = num_places // self._ways
        num_places = self._num_sets * self._ways
        self._records = np.empty((num_places, record_bytes), dtype=np.uint8)
        self._rows = np.full((self._num_sets, self._ways), _EMPTY, dtype=np.int64)
        # LRU notes when each place was last read; the clock notes whether it was read since the hand passed it.
        self._notes = np.zeros((self._num_sets, self._ways), dtype=np.int64 if policy == "lru" else np.uint8)
        self._hands = np.zeros(self._num_sets if policy == "clock" else 0, dtype=np.uint8)
        self._time = 0
        self._lock = threading.Lock()
        self._hits = self._misses = self._read_below = self._evictions = self._num_kept = 0

    def _renew(self) -> None:
        super()._renew()
        if self._lock.locked():
            # Another thread was changing the cache: row numbers may stand beside records of other rows.
            self._rows.fill(_EMPTY)
            self._num_kept = 0
        self._lock = threading.Lock()

    def _read_from(self, held: RecordTable, numbers: np.ndarray) -> Tensor:
        records = torch.empty(len(numbers), self.codec.record_bytes, dtype=torch.uint8)
        out = records.numpy()
        missing = self._take_pinned(numbers, out)
        with self._lock:
            if missing is None or len(missing):
                missing = self._take_kept(numbers, missing, out)
            if not len(missing):
                self._hits += len(numbers)
                return records
        wanted, positions = np.unique(numbers[missing], return_inverse=True)
        # Without the lock, so that other threads find their rows while this one waits. If it fails, nothing is kept.
        found = held._read(wanted).numpy()
        out[missing] = found[positions]
        with self._lock:
            self._keep(wanted, found)
            self._hits += len(numbers) - len(missing)
            self._misses += len(missing)
            self._read_below += len(wanted)
        return records

    @property
    def reads_ahead(self) -> bool:
        """Whether the table below does."""
        return self.table.reads_ahead

    def prefetch(self, rows: Tensor) -> Ticket:
        """Ask the table below for the rows that are not in the cache. See `Table.prefetch`."""
        self._refuse_closed(self._closed)
        numbers = np.unique(rows.detach().cpu().numpy())
        with self._lock:
            found, _ = self._find(numbers)
        absent = np.setdiff1d(np.delete(numbers, found), self._pinned_rows, assume_unique=True)
        if len(absent):
            self.table.prefetch(torch.from_numpy(absent))
        return Ticket(num_rows=len(numbers), num_bytes=len(numbers) * self.row_bytes)

    def load_records(self, start: int, stop: int) -> Tensor:
        """See `RecordTable.load_records`; reads past the cache, which copying a whole table would only spoil."""
        return self.table.load_records(start, stop)

    def stats(self) -> dict[str, Any]:
        """Statistics of the table below, and of the cache.

        ``hits`` and ``misses`` count requested rows; ``saved_bytes`` are the bytes of requested rows that were not read
        from below, because they were in the cache or several times in one request; ``used_bytes`` is at most
        ``capacity_bytes``.
        """
        with self._lock:
            asked = self._hits + self._misses
            place_bytes = self.codec.record_bytes + 8 + self._notes.itemsize
            used = self._pinned.nbytes + self._pinned_rows.nbytes + self._hands.nbytes + self._num_kept * place_bytes
            return {
                **self.table.stats(),
                **({} if self.tier_reason is None else {"tier_reason": self.tier_reason}),
                "num_gathers": self._num_gathers,
                "gathered_rows": self._rows_read,
                "policy": self.policy,
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate": self._hits / asked if asked else 0.0,
                "saved_bytes": (asked - self._read_below) * self.codec.record_bytes,
                "evictions": self._evictions,
                "pinned_rows": len(self._pinned_rows),
                "used_bytes": used,
                "capacity_bytes": self.capacity_bytes,
            }

    def close(self) -> None:
        """Close the table below too."""
        super().close()
        self.table.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the table below again, with an empty cache and the same pinned rows."""
        options = {"policy": self.policy, "pinned_rows": self._pinned_rows}
        return functools.partial(CachedTable, **options), (self.table, self.capacity_bytes)  # type: ignore[arg-type]

    def _load_pinned(self) -> np.ndarray:
        rows = torch.from_numpy(self._pinned_rows)
        pinned = np.empty((len(rows), self.codec.record_bytes), dtype=np.uint8)
        for start in range(0, len(rows), _PINNED_AT_ONCE):
            some = rows[start : start + _PINNED_AT_ONCE]
            pinned[start : start + len(some)] = self.table.read_records(some).numpy()
        return pinned

    def _take_pinned(self, numbers: np.ndarray, out: np.ndarray) -> np.ndarray | None:
        """Copy the pinned records and return the positions of the other rows; None for all of them."""
        if not len(self._pinned_rows):
            return None
        places = np.searchsorted(self._pinned_rows, numbers)
        places[places == len(self._pinned_rows)] = 0
        found = self._pinned_rows[places] == numbers
        out[found] = self._pinned[places[found]]
        return np.flatnonzero(~found)

    def _find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the rows that are kept, ascending, and the place of each: int64 ``[found]`` twice."""
        if self._num_sets == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        sets, ways = self._sets_of(numbers), self._ways
        # These calls are all that a small request costs, so they are few and plain. A row lies in at most one place of
        # its set: if there are as many matches as rows, each row has one.
        matches = (self._rows.take(sets, axis=0) == numbers[:, None]).reshape(-1).nonzero()[0]
        if len(matches) == len(numbers):
            found = np.arange(len(numbers))
        else:
            found = matches // ways
            sets = sets[found]
        # A match is counted over all rows, `ways` for each; what remains of it within its row is the way.
        return found, matches + (sets - found) * ways

    def _sets_of(self, numbers: np.ndarray) -> np.ndarray:
        # Multiplied first, so that rows at a regular distance spread over all sets (Fibonacci hashing). Then the upper
        # half of a product of 32 bits and the number of sets is the set, because dividing would take longer.
        mixed = numbers.view(np.uint64) * _GOLDEN
        mixed >>= _HALF_BITS
        mixed *= np.uint64(self._num_sets)
        mixed >>= _HALF_BITS
        return mixed.view(np.int64)

    def _take_kept(self, numbers: np.ndarray, positions: np.ndarray | None, out: np.ndarray) -> np.ndarray:
        """Copy the records kept of ``numbers[positions]`` (all where None) to ``out``; return the other positions."""
        found, places = self._find(numbers if positions is None else numbers[positions])
        if len(found):
            self._notes.reshape(-1)[places] = self._now()
        if len(found) == len(numbers):
            self._records.take(places, axis=0, out=out, mode="clip")
            return found[:0]
        positions = np.arange(len(numbers)) if positions is None else positions
        out[positions[found]] = self._records[places]
        return np.delete(positions, found)

    def _now(self) -> int:
        """What is noted of a record that is read now: the time, or for the clock that it was read."""
        self._time += 1
        return self._time if self.policy == "lru" else 1

    def _keep(self, numbers: np.ndarray, records: np.ndarray) -> None:
        """Put distinct records into their sets. Where more come than a set has places, the surplus is not kept."""
        found, _ = self._find(numbers)  # another thread may have been faster
        new = np.delete(np.arange(len(numbers)), found)
        if self._num_sets == 0 or not len(new):
            return
        sets = self._sets_of(numbers[new])
        order = np.argsort(sets, kind="stable")
        new, sets = new[order], sets[order]
        touched, first, counts = np.unique(sets, return_index=True, return_counts=True)
        # The new records of a set are numbered from 0; number k takes the place of the k-th record that gives way.
        rank = np.arange(len(sets)) - np.repeat(first, counts)
        giving_way = self._giving_way(touched, np.minimum(counts, self._ways))
        fits = rank < self._ways
        owner = np.repeat(np.arange(len(touched)), counts)[fits]
        ways, sets, new = giving_way[owner, rank[fits]], sets[fits], new[fits]
        num_empty = int((self._rows[sets, ways] == _EMPTY).sum())
        self._evictions += len(new) - num_empty
        self._num_kept += num_empty
        self._rows[sets, ways] = numbers[new]
        self._records[sets * self._ways + ways] = records[new]
        self._notes[sets, ways] = self._now() if self.policy == "lru" else 0

    def _giving_way(self, sets: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The ways of each set in the order in which they give way, ``[sets, ways]``, when ``counts`` of them do."""
        notes, empty = self._notes[sets], self._rows[sets] == _EMPTY
        if self.policy == "lru":
            return np.argsort(np.where(empty, -1, notes), axis=1, kind="stable")
        # The hand goes round and passes by what was read since its last visit; after a whole round it takes those too.
        ahead = (np.arange(self._ways) - self._hands[sets, None].astype(np.int64)) % self._ways
        turn = np.where(empty, -1, ahead + self._ways * (notes != 0))
        order = np.argsort(turn, axis=1, kind="stable")
        every = np.arange(len(sets))
        last = order[every, counts - 1]
        last_turn = turn[every, last]
        self._notes[sets] = np.where(ahead <= last_turn[:, None], 0, notes)
        self._hands[sets] = np.where(last_turn < 0, self._hands[sets], (last + 1) % self._ways)
        return order


def most_frequent(trace: np.ndarray | Sequence[np.ndarray], capacity_bytes: int, record_bytes: int) -> np.ndarray:
    """Find the rows that a recorded trace reads most, as many as fit, to pin them in a `CachedTable`.

    Args:
        trace: Row numbers as they were read, int64 of any shape, or several of these.
        capacity_bytes: Bytes that the pinned rows may take, their row numbers included.
        record_bytes: Bytes of a row as it is stored (``table.codec.record_bytes``).

    Returns:
        Row numbers, int64, the most frequent first; of equally frequent ones the smaller.
    """
    pieces = [trace] if isinstance(trace, np.ndarray) else list(trace)
    flat = [np.asarray(piece, dtype=np.int64).reshape(-1) for piece in pieces]
    rows, counts = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *flat]), return_counts=True)
    return rows[np.argsort(-counts, kind="stable")[: capacity_bytes // (record_bytes + 8)]]
