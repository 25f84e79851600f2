"""A table's optimizer step: Adam on touched rows against dense Adam, in time and in peak memory.

Each case runs in a process of its own, because peak memory is a process's; the cases take turns.

    python benchmarks/optimizer.py --out benchmarks/results/optimizer.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import harness

WIDTH = 64
READS = 16_384
KINDS = ("row_adam", "torch SparseAdam", "dense Adam")


def run_case(kind: str, num_parameters: int, steps: int) -> None:
    """Time steps of one optimizer on one table and print one JSON line."""
    import torch

    from engram.tables import ParameterTable
    from engram.training.optimizers import RowAdam

    torch.manual_seed(0)
    num_rows = num_parameters // WIDTH
    table = ParameterTable(num_rows, WIDTH, gradient="dense" if kind == "dense Adam" else "sparse")
    made = {
        "row_adam": lambda: RowAdam([table.weight], lr=1e-3),
        "torch SparseAdam": lambda: torch.optim.SparseAdam([table.weight], lr=1e-3),
        "dense Adam": lambda: torch.optim.Adam([table.weight], lr=1e-3, fused=True),
    }
    optimizer = made[kind]()
    # Zipf-like reads, as N-grams are.
    generator = torch.Generator().manual_seed(1)
    ranks = torch.rand(READS, generator=generator).pow(3).mul(num_rows).long().clamp_max(num_rows - 1)
    seconds = []
    for step in range(steps + 2):
        (table.gather(ranks).sum() * 1e-3).backward()
        started = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2:
            seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"median_seconds": statistics.median(seconds), "peak_bytes": peak, "distinct": len(ranks.unique())})
    )


def measure_case(kind: str, num_parameters: int, steps: int) -> dict:
    """Run one case in a process of its own."""
    call = [sys.executable, __file__, "--case", kind, "--parameters", str(num_parameters), "--steps", str(steps)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--case", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--parameters", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case, arguments.parameters, arguments.steps)
        return
    results = []
    for num_parameters in (4_000_000, 40_000_000):
        runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.repeats):
            for kind in KINDS:
                runs[kind].append(measure_case(kind, num_parameters, arguments.steps))
        dense = [run["median_seconds"] for run in runs["dense Adam"]]
        for kind in KINDS:
            own = [run["median_seconds"] for run in runs[kind]]
            result = {
                "what": kind,
                "table_parameters": num_parameters,
                "reads": READS,
                "distinct_rows": runs[kind][0]["distinct"],
                "median_step_seconds": statistics.median(own),
                "dense_over_this": statistics.median(d / o for d, o in zip(dense, own)),
                "peak_process_bytes": statistics.median(run["peak_bytes"] for run in runs[kind]),
            }
            results.append(result)
            print("  ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()))
    if arguments.out:
        harness.write(arguments.out, "optimizer", results)


if __name__ == "__main__":
    main()
