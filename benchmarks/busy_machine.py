"""What the waiting policy and the number of OpenMP threads cost a training alone, and beside other work.

    python benchmarks/busy_machine.py --out benchmarks/results/busy_machine.json

Real processes train the quickstart's memory model, two for each setting, each with one setting in its environment from
the start. They wait on a pipe, and are let go in turn: one alone, both at once, and one beside a program that never
waits, as a compiler does not. Speeds are divided by that of libgomp's own setting, alone, in the same round.
"""

import argparse
import collections
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import harness

SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own (300,000 spins)": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
CASES = {"alone": (1, 0), "two trainings at once": (2, 0), "beside one busy program": (1, 1)}
"""How many trainings, and how many busy programs beside them."""
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_")
"""Beginnings of the names of variables that would decide in place of a setting."""
SPINNER = "print(flush=True)\nwhile True: pass"


class Worker:
    """A process that trains with one setting whenever it is told to."""

    def __init__(self, setting: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**clean, **setting},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, seconds: float) -> None:
        """Let it train for so long, and for the step that is not done yet then."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for what it has to say, after its start or after training."""
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work() -> None:
    """Be a worker: train the quickstart's memory model for the seconds of each line on stdin."""
    import numpy as np
    import torch

    from engram_lm.studies.quickstart.run import Quickstart
    from engram_lm.training.build import build_model, model_config
    from engram_lm.training.data.batches import Batches
    from engram_lm.training.data.tokenizer import train_tokenizer
    from engram_lm.training.distribution import Ranks
    from engram_lm.training.loop import Trainer, TrainOptions, best_dtype
    from engram_lm.training.optimizers import OptimizerOptions

    options = Quickstart()
    tokenizer = train_tokenizer([" ".join(f"word{number}" for number in range(6000))], options.vocab_size)
    recipe = options.study().arms[0].recipe
    torch.manual_seed(0)
    model = build_model(recipe, model_config(recipe, tokenizer), tokenizer, Ranks())
    tokens = np.random.default_rng(0).integers(2, len(tokenizer), 500_000).astype(np.int32)
    batches = Batches(tokens, options.batch_size, options.sequence_length, 0)
    train_options = TrainOptions(num_steps=100_000, dtype=best_dtype(torch.device("cpu")))
    trainer = Trainer(model, batches, train_options, OptimizerOptions(backbone="adamw", lr=3e-3))
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        steps, start, computed = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < float(line):
            trainer.step()
            steps += 1
        seconds, computed = time.perf_counter() - start, time.process_time() - computed
        speed = steps * options.batch_size * options.sequence_length / seconds
        print(json.dumps({"tokens_per_second": speed, "cores": computed / seconds}), flush=True)


@contextlib.contextmanager
def spinning(number: int) -> Iterator[None]:
    """Keep so many programs of one thread busy inside the block."""
    programs = [
        subprocess.Popen([sys.executable, "-c", SPINNER], stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    try:
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def train(workers: list[Worker], seconds: float, beside: int = 0) -> dict[str, float]:
    """Train with all workers at once, and give the mean over them."""
    with spinning(beside):
        for worker in workers:
            worker.begin(seconds)
        found = [worker.answer() for worker in workers]
    return {key: statistics.mean(one[key] for one in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--seconds", type=float, default=1.3, help="of each measurement; a step begun is finished")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    workers, threads = {}, {}
    for name in SETTINGS:
        workers[name] = [Worker(SETTINGS[name]), Worker(SETTINGS[name])]
    for name, pair in workers.items():
        threads[name] = [worker.answer()["threads"] for worker in pair]
    for pair in workers.values():  # one after the other, so that they do not hinder each other
        for worker in pair:
            train([worker], 0.0)
    rounds: dict[tuple[str, str], list[dict[str, float]]] = collections.defaultdict(list)
    for _ in range(arguments.repeats):
        for case, (trainings, beside) in CASES.items():
            for name in SETTINGS:
                rounds[name, case].append(train(workers[name][:trainings], arguments.seconds, beside))
    for pair in workers.values():
        for worker in pair:
            worker.end()
    alone_in_rounds = [one["tokens_per_second"] for one in rounds[next(iter(SETTINGS)), "alone"]]
    results = []
    for (name, case), found in rounds.items():
        speeds = [one["tokens_per_second"] for one in found]
        shares = [speed / alone for speed, alone in zip(speeds, alone_in_rounds, strict=True)]
        results.append(
            {
                "setting": name,
                "threads": threads[name][0],
                "case": case,
                "tokens_per_second": statistics.median(speeds),
                "ratio_to_own_setting_alone": statistics.median(shares),
                "smallest_and_largest_ratio": [min(shares), max(shares)],
                "cores_used": statistics.median(one["cores"] for one in found),
            }
        )
    for case in CASES:
        for one in results:
            if one["case"] == case:
                low, high = one["smallest_and_largest_ratio"]
                print(
                    f"{case:24} {one['setting']:32} {one['tokens_per_second']:8,.0f} tokens/s of each  "
                    f"x{one['ratio_to_own_setting_alone']:.2f} ({low:.2f} to {high:.2f})  "
                    f"{one['cores_used']:.2f} cores"
                )
    if arguments.out:
        harness.write(arguments.out, "busy_machine", results)


if __name__ == "__main__":
    main()
