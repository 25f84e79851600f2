"""Lesson 4: open a table of 100 GB without loading it.

    python examples/4_open_100_gb.py [GIGABYTES]

Rows are addressed by number, so a table need not be in memory: it is read where it lies, a few hundred bytes at a time.
The table here is a safetensors file of 390 million rows that is nearly all holes, so it takes a few kilobytes of your
disk; nothing in the code knows that. (Linux and macOS: Windows would write the holes out.)
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch

from engram_lm import open_table

GIGABYTES, WIDTH = float(sys.argv[1]) if len(sys.argv) > 1 else 100, 128
num_rows = int(GIGABYTES * 1e9) // (2 * WIDTH)  # bfloat16

# %% A safetensors file is a length, a header in JSON, and the numbers. We write the header, and two rows.

path = Path("runs/lessons/huge.safetensors")
path.parent.mkdir(parents=True, exist_ok=True)
size = num_rows * WIDTH * 2
tensor = {"dtype": "BF16", "shape": [num_rows, WIDTH], "data_offsets": [0, size]}
header = json.dumps({"memory_tables.1.weight": tensor}).encode()
header += b" " * (-len(header) % 8)
written = {3: torch.full((WIDTH,), 1.5), num_rows - 1: torch.arange(WIDTH)}
with path.open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    for row, numbers in written.items():
        file.seek(8 + len(header) + row * WIDTH * 2)
        file.write(numbers.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
print(f"{path}: {num_rows:,} rows, {path.stat().st_size / 1e9:.1f} GB, {path.stat().st_blocks * 512:,} bytes on disk")

# %% Opening it reads the header. Reading a row reads a row.

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for tier in ("mmap", "file"):  # mapped, or by positional reads; both give the same bytes
    started = time.perf_counter()
    with_rows = open_table(path, tier=tier)
    rows = with_rows.gather(torch.tensor([3, num_rows - 1, 12_345 % num_rows]))
    took = time.perf_counter() - started
    assert torch.equal(rows[0], written[3].to(torch.bfloat16))
    assert torch.equal(rows[1], written[num_rows - 1].to(torch.bfloat16))
    assert not rows[2].any()  # a hole reads as zeros
    with_rows.close()
    print(f"{tier:4}: opened and read 3 rows in {1000 * took:.1f} ms")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
grown /= 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kibibytes
print(f"the process grew by {grown:.0f} MiB")
path.unlink()
