"""What a trained memory does: which rows are in use, how many N-grams share them, and how far the gates open."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt import MemoryAdapter
from engram_lm.adapt.controls import shuffled_rows
from engram_lm.evaluation import BenchmarkResults, run_tasks
from engram_lm.hashing.collisions import row_collisions
from engram_lm.memory.gate_recorder import record_gates
from engram_lm.page.number_text import mean_of
from engram_lm.studies.adaptation.recipe import TaskOptions
from engram_lm.studies.diagnostics import diagnose_models
from engram_lm.training.base_model import AdaptedBase
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.job import Job

_GATE_TOKENS = 16_384
"""Held-out tokens whose gates are looked at."""
_COUNTED_TOKENS = 1 << 20
"""Tokens of the domain whose N-grams are counted."""


def look_inside(job: Job, counted: dict[str, Any], *, measure: bool = True) -> dict[str, Any]:
    """Measure a trained arm with its memory off and with its rows exchanged, and look at what the memory does.

    Collisions are kept in ``counted``, by the hash, for the other arms of the seed. The result has
    ``memory_off``, ``rows_shuffled``, ``occupancy``, ``collisions``, ``gates`` and, for the first seed, ``bits`` by
    kind of token; each is None without memory, or if none of it is to be measured.
    """
    adapter = job.trained.adapter if isinstance(job.trained, AdaptedBase) and measure else None
    if adapter is None:
        return dict.fromkeys(("memory_off", "rows_shuffled", "occupancy", "collisions", "gates", "bits"))
    length, own_map = job.recipe.data.sequence_length, adapter.row_map
    with adapter.disabled():
        off = _losses(job)
    assert job.text.held_out is not None
    options: dict[str, Any] = {"dtype": job.trainer.options.dtype, "beginning": job.trainer.batches.beginning}
    bits = None
    if job.recipe.train.seed == 0:
        bits = diagnose_models(job.model, job.tokenizer, job.text, job.recipe, dtype=options["dtype"])
    gates = gate_statistics(job.model, adapter, job.text.held_out, length=length, **options)
    shuffle = shuffled_rows(adapter.spec)
    adapter.row_map = lambda block, rows: shuffle(block, rows if own_map is None else own_map(block, rows))
    shuffled = _losses(job)
    adapter.row_map = own_map
    digest = adapter.spec.digest
    if own_map is None and digest not in counted:
        tokens = job.text.train[: min(job.text.num_tokens, _COUNTED_TOKENS)]
        # As in training, where no N-gram reaches back over the start of a sequence.
        counted[digest] = collisions(adapter, tokens[: len(tokens) // length * length].reshape(-1, length))
    return {
        "memory_off": off,
        "rows_shuffled": shuffled,
        "occupancy": occupancy(adapter, job.trainer.table_use.touched),
        # A hash that looks at positions has no count of N-grams.
        "collisions": counted[digest] if own_map is None else None,
        "gates": gates,
        "bits": bits,
    }


def _losses(job: Job) -> dict[str, Any]:
    """Losses of the model as it stands, on the domain and on the retained texts."""
    texts = {
        name: job.evaluate(text.tokens, num_bytes=text.num_bytes).to_dict()
        for name, text in job.text.texts.items()
        if name != "validation"
    }
    return {"domain": loss_values(job.evaluate_held_out().to_dict()), **retained_losses(texts)}


def retained_losses(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Say what a result holds of the retained texts: their mean, as ``retained``, and each of them in ``texts``.

    Every text weighs the same, whatever its length. Both are None without such texts.
    """
    found = {name: loss_values(text) for name, text in texts.items() if name != "validation"}
    known = [values for values in found.values() if values is not None]
    if not known:
        return {"retained": None, "texts": None}
    mean = {key: mean_of(values[key] for values in known) for key in ("loss", "bits_per_byte")}
    perplexity = None if mean["loss"] is None else math.exp(min(mean["loss"], 700.0))
    retained = {**mean, "perplexity": perplexity, "num_tokens": sum(values["num_tokens"] for values in known)}
    return {"retained": known[0] if len(known) == 1 else retained, "texts": found}


