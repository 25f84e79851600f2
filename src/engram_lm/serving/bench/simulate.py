"""``engram-lm table simulate``: what caches and batches would do for the rows that a text, or a recorded run, reads."""

import dataclasses
import itertools
import json as json_module
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, DataError, check_flags
from engram_lm.files import replacing
from engram_lm.hashing.spec import HashSpec
from engram_lm.hashing.token_map import load_tokenizer
from engram_lm.planning.bars import print_bars
from engram_lm.planning.command import read_config
from engram_lm.progress import NOTHING, Progress, Tasks
from engram_lm.serving.bench.listed import listed
from engram_lm.tables.around.reuse import (
    PAGE_BYTES,
    HitCurve,
    count_in_batches,
    lfu_ranks,
    lru_distances,
    pinned_ranks,
    previous_pages,
    previous_reads,
    row_reuse,
)
from engram_lm.tables.around.row_trace import read_trace
from engram_lm.tables.byte_size import byte_size
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.documents import read_documents

POLICIES = {
    "lru": "LRU",
    "lfu": "LFU",
    "pinned": "pinned by the first part",
    "ideal": "best fixed set (known ahead)",
}
"""Which rows a cache keeps, and how tables and plots call that."""

_RECORD_BYTES = 264
_DOCUMENTS_AT_ONCE = 64
_BARS = 10
"""Sizes of a cache that are drawn in a terminal."""


