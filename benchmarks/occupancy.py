"""What occupancy costs one memory layer, against the same layer without it, in turn.

python benchmarks/occupancy.py --out benchmarks/results/occupancy.json
"""

import argparse
import statistics

import harness
import torch

from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.tables import ParameterTable
from engram_lm.tables.occupancy import FirstRows

GEOMETRY = {"hidden_size": 576, "memory_dim": 576, "rows_per_head": 32_768, "table_std": 0.02}
"""A layer for a model of 135 M parameters."""
SHAPES = {"evaluation": ((4, 256), (1, 1)), "training": ((4, 256),)}
"""Batch and length of the texts in each mode."""


def build(occupancy: str, is_loaded: bool) -> EngramLayer:
    """A layer of which training has written half of the rows, as training left it or as a file is loaded."""
    torch.manual_seed(0)
    config = EngramConfig(occupancy=occupancy, **GEOMETRY)
    first = FirstRows("benchmark", config.table_std) if occupancy != "none" else None
    table = ParameterTable(sum(config.num_table_rows()), config.head_dim, std=config.table_std, first_rows=first)
    rows = torch.arange(0, table.num_rows, 2)
    table.store(rows, torch.randn(len(rows), table.width) * config.table_std)
    if is_loaded:
        table.take(table.saved_weight())
    layer = EngramLayer(config, table)
    torch.nn.init.normal_(layer.conv_weight)
    return layer


def measure(mode: str, is_loaded: bool, shape: tuple[int, int], repeats: int) -> list[dict]:
    """Time the layer with each rule of occupancy and without, the same tokens each."""
    calls = {}
    for occupancy in ("none", "rows", "ngrams"):
        layer = build(occupancy, is_loaded)
        layer.train(mode == "training")
        layer.table.train(mode == "training")
        hidden = torch.randn(*shape, GEOMETRY["hidden_size"])
        rows = torch.randint(layer.table.num_rows, (*shape, layer.config.num_heads_total))

        def call(layer=layer, hidden=hidden, rows=rows):
            if mode == "training":
                layer(hidden, rows).square().mean().backward()
                layer.zero_grad()
                layer.table.zero_grad()
            else:
                # More calls where one takes microseconds.
                with torch.no_grad():
                    for _ in range(1 if rows.shape[1] > 1 else 50):
                        layer(hidden, rows)

        calls[occupancy] = call
    seconds = harness.measure(calls, repeats)
    return [
        {
            "case": mode,
            "table": "loaded" if is_loaded else "trained",
            "tokens": shape[0] * shape[1],
            "occupancy": occupancy,
            "median_seconds": statistics.median(times) / (50 if shape[1] == 1 else 1),
            "ratio_to_none": statistics.median(a / b for a, b in zip(times, seconds["none"], strict=True)),
        }
        for occupancy, times in seconds.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for mode, shapes in SHAPES.items():
        for shape in shapes:
            for is_loaded in (False, True) if mode == "evaluation" else (False,):
                results += measure(mode, is_loaded, shape, arguments.repeats)
    for result in results:
        print(
            "  ".join(
                f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in result.items()
            )
        )
    if arguments.out:
        harness.write(arguments.out, "occupancy", results)
