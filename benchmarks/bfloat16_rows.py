"""How tables of bfloat16 are best trained: rounded to the nearest number, at random, or with a compensation.

A student's table learns what a teacher's says through the same fixed layer, with the learning rate falling to zero; in
float32, and in bfloat16 in three ways. A second case pushes rows by 1/78 of the distance between two numbers, 200
times.

python benchmarks/bfloat16_rows.py --out benchmarks/results/bfloat16_rows.json
"""

import argparse
import contextlib
import statistics
import time

import harness
import torch
from torch import Tensor

from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.tables import ParameterTable
from engram_lm.training.optimizers import RowAdam, rows

WAYS = {"float32": 4, "nearest": 2, "random": 2, "compensated": 4}
"""Ways to keep rows, and the bytes that each takes for a number, beside the optimizer's moments."""
NUM_ROWS, STEPS, BATCH = 4_096, 400, 64


def compensated(weight: Tensor, places: Tensor, values: Tensor, state: dict) -> None:
    """Add what was lost before, and keep what is lost now, in bfloat16."""
    lost = state.setdefault("compensation", torch.zeros_like(weight))
    values = values + lost[places].float()
    rounded = values.to(weight.dtype)
    weight.index_copy_(0, places, rounded)
    lost.index_copy_(0, places, (values - rounded.float()).to(lost.dtype))


def nearest(weight: Tensor, places: Tensor, values: Tensor, state: dict) -> None:
    """Round as a conversion does."""
    weight.index_copy_(0, places, values.to(weight.dtype))


@contextlib.contextmanager
def writing(way: str):
    """Let the optimizers of rows round in one of the ways."""
    before = rows.write_rows
    rows.write_rows = {"nearest": nearest, "compensated": compensated}.get(way, before)
    try:
        yield
    finally:
        rows.write_rows = before


def learn(way: str, seed: int, rate: float) -> dict:
    """Train a student and say how far it is from its teacher at the end."""
    torch.manual_seed(seed)
    config = EngramConfig(hidden_size=64, memory_dim=128, num_heads=4, rows_per_head=NUM_ROWS // 8, kernel_size=0)
    teacher, student = (ParameterTable(sum(config.num_table_rows()), config.head_dim, std=std) for std in (1.0, 1.0))
    layer = EngramLayer(config, None).requires_grad_(False)
    student.to(torch.float32 if way == "float32" else torch.bfloat16)
    optimizer = RowAdam([student.weight], lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)

    def distance(step_rows: Tensor, hidden: Tensor) -> Tensor:
        vectors = [table.gather(step_rows).flatten(-2).float() for table in (student, teacher)]
        ours, theirs = (layer(hidden, one) for one in vectors)
        return (ours - theirs.detach()).square().mean()

    def sample() -> tuple[Tensor, Tensor]:
        shape = (BATCH, 8)
        numbers = torch.randint(student.num_rows, (*shape, config.num_heads_total), generator=generator)
        return numbers, torch.randn(*shape, 64, generator=generator)

    seconds = 0.0
    with writing(way):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
            distance(*sample()).backward()
            start = time.perf_counter()
            optimizer.step()
            seconds += time.perf_counter() - start
            optimizer.zero_grad()
    with torch.no_grad():
        return {"distance": statistics.mean(float(distance(*sample())) for _ in range(20)), "seconds": seconds / STEPS}


def push(way: str) -> float:
    """Move rows by tiny equal updates; the mean distance they have come."""
    table = ParameterTable(64, 32, dtype=torch.float32 if way == "float32" else torch.bfloat16)
    begin = torch.linspace(1.01, 1.9, 64 * 32).view(64, 32).bfloat16()
    with torch.no_grad():
        table.weight.copy_(begin)
    optimizer = RowAdam([table.weight], lr=1e-4, betas=(0.9, 0.95))
    with writing(way):
        for _ in range(200):
            table.gather(torch.arange(64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return float((table.weight.detach().float() - begin.float()).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    exact = push("float32")
    results = [{"case": "tiny updates", "way": way, "moved_relative_to_float32": push(way) / exact} for way in WAYS]
    for rate in (3e-2, 3e-3):
        runs = {way: [] for way in WAYS}
        for seed in range(arguments.seeds):
            for way in WAYS:  # in turn, for the times
                runs[way].append(learn(way, seed, rate))
        for way, found in runs.items():
            against = [one["distance"] - other["distance"] for one, other in zip(found, runs["float32"], strict=True)]
            slower = [one["seconds"] / other["seconds"] for one, other in zip(found, runs["nearest"], strict=True)]
            results.append(
                {
                    "case": "teacher",
                    "learning_rate": rate,
                    "way": way,
                    "bytes_per_number": WAYS[way],
                    "seeds": arguments.seeds,
                    "mean_square_error": statistics.mean(run["distance"] for run in found),
                    "more_than_float32": statistics.mean(against),
                    "standard_deviation_of_that": statistics.stdev(against),
                    "step_seconds": statistics.median(run["seconds"] for run in found),
                    "step_ratio_to_nearest": statistics.median(slower),
                }
            )
    for result in results:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()))
    if arguments.out:
        harness.write(arguments.out, "bfloat16_rows", results)
