"""Rows from a Mooncake Store on loopback: this library against Mooncake's own EngramStore, on the same rows.

    python benchmarks/remote.py --in-a-row 1 1 1 --out benchmarks/results/remote.json

Starts a master and a storage process, publishes one table both ways (EngramStore knows float32 only: a key per head),
and reads random rows of it, other ones in every request. "cold" asks the store for every row; "warm" asks a
`CachedTable` that has read them before. Each way takes so many requests in a row, in turn with the others; seconds are
those of one request.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from engram_lm.tables import MooncakeTable, publish_to_mooncake, tensor_layout
from engram_lm.tables.around.cache import CachedTable
from engram_lm.tables.files.safetensors_file import read_header
from engram_lm.tables.files.safetensors_writer import TensorWriter

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tables.mooncake_store import running

NUM_HEADS, ROWS_PER_HEAD, WIDTH = 8, 50_000, 64
CACHE_BYTES = 256 << 20


def engram_store(address: str, rows: np.ndarray) -> tuple[Any, Any]:
    """Mooncake's client and its own table, filled."""
    from mooncake import store

    client = store.MooncakeDistributedStore()
    master = address.removeprefix("mooncake://")
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 128 << 20, "tcp", "", master) == 0
    config = store.EngramStoreConfig()
    config.table_vocab_sizes, config.embedding_dim = [ROWS_PER_HEAD] * NUM_HEADS, WIDTH
    theirs = store.EngramStore(1, config, client)
    theirs.populate(list(rows))
    return client, theirs  # the client must outlive its table


def in_turn(read: Callable[[Any], Any], requests: Sequence[Any], in_a_row: int) -> Callable[[], None]:
    """A call that reads the next requests every time."""
    turn = iter(requests)

    def call() -> None:
        for _ in range(in_a_row):
            read(next(turn))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/remote.json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-a-row", type=int, nargs=3, default=[16, 8, 1], help="requests of 24, 512, 6144 rows")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((NUM_HEADS, ROWS_PER_HEAD, WIDTH), dtype=np.float32)
    first_rows = np.arange(NUM_HEADS) * ROWS_PER_HEAD
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, running(storage_bytes=1 << 29, lease="10000") as store:
        path = Path(folder) / "table.safetensors"
        with TensorWriter(path, {"rows": (torch.float32, (NUM_HEADS * ROWS_PER_HEAD, WIDTH))}) as writer:
            writer.append("rows", torch.from_numpy(rows.reshape(-1, WIDTH)))
        name = publish_to_mooncake(tensor_layout([read_header(path)["rows"]]), store.address)
        client, theirs = engram_store(store.address, rows)
        cold = MooncakeTable(store.address, name)
        warm = CachedTable(MooncakeTable(store.address, name), CACHE_BYTES)
        for length, in_a_row in zip((3, 64, 768), arguments.in_a_row, strict=True):
            count = in_a_row * (arguments.repeats + 1)
            requests = [rng.integers(0, ROWS_PER_HEAD, (1, length, NUM_HEADS)) for _ in range(count)]
            numbers = [torch.from_numpy(request + first_rows) for request in requests]
            for one in numbers:
                warm.gather(one)
            for request, one in zip(requests, numbers, strict=True):
                expected = rows[np.arange(NUM_HEADS), request]
                for found in (theirs.lookup(request), cold.gather(one).numpy(), warm.gather(one).numpy()):
                    assert np.array_equal(found, expected)
            calls = {
                "EngramStore": (theirs.lookup, requests),
                "cold": (cold.gather, numbers),
                "warm": (warm.gather, numbers),
            }
            rounds = harness.measure(
                {what: in_turn(*call, in_a_row) for what, call in calls.items()}, arguments.repeats
            )
            seconds = {what: [time / in_a_row for time in times] for what, times in rounds.items()}
            num_rows = length * NUM_HEADS
            base = statistics.median(seconds["EngramStore"])
            for what, times in seconds.items():
                median = statistics.median(times)
                results.append(
                    {
                        "what": what,
                        "num_rows": num_rows,
                        "row_bytes": 4 * WIDTH,
                        "requests_in_a_row": in_a_row,
                        "table_rows": NUM_HEADS * ROWS_PER_HEAD,
                        "median_seconds": median,
                        "seconds": times,
                        "rows_per_second": num_rows / median,
                        "times_engram_store": base / median,
                    }
                )
                print(f"{num_rows:>6} rows  {what:<12} {median * 1e3:9.3f} ms  {num_rows / median:12,.0f} rows/s"
                      f"  {base / median:8.1f}x")  # fmt: skip
        results.append({"what": "stats of cold", **cold.stats()})
        cold.close()
        warm.close()
        client.close()
    harness.write(arguments.out, "remote", results)


if __name__ == "__main__":
    main()
