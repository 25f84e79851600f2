"""Runs benchmarks of lm-evaluation-harness on a model, and holds their results."""

import contextlib
import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from engram_lm.errors import ConfigError, DataError, MissingExtraError, check_whole
from engram_lm.evaluation.ruler.harness import build_task, check_length, describe, is_ruler
from engram_lm.evaluation.ruler.tasks import RulerData
from engram_lm.evaluation.tasks import read_tasks
from engram_lm.files import only_finite, user_path

_SOURCE = "engram_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of one task."""

    value: float
    """The mean over the questions, or what the task makes of them; NaN where it cannot be computed."""
    standard_error: float | None
    """The standard error of the value, as the harness estimates it; None where it does not."""
    num_questions: int
    """How many questions it was measured on."""
    higher_is_better: bool | None
    """Whether a larger value is a better one; None where the task does not say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a model did in one task, or in a group of tasks that has a score of its own."""

    name: str
    """Name of the task or group."""
    scores: Mapping[str, Score]
    """By measure, such as ``acc``; where a task reads answers in several ways, ``exact_match,strict-match``."""
    num_few_shot: int | None
    """Examples before each question; None for a group whose tasks differ."""
    num_questions: int
    """Questions that were asked."""
    is_group: bool = False
    """Whether the scores are means over the tasks of a group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkResults:
    """How a model did in all tasks.

    Example:
        >>> results = run_tasks(model, tokenizer, ["arc_challenge"])  # doctest: +SKIP
        >>> results.value("arc_challenge", "acc_norm")  # doctest: +SKIP
        0.294
    """

    tasks: Mapping[str, TaskResult]
    """By name, in the order in which they were asked for; groups before their tasks."""
    num_truncated: int
    """Requests whose beginning was cut off, because they were longer than the model sees."""
    raw: dict[str, Any]
    """The harness's own results, with the answer to every question under ``samples``."""

    def value(self, task: str, measure: str) -> float:
        """Return the value of one measure.

        Raises:
            KeyError: There is no such task or measure.
        """
        return self.tasks[task].scores[measure].value

    def to_dict(self) -> dict[str, Any]:
        """Every score as plain values; None stands for values that are not a number."""
        return {
            name: {
                "num_questions": result.num_questions,
                "num_few_shot": result.num_few_shot,
                **{
                    measure: only_finite({"value": score.value, "standard_error": score.standard_error})
                    for measure, score in result.scores.items()
                },
            }
            for name, result in self.tasks.items()
        }


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_data: str | Path | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 1234,
    chat_template: bool = False,
    run_unsafe_code: bool = False,
    on_progress: Callable[[int, int], None] = lambda num_done, num_requests: None,
) -> BenchmarkResults:
    """Ask a model the questions of tasks of lm-evaluation-harness.

    To add a task, put a folder with a YAML file below ``engram_lm/evaluation/suites``; it is found by the name in it,
    here and by ``engram-lm eval --tasks``. The file may describe the task, or name a class derived from ``Task`` or
    ``ConfigurableTask`` of the harness (``class: !function engram_lm.evaluation.suites.mine.MyTask`` beside
    ``task: my_task``). A task that is made in Python may also be passed as it is.

    Args:
        model: An `EngramForCausalLM` or any causal language model of transformers, with memory attached or without; its
            training flag is put back afterwards.
        tokenizer: Its tokenizer.
        names: Names of tasks, groups and tags; patterns of names, such as ``arc_*``; paths of YAML files or of task
            files (``.jsonl``, see `engram_lm.evaluation.tasks`); tasks; or tuples of `TaskItem`. Names that begin with
            ``ruler`` are this library's own and may end with a length: ``ruler_vt_8192``.
        limit: Ask no more than this many questions of each task, from its beginning; all where None.
        num_fewshot: Examples before each question; what each task says where None. Tasks that say 0 keep to it.
        task_data: A folder from which alone data sets are read, and whose YAML files in ``tasks`` are tasks too (see
            `engram_lm.evaluation.task_data`); the Hugging Face Hub, or its cache, where None.
        batch_size: Sequences at a time; found by itself where None.
        max_length: Tokens that the model sees at most; what its configuration says where None.
        seed: Chooses few-shot examples and whatever else a task leaves to chance.
        chat_template: Write each question as a chat, as the tokenizer's template does.
        run_unsafe_code: Agree that tasks such as ``humaneval`` run what the model writes, on this machine and without
            any protection.
        on_progress: Called with the numbers of requests that are done and that there are.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        ConfigError: There is no such task, or it runs code and that was not agreed to.
        DataError: The data of a task cannot be had, or a question does not fit into the model.
    """
    check_whole(limit=limit, batch_size=batch_size, max_length=max_length)
    check_whole(at_least=0, num_fewshot=num_fewshot, seed=seed)
    need_harness()
    from lm_eval import evaluate

    from engram_lm.evaluation.harness_model import HarnessModel
    from engram_lm.evaluation.harness_tasks import Tasks

    counter = _Counter(on_progress)
    asked = HarnessModel(model, tokenizer, batch_size=batch_size, max_length=max_length, on_progress=counter.advance)
    counter.watch(asked)
    ruler = functools.partial(
        build_task,
        tokenizer=tokenizer,
        num_samples=limit,
        seed=seed,
        data=RulerData(folder=None if task_data is None else user_path(task_data) / "ruler"),
        longest=asked.max_length,
    )
    with _chance(seed):
        wanted = [ruler(name) if is_ruler(name) else name for name in names]
        tasks = Tasks(task_data)
        if not run_unsafe_code:
            _refuse_code(tasks.running_code(name for name in wanted if isinstance(name, str)))
        loaded = tasks.load(_with_families(wanted, asked))
        if not run_unsafe_code:
            _refuse_code([name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)])
        for task in loaded["tasks"].values():
            _settle_few_shot(task, num_fewshot, seed)
        started = time.time()
        with _no_bars():
            raw: Any = evaluate(
                lm=asked,
                task_dict=loaded,
                limit=limit,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                confirm_run_unsafe_code=run_unsafe_code,
            )
    raw["config"] = {
        "model": _SOURCE,
        "model_args": {"path": str(getattr(model.config, "_name_or_path", ""))},
        **asked.get_model_info(),
        "batch_size": asked.batch_size,
        "limit": limit,
        "fewshot_seed": seed,
    }
    raw["date"] = started
    raw["max_length"] = asked.max_length
    raw["total_evaluation_time_seconds"] = str(time.time() - started)
    return BenchmarkResults(tasks=_task_results(raw), num_truncated=asked.num_truncated, raw=raw)


