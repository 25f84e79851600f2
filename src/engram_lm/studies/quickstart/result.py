"""The result of a quickstart: the format ``engram.quickstart.1``, and what the models wrote."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.gates.trace import GateTrace, gate_trace
from engram_lm.serving.generate import continue_text
from engram_lm.studies.quickstart.summary import MEMORY, TWIN
from engram_lm.studies.result import run_record
from engram_lm.studies.study import TrainedArm
from engram_lm.studies.summary import paired_difference, spread
from engram_lm.training.assembly import TrainingText

Loaded = Mapping[str, tuple[Any, Any]]
"""For each arm, its model and the tokenizer."""


def held_out_documents(text: TrainingText, tokenizer: Any, names: Sequence[str]) -> list[tuple[str, str]]:
    """Name and text of the held-out documents, the longest first.

    The names are those of the documents in order; they are not used where the end of the text was held out instead.
    """
    assert text.held_out is not None and text.held_out_ends is not None
    pieces = [piece.tolist() for piece in np.split(text.held_out, text.held_out_ends) if len(piece)]
    documents = tokenizer.batch_decode(pieces, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if len(names) != len(documents):
        names = ["the end of the text"] * len(documents)
    return sorted(zip(names, documents, strict=True), key=lambda pair: len(pair[1]), reverse=True)


def data_facts(text: TrainingText, documents: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What the models were trained and judged on; the documents are those that were held out."""
    facts = dict(text.facts)
    num_files, apart = facts.pop("documents"), len(documents)
    num_bytes = sum(len(document.encode("utf-8", "replace")) for _, document in documents)
    return {
        "files": num_files,
        **facts,
        "train_files": num_files - apart if text.about is None else num_files,
        "held_out_files": apart,
        "bytes_per_token": num_bytes / facts["held_out_tokens"],
    }


def quickstart_result(seeds: Sequence[Mapping[str, TrainedArm]], bytes_per_token: float) -> dict[str, Any]:
    """Put the runs of all arms together: what ``engram.quickstart.1`` says of seeds, arms and their difference.

    The arms of each seed are given by name; ``bytes_per_token`` is of the held-out text.
    """
    arms: dict[str, dict[str, Any]] = {}
    for name, first in seeds[0].items():
        runs = [_run(seed[name], bytes_per_token) for seed in seeds]
        sizes = None if first.failed is not None else first.sizes
        arms[name] = {
            "title": first.arm.title,
            "about": first.arm.about,
            "parameters": {}
            if sizes is None
            else {
                "vocabulary": sizes.vocabulary,
                "backbone": sizes.backbone - sizes.vocabulary,
                **{kind: getattr(sizes, kind) for kind in ("memory_layers", "memory_tables", "total")},
            },
            "flops_per_token": None if sizes is None else sizes.flops_per_token,
            "runs": runs,
            "loss": spread(run["loss"] for run in runs),
        }
    memory, twin = (arms[name]["runs"] for name in (MEMORY, TWIN))
    ratios = [
        ours["median_step_seconds"] / theirs["median_step_seconds"]
        for ours, theirs in zip(memory, twin, strict=True)
        if ours["num_steps"] and theirs["num_steps"]
    ]
    losses = [{run["seed"]: run["loss"] for run in runs} for runs in (twin, memory)]
    return {
        "seeds": [run["seed"] for run in memory],
        "arms": arms,
        "difference": paired_difference(*losses),
        "step_time_ratio": statistics.median(ratios) if ratios else None,
    }


def _run(trained: TrainedArm, bytes_per_token: float) -> dict[str, Any]:
    """One run: its losses, its speed and its curves."""
    found = run_record(trained, curve_points=100)
    loss, seconds = found["loss"], [line["seconds"] for line in trained.records if line["step"]]
    points = [line for line in trained.records if "held_out" in line]
    return {
        **found,
        "perplexity": (trained.result.get("held_out") or {}).get("perplexity"),
        "bits_per_byte": None if loss is None else loss / (np.log(2) * bytes_per_token),
        "tokens_per_second": found["tokens"] / found["seconds"] if seconds else None,
        "median_step_seconds": statistics.median(seconds) if seconds else None,
        # The last point is of the same tokens as the others.
        "held_out_curve": [(line["num_tokens"], line.get("curve_loss", line["held_out"]["loss"])) for line in points],
    }


def write_samples(models: Loaded, documents: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Let the model with memory and its twin continue the middle of some held-out documents."""
    samples = []
    for source, document in documents[:3]:
        prompt = _excerpt(document, 160)
        continuations = {
            name: continue_text(*models[name], prompt, max_new_tokens=48, temperature=0.7, top_k=40, seed=0)
            for name in (MEMORY, TWIN)
        }
        samples.append({"prompt": prompt, "source": source, "continuations": continuations})
    return samples


def gate_texts(models: Loaded, documents: Sequence[tuple[str, str]]) -> list[GateTrace]:
    """See the middle of some held-out documents through the gates of the model with memory."""
    return [gate_trace(*models[MEMORY], _excerpt(document, 700)) for _, document in documents[:3]]


def _excerpt(text: str, length: int) -> str:
    """Some lines from the middle of a text."""
    start = max(text.rfind("\n", 0, len(text) // 2) + 1, 0)
    return text[start : start + length].strip("\n") or text[:length]
