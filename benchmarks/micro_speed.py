"""Tokens that micro models train on in a second of one core, compiled and plain, and beside another program.

    python benchmarks/micro_speed.py --out benchmarks/results/micro_speed.json         # about ten minutes, one thread

Steps are those of `engram-lm train`, 16 sequences of 128 random tokens, in bfloat16 where the processor has it. Seconds
are those of the processor, because other programs on the machine then change them little; all variants of a model take
turns in one process, and ratios are of the same round. `--beside FILE` times another program too: a Python file whose
`training_step(family, size)` returns a function that trains such a model on as many tokens, or None.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch

from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.studies.micro_models import MicroModelFlags
from engram_lm.training.build import model_config
from engram_lm.training.data.batches import Batches
from engram_lm.training.loop import Trainer, TrainOptions, best_dtype

BATCH_SIZE, LENGTH = 16, 128
CASES = [
    *((family, "100k") for family in ("dense", "dense_engram", "moe", "engram")),
    *((family, size) for size in ("500k", "2m") for family in ("dense", "dense_engram", "engram")),
]
MEMORY = {"rows_per_head": 5000}


def trainer(family: Any, size: Any, compiled: bool) -> Trainer:
    flags = MicroModelFlags(size=size)
    memory = MEMORY if "engram" in family else None
    recipe = flags.recipe(flags.model(family, memory=memory))
    torch.manual_seed(0)
    config: EngramLMConfig = model_config(recipe)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 1_000_000)
    options = TrainOptions(num_steps=100_000, dtype=best_dtype(torch.device("cpu")), compile=compiled)
    return Trainer(EngramForCausalLM(config), Batches(tokens, BATCH_SIZE, LENGTH, 0), options, recipe.optimizer)


def cpu_seconds(steps: dict[str, Callable[[], Any]], rounds: int, num_steps: int) -> dict[str, list[float]]:
    """Seconds of the processor for some steps of each, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            begun = time.process_time()
            for _ in range(num_steps):
                step()
            if round_:  # the first round also compiles
                seconds[name].append(time.process_time() - begun)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of each in a round")
    parser.add_argument("--beside", metavar="FILE", help="a Python file that trains such models by other means")
    parser.add_argument("--cases", nargs="+", metavar="FAMILY-SIZE", help="some of the models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    other: Any = None
    if options.beside:
        spec = importlib.util.spec_from_file_location("beside", options.beside)
        assert spec is not None and spec.loader is not None
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
    results = []
    for family, size in CASES:
        if options.cases and f"{family}-{size}" not in options.cases:
            continue
        steps: dict[str, Callable[[], Any]] = {
            name: trainer(family, size, name == "compiled").step for name in ("plain", "compiled")
        }
        beside = other.training_step(family, size) if other is not None else None
        if beside is not None:
            steps["beside"] = beside
        seconds = cpu_seconds(steps, options.rounds, options.steps)
        tokens = options.steps * BATCH_SIZE * LENGTH
        found: dict[str, Any] = {"family": family, "size": size}
        for name, values in seconds.items():
            ratios = [compiled / value for compiled, value in zip(seconds["compiled"], values, strict=True)]
            found[name] = {
                "tokens_per_cpu_second": tokens / statistics.median(values),
                # How many times as fast as the compiled one this is.
                "speed_ratio": statistics.median(ratios),
                "seconds": values,
            }
        results.append(found)
        print(family, size, {name: round(tokens / statistics.median(values)) for name, values in seconds.items()})
    harness.write(options.out, "micro_speed", results)


if __name__ == "__main__":
    main()
