"""Results of benchmarks as a table, and as the files that lm-evaluation-harness writes."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

from engram_lm.evaluation.benchmarks import BenchmarkResults
from engram_lm.files import user_path, write_atomically

_UNSAFE = re.compile(r"[^\w.-]")
"""What may not be in a file's name."""


def print_table(results: BenchmarkResults) -> None:
    """Print every score with its standard error."""
    width = max(len(name) for name in results.tasks)
    measures = [measure for result in results.tasks.values() for measure in result.scores]
    second = max(len("measure"), *map(len, measures))
    print(f"{'task':{width}}  {'measure':{second}}  {'score':>9}   {'error':>7}  {'questions':>9}  examples")
    for name, result in results.tasks.items():
        shots = "–" if result.num_few_shot is None else str(result.num_few_shot)
        for measure, score in result.scores.items():
            error = "–" if score.standard_error is None else f"{score.standard_error:.4f}"
            line = f"{name:{width}}  {measure:{second}}  {score.value:9.4f} ± {error:>7}"
            print(f"{line}  {score.num_questions:9,}  {shots:>8}")
    if results.num_truncated:
        print(f"{results.num_truncated:,} requests were longer than the model sees; their beginning was cut off")


def write_results(folder: str | Path, results: BenchmarkResults) -> Path:
    """Write ``results_TIME.json``, and the answers of each task as ``samples_TASK_TIME.jsonl``.

    Returns:
        The path of the results.

    Raises:
        OSError: The folder cannot be written.

    Source: ``lm_eval/loggers/evaluation_tracker.py`` of EleutherAI/lm-evaluation-harness.
    """
    from lm_eval.utils import handle_non_serializable

    root = user_path(folder)
    root.mkdir(parents=True, exist_ok=True)
    time = datetime.datetime.fromtimestamp(results.raw["date"]).isoformat().replace(":", "-")
    for name, samples in results.raw["samples"].items():
        lines = (
            json.dumps(_sample(sample), default=handle_non_serializable, ensure_ascii=False) + "\n"
            for sample in samples
        )
        write_atomically(root / f"samples_{_UNSAFE.sub('_', name)}_{time}.jsonl", "".join(lines))
    rest = {key: value for key, value in results.raw.items() if key != "samples"}
    path = root / f"results_{time}.json"
    write_atomically(path, json.dumps(rest, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    return path


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{place}": {f"arg_{index}": value for index, value in enumerate(values)}
        for place, values in enumerate(sample["arguments"])
    }
    return {
        **sample,
        "arguments": arguments,
        "target": str(sample["target"]),
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
    }
