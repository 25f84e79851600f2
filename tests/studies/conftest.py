"""A result of a quickstart, and a text seen through gates, made by hand."""

import copy

import numpy as np
import pytest

from engram_lm.analysis import GateTrace

ABOUT = {"memory": ("With memory", "reads a table"), "twin": ("Twin", "a wider feed-forward"), "wide": ("Wide", "")}


def make_result(*, arms=("memory", "twin"), gains=(0.25,), **fields):
    """A result whose twin has the loss 3.0 and whose memory model is better by each seed's gain."""
    made = {}
    for name in arms:
        runs = []
        for seed, gain in enumerate(gains):
            loss = 3.0 - (gain if name == "memory" else 0.0)
            curve = [[step * 1000, loss + 4 / step] for step in range(1, 121)]
            runs.append(
                {
                    "seed": seed,
                    "loss": loss,
                    "perplexity": float(np.exp(loss)),
                    "bits_per_byte": 1.25,
                    "tokens": 120_000,
                    "tokens_per_second": 4321.0,
                    "seconds": 90.0,
                    "train_curve": curve,
                    "held_out_curve": curve[::20],
                }
            )
        losses = [run["loss"] for run in runs]
        title, about = ABOUT[name]
        made[name] = {
            "title": title,
            "about": about,
            "parameters": {
                "vocabulary": 524_288,
                "backbone": 763_264,
                "memory_layers": 67_328 * (name == "memory"),
                "memory_tables": 2_131_000 * (name == "memory"),
                "total": 3_485_880,
            },
            "flops_per_token": 2_843_136,
            "runs": runs,
            "loss": {"mean": float(np.mean(losses)), "std": float(np.std(losses, ddof=1)) if len(gains) > 1 else None},
        }
    difference = {
        "mean": float(np.mean(gains)),
        "std": float(np.std(gains, ddof=1)) if len(gains) > 1 else None,
        "per_seed": list(gains),
    }
    result = {
        "format": "engram.quickstart.1",
        "command": "engram-lm quickstart --minutes 1",
        "started": "2026-01-02T03:04:05+00:00",
        "machine": {"processor": "two cores", "memory_gib": 15.5},
        "versions": {"torch": "2.13.0"},
        "commit": "3f2a91c",
        "data": {
            "source": "the Python standard library",
            "files": 12,
            "bytes": 123_456,
            "skipped": {"not UTF-8": 3},
            "train_files": 11,
            "held_out_files": 1,
            "train_tokens": 34_567,
            "held_out_tokens": 2_345,
            "bytes_per_token": 3.41,
        },
        "settings": {"hidden_size": 128, "memory_blocks": [1, 2], "dtype": "float32"},
        "seeds": list(range(len(gains))),
        "interrupted": False,
        "arms": made,
        "difference": difference if {"memory", "twin"} <= set(arms) else None,
        "samples": [{"prompt": "def ", "continuations": {name: f"said by {name}" for name in arms}}],
    }
    return copy.deepcopy({**result, **fields})


def make_trace(texts, *, blocks=(1, 2), num_streams=2, seed=0) -> GateTrace:
    """A trace of two orders whose scores are random; position 2 is dead, position 3 starts a segment."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(len(blocks), len(texts), 2, num_streams)).astype(np.float32)
    visible = np.minimum(np.arange(len(texts)) + 1, 3)
    if len(texts) > 5:
        visible[2:6] = (0, 1, 2, 3)
    return GateTrace(
        tokens=np.arange(len(texts)),
        texts=tuple(texts),
        blocks=blocks,
        orders=(2, 3),
        gates=(1 / (1 + np.exp(-scores.sum(2)))).astype(np.float32) * (visible > 0)[:, None],
        order_scores=scores,
        bias_scores=np.zeros_like(scores[:, :, 0]),
        visible=visible,
    )


@pytest.fixture(name="make_result")
def make_result_fixture():
    return make_result


@pytest.fixture(name="make_trace")
def make_trace_fixture():
    return make_trace
