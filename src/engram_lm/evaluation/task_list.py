"""``engram-lm eval --list``: which tasks there are, and what each reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_lm.evaluation.ruler.harness import describe, is_ruler
from engram_lm.evaluation.ruler.harness import kinds as ruler_kinds
from engram_lm.evaluation.task_data import find_dataset


def list_tasks(names: Sequence[str], data: Path | None, *, as_json: bool) -> None:
    """Print the names of all tasks, or what those that are named consist of.

    Raises:
        ConfigError: There is no such task.
        DataError: There is no folder ``data``.
    """
    from engram_lm.evaluation.harness_tasks import Tasks

    tasks = Tasks(data)
    if not names:
        kinds = {name: entry.kind.name.lower().removeprefix("py_") for name, entry in tasks.index.items()}
        kinds |= ruler_kinds()
        if as_json:
            print(json.dumps(kinds))
        else:
            print("\n".join(f"{kind:5}  {name}" for name, kind in sorted(kinds.items())))
        return
    rows = [
        _row(config, tasks.data)
        for name in names
        for config in (describe(name) if is_ruler(name) else tasks.leaves(name))
    ]
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(row["task"]) for row in rows)
    print(f"{'task':{width}}  examples  data")
    for row in rows:
        shots = "–" if row["num_few_shot"] is None else str(row["num_few_shot"])
        print(f"{row['task']:{width}}  {shots:>8}  {_described(row, data is not None)}")


def _row(config: dict[str, Any], data: Path | None) -> dict[str, Any]:
    name, configuration = config.get("dataset_path"), config.get("dataset_name")
    found = find_dataset(data, name, configuration) if data is not None and name else None
    return {
        "task": config["task"],
        "num_few_shot": config.get("num_fewshot"),
        "dataset": name,
        "configuration": configuration,
        "found_in": None if found is None else str(found),
        "runs_code": bool(config.get("unsafe_code")),
        "bring": (config.get("metadata") or {}).get("bring"),
    }


def _described(row: dict[str, Any], looked: bool) -> str:
    text = f"{row['dataset'] or 'its own'}{' ' + row['configuration'] if row['configuration'] else ''}"
    if looked and row["dataset"]:
        text += f", found in {row['found_in']}" if row["found_in"] else ", missing in the folder of data sets"
    if row["runs_code"]:
        text += "; runs what the model writes, needs --run-unsafe-code"
    return text + (f"; {row['bring']}" if row["bring"] else "")
