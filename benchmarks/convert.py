"""MB/s of `engram-lm table convert` against `cp` of the same bytes, in turn in one run.

python benchmarks/convert.py --folder /mnt/disk                 # 2 GB; writes benchmarks/results/convert.json

The source is a DeepSeek-V4.1 table of random rows: 8-bit numbers and scales in two tensors. Its pages are in the page
cache; both sides write to the disk and wait for it (fsync), which `cp` alone does not. Beside copying, each type that
rows can be rounded to is timed.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import harness
import numpy as np
import torch

from engram_lm.tables.files.convert import convert
from engram_lm.tables.files.safetensors_writer import TensorWriter

WIDTH, ROWS_AT_ONCE = 256, 2**16


def write_source(folder: Path, num_rows: int) -> Path:
    """A checkpoint with one table of the published layout."""
    path = folder / "source" / "model.safetensors"
    path.parent.mkdir()
    name, generator = "layers.1.engram.embed.", np.random.default_rng(0)
    plan = {
        f"{name}weight": (torch.float8_e4m3fn, (num_rows, WIDTH)),
        f"{name}scale": (torch.float8_e8m0fnu, (num_rows, WIDTH // 32)),
    }
    with TensorWriter(path, plan) as writer:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, num_rows - start)
            # Bits 0 to 5 and the sign: no NaN.
            values = generator.integers(0, 256, (count, WIDTH), dtype=np.uint8) & 0xBF
            scales = generator.integers(110, 130, (count, WIDTH // 32), dtype=np.uint8)
            writer.append(f"{name}weight", torch.from_numpy(values).view(torch.float8_e4m3fn))
            writer.append(f"{name}scale", torch.from_numpy(scales).view(torch.float8_e8m0fnu))
    return path


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk that is measured")
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", default="int8,int4", help="types to round to, separated by commas; may be empty")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="engram-convert-") as name:
        folder = Path(name)
        source = write_source(folder, arguments.rows)
        flush(source)

        def copy() -> None:
            target = folder / "copy"
            subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
            flush(target)
            target.unlink()

        def converted(dtype: str | None) -> None:
            convert(source.parent, folder / "packed", dtype=dtype, resume=False, error_rows=1)
            shutil.rmtree(folder / "packed")

        calls = {"cp": copy, "convert": lambda: converted(None)}
        for dtype in filter(None, arguments.dtypes.split(",")):
            calls[f"convert --dtype {dtype}"] = lambda dtype=dtype: converted(dtype)
        seconds = harness.measure(calls, arguments.repeats)
        size = source.stat().st_size
    copied = statistics.median(seconds["cp"])
    results = []
    for what, times in seconds.items():
        median = statistics.median(times)
        results.append(
            {
                "what": what,
                "rows": arguments.rows,
                "source_bytes": size,
                "median_seconds": median,
                "fastest_seconds": min(times),
                "slowest_seconds": max(times),
                "source_mb_per_second": size / median / 1e6,
                "times_cp": copied / median,
            }
        )
        print(f"{what:24} {size / median / 1e6:8.0f} MB/s of the source, {copied / median:.2f} times cp")
    harness.write(arguments.out, "convert", results)


if __name__ == "__main__":
    main()
