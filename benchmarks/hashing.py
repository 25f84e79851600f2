"""Rows per second: our torch path, our NumPy path, and the hash inside transformers' qwen4_exp, on the same tokens.

python benchmarks/hashing.py --out benchmarks/results/hashing.json
"""

import argparse
import statistics

import harness
import numpy as np
import torch
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from engram_lm.hashing import HashSpec

VOCAB_SIZE, EOS, HEADS = 248_320, 248_044, 8
# transformers finds its primes by trial division when it is built; this base keeps that short and the rows realistic.
ROWS_PER_HEAD = 2_000_003


class Rows(torch.nn.Module):
    """Stands for the embedding table and returns the row numbers, so that only the hash is timed."""

    weight = torch.empty(0)

    def forward(self, rows: torch.Tensor) -> "Rows":
        self.rows = rows
        return self

    def to(self, *_: object) -> "Rows":
        return self

    def flatten(self, *_: object) -> torch.Tensor:
        return self.rows


def qwen_hashes(num_layers: int) -> list[Qwen4ExpTextNGramEmbedding]:
    """Build transformers' own modules, one per layer, without their tables."""
    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB_SIZE, eos_token_id=EOS, ngram_size=3, heads_per_ngram=HEADS,
        ngram_vocab_size_base=ROWS_PER_HEAD, seed=1234,
    )  # fmt: skip
    modules = []
    for ordinal in range(num_layers):
        with torch.device("meta"):
            module = Qwen4ExpTextNGramEmbedding(config, 2 * HEADS, layer_idx=ordinal, ple_layer_index=ordinal)
        fresh = HashSpec.from_config(spec_config(num_layers))
        module.layer_multipliers = torch.tensor(fresh.multipliers[ordinal])
        module.ngram_heads_vocab_sizes = torch.tensor(module.head_vocab_sizes)
        module.ngram_heads_offsets = torch.tensor(module.head_offsets)
        module.ngram_embedding = Rows()
        modules.append(module)
    return modules


def spec_config(num_layers: int) -> dict[str, object]:
    return {
        "ple_layer_ids": [2 * place + 2 for place in range(num_layers)], "ngram_size": 3, "heads_per_ngram": HEADS,
        "ngram_vocab_size_base": ROWS_PER_HEAD, "seed": 1234, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", help="also write the result as JSON")
    arguments = parser.parse_args()

    spec = HashSpec.from_config(spec_config(2))
    theirs = qwen_hashes(2)
    results = []
    print(f"two layers x {spec.num_heads_total} heads, {torch.get_num_threads()} threads")
    print(f"{'tokens':>10}  {'path':<24} {'median ms':>10} {'M rows/s':>9} {'M tokens/s':>11} {'x numpy':>8}")
    for batch, length in ((8, 2048), (1, 2048), (1, 1)):
        tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (batch, length))
        tensor = torch.from_numpy(tokens)
        compiled = torch.compile(lambda t: spec.rows_for_layers(spec.encode(t)), fullgraph=True)
        paths = {
            "torch": lambda t=tensor: spec.rows_for_layers(spec.encode(t)),
            "torch, compiled": lambda t=tensor, f=compiled: f(t),
            "numpy": lambda t=tokens: spec.rows_for_layers(spec.encode(t)),
            "transformers qwen4_exp": lambda t=tensor: [module(t, None) for module in theirs],
        }
        # Four paths, one answer: otherwise their rates say nothing about each other.
        answers = {name: call() for name, call in paths.items()}
        for name, answer in answers.items():
            rows = list(answer.values()) if isinstance(answer, dict) else answer
            for ours, found in zip(answers["numpy"].values(), rows, strict=True):
                if not np.array_equal(ours, np.asarray(found)):
                    raise SystemExit(f"{name} gives other rows than numpy")
        seconds = harness.measure(paths, arguments.repeats)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            rows = batch * length * 2 * spec.num_heads_total
            result = {
                "path": name,
                "batch_size": batch,
                "length_tokens": length,
                "median_seconds": median,
                "min_seconds": min(seconds[name]),
                "rows_per_second": rows / median,
                "times_numpy": medians["numpy"] / median,
                "times_transformers": medians["transformers qwen4_exp"] / median,
            }
            results.append(result)
            print(
                f"{batch:>4} x {length:<4} {name:<24} {median * 1e3:>10.3f} {rows / median / 1e6:>9.2f} "
                f"{batch * length / median / 1e6:>11.3f} {result['times_numpy']:>8.2f}"
            )
    if arguments.out:
        harness.write(arguments.out, "hashing", results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
