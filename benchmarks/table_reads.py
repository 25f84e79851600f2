"""Random rows of one file, read in every way, in one run: from RAM, mapped, by FileTable, by preads, by EngramDB.

python benchmarks/table_reads.py --out benchmarks/results/table_reads.json

EngramDB is measured where it can be imported: pip install engramdb-python==0.3.0, in an environment with torch.
"""

import argparse
import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import numpy as np
import torch

from engram_lm.tables import FileTable, HostTable, MappedTable, ResidentTable, RowCodec, RowLayout
from engram_lm.tables.layout import Extent, Part
from engram_lm.tables.tiers.page_cache import PAGE_BYTES, drop_from_memory

WIDTH = 128  # bfloat16: rows of 256 bytes
ROW_BYTES = 2 * WIDTH
RAM = "RAM, index_select"
COLD = (
    "before each cold reading: fsync and posix_fadvise(POSIX_FADV_DONTNEED) on the file while nobody has it mapped, "
    "tables opened anew; resident_before is the largest share of the file's pages that mincore found in memory then, "
    "and a cold reading counts only where it is at most 1 percent"
)


def make_file(path, num_rows):
    """Write random bytes in pieces, once; a file of the right size is kept."""
    if path.exists() and path.stat().st_size == num_rows * ROW_BYTES:
        return
    generator, step = np.random.default_rng(0), 1 << 16
    with open(path, "wb") as file:
        for start in range(0, num_rows, step):
            # Finite numbers only, so that equal bits compare as equal.
            count = min(step, num_rows - start) * WIDTH
            file.write((generator.integers(0, 1 << 16, count, dtype=np.uint16) & 0xBFFF).tobytes())
        file.flush()
        os.fsync(file.fileno())


class Table:
    """A table of this library, opened and closed around every cold reading."""

    def __init__(self, open_):
        self._open, self._table = open_, None

    def open(self):
        self._table = self._open()

    def read(self, rows):
        return self._table.gather(torch.from_numpy(rows))

    def close(self):
        self._table.close()
        self._table = None


class Resident:
    """The fastest gather that torch has for rows in RAM: what everything is held against."""

    def __init__(self, weight):
        self._weight = weight

    def gather(self, rows):
        return torch.index_select(self._weight, 0, rows)


class Preads:
    """One pread per row, by one thread or several."""

    def __init__(self, path, num_threads=1):
        self._path, self._num_threads = path, num_threads

    def open(self):
        self._descriptor = os.open(self._path, os.O_RDONLY)
        self._pool = ThreadPoolExecutor(self._num_threads)

    def read(self, rows):
        pieces = np.array_split(rows, self._num_threads)
        read = list(self._pool.map(self._piece, pieces)) if self._num_threads > 1 else [self._piece(rows)]
        return torch.frombuffer(bytearray(b"".join(read)), dtype=torch.bfloat16).view(len(rows), WIDTH)

    def _piece(self, rows):
        return b"".join([os.pread(self._descriptor, ROW_BYTES, row * ROW_BYTES) for row in rows.tolist()])

    def close(self):
        os.close(self._descriptor)
        self._pool.shutdown()


