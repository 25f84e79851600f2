"""What memory costs the models of the presets: training steps, decode steps, generation; and the parts of the backbone
that have a plain twin.

    python benchmarks/model.py --out benchmarks/results/model.json
    python benchmarks/model.py --device cuda --sizes small --out benchmarks/results/model_gpu.json

Every model is timed against the same backbone without memory, step by step in turn. Peak memory is that of a process of
its own.
"""

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.streams import StreamMixer
from engram_lm.training.data.batches import Batches
from engram_lm.training.loop import Trainer, TrainOptions, best_dtype
from engram_lm.training.optimizers import OptimizerOptions

TRAINING = {"nano": (8, 256), "tiny": (4, 256), "small": (8, 1024)}  # sequences, tokens in each
PROMPT_TOKENS = 64


def build(size: str, memory: bool, device: str, host_table: bool = False) -> EngramForCausalLM:
    """The engram preset of a size, or its backbone alone."""
    config = EngramLMConfig.preset(f"engram-{size}")
    if config.vocab_size > 100_000:  # raw tokens, so that no tokenizer is needed; the same number of rows
        config = EngramLMConfig.preset(f"engram-{size}", vocab_size=config.vocab_size - 1)
    if not memory:
        values = {**config.to_dict(), "memory": None, "hash_spec": None}
        config = EngramLMConfig(**{k: v for k, v in values.items() if k not in ("model_type", "layer_types")})
    torch.manual_seed(0)
    model = EngramForCausalLM(config).to(device)
    if host_table:
        model.model.memory_tables.to("cpu")
    model.generation_config.eos_token_id = None
    return model


def trainer_of(model: EngramForCausalLM, size: str, device: str) -> Trainer:
    batch_size, length = TRAINING[size]
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, 200_000).astype(np.int32)
    options = TrainOptions(num_steps=10_000, dtype=best_dtype(torch.device(device)))
    return Trainer(model, Batches(tokens, batch_size, length, 0), options, OptimizerOptions(backbone="adamw", lr=3e-3))


def synchronized(call: Callable[[], Any], device: str) -> Callable[[], None]:
    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def compared(seconds: dict[str, list[float]], tokens: int, base: str = "without memory") -> list[dict[str, Any]]:
    """Medians, and the median of the ratios of each round to the one that is compared with."""
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[base], strict=True))
        rows.append(
            {
                "what": name,
                "tokens": tokens,
                "median_seconds": statistics.median(times),
                "tokens_per_second": tokens / statistics.median(times),
                "ratio": ratio,
                "share_of_time_in_memory": 1 - 1 / ratio if name.startswith("with memory") else 0.0,
            }
        )
    return rows


def models(size: str, device: str) -> dict[str, EngramForCausalLM]:
    found = {"with memory": build(size, True, device), "without memory": build(size, False, device)}
    if device == "cuda":
        found["with memory, table on the host"] = build(size, True, device, host_table=True)
    return found


def training(size: str, device: str, repeats: int) -> list[dict[str, Any]]:
    built = models(size, device)
    if device == "cuda":  # a table on the host is read there and trained on the device's side only through its rows
        built.pop("with memory, table on the host")
    trainers = {name: trainer_of(model, size, device) for name, model in built.items()}
    seconds = harness.measure({n: synchronized(t.step, device) for n, t in trainers.items()}, repeats)
    batch_size, length = TRAINING[size]
    rows = compared(seconds, batch_size * length)
    return [
        {"case": "training step", "size": size, **row, "peak_bytes": peak(size, row["what"], device)} for row in rows
    ]