@dataclasses.dataclass(frozen=True)
class _Trace:
    """The reads of one table, or of one order's heads in it."""

    block: int
    """Block whose table is read."""
    order: int | None
    """Order of the N-grams; None for all orders together."""
    rows: np.ndarray
    """Row numbers in the order they were read, int64 [n]."""
    rows_per_token: int
    """Rows that a token reads."""
    starts: np.ndarray | None
    """First read of each step, int64 [s], where steps were recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulate:
    """Simulate caches, batches and pages for the rows that a text reads, before buying the memory.

    The rows come from text under any published config, from text under a model of ours, or from a recorded run. Every
    policy answers the same reads: those behind the first --train-share of the trace, which warms LRU and LFU and
    decides what a pinned set holds. Sizes of caches are bytes of records, without the cache's own index.

    Examples::

        engram-lm table simulate --config config.json --tokenizer FOLDER --data texts/ --plot hits.png
        engram-lm table simulate --model runs/mine/model --data texts/ --hit-rates 0.5,0.9 --json
        engram-lm table simulate --trace recorded.npz --rows-per-token 24 --record-bytes 264
    """

    trace: Path | None = None
    """A recorded .npz: rows_BLOCK, int64 [n], row numbers in the order they were read; and optionally steps_BLOCK,
    int64 [s], the places in it where forward passes begin."""
    config: Path | None = None
    """A config that engram-lm hash reads, or the folder that holds it."""
    tokenizer: Path | None = None
    """A folder with tokenizer.json, or that file."""
    model: Path | None = None
    """A model folder of ours, in place of --config and --tokenizer."""
    data: tuple[Path, ...] = ()
    """Text files or folders."""
    layers: str | None = None
    """Layers of the config to simulate, separated by commas; by default the first, because layers read the same N-grams
    and differ in collisions only. For --trace all blocks by default."""
    sequence_length: int = 4096
    """Tokens after which N-grams begin anew, as in a new request; documents end sequences too."""
    batch_tokens: str = "1,16,256,4096"
    """Batch sizes in tokens, separated by commas, whose distinct rows and pages are counted."""
    rows_per_token: int = 1
    """Rows that a token reads, for --trace; with 1, batches are counted in reads."""
    record_bytes: int | None = None
    """Bytes of a stored row; by default 264 (FP8 with scales, as in DeepSeek-V4.1), for --model its bfloat16 row."""
    scale_bytes: int = 0
    """How many of them are scales in a tensor of their own; adds the pages of that layout."""
    hit_rates: str = "0.5,0.8,0.9"
    """Hit rates, separated by commas, for which the size of the cache is wanted."""
    train_share: float = 0.5
    """Share of the trace that comes before what is measured, between 0 and 1."""
    max_reads: int = 20_000_000
    """Reads per table at most; the trace is cut there. Takes about 120 bytes of memory for each."""
    plot: Path | None = None
    """Draw hit rate against cache size, into this .png or .svg file."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.trace, self.config, self.model)) != 1:
            raise ConfigError("name exactly one source of rows: --trace, --config (with --data), or --model (likewise)")
        if (self.trace is None) != bool(self.data):
            raise ConfigError("--config and --model need the text they read as --data; --trace has its rows already")
        if self.config is None and self.tokenizer is not None:
            raise ConfigError("--tokenizer belongs to --config; a --model folder holds its own")
        if self.config is not None and self.tokenizer is None:
            raise ConfigError("--config needs the --tokenizer that turns text into tokens")
        check_flags(self, "sequence_length", "rows_per_token", "record_bytes", "max_reads")
        if not 0 < self.train_share < 1:
            raise ConfigError(f"--train-share is a share between 0 and 1, not {self.train_share}")
        if not 0 <= self.scale_bytes < (self.record_bytes or _RECORD_BYTES):
            raise ConfigError(f"--scale-bytes is a part of the record, not {self.scale_bytes}")
        if self.plot is not None and self.plot.suffix not in (".png", ".svg"):
            raise ConfigError(f"--plot writes .png or .svg, not {self.plot}")
        _ = self._batch_sizes, self._wanted_rates, self._wanted_layers

    @property
    def _batch_sizes(self) -> list[int]:
        return listed(self.batch_tokens, "--batch-tokens", int, 1)

    @property
    def _wanted_rates(self) -> list[float]:
        return listed(self.hit_rates, "--hit-rates", float, 0, 1)

    @property
    def _wanted_layers(self) -> list[int] | None:
        return None if self.layers is None else listed(self.layers, "--layers", int, 0)

    def run(self) -> int:
        """Simulate and print."""
        record_bytes = self.record_bytes or (_RECORD_BYTES if self.model is None else _model_row_bytes(self.model))
        found: dict[str, Any] = {
            "record_bytes": record_bytes,
            "page_bytes": PAGE_BYTES,
            "train_share": self.train_share,
            "cut": False,
            "traces": [],
        }
        with Progress().tasks(NOTHING) as tasks:
            tasks.begin("hashing text" if self.trace is None else "reading the trace")
            for trace in self._recorded(found) if self.trace is not None else self._hashed(found):
                found["traces"].append(self._simulate(trace, record_bytes, tasks))
        if self.plot is not None:
            _save_plot(found["traces"], self.plot)
        if self.json:
            print(json_module.dumps(found))
        else:
            _print(found)
        return 0

    def _recorded(self, found: dict[str, Any]) -> Iterator[_Trace]:
        """The traces of a recorded run; says in ``found`` what they are."""
        assert self.trace is not None
        found["source"] = str(self.trace)
        for block, rows, starts, cut in read_trace(self.trace, self._wanted_layers, self.max_reads):
            found["cut"] |= cut
            yield _Trace(block, None, rows, self.rows_per_token, starts)

    def _hashed(self, found: dict[str, Any]) -> Iterator[_Trace]:
        """The traces of a text, of each layer all orders first; says in ``found`` what they are."""
        config, folder = (self.config, self.tokenizer) if self.model is None else (self.model, self.model)
        assert config is not None
        tokenizer = load_tokenizer(folder)
        spec = HashSpec.from_config(config, tokenizer)
        layers = self._wanted_layers or [spec.layers[0]]
        for layer in layers:
            if layer not in spec.layers:
                raise ConfigError(f"layer {layer} has no memory; this config's layers are {list(spec.layers)}")
        corpus = read_documents(self.data)
        heads, most = spec.num_heads_total, max(1, self.max_reads // spec.num_heads_total)
        pieces, num_tokens, cut = [], 0, False
        for ids in _encode(tokenizer, (document.text for document in corpus.documents)):
            cut = cut or num_tokens + len(ids) > most
            ids = ids[: most - num_tokens]
            num_tokens += len(ids)
            pieces += [ids[start : start + self.sequence_length] for start in range(0, len(ids), self.sequence_length)]
            if num_tokens >= most:
                break
        if not pieces:
            raise DataError(f"the text of {corpus.source} has no tokens")
        found.update(source=corpus.source, num_tokens=num_tokens, variant=spec.variant, digest=spec.digest, cut=cut)
        for layer, block in zip(spec.layers, spec.blocks, strict=True):
            if layer not in layers:
                continue
            rows = np.concatenate([spec.rows(piece, layer) for piece in pieces])  # [tokens, heads]
            yield _Trace(block, None, rows.reshape(-1), heads, None)
            for place, order in enumerate(spec.orders):
                columns = slice(place * spec.num_heads, (place + 1) * spec.num_heads)
                yield _Trace(block, order, rows[:, columns].reshape(-1), spec.num_heads, None)

    def _simulate(self, trace: _Trace, record_bytes: int, tasks: Tasks) -> dict[str, Any]:
        rows, title = trace.rows, _title(trace.block, trace.order)
        tasks.begin(title, len(POLICIES))
        previous, earlier = previous_reads(rows)
        cut = int(len(rows) * self.train_share)
        if not 0 < cut < len(rows):
            raise DataError(f"a trace of {len(rows)} reads has nothing to divide; give more text")
        reuse = row_reuse(rows)
        sizes: dict[str, Callable[[], np.ndarray]] = {
            "lru": lambda: lru_distances(rows, previous)[cut:],
            "lfu": lambda: lfu_ranks(rows, previous, earlier)[cut:],
            "pinned": lambda: pinned_ranks(rows[:cut], rows[cut:]),
            "ideal": lambda: pinned_ranks(rows[cut:], rows[cut:]),
        }
        policies: dict[str, dict[str, Any]] = {}
        for policy in POLICIES:  # one at a time, and only its curve is kept: an array of sizes is as long as the trace
            policies[policy] = self._describe(HitCurve.from_sizes(sizes[policy]()), record_bytes)
            tasks.show(title, len(policies), detail=f"{len(rows):,} reads by {POLICIES[policy]}")
        return {
            "block": trace.block,
            "order": trace.order,
            "num_reads": reuse.num_reads,
            "distinct_rows": reuse.num_rows,
            "distinct_rows_bytes": reuse.num_rows * record_bytes,
            "read_once_rows": reuse.num_read_once,
            "rows_by_reads": [{"reads_from": reads, "rows": number} for reads, number in reuse.rows_by_reads],
            "coverage": [{"rows": number, "share": share} for number, share in reuse.coverage],
            "batches": self._batches(trace, previous, record_bytes),
            "measured_reads": len(rows) - cut,
            "policies": policies,
        }

    def _describe(self, curve: HitCurve, record_bytes: int) -> dict[str, Any]:
        largest = len(curve.hits) - 1
        # About four sizes to an octave.
        growing = np.geomspace(1, max(largest, 1), 4 * largest.bit_length() + 2).round().astype(int).tolist()
        points = sorted({0, largest, *(size for size in growing if size < largest)})
        wanted = {rate: curve.rows_for(rate) for rate in self._wanted_rates}
        return {
            "highest_hit_rate": curve.highest,
            "curve": [
                {"cache_rows": size, "cache_bytes": size * record_bytes, "hit_rate": curve.hit_rate(size)}
                for size in points
            ],
            "wanted": [
                {"hit_rate": rate, "cache_rows": size, "cache_bytes": None if size is None else size * record_bytes}
                for rate, size in wanted.items()
            ],
        }

    def _batches(self, trace: _Trace, previous: np.ndarray, record_bytes: int) -> list[dict[str, Any]]:
        """Distinct rows and pages of batches of every size, and of the steps where they were recorded."""
        num_reads = len(trace.rows)
        batches: dict[int | None, np.ndarray] = {
            tokens: np.arange(0, num_reads, tokens * trace.rows_per_token) for tokens in self._batch_sizes
        }
        if trace.starts is not None:
            batches[None] = trace.starts
        # Where rows may lie: as bytes of their parts, each in a file of its own. Pages hold rows of the whole table.
        layouts: dict[str, tuple[int, ...]] = {} if trace.order is not None else {"side_by_side": (record_bytes,)}
        if layouts and self.scale_bytes:
            layouts["scales_apart"] = (record_bytes - self.scale_bytes, self.scale_bytes)
        pages: dict[str, list[int]] = {}
        for name, parts in layouts.items():
            totals = np.zeros(len(batches), np.int64)
            for row_bytes in parts:  # one at a time: what is found for one is as long as the trace
                places, most = previous_pages(trace.rows, row_bytes)
                totals += [count_in_batches(places, starts * most).sum() for starts in batches.values()]
            pages[name] = totals.tolist()
        results: list[dict[str, Any]] = []
        for number, (tokens, starts) in enumerate(batches.items()):
            distinct = count_in_batches(previous, starts)
            useful = int(distinct.sum()) * record_bytes
            results.append(
                {
                    "batch_tokens": tokens,
                    "num_batches": len(starts),
                    "reads_per_batch": num_reads / len(starts),
                    "distinct_rows_per_batch": float(distinct.mean()),
                    "distinct_share": float(distinct.sum() / num_reads),
                    "pages_per_batch": {name: total[number] / len(starts) for name, total in pages.items()},
                    "page_amplification": {name: total[number] * PAGE_BYTES / useful for name, total in pages.items()},
                }
            )
        return results


def _title(block: int, order: int | None) -> str:
    return f"block {block}, " + ("all orders" if order is None else f"order {order}")


def _encode(tokenizer: Any, texts: Iterator[str]) -> Iterator[np.ndarray]:
    """Token ids of each document, int64, a few documents at a time."""
    beginning = beginning_tokens(tokenizer)
    while some := list(itertools.islice(texts, _DOCUMENTS_AT_ONCE)):
        for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
            yield np.array([*beginning, *encoding.ids], dtype=np.int64)


def _model_row_bytes(folder: Path) -> int:
    """Bytes of a bfloat16 row of a model of ours."""
    memory = read_config(str(folder / "config.json") if folder.is_dir() else str(folder)).memory_config
    if memory is None:
        raise ConfigError(f"{folder} is a model without memory: it reads no rows")
    return memory.head_dim * 2


def _save_plot(traces: list[dict[str, Any]], path: Path) -> None:
    """Draw hit rate against cache size: a row of panels for each block, a panel for each order where they are known."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    blocks = sorted({trace["block"] for trace in traces})
    columns = max(sum(trace["block"] == block for trace in traces) for block in blocks)
    size = (max(5.6, 3.4 * columns), 3.2 * len(blocks) + 0.6)
    figure = Figure(figsize=size, layout="constrained", dpi=120, facecolor="white")
    panels = figure.subplots(len(blocks), columns, squeeze=False, sharey=True)
    styles = dict(zip(POLICIES, (("C0", "-"), ("C1", "--"), ("C2", "-."), ("0.45", ":")), strict=True))
    for row, block in enumerate(blocks):
        shown = [trace for trace in traces if trace["block"] == block]
        for axes, trace in itertools.zip_longest(panels[row], shown):
            if trace is None:
                axes.set_axis_off()
                continue
            for policy, (color, dashes) in styles.items():
                points = [point for point in trace["policies"][policy]["curve"] if point["cache_bytes"]]
                sizes, rates = ([point[key] for point in points] for key in ("cache_bytes", "hit_rate"))
                axes.plot(sizes, rates, color=color, linestyle=dashes, label=POLICIES[policy])
            order = "all rows" if trace["order"] is None else f"{trace['order']}-grams"
            axes.set_xscale("log", base=2)
            axes.set(title=f"block {block}: {order}", ylim=(0, 1), xlabel="cache, bytes of rows")
            axes.xaxis.set_major_locator(LogLocator(base=64))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_size(value, digits=0)))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(alpha=0.3)
        panels[row][0].set_ylabel("reads answered by the cache")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as aside:
        figure.savefig(aside, format=path.suffix[1:])


def _hits_by_size(trace: dict[str, Any]) -> dict[str, float]:
    """Hit rates of LRU by the size of the cache, at some of the sizes of its curve."""
    points = [point for point in trace["policies"]["lru"]["curve"] if point["cache_rows"]]
    points = [points[round(place)] for place in np.linspace(0, len(points) - 1, min(_BARS, len(points)))]
    return {byte_size(point["cache_bytes"], digits=1): point["hit_rate"] for point in points}


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    tokens = f", {found['num_tokens']:,} tokens" if "num_tokens" in found else ""
    cut = "; cut at --max-reads" if found["cut"] else ""
    console.print(f"{found['source']}{tokens}{cut}; records of {found['record_bytes']} bytes")
    for trace in found["traces"]:
        columns = [Column(name, justify="right") for name in POLICIES.values()]
        table = Table("", *columns, title=_title(trace["block"], trace["order"]), title_justify="left")
        share = trace["distinct_rows"] / trace["num_reads"]
        once = trace["read_once_rows"] / trace["distinct_rows"]
        policies = trace["policies"].values()
        for place, wanted in enumerate(trace["policies"]["lru"]["wanted"]):
            sizes = [policy["wanted"][place]["cache_bytes"] for policy in policies]
            cells = ["never" if size is None else byte_size(size, digits=1) for size in sizes]
            table.add_row(f"RAM for {wanted['hit_rate']:.0%} hits", *cells)
        table.add_row("most hits of any size", *(f"{policy['highest_hit_rate']:.1%}" for policy in policies))
        console.print()
        console.print(table)
        console.print(
            f"{trace['num_reads']:,} reads of {trace['distinct_rows']:,} rows ({share:.1%}; "
            f"{byte_size(trace['distinct_rows_bytes'], digits=1)}), {once:.0%} of the rows read once"
        )
        if trace["order"] is None:
            print_bars(
                console, "reads that an LRU cache of this size answers", _hits_by_size(trace), "{:.0%}".format, full=1
            )
        for batch in trace["batches"]:
            name = "a recorded step" if batch["batch_tokens"] is None else f"{batch['batch_tokens']:,} tokens"
            pages = ", ".join(
                f"{times:.1f}× {layout.replace('_', ' ')}" for layout, times in batch["page_amplification"].items()
            )
            console.print(
                f"  batch of {name}: {batch['distinct_share']:.1%} of its {batch['reads_per_batch']:,.0f} reads are "
                f"distinct{'; bytes of pages over bytes of rows ' + pages if pages else ''}"
            )
