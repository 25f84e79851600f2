"""What a table divided over ranks sends: bytes per step against the least that must travel, and time.

The text is Python's standard library, the row numbers are those of the nano and tiny presets' memory, the ranks are
processes of this machine that exchange by gloo. Each case reads its tables forward and sends gradients back.

    python benchmarks/exchange.py --out benchmarks/results/exchange.json

The least: every distinct row that another rank has must come once, its gradient must go back once, and its place must
be said, in 4 bytes. "overlapped" asks for the rows of all layers, computes, then gathers, as a model does; "in turn"
computes, then asks and gathers. Both compute the same products.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engram_lm.model import EngramLMConfig
from engram_lm.tables.tiers.sharded import ShardedTable, block_of
from engram_lm.training.data.documents import pack, read_documents
from engram_lm.training.data.tokenizer import train_tokenizer

TRAINING = {"nano": (8, 256), "tiny": (4, 256)}  # sequences of a rank, tokens in each
PLACE_BYTES = 4


def read_rows(size: str, world_size: int, steps: int, max_bytes: int) -> dict:
    """Row numbers that each rank reads at each step, in each layer, of text that no other reads."""
    corpus = read_documents(max_bytes=max_bytes)
    vocab_size = EngramLMConfig.preset(f"engram-{size}").vocab_size
    tokenizer = train_tokenizer((document.text for document in corpus.documents), vocab_size)
    config = EngramLMConfig.preset(f"engram-{size}", tokenizer)
    spec = config.spec.bind(tokenizer)
    batch_size, length = TRAINING[size]
    tokens = pack(corpus.documents, tokenizer).astype(np.int64)
    per_step = batch_size * length * world_size
    count = min(steps, len(tokens) // per_step)
    # Sequences from anywhere in the text, as a shuffled corpus gives them.
    sequences = np.random.default_rng(0).permutation(len(tokens) // length)[: count * batch_size * world_size]
    given = tokens[: len(tokens) // length * length].reshape(-1, length)[sequences]
    layers = {}
    for layer in spec.layers:
        rows = torch.from_numpy(np.ascontiguousarray(spec.rows(given, layer)))
        layers[layer] = (spec.num_rows(layer), rows.view(count, world_size, batch_size, length, -1))
    return {"layers": layers, "width": config.memory_config.head_dim, "steps": count}


def least_bytes(rows: torch.Tensor, num_rows: int, width: int, rank: int, world_size: int) -> int:
    """Bytes that one rank must send and receive for its own request, forward and backward, float32 rows."""
    first, count = block_of(num_rows, rank, world_size)
    distinct = np.unique(rows.numpy())
    remote = int(((distinct < first) | (distinct >= first + count)).sum())
    return remote * (PLACE_BYTES + 2 * 4 * width)


def run_rank(rank: int, world_size: int, folder: str, products: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    given = torch.load(f"{folder}/rows", weights_only=True)
    width, steps = given["width"], given["steps"]
    found = {}
    for deduplicate in (True, False):
        tables = {
            layer: ShardedTable(num_rows, width, deduplicate=deduplicate)
            for layer, (num_rows, _) in given["layers"].items()
        }
        matrix = torch.randn(512, 512)

        def step(number, how, tables=tables, matrix=matrix):
            rows = {layer: numbers[number, rank] for layer, (_, numbers) in given["layers"].items()}
            dist.barrier()
            began = time.perf_counter()
            if how == "overlapped":
                for layer, table in tables.items():
                    table.prefetch(rows[layer])
            if how != "forward and backward":
                for _ in range(products):
                    matrix = (matrix @ matrix).clamp_(-1, 1)
            total = sum(table.gather(rows[layer]).sum() for layer, table in tables.items())
            if how == "forward and backward":
                total.backward()
                for table in tables.values():
                    table.weight.grad = None
            return time.perf_counter() - began

        seconds = {"forward and backward": [], "overlapped": [], "in turn": []}
        for number in range(steps):
            for how, times in seconds.items():
                if how == "forward and backward":
                    for table in tables.values():
                        table.reset_stats()
                times.append(step(number, how))
                if how == "forward and backward":
                    for table in tables.values():
                        for name, value in table.stats().items():
                            key = (deduplicate, name)
                            found[key] = found.get(key, 0) + (value if isinstance(value, int) else 0)
        for how, times in seconds.items():
            found[deduplicate, f"{how}_seconds"] = times[1:]
    least = 0
    for num_rows, numbers in given["layers"].values():
        least += sum(least_bytes(numbers[number, rank], num_rows, width, rank, world_size) for number in range(steps))
    found["least"] = least
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def measure_case(size: str, world_size: int, steps: int, max_bytes: int, products: int) -> list[dict]:
    """One preset on so many ranks: a result with and one without deduplication."""
    with tempfile.TemporaryDirectory() as folder:
        given = read_rows(size, world_size, steps, max_bytes)
        torch.save(given, f"{folder}/rows")
        mp.spawn(run_rank, args=(world_size, folder, products), nprocs=world_size)
        ranks = [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]
    steps, results = given["steps"], []
    least = sum(found["least"] for found in ranks) / world_size / steps
    for deduplicate in (True, False):
        mean = {  # of ranks, per step, all layers together
            name: sum(found[deduplicate, name] for found in ranks) / world_size / steps
            for kept, name in [key for key in ranks[0] if isinstance(key, tuple)]
            if kept and ("bytes" in name or name.endswith("_rows")) and name not in ("table_bytes", "num_rows")
        }
        # What a rank sends and receives for its own request, so that every byte is counted once over all ranks.
        own = mean["place_bytes_sent"] + mean["row_bytes_received"] + mean["gradient_bytes_sent"]
        result = {
            "what": f"engram-{size}, {world_size} ranks, " + ("distinct rows" if deduplicate else "every row"),
            "layers": len(given["layers"]),
            "row_bytes": 4 * given["width"],
            "tokens_per_rank": TRAINING[size][0] * TRAINING[size][1],
            "steps": steps,
            "requested_rows": mean["requested_rows"],
            "distinct_rows": mean["distinct_rows"],
            "remote_rows": mean["remote_rows"],
            "place_bytes": mean["place_bytes_sent"],
            "row_bytes_received": mean["row_bytes_received"],
            "gradient_bytes_sent": mean["gradient_bytes_sent"],
            "message_bytes": mean["message_bytes"] / 2,
            "bytes_per_step": own + mean["message_bytes"] / 2,
            "least_bytes_per_step": least,
            "over_least": (own + mean["message_bytes"] / 2) / least,
        }
        for how in ("forward and backward", "overlapped", "in turn"):
            # A step is done when the last rank is.
            slowest = [max(times) for times in zip(*(found[deduplicate, f"{how}_seconds"] for found in ranks))]
            result[f"{how.replace(' ', '_')}_seconds"] = statistics.median(slowest)
            if how == "overlapped":
                overlapped = slowest
        result["in_turn_over_overlapped"] = statistics.median(a / b for a, b in zip(slowest, overlapped))
        results.append(result)
        print("  ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--sizes", nargs="+", choices=TRAINING, default=list(TRAINING))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bytes", type=int, default=8_000_000, help="of text")
    parser.add_argument("--products", type=int, default=4, help="matrix products that the exchange may hide behind")
    arguments = parser.parse_args()
    results = []
    for size in arguments.sizes:
        for world_size in arguments.ranks:
            results += measure_case(size, world_size, arguments.steps, arguments.bytes, arguments.products)
    if arguments.out:
        harness.write(arguments.out, "exchange", results)


if __name__ == "__main__":
    main()
