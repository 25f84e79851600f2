"""MB/s of packing text into token shards against the tokenizer alone, memory of packing, and the time to load a batch.

python benchmarks/data.py --folder /mnt/disk                 # minutes; writes benchmarks/results/data.json

The text is the Python standard library, tests included, as JSON lines. `tokenizers alone` encodes the same texts,
already in memory, in batches of the same size, and keeps nothing: once as the library does by default (encode_batch)
and once without offsets (encode_batch_fast). Packing also reads, parses, hashes, stores and flushes. Loading is timed
from a page cache, and compared with forward and backward of the quickstart's model on the same batch, without an
optimizer.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from transformers import AutoTokenizer

from engram_lm.model import EngramForCausalLM
from engram_lm.studies.quickstart.run import Quickstart
from engram_lm.training.build import model_config
from engram_lm.training.data import packing
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.documents import read_documents, text_encoder
from engram_lm.training.data.packing import pack_to_shards
from engram_lm.training.data.shards import TokenShards, token_dtype, write_index, write_shard
from engram_lm.training.data.tokenizer import train_tokenizer

PEAK = """
import sys
from transformers import AutoTokenizer
from engram_lm.training.data.packing import pack_to_shards

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
# Of this program alone; getrusage counts what the parent had too.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
pack_to_shards(sys.argv[2:3], tokenizer, sys.argv[3], held_out=0)
print(before, peak())
"""


def tokenization(folder: Path, texts: list[str], vocab_size: int, repeats: int) -> list[dict]:
    """MB/s of packing and of the tokenizer alone, in turn."""
    tokenizer = train_tokenizer(itertools.islice(texts, 300), vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    source, num_bytes = folder / "text.jsonl", sum(len(text.encode()) for text in texts)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder = text_encoder(tokenizer)

    def batches() -> list[list[str]]:
        result, size = [[]], 0
        for text in texts:
            if size >= packing._BATCH_CHARACTERS:
                result, size = [*result, []], 0
            result[-1].append(text)
            size += len(text)
        return result

    in_batches = batches()

    def alone(method: str) -> None:
        for batch in in_batches:
            getattr(encoder, method)(batch, add_special_tokens=False)

    def packed() -> None:
        pack_to_shards([source], tokenizer, folder / "cache", held_out=0.01)
        shutil.rmtree(folder / "cache")

    seconds = harness.measure(
        {
            "tokenizers alone (encode_batch)": lambda: alone("encode_batch"),
            "tokenizers alone (encode_batch_fast)": lambda: alone("encode_batch_fast"),
            "pack_to_shards": packed,
        },
        repeats,
    )
    mine = statistics.median(seconds["pack_to_shards"])
    results = []
    for what, times in seconds.items():
        median = statistics.median(times)
        results.append(
            {
                "what": what,
                "text_bytes": num_bytes,
                "vocab_size": vocab_size,
                "median_seconds": median,
                "fastest_seconds": min(times),
                "slowest_seconds": max(times),
                "mb_per_second": num_bytes / median / 1e6,
                "packing_speed_relative_to_it": median / mine,
            }
        )
        print(f"{what:40} {num_bytes / median / 1e6:7.2f} MB/s; packing is {median / mine:.2f} times as fast")
    return results


def peak_memory(folder: Path, texts: list[str], sizes: list[int]) -> list[dict]:
    """Peak memory of a process that packs one document of so many MB."""
    results, joined = [], "".join(texts)
    for size in sizes:
        path = folder / "large.txt"
        path.write_text((joined * (size * 10**6 // len(joined) + 1))[: size * 10**6])
        done = subprocess.run(
            [sys.executable, "-c", PEAK, folder / "tokenizer", path, folder / "cache"],
            check=True,
            capture_output=True,
            text=True,
        )
        before, peak = (int(number) * 1024 for number in done.stdout.split())
        shutil.rmtree(folder / "cache")
        results.append({"what": "one document", "text_mb": size, "bytes_before": before, "peak_bytes": peak})
        print(f"one document of {size} MB: {before / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at the peak")
    return results


def loading(folder: Path, repeats: int) -> list[dict]:
    """Microseconds per sequence, and the share of a step."""
    generator, vocab_size, entries = np.random.default_rng(0), 4096, []
    (folder / "shards").mkdir()
    for number in range(8):
        tokens = generator.integers(2, vocab_size, 1 << 22).astype(np.uint16)
        path = folder / "shards" / f"{number}.safetensors"
        entries.append(write_shard(path, [tokens], list(range(500, 1 << 22, 500)), token_dtype(vocab_size)))
    facts = {"vocab_size": vocab_size, "tokenizer": "none", "end_token": 0, "num_text_bytes": 0}
    write_index(folder / "shards", facts, entries)
    shards, results = TokenShards.open(folder / "shards"), []
    for batch_size, length, restart in itertools.product((16, 64), (256, 4096), (False, True)):
        batches = Batches(shards, batch_size, length, 0, restart_documents=restart)
        times = []
        for step in range(repeats + 5):
            start = time.perf_counter()
            batches.part(step, 0, batch_size)
            times.append(time.perf_counter() - start)
        median = statistics.median(times[5:])
        results.append(
            {
                "what": "loading a batch",
                "batch_size": batch_size,
                "length": length,
                "restart_documents": restart,
                "median_seconds": median,
                "microseconds_per_sequence": median / batch_size * 1e6,
            }
        )
        print(f"{batch_size} x {length}, restart={restart}: {median / batch_size * 1e6:.1f} µs per sequence")
    step = step_seconds(folder)
    loaded = next(result["median_seconds"] for result in results)
    results.append({"what": "forward and backward of the quickstart's model", "median_seconds": step})
    results.append({"what": "loading, share of it", "share": loaded / step})
    print(f"16 x 256: step {step:.3f} s, loading is {loaded / step:.3%} of it")
    return results


def step_seconds(folder: Path) -> float:
    """Forward and backward of the quickstart's model on 16 x 256 tokens."""
    quickstart = Quickstart()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = EngramForCausalLM(model_config(quickstart.recipe(quickstart.model(quickstart.memory())), tokenizer))
    tokens = torch.randint(2, len(tokenizer), (16, 257))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk that is measured")
    parser.add_argument("--max-mb", type=int, default=32, help="text to tokenize")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents-mb", default="20,200", help="sizes of single documents, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="engram-data-") as name:
        folder = Path(name)
        documents = read_documents([sysconfig.get_paths()["stdlib"]], max_bytes=arguments.max_mb * 10**6).documents
        texts = [document.text for document in documents]
        results = tokenization(folder, texts, arguments.vocab_size, arguments.repeats)
        results += loading(folder, 100)
        sizes = [int(size) for size in arguments.documents_mb.split(",") if size]
        results += peak_memory(folder, texts, sizes)
    harness.write(arguments.out, "data", results)


if __name__ == "__main__":
    main()
