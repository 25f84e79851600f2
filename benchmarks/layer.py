"""The Engram layer against its plain twin, and its share of a training step of the quickstart's model.

python benchmarks/layer.py --out benchmarks/results/layer.json
"""

import argparse
import statistics

import harness
import numpy as np
import torch

from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.memory.reference import layer_reference
from engram_lm.studies.quickstart.run import Quickstart
from engram_lm.tables import ParameterTable
from engram_lm.training.build import build_model, model_config
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import Ranks
from engram_lm.training.loop import Trainer, TrainOptions, best_dtype
from engram_lm.training.optimizers import OptimizerOptions


def against_the_twin(repeats: int) -> list[dict]:
    """Forward and backward of one layer at the twin's pace: few tokens, the quickstart's geometry."""
    results = []
    for streams in (1, 4):
        config = EngramConfig(hidden_size=128, num_streams=streams, memory_dim=128, rows_per_head=4096)
        torch.manual_seed(0)
        table = ParameterTable(sum(config.num_table_rows()), config.head_dim)
        layer = EngramLayer(config, table)
        torch.nn.init.normal_(layer.conv_weight)
        batch, length = 2, 64
        hidden = torch.randn(batch, length, streams, 128)
        rows = torch.randint(table.num_rows, (batch, length, config.num_heads_total))

        def ours(layer=layer, hidden=hidden, rows=rows):
            layer(hidden, rows).square().mean().backward()

        def twin(layer=layer, hidden=hidden, rows=rows):
            layer_reference(layer, hidden, rows)[0].square().mean().backward()

        for name, seconds in harness.measure({"layer": ours, "plain twin": twin}, repeats).items():
            tokens = batch * length
            results.append(
                {
                    "case": "forward and backward",
                    "what": name,
                    "num_streams": streams,
                    "tokens": tokens,
                    "median_seconds": statistics.median(seconds),
                    "tokens_per_second": tokens / statistics.median(seconds),
                }
            )
    return results


def share_of_a_step(repeats: int) -> list[dict]:
    """Training steps of the quickstart's models, in turn: with memory, its twin of equal operations, and the same
    backbone without memory and without the twin's extra width."""
    options = Quickstart()
    words = [f"word{number}" for number in range(6000)]
    tokenizer = train_tokenizer([" ".join(words)], options.vocab_size)
    tokens = np.random.default_rng(0).integers(2, len(tokenizer), 500_000).astype(np.int32)
    length = options.sequence_length
    models = {
        arm.title: build_model(arm.recipe, model_config(arm.recipe, tokenizer), tokenizer, Ranks())
        for arm in options.study().arms
    }
    alone = options.recipe(options.model(None))
    models["backbone alone"] = build_model(alone, model_config(alone, tokenizer), tokenizer, Ranks())
    dtype = best_dtype(torch.device("cpu"))
    batches = Batches(tokens, options.batch_size, length, 0)
    train_options = TrainOptions(num_steps=10_000, dtype=dtype)
    optimizer = OptimizerOptions(backbone="adamw", lr=3e-3)
    trainers = {name: Trainer(model, batches, train_options, optimizer) for name, model in models.items()}
    seconds = harness.measure({name: trainer.step for name, trainer in trainers.items()}, repeats)
    base = seconds["backbone alone"]
    return [
        {
            "case": "training step",
            "what": name,
            "dtype": dtype,
            "tokens": options.batch_size * length,
            "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
            "median_seconds": statistics.median(times),
            "ratio_to_backbone_alone": statistics.median(a / b for a, b in zip(times, base)),
        }
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    results = against_the_twin(arguments.repeats) + share_of_a_step(arguments.repeats)
    for result in results:
        print(
            "  ".join(
                f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in result.items()
            )
        )
    if arguments.out:
        harness.write(arguments.out, "layer", results)