class PlainMapped:
    """Indexing of a plain memory map, without advice of any kind."""

    def __init__(self, path):
        self._path = path

    def open(self):
        with open(self._path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(self._map, np.int16).reshape(-1, WIDTH)

    def read(self, rows):
        return torch.from_numpy(self._rows[rows]).view(torch.bfloat16)

    def close(self):
        del self._rows
        self._map.close()


class EngramDB:
    """EngramDB's store on the same file, under the name that it looks for."""

    def __init__(self, path, num_rows):
        import engramdb

        self._engramdb, self._num_rows = engramdb, num_rows
        self._folder = path.parent / "engramdb"
        self._folder.mkdir(exist_ok=True)
        link = self._folder / "shard_000.bin"
        link.unlink(missing_ok=True)
        link.symlink_to(path)

    def open(self):
        self._store = self._engramdb.Store(str(self._folder), 1, self._num_rows, ROW_BYTES)

    def read(self, rows):
        found = self._store.fetch(rows.tolist())
        return torch.frombuffer(bytearray(found), dtype=torch.bfloat16).view(len(rows), WIDTH)

    def close(self):
        self._store.close()


def ways(path, num_rows):
    layout = RowLayout(
        RowCodec(WIDTH, torch.bfloat16), (Part(ROW_BYTES, (Extent(str(path), 0, num_rows, ROW_BYTES),)),)
    )
    found = {
        "MappedTable": Table(lambda: MappedTable(layout)),
        "FileTable": Table(lambda: FileTable(layout)),
        "FileTable, row by row, 16 threads": Table(lambda: FileTable(layout, read_ahead=False)),
        "FileTable, direct": Table(lambda: FileTable(layout, direct=True, num_threads=64)),
        "plain mmap": PlainMapped(path),
        "pread loop": Preads(path),
        "pread, 16 threads": Preads(path, 16),
    }
    try:
        found["EngramDB"] = EngramDB(path, num_rows)
    except ImportError:
        print("EngramDB cannot be imported and is left out")
    return found, layout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--file", type=Path, default=Path("/tmp/engram-table-reads/rows.bin"))
    parser.add_argument("--rows", type=int, default=4_000_000, help="rows in the file, 256 bytes each")
    parser.add_argument("--requests", type=int, nargs="+", default=[48, 6144])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    make_file(arguments.file, arguments.rows)
    compared, layout = ways(arguments.file, arguments.rows)
    generator, results = np.random.default_rng(1), []
    for size in arguments.requests:
        cold = {name: [] for name in compared}
        resident = {name: [] for name in compared}
        for _ in range(arguments.repeats):
            for name, way in compared.items():
                rows = generator.integers(0, arguments.rows, size)
                share = drop_from_memory(arguments.file)
                way.open()
                start = time.perf_counter()
                found = way.read(rows)
                seconds = time.perf_counter() - start
                way.close()
                assert len(found) == size
                if share is not None and share <= 0.01:
                    resident[name].append(share)
                    cold[name].append(seconds)
        # The page cache is filled by reading the file once; other rows in each round, so that no processor cache is.
        with open(arguments.file, "rb") as file:
            while file.read(1 << 24):
                pass
        host = HostTable(layout)
        weight = host.gather(torch.arange(arguments.rows))
        readers = {RAM: Resident(weight), "ResidentTable": ResidentTable(weight), "HostTable": host}
        for way in compared.values():
            way.open()
        # "Again": the same rows in every round, whose pages a mapping has already. "New": other rows in every round,
        # whose pages it has to look up in the page cache first.
        warm = {name: {"again": [], "new": []} for name in [*readers, *compared]}
        for kind in ("again", "new"):
            rows = generator.integers(0, arguments.rows, size)
            for round_ in range(2 * arguments.repeats + 1):
                for name in warm:
                    if kind == "new":
                        rows = generator.integers(0, arguments.rows, size)
                    # Rows of one way must not lie in the processor's cache for the next.
                    weight[: 1 << 16].sum()
                    start = time.perf_counter()
                    reader = readers.get(name)
                    found = reader.gather(torch.from_numpy(rows)) if reader else compared[name].read(rows)
                    seconds = time.perf_counter() - start
                    assert torch.equal(found, weight[torch.from_numpy(rows)]), name
                    if round_ > 0:
                        warm[name][kind].append(seconds)
        for way in compared.values():
            way.close()
        medians = {name: {kind: statistics.median(found) for kind, found in by.items()} for name, by in warm.items()}
        ram = medians[RAM]
        for name, by in medians.items():
            result = {
                "what": name, "requested_rows": size, "row_bytes": ROW_BYTES, "table_rows": arguments.rows,
                "page_bytes": PAGE_BYTES,
            }  # fmt: skip
            for kind, seconds in by.items():
                result |= {f"warm_{kind}_seconds": warm[name][kind], f"warm_{kind}_median_seconds": seconds}
                result |= {f"warm_{kind}_times_ram": seconds / ram[kind]}
                if "EngramDB" in medians:
                    result[f"engramdb_over_this_warm_{kind}"] = medians["EngramDB"][kind] / seconds
            if cold.get(name):
                result |= {"cold_seconds": cold[name], "cold_median_seconds": statistics.median(cold[name])}
                result |= {"cold_how": COLD, "resident_before": max(resident[name])}
                if cold.get("EngramDB"):
                    theirs = statistics.median(cold["EngramDB"])
                    result["engramdb_over_this_cold"] = theirs / result["cold_median_seconds"]
            results.append(result)
            text = f"{result['cold_median_seconds'] * 1e3:9.2f}" if "cold_median_seconds" in result else " " * 9
            print(
                f"{size:6} rows  {name:36} warm again {by['again'] * 1e3:8.3f} ms, "
                f"new {by['new'] * 1e3:8.3f} ms  cold {text} ms",
                flush=True,
            )
    if arguments.out:
        harness.write(arguments.out, "table_reads", results)


if __name__ == "__main__":
    main()