def check_tasks(names: Sequence[str | Path], task_data: str | Path | None = None) -> None:
    """Refuse names that `run_tasks` would refuse, before anything that takes long; no data are read.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        ConfigError: There is no such task.
        DataError: There is no such task file, or no such folder.
    """
    need_harness()
    from engram_lm.evaluation.harness_tasks import Tasks

    files = [name for name in names if str(name).endswith(".jsonl")]
    if files:
        read_tasks(files)
    tasks = Tasks(task_data)
    for name in names:
        if is_ruler(name):
            describe(str(name))
        elif name not in files:
            tasks.find(name)


def check_lengths(names: Sequence[str | Path], model: Any, tokenizer: Any, max_length: int | None = None) -> None:
    """Refuse RULER's tasks whose samples are longer than the model sees, before anything that takes long.

    Raises:
        ConfigError: A task is too long.
    """
    from engram_lm.evaluation.harness_model import resolve_max_length

    longest = max_length or resolve_max_length(model.config, tokenizer)
    for name in names:
        if is_ruler(name):
            check_length(str(name), longest)


def need_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"benchmarks run on lm-evaluation-harness, which cannot be imported ({error}): "
            'pip install "engram-lm[eval]"'
        ) from error


def _with_families(names: Sequence[Any], asked: Any) -> list[Any]:
    """Put tasks in the place of task files and of questions."""
    from engram_lm.evaluation.family_tasks import family_tasks
    from engram_lm.evaluation.harness_tasks import quiet_harness

    files = [name for name in names if isinstance(name, str | Path) and str(name).endswith(".jsonl")]
    items = [
        *(read_tasks(files) if files else ()),
        *(item for name in names if isinstance(name, tuple) for item in name),
    ]
    others = [name for name in names if name not in files and not isinstance(name, tuple)]
    with quiet_harness():
        return [*others, *family_tasks(items, asked.encode_pair, asked.max_length)]


class _Counter:
    """Counts requests that are done, of all that there are."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self._done = 0
        self._total = 0

    def watch(self, asked: Any) -> None:
        """Learn of each kind of request how many there are, when the harness makes them."""
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(asked, kind, self._counting(getattr(asked, kind)))

    def _counting(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        def counted(requests: list[Any], **options: Any) -> Any:
            self._total += len(requests)
            self._report(self._done, self._total)
            return answer(requests, **options)

        return counted

    def advance(self, number: int) -> None:
        self._done += number
        self._report(self._done, self._total)


def _settle_few_shot(task: Any, number: int | None, seed: int) -> None:
    """Set a task's number of examples as ``lm_eval.simple_evaluate`` does."""
    own = task.get_config("num_fewshot")
    if own is None or (number is not None and own != 0):
        task.set_config(key="num_fewshot", value=number or 0)
    missing = getattr(task, "missing_examples", None)
    if task.get_config("num_fewshot") and missing:
        raise DataError(
            f"{missing}, from which the task {task.task_name} takes its examples; bring it, or ask for none"
        )
    examples = getattr(getattr(task, "sampler", None), "df", None)
    if examples is not None and len(examples) < task.get_config("num_fewshot"):
        raise DataError(
            f"the task {task.task_name} has {len(examples)} examples to show and was asked for "
            f"{task.get_config('num_fewshot')}"
        )
    task.set_fewshot_seed(seed=seed)


@contextlib.contextmanager
def _chance(seed: int) -> Iterator[None]:
    """Seed every source of chance that a task may use, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _refuse_code(names: Sequence[str]) -> None:
    """Refuse tasks that run code."""
    if names:
        raise ConfigError(
            f"{', '.join(names)} would run the code that the model writes, on this machine and without any "
            "protection; agree with --run-unsafe-code, or leave them out"
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Show none of the harness's progress bars, one for each task, beside the progress that callers are told of."""
    from tqdm import tqdm

    begin: Any = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(begin, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = begin


def _task_results(raw: Mapping[str, Any]) -> Mapping[str, TaskResult]:
    results = {}
    groups = raw.get("groups", {})
    for name, values in raw["results"].items():
        scores = {}
        num_questions = int(values.get("sample_len") or raw.get("n-samples", {}).get(name, {}).get("effective", 0))
        better = raw.get("higher_is_better", {}).get(name, {})
        for key, value in values.items():
            measure, comma, reading = key.partition(",")
            if not comma or measure.endswith("_stderr"):
                continue
            error = values.get(f"{measure}_stderr,{reading}")
            scores[measure if reading == "none" else key] = Score(
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                num_questions=num_questions,
                higher_is_better=better.get(measure),
            )
        few_shot = raw.get("n-shot", {}).get(name)
        results[name] = TaskResult(
            name=name,
            scores=MappingProxyType(scores),
            num_few_shot=few_shot if isinstance(few_shot, int) else None,
            num_questions=num_questions,
            is_group=name in groups,
        )
    return MappingProxyType(results)
