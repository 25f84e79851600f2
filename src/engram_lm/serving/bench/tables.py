"""``engram-lm table bench``: rows and bytes a second from a table, by tier, cold and warm."""

import contextlib
import dataclasses
import functools
import json as json_module
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import tyro

from engram_lm.errors import ConfigError
from engram_lm.planning.bars import print_bars
from engram_lm.progress import NOTHING, Progress
from engram_lm.serving.bench.listed import listed
from engram_lm.tables.around.read_ahead import ReadAheadTable
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import build_random
from engram_lm.tables.open import open_table
from engram_lm.tables.tiers.page_cache import drop_from_memory

Distribution = Literal["zipf", "uniform"]

IN_FILES = ("mmap", "file")
"""Tiers whose rows are read from files of this machine while they are gathered: those that can be cold."""

COLD_METHOD = "table closed, fsync and posix_fadvise(POSIX_FADV_DONTNEED) on each of its files, checked with mincore"
_STATES = {
    "cold_seconds": "cold",
    "cold_seconds_with_prefetch": "cold, prefetched and gathered at once",
    "cold_seconds_after_prefetch_and_compute": "cold, prefetched, gathered after as long",
    "warm_seconds": "warm",
    "warm_seconds_with_prefetch": "warm, prefetched and gathered at once",
}
_COLD_BELOW = 0.001  # of a file's pages: a few stay where another process reads the header, say
_STAGED_BYTES = 8 << 30  # more than the largest gather: a prefetch that is skipped measures nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast rows come from a table: every tier, cold and warm, with the same rows in the same rounds.

    A round takes each tier and number of rows once, in a new order, on row numbers that no round before had; a gather
    is cold first, if it can be, then warm with the same rows. Printed are medians over the rounds.

    Cold means: the table is closed, its files are dropped from the page cache, mincore confirms that, and the table is
    opened again (not timed) and read. Where the kernel does not drop the files (a file system in memory, a file that
    another process has mapped), no cold number is given and the output says why. The caches of the disk itself, and of
    the host of a virtual machine, stay as they are.

    Examples::

        engram-lm table bench FOLDER --tier mmap,file --rows 1,64,4096
        engram-lm table bench --synthetic 4000000x256 --folder /mnt/nvme --tier mmap,file --prefetch --json
    """

    source: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SOURCE")] = None
    """What holds the table: whatever open_table opens, a folder, a file or an address."""
    synthetic: str | None = None
    """Write a table of ROWSxWIDTH bfloat16 numbers, measure it and remove it; in place of SOURCE."""
    folder: Path | None = None
    """Where --synthetic writes; the system's folder for temporary files by default."""
    layer: int | str | None = None
    """Which layer's table, where the source holds several."""
    tier: str = "mmap,file"
    """Tiers to measure, separated by commas."""
    rows: str = "1,64,4096,65536"
    """Rows in a gather, separated by commas."""
    distribution: Distribution = "zipf"
    """Which rows are read: all equally often (uniform), or the k-th most popular 1/k as often as the first, spread over
    the table (zipf)."""
    prefetch: bool = False
    """Measure each gather also after a prefetch of its rows: at once, and after time to compute."""
    rounds: int = 5
    """How often everything is measured, at least once."""
    seed: int = 0
    """Decides which rows, and in which order."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.synthetic is None):
            raise ConfigError("name exactly one table: a SOURCE, or --synthetic ROWSxWIDTH")
        if self.folder is not None and self.synthetic is None:
            raise ConfigError("--folder says where --synthetic writes; without it there is nothing to write")
        if self.rounds < 1:
            raise ConfigError(f"--rounds must be at least 1, not {self.rounds}")
        if self.synthetic is not None:
            _geometry(self.synthetic)
        if not (self._row_counts and self._tier_names):
            raise ConfigError("--tier names at least one tier")

    @property
    def _tier_names(self) -> list[str]:
        return list(dict.fromkeys(self.tier.replace(",", " ").split()))

    @property
    def _row_counts(self) -> list[int]:
        return listed(self.rows, "--rows", int, 1, 1 << 24)

    def run(self) -> int:
        """Measure and print."""
        with contextlib.ExitStack() as stack:
            source = self.source
            if self.synthetic is not None:
                source = str(stack.enter_context(synthetic_table(*_geometry(self.synthetic), self.folder)))
            assert source is not None
            found = self._measure(source)
        if self.json:
            print(json_module.dumps(found))
        else:
            _print(found)
        return 0

    def _measure(self, source: str) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            tiers = []
            for name in self._tier_names:
                opener = functools.partial(open_table, source, layer=self.layer, tier=cast(Any, name))
                tiers.append(self._opened(name, opener, stack))
            geometry = {(tier.about["num_rows"], tier.about["width"]) for tier in tiers}
            if len(geometry) != 1:
                raise ConfigError(f"these tiers do not hold the same table: (rows, width) is {sorted(geometry)}")
            numbers = tiers[0].about
            cases = [(tier, count) for count in self._row_counts for tier in tiers]
            samples: list[list[dict[str, Any]]] = [[] for _ in cases]
            with Progress().tasks(NOTHING) as tasks:
                tasks.begin("measuring", self.rounds * len(cases))
                for round_ in range(self.rounds):
                    for place in np.random.default_rng((self.seed, round_)).permutation(len(cases)).tolist():
                        tier, count = cases[place]
                        draw = np.random.default_rng((self.seed, round_, count))  # the same rows for every tier
                        rows = draw_rows(self.distribution, numbers["num_rows"], count, draw)
                        samples[place].append({**self._sample(tier, rows), "distinct_rows": len(np.unique(rows))})
                        tasks.advance("measuring", 1, detail=f"{tier.name}, {count:,} rows")
        return {
            "source": self.synthetic or source,
            "distribution": self.distribution,
            "rounds": self.rounds,
            "seed": self.seed,
            **{key: numbers[key] for key in ("num_rows", "width", "dtype", "record_bytes", "row_bytes")},
            "cold_method": COLD_METHOD,
            "tiers": [{"tier": tier.name, **tier.about} for tier in tiers],
            "results": [
                _summary(tier.name, count, found, numbers) for (tier, count), found in zip(cases, samples, strict=True)
            ],
        }

    def _opened(self, name: str, opener: Callable[[], Any], stack: contextlib.ExitStack) -> "_Tier":
        """Open a tier and see what it is; tables in memory stay open until the stack is left."""
        found: list[Any] = []
        seconds = _seconds(lambda: found.append(opener()))
        (table,) = found
        stats = table.stats()
        in_files = stats.get("tier") in IN_FILES
        about = {
            "num_rows": table.num_rows,
            "width": table.width,
            "dtype": str(table.dtype).removeprefix("torch."),
            "row_bytes": table.row_bytes,
            "record_bytes": stats.get("record_bytes", table.row_bytes),
            "is_in_files": in_files,
            "open_seconds": seconds,
        }
        if not in_files:
            kept = _ahead(table) if self.prefetch else table
            stack.callback(kept.close)
            return _Tier(name, about, opener, (), kept)
        files = tuple(table.layout.files)
        table.close()
        return _Tier(name, about, opener, files, None)

    def _sample(self, tier: "_Tier", numbers: np.ndarray) -> dict[str, Any]:
        """One gather, cold if that can be had, then warm; then the same behind a prefetch."""
        rows = torch.from_numpy(numbers)
        if tier.kept is not None:
            plain = tier.kept.table if self.prefetch else tier.kept
            plain.gather(rows)
            warm = {"warm_seconds": _seconds(lambda: plain.gather(rows))}
            return {**warm, **_prefetched(tier.kept, rows, "warm")} if self.prefetch else warm
        left = _drop(tier.files)
        cold = is_cold(left)
        values: dict[str, Any] = {"resident_share_before_cold": left}
        with contextlib.closing(tier.opener()) as table:
            first = _seconds(lambda: table.gather(rows))
            if cold:
                values["cold_seconds"] = first
            values["warm_seconds"] = _seconds(lambda: table.gather(rows))
        if not self.prefetch:
            return values
        with contextlib.closing(_ahead(tier.opener())) as table:
            values.update(_prefetched(table, rows, "warm"))
        if cold and is_cold(_drop(tier.files)):
            with contextlib.closing(_ahead(tier.opener())) as table:
                values.update(_prefetched(table, rows, "cold"))
        if cold and is_cold(_drop(tier.files)):
            with contextlib.closing(_ahead(tier.opener())) as table:
                _start_threads(table)
                table.prefetch(rows)
                time.sleep(first)  # stands for compute that takes as long as the rows do
                values["cold_seconds_after_prefetch_and_compute"] = _seconds(lambda: table.gather(rows))
        return values


@dataclasses.dataclass(frozen=True)
class _Tier:
    """A tier that is measured."""

    name: str
    """Its name."""
    about: dict[str, Any]
    """What the results say of it."""
    opener: Callable[[], Any]
    """Opens the table."""
    files: tuple[str, ...]
    """The files its rows are read from while they are gathered; empty where they are in memory or far away."""
    kept: Any
    """The open table, where opening it again would load it again; else None, and it is opened for each gather."""


def _ahead(table: Any) -> Any:
    """The table with a prefetch that reads in the background."""
    return table if isinstance(table, ReadAheadTable) else ReadAheadTable(table, max_bytes=_STAGED_BYTES)


def _start_threads(table: Any) -> None:
    """Let the threads of a prefetch begin, which happens once and is not what is measured; reads the last row."""
    last = torch.tensor([table.num_rows - 1])
    table.prefetch(last)
    table.gather(last)


def is_cold(resident_share: float | None) -> bool:
    """Whether so little of a file is in the page cache that reads come from the disk."""
    return resident_share is not None and resident_share < _COLD_BELOW


def _prefetched(table: Any, rows: Any, state: str) -> dict[str, float]:
    """Prefetch and gather at once."""
    _start_threads(table)
    asked = _seconds(lambda: table.prefetch(rows))
    gathered = _seconds(lambda: table.gather(rows))
    return {f"{state}_prefetch_call_seconds": asked, f"{state}_seconds_with_prefetch": asked + gathered}


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _drop(files: tuple[str, ...]) -> float | None:
    """Drop files from the page cache; return the largest share that is left of one, None where nobody can say."""
    left = [drop_from_memory(file) for file in files]
    return None if None in left else max(left, default=None)  # type: ignore[type-var]  # none of them is None


def draw_rows(distribution: Distribution, num_rows: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw row numbers of a table of ``num_rows`` rows, int64 ``[count]``.

    With ``"zipf"`` the k-th most popular row is drawn in proportion to log(1 + 1/k), which is 1/k except for the first
    few. Popular rows are spread over the table, as hashing spreads them.
    """
    if distribution == "uniform":
        return random.integers(0, num_rows, count)
    ranks = np.exp(random.random(count) * math.log(num_rows + 1)).astype(np.int64) - 1
    ranks = np.clip(ranks, 0, num_rows - 1)
    factor = max(1, min(2**62 // num_rows, round(num_rows * (math.sqrt(5) - 1) / 2)))
    while math.gcd(factor, num_rows) != 1:
        factor -= 1
    return ranks * factor % num_rows


@contextlib.contextmanager
def synthetic_table(num_rows: int, width: int, folder: Path | None) -> Iterator[Path]:
    """Write a packed table of random bfloat16 rows, and remove it in the end."""
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--folder {folder} is no folder")
    with tempfile.TemporaryDirectory(prefix="engram-bench-", dir=folder) as place:
        path = Path(place) / "table.safetensors"
        print(f"engram-lm table bench: writing {num_rows * width * 2:,} bytes to {path}", file=sys.stderr)
        build_random(path, num_rows, RowCodec.named("bfloat16", width))
        yield path


def _geometry(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**40 for part in parts):
        raise ConfigError(f"--synthetic is ROWSxWIDTH, as in 4000000x256, not {text!r}")
    return int(parts[0]), int(parts[1])


def _summary(tier: str, count: int, samples: list[dict[str, Any]], numbers: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, and what they are in rows and bytes a second."""
    values: dict[str, Any] = {"tier": tier, "gather_rows": count}
    values["distinct_rows"] = statistics.median(sample["distinct_rows"] for sample in samples)
    for key in dict.fromkeys(key for sample in samples for key in sample if "_seconds" in key):
        values[key] = statistics.median(sample[key] for sample in samples if key in sample)
    for state in ("cold", "warm"):
        for suffix in ("", "_with_prefetch"):
            seconds = values.get(f"{state}_seconds{suffix}")
            if seconds is not None:
                rate = count / max(seconds, 1e-9)
                values[f"{state}_rows_per_second{suffix}"] = rate
                values[f"{state}_gigabytes_per_second{suffix}"] = rate * numbers["record_bytes"] / 1e9
    shares = [sample["resident_share_before_cold"] for sample in samples if "resident_share_before_cold" in sample]
    if not shares:
        values["cold"] = "none: this tier's rows are in memory, or another machine has them"
    elif None in shares:
        values["cold"] = "none: the system does not say which pages of the files are in memory"
    elif "cold_seconds" not in values:
        values["cold"] = f"none: {min(shares):.1%} of a file stayed in memory after it was dropped"
    else:
        dropped = sum("cold_seconds" in sample for sample in samples)
        values["cold"] = f"files dropped in {dropped} of {len(samples)} rounds"
    values["largest_resident_share_before_cold"] = max((s for s in shares if s is not None), default=None)
    return values


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    console.print(
        f"{found['source']}: {found['num_rows']:,} rows of {found['width']}, records of {found['record_bytes']} bytes; "
        f"{found['distribution']} rows, medians of {found['rounds']} interleaved rounds"
    )
    columns = {"rows": "right", "tier": "left", "state": "left", "rows/s": "right", "GB/s": "right", "ms": "right"}
    table = Table(*(Column(name, justify=cast(Any, side)) for name, side in columns.items()))
    for result in found["results"]:
        for key, state in _STATES.items():
            seconds = result.get(key)
            if seconds is not None:
                rate = result["gather_rows"] / max(seconds, 1e-9)
                amounts = (f"{rate:,.0f}", f"{rate * found['record_bytes'] / 1e9:.3f}", f"{seconds * 1e3:.3f}")
                table.add_row(f"{result['gather_rows']:,}", result["tier"], state, *amounts)
    console.print(table)
    for count in dict.fromkeys(result["gather_rows"] for result in found["results"]):
        rates = {
            f"{result['tier']}, {state}": count / max(result[key], 1e-9)
            for result in found["results"]
            if result["gather_rows"] == count
            for key, state in _STATES.items()
            if result.get(key) is not None
        }
        print_bars(console, f"rows a second, {count:,} at a time", rates, "{:,.0f}".format, full=max(rates.values()))
    console.print(f"cold: {found['cold_method']}")
    for tier in found["tiers"]:
        said = {result["cold"] for result in found["results"] if result["tier"] == tier["tier"]}
        console.print(f"  {tier['tier']}: {'; '.join(sorted(said))}")