def measure_tasks(model: Any, tokenizer: Any, options: TaskOptions) -> dict[str, dict[str, Any]] | None:
    """Let a model answer the benchmarks of a recipe; None where it names none.

    By task: ``measure`` (accuracy by the answers' lengths where the task has it), its ``value`` and ``stderr``,
    ``higher_is_better`` (None where the task does not say), and ``right``, a digit for each question: 1 where it was
    answered rightly, so that two models can be compared question by question; None where the measure is no such yes or
    no.
    """
    if not options.names:
        return None
    results = run_tasks(
        model, tokenizer, options.names, limit=options.limit, num_fewshot=options.few_shot, task_data=options.data
    )
    found = {}
    for name in _benchmarks(results):
        task = results.tasks[name]
        measure = next(one for one in ("acc_norm", "acc", *task.scores) if one in task.scores)
        score = task.scores[measure]
        answers = [sample.get(measure) for sample in results.raw.get("samples", {}).get(name, ())]
        yes_or_no = bool(answers) and all(answer in (0, 1) for answer in answers)
        found[name] = {
            "measure": measure,
            "value": score.value,
            "stderr": score.standard_error,
            "higher_is_better": score.higher_is_better,
            "right": "".join(str(int(answer)) for answer in answers) if yes_or_no else None,
        }
    return found


def _benchmarks(results: BenchmarkResults) -> list[str]:
    """The tasks that were asked for: a group that has a score counts once, one that has none is each of its tasks."""
    parts: Mapping[str, Sequence[str]] = results.raw.get("group_subtasks", {})
    inner = {name for group in parts.values() for name in group}
    counted, open_names = set[str](), {*results.tasks, *parts} - inner
    while open_names:
        name = open_names.pop()
        if name in results.tasks and results.tasks[name].scores:
            counted.add(name)
        else:
            open_names |= set(parts.get(name, ()))
    return [name for name in results.tasks if name in counted]


def loss_values(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a result says of a held-out loss."""
    if found is None:
        return None
    return {key: found.get(key) for key in ("loss", "perplexity", "num_tokens", "bits_per_byte")}


def occupancy(adapter: MemoryAdapter, touched: dict[str, Tensor]) -> dict[str, float] | None:
    """Find, by block, the share of the rows that it can read which training has updated; None without training.

    ``touched`` is `TableUse.touched`: by table, 1 for each such row.
    """
    found = {}
    for block in adapter.spec.blocks:
        table = "shared" if adapter.spec.shared_table else str(block)
        rows = [used for name, used in touched.items() if name.endswith(f"memory_tables.{table}")]
        if not rows:
            return None
        found[str(block)] = float(rows[0].float().mean())
    return found


def collisions(adapter: MemoryAdapter, tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """Count how many distinct N-grams of ``tokens [num_sequences, length]`` meet in a row.

    By block: ``num_tokens`` looked at, ``rows_hit``, ``ngrams_per_row`` (mean over the rows hit), ``shared`` (share of
    the rows hit by two N-grams or more) and ``shared_positions`` (share of the reads that go to such a row).
    """
    spec, found = adapter.spec, {}
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        counted = row_collisions(spec, layer, tokens)
        hit, several = counted.num_ngrams > 0, counted.num_ngrams > 1
        found[str(block)] = {
            "num_tokens": tokens.size,
            "rows_hit": int(hit.sum()),
            "ngrams_per_row": float(counted.num_ngrams.sum() / max(1, hit.sum())),
            "shared": float(several.sum() / max(1, hit.sum())),
            "shared_positions": float(counted.num_positions[several].sum() / max(1, counted.num_positions.sum())),
        }
    return found


def gate_statistics(
    model: Any, adapter: MemoryAdapter, tokens: np.ndarray, *, length: int, dtype: str, beginning: Sequence[int] = ()
) -> dict[str, dict[str, float]]:
    """Describe how far the gates open on held-out ``tokens [num_tokens]``, of which the first 16,384 are looked at.

    By block: ``mean``, ``p10``, ``p50``, ``p90`` and ``share_above_half``.
    """
    layers: dict[int, Any] = {int(block): layer for block, layer in adapter.layers.items()}
    gates: dict[int, list[Tensor]] = {block: [] for block in layers}
    with record_gates(layers, lambda block, values: gates[block].append(values.float().cpu().flatten())):
        held_out_loss(model, tokens, length=length, max_tokens=_GATE_TOKENS, dtype=dtype, beginning=beginning)
    found = {}
    for block, parts in gates.items():
        values = torch.cat(parts)
        found[str(block)] = {
            "mean": float(values.mean()),
            **{f"p{percent}": float(torch.quantile(values, percent / 100)) for percent in (10, 50, 90)},
            "share_above_half": float((values > 0.5).float().mean()),
        }
    return found
