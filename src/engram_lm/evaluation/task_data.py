"""Data sets of tasks from a folder, for machines without a network and for data that cannot be downloaded.

A task reads a data set by its name on the Hugging Face Hub and, where there are several, a configuration:
``cais/mmlu``, ``anatomy``. In the folder it is the first of these that exists::

    cais/mmlu/anatomy    mmlu/anatomy    cais/mmlu    mmlu

each of which may be

- a folder that ``save_to_disk`` of ``datasets`` wrote, or one such folder for each split;
- a folder of data files named by split, as in ``test.jsonl`` or ``test-00000-of-00001.parquet`` (JSON lines, Parquet
  or Arrow), or a copy of a data set's repository.

Data of another name is given the expected one by a symbolic link. Code in a folder is never run.
"""

import os
from pathlib import Path
from typing import Any

from engram_lm.errors import DataError
from engram_lm.files import user_path

_STATE = "state.json"
"""The file that every split written by ``save_to_disk`` has."""


def find_dataset(folder: Path, name: str, configuration: str | None) -> Path | None:
    """Find the folder of a data set; None if there is none."""
    return next((place for place in _places(folder, name, configuration) if place.is_dir()), None)


def load_dataset(folder: str | os.PathLike[str], name: str, configuration: str | None = None) -> Any:
    """Load a data set, a ``datasets.DatasetDict`` by split.

    Args:
        folder: The folder of all data sets.
        name: The data set's name on the Hub.
        configuration: Which part of it; None for all.

    Raises:
        DataError: It is not there, or cannot be read; the message names the places where it may be.
    """
    import datasets

    root = user_path(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder of data sets {root}")
    place = find_dataset(root, name, configuration)
    if place is None:
        tried = ", ".join(str(one.relative_to(root)) for one in _places(root, name, configuration))
        raise DataError(
            f"the data set {name!r}{f' ({configuration})' if configuration else ''} is not in {root}; put it into one "
            f"of the folders {tried} there, as save_to_disk of datasets writes it or as files such as test.jsonl"
        )
    try:
        if (place / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(place))
        if (place / _STATE).is_file():
            one = datasets.load_from_disk(str(place))
            return datasets.DatasetDict({str(one.split or "test"): one})
        splits = sorted(one for one in place.iterdir() if (one / _STATE).is_file())
        if splits:
            return datasets.DatasetDict({one.name: datasets.load_from_disk(str(one)) for one in splits})
        try:
            return datasets.load_dataset(str(place), configuration)
        except ValueError:  # It has no such configuration, being the folder of this configuration itself.
            return datasets.load_dataset(str(place))
    except Exception as error:  # datasets and pyarrow raise errors of many kinds for a file that is not what it seems
        raise DataError(f"cannot read the data set {name!r} from {place}: {error}") from error


def _places(root: Path, name: str, configuration: str | None) -> list[Path]:
    names = [name, name.rsplit("/", 1)[-1]]
    parts = [configuration] if configuration else ["default", "none"]
    places = [root / one / part for one in names for part in parts] + [root / one for one in names]
    return [place for place in dict.fromkeys(places) if ".." not in place.parts]
