"""RULER as tasks of lm-evaluation-harness: ``ruler_vt_8192`` is the task ``vt`` at 8,192 tokens, ``ruler_8192`` all."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.errors import ConfigError, suggestion
from engram_lm.evaluation.ruler.tasks import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    NAMES,
    QUESTION_FILES,
    RulerData,
    answer_tokens,
    make_samples,
    score,
)

MEASURE = "string_match"
"""The measure of every task: the share of the references that the answer holds, or for questions whether it holds one
of them."""
GROUPS: Mapping[str, Sequence[str]] = {
    "ruler": NAMES,
    "ruler_synthetic": tuple(name for name in NAMES if not name.startswith("qa")),
}
"""Groups of tasks; the second one needs no data."""

_NAME = re.compile(r"ruler(_[a-z].*?)??(?:_(\d{3,}))?")


def kinds() -> dict[str, str]:
    """Every name without a length, and whether it is a ``task`` or a ``group``."""
    return {**dict.fromkeys(GROUPS, "group"), **dict.fromkeys((f"ruler_{name}" for name in NAMES), "task")}


def is_ruler(name: Any) -> bool:
    """Whether a name asks for one of these tasks or groups."""
    if not isinstance(name, str) or name.endswith((".jsonl", ".yaml", ".yml")):
        return False
    return name == "ruler" or name.startswith("ruler_")


def describe(name: str) -> list[dict[str, Any]]:
    """What a name stands for, as the harness describes tasks; ``bring`` says which file a person must bring.

    Raises:
        ConfigError: There is no such task.
    """
    plain, length = _parse(name)
    return [
        {
            "task": f"ruler_{task}_{length}",
            "num_fewshot": 0,
            "metadata": {"bring": f"bring ruler/{QUESTION_FILES[task]}"} if task in QUESTION_FILES else {},
        }
        for task in GROUPS.get(plain, (plain.removeprefix("ruler_"),))
    ]


def _parse(name: str) -> tuple[str, int]:
    """Divide a name into the name of a task or group and a length."""
    found = _NAME.fullmatch(name)
    plain = name if found is None else f"ruler{found[1] or ''}"
    if found is None or plain not in kinds():
        if any(sign in name for sign in "*?["):
            raise ConfigError(f"there is no task {name!r}: RULER's names take no pattern; 'ruler' asks for all of them")
        raise ConfigError(
            f"there is no task {name!r}; {suggestion(plain, kinds())} (a length of at least 100 tokens may follow the "
            "name, as in ruler_vt_8192)"
        )
    return plain, int(found[2] or DEFAULT_LENGTH)


def check_length(name: str, longest: int | None) -> None:
    """Refuse, by a `ConfigError`, a name that is no task's, or whose samples are longer than a model sees."""
    plain, length = _parse(name)
    if longest is not None and length > longest:
        raise ConfigError(
            f"{name} has samples of {length:,} tokens and the model sees {longest:,}; ask for shorter ones, as in "
            f"{plain}_{longest}, or raise what it sees with --max-length"
        )


def build_task(
    name: str, tokenizer: Any, *, num_samples: int | None, seed: int, data: RulerData, longest: int | None
) -> Any:
    """Make a task or a group by its name, its samples written.

    Args:
        name: A name of `kinds`, with ``_`` and a length in tokens behind it or without.
        tokenizer: The tokenizer of the model that will be asked.
        num_samples: How many samples of each task; as many as published where None.
        seed: Which samples.
        data: Where questions and essays come from.
        longest: Tokens that the model sees at most; None where that is not known.

    Raises:
        ConfigError: There is no such task, or it is longer than the model sees.
        DataError: Data that it needs are not there.
    """
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    check_length(name, longest)
    plain, length = _parse(name)
    build = functools.partial(
        _build_one, tokenizer=tokenizer, length=length, num_samples=num_samples or DEFAULT_SAMPLES, seed=seed, data=data
    )
    if plain not in GROUPS:
        return build(plain.removeprefix("ruler_"))
    group = Group(
        f"{plain}_{length}",
        aggregate_metric_list=[AggMetricConfig(metric=MEASURE, weight_by_size=False)],
        metadata={"version": 1},
    )
    for task in GROUPS[plain]:
        group.add(build(task))
    return group


def _build_one(task: str, *, tokenizer: Any, length: int, num_samples: int, seed: int, data: RulerData) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    samples = make_samples(task, tokenizer, length=length, num_samples=num_samples, seed=seed, data=data)
    columns = [{"text": one.text, "prefix": one.prefix, "answers": list(one.answers)} for one in samples]
    return ConfigurableTask(
        config={
            "task": f"ruler_{task}_{length}",
            "output_type": "generate_until",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(columns)},
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": "text",
            "gen_prefix": "prefix",
            "doc_to_target": "answers",
            "target_delimiter": " ",
            "process_results": lambda doc, results: {MEASURE: score(task, results[0], doc["answers"])},
            "metric_list": [{"metric": MEASURE, "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"do_sample": False, "until": [], "max_gen_toks": answer_tokens(task)},
            "metadata": {"version": 1, "length": length, "seed": seed, "essay": data.essay_digest(task)},
        }
    )
