"""Optimizer steps: a table's, on touched rows against dense AdamW, in time and in peak memory; and Muon's.

Each case of a table runs in a process of its own, because peak memory is a process's; the cases take turns. A step's
time is that of the optimizer alone; beside it stands the time with the backward pass, which for a dense gradient
writes the whole table too.

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
SIZES = (1_000_000, 10_000_000, 100_000_000)
DENSE = ("dense AdamW", "dense AdamW fused")
KINDS = (
    "row_adam",
    "row_adam by rows",
    "row_wise_adam",
    "row_wise_adam without first moment",
    "row_wise_adagrad",
    "sinkhorn",
    "torch SparseAdam",
    *DENSE,
)


def run_case(kind: str, num_parameters: int, steps: int) -> None:
    """Time steps of one optimizer on one table and print one JSON line."""
    import torch

    from engram_lm.tables import ParameterTable
    from engram_lm.training.optimizers import RowAdam, RowWiseAdagrad, RowWiseAdam, SinkhornMomentum

    torch.manual_seed(0)
    num_rows = num_parameters // WIDTH
    table = ParameterTable(num_rows, WIDTH, gradient="dense" if kind in DENSE else "sparse")
    params = [table.weight]
    made = {
        "row_adam": lambda: RowAdam(params, lr=1e-3),
        "row_adam by rows": lambda: RowAdam(params, lr=1e-3, bias_correction="row"),
        "row_wise_adam": lambda: RowWiseAdam(params, lr=1e-3),
        "row_wise_adam without first moment": lambda: RowWiseAdam(params, lr=1e-3, first_moment="none"),
        "row_wise_adagrad": lambda: RowWiseAdagrad(params, lr=1e-3),
        "sinkhorn": lambda: SinkhornMomentum(params, lr=1e-3),
        "torch SparseAdam": lambda: torch.optim.SparseAdam(params, lr=1e-3),
        "dense AdamW": lambda: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
        "dense AdamW fused": lambda: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0, fused=True),
    }
    optimizer = made[kind]()
    # Zipf-like reads, as N-grams are.
    generator = torch.Generator().manual_seed(1)
    ranks = torch.rand(READS, generator=generator).pow(3).mul(num_rows).long().clamp_max(num_rows - 1)
    factor = torch.randn(READS, WIDTH, generator=generator)
    step_seconds, whole_seconds = [], []
    for step in range(steps + 2):
        loss = (table.gather(ranks) * factor).sum()
        started = time.perf_counter()
        loss.backward()
        stepped = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended = time.perf_counter()
        if step >= 2:
            step_seconds.append(ended - stepped)
            whole_seconds.append(ended - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "step_seconds": statistics.median(step_seconds),
        "backward_and_step_seconds": statistics.median(whole_seconds),
        "peak_bytes": peak,
        "distinct": len(ranks.unique()),
    }
    print(json.dumps(found))


def measure_case(kind: str, num_parameters: int, steps: int) -> dict:
    """Run one case in a process of its own."""
    call = [sys.executable, __file__, "--case", kind, "--parameters", str(num_parameters), "--steps", str(steps)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def measure_tables(sizes: list[int], repeats: int, steps: int) -> list[dict]:
    """Compare all optimizers of a table; ratios are of neighbours in time."""
    results = []
    for num_parameters in sizes:
        runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for _ in range(repeats):
            for kind in KINDS:
                runs[kind].append(measure_case(kind, num_parameters, steps))
        for kind in KINDS:
            result = {
                "what": kind,
                "table_parameters": num_parameters,
                "reads": READS,
                "distinct_rows": runs[kind][0]["distinct"],
                "median_step_seconds": statistics.median(run["step_seconds"] for run in runs[kind]),
                "median_backward_and_step_seconds": statistics.median(
                    run["backward_and_step_seconds"] for run in runs[kind]
                ),
                "peak_process_bytes": statistics.median(run["peak_bytes"] for run in runs[kind]),
            }
            for dense in DENSE:
                for part in ("step", "backward_and_step"):
                    pairs = zip(runs[dense], runs[kind])
                    result[f"{dense.replace(' ', '_')}_over_this_{part}"] = statistics.median(
                        other[f"{part}_seconds"] / own[f"{part}_seconds"] for other, own in pairs
                    )
            results.append(result)
            show(result)
    return results


def measure_muon(preset: str, num_blocks: int, repeats: int) -> list[dict]:
    """Compare Muon with torch's, which takes no stacks, on the matrices of a preset's first blocks."""
    import torch

    from engram_lm.model import EngramForCausalLM, EngramLMConfig
    from engram_lm.training.optimizers import Muon, sort_parameters
    from engram_lm.training.optimizers.muon import product_dtype

    with torch.device("meta"):
        model = EngramForCausalLM(EngramLMConfig.preset(preset))
    shapes = [
        tuple(parameter.shape)
        for name, parameter in sort_parameters(model).matrices.items()
        if int(name.split(".")[2]) < num_blocks
    ]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in ours:
        parameter.grad = torch.randn(parameter.shape)
    theirs = []
    for parameter in ours:
        stack = [parameter] if parameter.dim() == 2 else parameter
        gradients = [parameter.grad] if parameter.dim() == 2 else parameter.grad
        for matrix, gradient in zip(stack, gradients):
            theirs.append(torch.nn.Parameter(matrix.detach().clone()))
            theirs[-1].grad = gradient.clone()
    optimizers = {
        "muon": Muon(ours),
        "torch Muon, a loop over matrices": torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw"),
    }
    seconds = harness.measure({name: optimizer.step for name, optimizer in optimizers.items()}, repeats)
    theirs_seconds = seconds["torch Muon, a loop over matrices"]
    results = []
    for name, own in seconds.items():
        result = {
            "what": name,
            "preset": preset,
            "blocks": num_blocks,
            "num_matrices": len(theirs),
            "matrix_parameters": sum(parameter.numel() for parameter in ours),
            "products": str(product_dtype(torch.device("cpu"))),
            "median_step_seconds": statistics.median(own),
            "torch_over_this": statistics.median(other / mine for other, mine in zip(theirs_seconds, own)),
        }
        results.append(result)
        show(result)
    return results


def show(result: dict) -> None:
    """Print one line."""
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="parameters of the table")
    parser.add_argument("--muon-preset", default="engram-tiny", help="empty to leave Muon out")
    parser.add_argument("--muon-blocks", type=int, default=12, help="blocks of the preset whose matrices are trained")
    parser.add_argument("--case", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--parameters", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case, arguments.parameters, arguments.steps)
        return
    results = measure_tables(arguments.sizes, arguments.repeats, arguments.steps)
    if arguments.muon_preset:
        results += measure_muon(arguments.muon_preset, arguments.muon_blocks, arguments.repeats)
    if arguments.out:
        harness.write(arguments.out, "optimizer", results)


if __name__ == "__main__":
    main()