def peak(size: str, what: str, device: str) -> int | None:
    """Peak memory of three training steps in a process of their own (on a GPU: of its allocator)."""
    command = [sys.executable, __file__, "--device", device, "--peak", size, str(int(what.startswith("with memory")))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(size: str, memory: bool, device: str) -> None:
    trainer = trainer_of(build(size, memory, device), size, device)
    for _ in range(3):
        trainer.step()
    # VmHWM, not ru_maxrss, which a child inherits from its parent.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(torch.cuda.max_memory_allocated() if device == "cuda" else kilobytes * 1024)


@torch.no_grad()
def decoding(size: str, device: str, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """One token per sequence, after a prompt, with the cache that `generate` uses."""
    built = models(size, device)
    dtype = best_dtype(torch.device(device))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 8000, (batch_size, PROMPT_TOKENS), generator=generator).to(device)
    steps = {}
    for name, model in built.items():
        model = model.eval().to(getattr(torch, dtype))
        cache = model(prompt, use_cache=True).past_key_values

        def step(model: Any = model, cache: Any = cache) -> None:
            model(prompt[:, :1], past_key_values=cache, use_cache=True)

        steps[name] = synchronized(step, device)
    rows = compared(harness.measure(steps, repeats), batch_size)
    return [{"case": "decode step", "size": size, "batch_size": batch_size, "dtype": dtype, **row} for row in rows]


@torch.no_grad()
def generating(size: str, device: str, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    built = {name: model.eval() for name, model in models(size, device).items()}
    dtype = best_dtype(torch.device(device))
    prompt = torch.randint(3, 8000, (batch_size, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    new_tokens = 32
    calls = {}
    for name, model in built.items():
        model = model.to(getattr(torch, dtype))

        def call(model: Any = model) -> None:
            model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)

        calls[name] = synchronized(call, device)
    rows = compared(harness.measure(calls, repeats), batch_size * new_tokens)
    return [{"case": "generate", "size": size, "batch_size": batch_size, "dtype": dtype, **row} for row in rows]


def fused_projection(size: str, tokens: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """All keys and the value in one product, against one product each."""
    memory = EngramLMConfig.preset(f"engram-{size}").memory_config
    assert memory is not None
    width, wide = memory.hidden_size, (memory.num_streams + 1) * memory.hidden_size
    torch.manual_seed(0)
    fused = nn.Linear(memory.memory_dim, wide, bias=False, device=device)
    separate = nn.ModuleList(
        nn.Linear(memory.memory_dim, width, bias=False, device=device) for _ in range(memory.num_streams + 1)
    )
    embeddings = torch.randn(tokens, memory.memory_dim, device=device, requires_grad=True)

    def one() -> None:
        fused(embeddings).square().sum().backward()

    def several() -> None:
        sum(projection(embeddings).square().sum() for projection in separate).backward()

    calls = {"fused": synchronized(one, device), "separate": synchronized(several, device)}
    rows = compared(harness.measure(calls, repeats), tokens, base="fused")
    return [{"case": "projection, forward and backward", "size": size, **row} for row in rows]


def stream_mixing(size: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Our mixer against transformers' hyper-connection, which it equals."""
    config = EngramLMConfig.preset(f"engram-{size}")
    batch_size, length = TRAINING[size]
    torch.manual_seed(0)
    ours, theirs = StreamMixer(config, 0).to(device), DeepseekV4HyperConnection(config).to(device)
    ours.reset_parameters(0.02)
    theirs.load_state_dict(ours.state_dict())
    shape = (batch_size, length, config.num_streams, config.hidden_size)
    streams = torch.randn(shape, device=device, requires_grad=True)

    def own() -> None:
        post, comb, read = ours(streams)
        ours.write(streams, read, post, comb).square().sum().backward()

    def transformers() -> None:
        post, comb, read = theirs(streams)
        mixed = post.unsqueeze(-1) * read.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams)
        mixed.square().sum().backward()

    calls = {"ours": synchronized(own, device), "transformers": synchronized(transformers, device)}
    rows = compared(harness.measure(calls, repeats), batch_size * length, base="ours")
    return [{"case": "stream mixer, forward and backward", "size": size, **row} for row in rows]


def experts(size: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Training steps with the experts as grouped products and as a loop."""
    calls = {}
    for name, implementation in (("grouped products", "grouped_mm"), ("loop", "eager")):
        model = build(size, True, device)
        model.set_experts_implementation(implementation)
        calls[name] = synchronized(trainer_of(copy.deepcopy(model), size, device).step, device)
    batch_size, length = TRAINING[size]
    rows = compared(harness.measure(calls, repeats), batch_size * length, base="grouped products")
    return [{"case": "experts, training step", "size": size, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--sizes", nargs="+", default=["nano", "tiny"], choices=list(TRAINING))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=["training", "decode", "generate", "parts"])
    parser.add_argument("--peak", nargs=2, metavar=("SIZE", "MEMORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak[0], arguments.peak[1] == "1", arguments.device)
        return
    results: list[dict[str, Any]] = []

    def add(rows: list[dict[str, Any]]) -> None:
        results.extend({**row, "device": arguments.device} for row in rows)
        for row in rows:
            print(json.dumps(row), flush=True)

    device, repeats = arguments.device, arguments.repeats
    for size in arguments.sizes:
        if "training" in arguments.cases:
            add(training(size, device, repeats))
        for batch_size in (1, 8, 32):
            if "decode" in arguments.cases:
                add(decoding(size, device, batch_size, 8 * repeats))
            if "generate" in arguments.cases:
                add(generating(size, device, batch_size, max(3, repeats // 2)))
        if "parts" in arguments.cases:
            add(fused_projection(size, 1024, device, 4 * repeats))
            add(stream_mixing(size, device, repeats))
            add(experts(size, device, max(3, repeats // 2)))
    if arguments.out:
        harness.write(arguments.out, "model", results)


if __name__ == "__main__":
    main()
