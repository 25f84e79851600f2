"""Names of tasks → tasks of lm-evaluation-harness: its own, those of this library, and a user's own files.

A task is a YAML file, or a class of Python that a YAML file names. Those in folders below ``suites/`` are part of the
library: a module that brings tasks puts a folder there, and nothing needs to be registered. A YAML file there may name
functions and classes by their place in the library, as in ``!function engram_lm.evaluation.suites.mine.doc_to_text``.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from engram_lm.errors import ConfigError, DataError, EngramError, suggestion
from engram_lm.evaluation import task_data
from engram_lm.files import user_path

SUITES = Path(__file__).with_name("suites")
"""Folder of the library's own tasks."""

_USER_TASKS = "tasks"
"""Folder below a folder of data sets that holds a user's own YAML files."""

_FILE_READERS = ("arrow", "csv", "json", "parquet", "text")
"""What a task names as its data set when it names files by itself."""


class Tasks:
    """Every task there is, by name.

    Args:
        data: Folder of data sets (see `engram_lm.evaluation.task_data`), from which alone the data of tasks is then
            read; YAML files below its ``tasks`` are tasks too. None reads data from the Hub, or from its cache.
    """

    def __init__(self, data: str | Path | None = None) -> None:
        self.data = None if data is None else user_path(data)
        if self.data is not None and not self.data.is_dir():
            raise DataError(f"there is no folder of data sets {self.data}")
        own = [SUITES, *([self.data / _USER_TASKS] if self.data is not None else [])]
        with quiet_harness():
            self._own = TaskManager(include_path=own, include_defaults=False)
        self._manager: TaskManager | None = None

    @property
    def index(self) -> Mapping[str, Entry]:
        """All names of tasks, groups and tags, with where they come from."""
        index: Mapping[str, Entry] = self._complete().task_index
        return index

    def load(self, names: Iterable[str | Path | Task | Group]) -> dict[str, Any]:
        """Make tasks ready, their data loaded.

        Args:
            names: Names of tasks, groups or tags, patterns of names (``arc_*``), paths of YAML files, or tasks.

        Returns:
            What ``lm_eval.evaluate`` takes: ``tasks`` and ``groups`` by name, and ``group_map``.

        Raises:
            ConfigError: There is no such task, or a file describes none.
            DataError: The data of a task cannot be read.
        """
        specs: list[Any] = []
        for name in names:
            specs.extend([name] if isinstance(name, Task | Group) else self.find(name))
        made = [spec.task_name for spec in specs if isinstance(spec, Task)]
        repeated = {name for name in made if made.count(name) > 1 or name in specs}
        if repeated:
            raise ConfigError(f"there are two tasks {', '.join(sorted(repeated))}; give one another name")
        if not specs:
            raise ConfigError("name at least one task")
        files = all(not isinstance(spec, str) or spec.endswith(".yaml") for spec in specs)
        manager = self._own if files else self._complete()
        manager._factory = _Factory(self.data)  # the harness has no public place for it
        with quiet_harness():
            try:
                loaded: dict[str, Any] = dict(manager.load(specs))
            except (KeyError, TypeError, ValueError) as error:  # a group that is not what it should be
                if isinstance(error, EngramError):
                    raise
                raise ConfigError(f"cannot make the tasks {', '.join(map(str, specs))} ready: {error}") from error
        return loaded

    def leaves(self, name: str) -> list[dict[str, Any]]:
        """List the tasks that a name stands for, as their configurations, without loading data.

        Settings that a group gives to its members, such as ``num_fewshot``, are in them.
        """
        index = self.index
        found: list[dict[str, Any]] = []

        def members(config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
            """Visit what a group consists of; its settings give way to those of the groups that it is in."""
            for member in config["task"]:
                described = {"task": member} if isinstance(member, str) else dict(member)
                inner = {**{key: described[key] for key in described if key not in ("group", "task")}, **settings}
                if described.get("group") in index or "group" not in described:
                    visit(described.get("group") or described["task"], inner)
                else:  # a group of a group's own
                    members(described, inner)

        def visit(one: str, settings: Mapping[str, Any]) -> None:
            entry = index.get(one)
            if entry is None:
                raise ConfigError(f"there is no task {one!r}; {_near(one, index)}")
            if entry.kind is Kind.TAG:
                for member in sorted(entry.tags):
                    visit(member, settings)
            elif entry.kind is Kind.GROUP:
                members(entry.cfg or {}, settings)
            else:
                found.append({**(entry.cfg or {}), **settings, "task": one})

        for one in self.find(name):
            visit(one, {})
        return found

    def running_code(self, names: Iterable[str]) -> list[str]:
        """Name the harness's tasks among these that run what a model writes, which some do as soon as they are loaded.

        Not looked into are YAML files and a user's own tasks.
        """
        files = (".yaml", ".yml", ".jsonl")
        known = [name for name in names if name not in self._own.task_index and not name.endswith(files)]
        return [leaf["task"] for name in known for leaf in self.leaves(name) if leaf.get("unsafe_code")]

    def find(self, name: str | Path) -> list[str]:
        """Find what a name, a pattern of names or the path of a YAML file stands for, without loading anything.

        Raises:
            ConfigError: There is no such task.
        """
        if isinstance(name, Path) or name.endswith((".yaml", ".yml")):
            path = user_path(name)
            if not path.is_file():
                raise ConfigError(f"there is no task file {path}")
            return [str(path)]
        if name in self._own.task_index:
            return [name]
        index = self.index
        if name in index:
            return [name]
        found: list[str] = self._complete().match_tasks([name])
        if not found:
            raise ConfigError(f"there is no task {name!r}; {_near(name, index)}")
        return found

    def _complete(self) -> TaskManager:
        """The library's and the user's tasks beside those of the harness, which take seconds to find."""
        if self._manager is None:
            own = dict(self._own.task_index)
            self._own.task_index.update({**_harness_index(), **own})
            self._own._all_tasks = sorted(self._own.task_index)
            self._manager = self._own
        return self._manager


@functools.cache
def _harness_index() -> dict[str, Entry]:
    with quiet_harness():
        return dict(TaskManager().task_index)


def _near(name: str, index: Mapping[str, Any]) -> str:
    near = suggestion(name, index)
    return near if near.startswith("did") else "engram-lm eval --list names all of them"


class _YamlTask(ConfigurableTask):
    """A task that a YAML file describes."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})


class _Factory(TaskFactory):
    """Makes tasks that read their data from a folder, or say in words why their data could not be had."""

    def __init__(self, data: Path | None) -> None:
        super().__init__()
        self._data = data

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        try:
            return super()._build_task(entry, overrides)
        except Exception as error:  # whatever a YAML file and the functions that it names may raise
            if isinstance(error, EngramError):
                raise
            raise ConfigError(f"cannot make the task {entry.name} ready: {error!r}; leave it out") from error

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if entry.kind in (Kind.TASK, Kind.PY_TASK):
            made_by = config.get("class", _YamlTask)
            config["class"] = type(made_by.__name__, (made_by,), {"download": _downloader(made_by, self._data)})
        return config


def _downloader(made_by: Any, data: Path | None) -> Any:
    def download(task: Any, *args: Any, **kwargs: Any) -> None:
        config = getattr(task, "_config", None)  # a class of Python loads its data before it has one
        name = getattr(config, "dataset_path", None) or task.DATASET_PATH
        configuration = getattr(config, "dataset_name", None) or task.DATASET_NAME
        generated = callable(getattr(config, "custom_dataset", None))
        if data is not None and name and not generated and name not in _FILE_READERS and not Path(name).is_absolute():
            task.dataset = task_data.load_dataset(data, name, configuration)
            _check_splits(task, config, name)
            return
        try:
            made_by.download(task, *args, **kwargs)
        except Exception as error:  # datasets and huggingface_hub raise errors of many kinds
            if isinstance(error, EngramError):
                raise
            raise DataError(
                f"the task {getattr(config, 'task', made_by.__name__)} reads the data set {name}"
                f"{f' ({configuration})' if configuration else ''}, which could not be loaded: {error}; without a "
                "network, name a folder that holds it with --task-data"
            ) from error

    return download


def _check_splits(task: Any, config: Any, name: str) -> None:
    """Refuse a data set without the questions; without the examples, note that there can be none."""
    if config is None:
        return
    asked = config.test_split or config.validation_split
    if asked is not None and asked not in task.dataset:
        raise DataError(f"the data set {name} has no split {asked!r} of questions, but {', '.join(task.dataset)}")
    for kind in ("training_split", "fewshot_split", "validation_split"):
        split = getattr(config, kind)
        if split is not None and split not in task.dataset:
            setattr(config, kind, None)
            if kind == "fewshot_split":
                task.fewshot_cfg.split = None
            # Examples that the task brings itself, or has a split of their own for, come before the training split.
            shown = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples is not None
            if kind == "fewshot_split" or (kind == "training_split" and not shown):
                task.missing_examples = f"the data set {name} has no split {split!r}"


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep what the harness says of names that two of its own files share from every command's standard error."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
