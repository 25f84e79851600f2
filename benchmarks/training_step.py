"""Where the time of a training step goes, with and without memory, and whether loading data can hold it up.

    python benchmarks/training_step.py --out benchmarks/results/training_step.json

Steps are those of `engram-lm train`: Muon for matrices, AdamW for the rest, RowAdam for tables, on the Python standard
library's own sources. Whole steps are timed in turn; their parts in other steps, because looking costs time.
"""

import argparse
import collections
import contextlib
import statistics
import time
from typing import Any

import harness
import numpy as np
import torch

from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.experts import balance_experts
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.documents import pack, read_documents, split_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.loop import Trainer, TrainOptions, best_dtype
from engram_lm.training.optimizers import OptimizerOptions, clip_gradients

SHAPES = {"nano": (16, 256), "tiny": (8, 256)}  # sequences, tokens in each
VOCABULARY, TEXT_BYTES = 8192, 4_000_000


class Clock:
    """Adds up the seconds of named parts; parts inside others are taken out of these."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._open: list[tuple[str, float]] = []

    def start(self, name: str) -> None:
        now = time.perf_counter()
        if self._open:
            outer, since = self._open[-1]
            self.seconds[outer] += now - since
        self._open.append((name, now))

    def stop(self) -> None:
        now = time.perf_counter()
        name, since = self._open.pop()
        self.seconds[name] += now - since
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    @contextlib.contextmanager
    def part(self, name: str) -> Any:
        self.start(name)
        yield
        self.stop()


def tokens_of_text() -> np.ndarray:
    files, _ = split_documents(read_documents(max_bytes=TEXT_BYTES))
    return pack(files, train_tokenizer((file.text for file in files), VOCABULARY))


def build(size: str, memory: bool, tokens: np.ndarray) -> Trainer:
    preset = EngramLMConfig.preset(f"engram-{size}")
    if not memory:
        values = {**preset.to_dict(), "memory": None, "hash_spec": None}
        preset = EngramLMConfig(**{k: v for k, v in values.items() if k not in ("model_type", "layer_types")})
    torch.manual_seed(0)
    batch_size, length = SHAPES[size]
    options = TrainOptions(num_steps=10_000, dtype=best_dtype(torch.device("cpu")))
    return Trainer(EngramForCausalLM(preset), Batches(tokens, batch_size, length, 0), options, OptimizerOptions())


def watch_forward(model: Any, clock: Clock) -> list[Any]:
    """Time the parts of the forward pass."""
    handles = []

    def around(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda *given: clock.start(name)))
        handles.append(module.register_forward_hook(lambda *given: clock.stop()))

    for layer in model.model.layers:
        around(layer.self_attn, "forward: attention")
        around(layer.mlp, "forward: experts and dense network")
        if layer.memory is not None:
            around(layer.memory, "forward: memory's projection, gate and convolution")
            layer.memory.read = timed(layer.memory.read, clock, "forward: rows of the tables")
        if layer.num_streams > 1:
            around(layer.attention_streams, "forward: mixing of streams")
            around(layer.feed_forward_streams, "forward: mixing of streams")
    model.model._begin_memory = timed(model.model._begin_memory, clock, "forward: hashing")
    return handles


def timed(call: Any, clock: Clock, name: str) -> Any:
    def run(*given: Any, **named: Any) -> Any:
        with clock.part(name):
            return call(*given, **named)

    return run


def profile(trainer: Trainer, repeats: int) -> dict[str, float]:
    """Median seconds of each part of a step."""
    rounds: list[dict[str, float]] = []
    clock = Clock()
    watch_forward(trainer.model, clock)
    optimizer = trainer.optimizer
    for step in range(repeats + 1):
        clock.seconds.clear()
        with clock.part("data"):
            batch = trainer.batches.part(step, 0, trainer.batches.batch_size)
        trainer.model.train()
        with clock.part("forward: embedding, norms, head and loss"):
            loss = trainer.loss_module(batch.inputs, batch.targets)
        with clock.part("backward"):
            loss.backward()
        with clock.part("clipping"):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            clip_gradients(parameters, 1.0)
        optimizer.set_lr(1e-4)
        for one in optimizer.optimizers:
            with clock.part(f"optimizer: {type(one).__name__}"):
                one.step()
        with clock.part("balancing of experts, clearing of gradients"):
            optimizer.zero_grad(set_to_none=True)
            balance_experts(trainer.model)
        if step:
            rounds.append(dict(clock.seconds))
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--sizes", nargs="+", default=["nano", "tiny"], choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens, results = tokens_of_text(), []
    for size in arguments.sizes:
        trainers = {"with memory": build(size, True, tokens), "without memory": build(size, False, tokens)}
        seconds = harness.measure({name: trainer.step for name, trainer in trainers.items()}, arguments.repeats)
        ratio = statistics.median(a / b for a, b in zip(seconds["with memory"], seconds["without memory"], strict=True))
        for name, trainer in trainers.items():
            parts = profile(trainer, max(3, arguments.repeats // 2))
            whole = sum(parts.values())
            batch_size, length = SHAPES[size]
            results.append(
                {
                    "size": size,
                    "what": name,
                    "tokens": batch_size * length,
                    "median_seconds": statistics.median(seconds[name]),
                    "with_over_without": ratio,
                    "parts_seconds": parts,
                    "data_share": parts["data"] / whole,
                }
            )
            print(f"{size}, {name}: {statistics.median(seconds[name]):.3f} s a step, x{ratio:.3f} with memory")
            for part, value in sorted(parts.items(), key=lambda item: -item[1]):
                print(f"  {value / whole:6.1%}  {value * 1e3:8.1f} ms  {part}")
    if arguments.out:
        harness.write(arguments.out, "training_step", results)


if __name__ == "__main__":
    main()
