"""Where text comes from, as recipes and commands say it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from engram_lm.errors import ConfigError, suggestion
from engram_lm.files import user_path

Kind = Literal["auto", "text", "jsonl", "parquet", "dataset"]

STANDARD_LIBRARY = "python:standard-library"
"""Path of the default source: the Python standard library's own sources on this machine, ``*.py`` without tests."""
HUB = "hf://"
"""Prefix of a path that names a dataset of the Hugging Face hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from, as a recipe says it: a string (its path) or a table of these fields."""

    path: str
    """A file, a folder that is searched through, a pattern such as ``data/*.json.gz``, ``hf://owner/name`` for a
    dataset of the Hugging Face hub, or ``python:standard-library`` for the Python standard library's own sources. A
    path may begin with ``~``; a relative one counts from the folder the command is called in."""
    kind: Kind = "auto"
    """What it is. ``auto`` goes by the name, and by what a file begins with where the name leaves it open: ``.jsonl``
    and ``.ndjson`` are JSON lines; ``.json`` and files without an ending are that where they hold it, or an array of
    objects with the ``field``; Parquet is known by any name; a folder written by ``save_to_disk`` is a dataset; other
    files are plain text, one document each. All may be packed with gzip. Of a folder, ``text`` reads every file as
    plain text, ``jsonl`` and ``parquet`` read those that are it, by their names or by what they begin with."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet file or dataset, that holds the text."""
    split: str = "train"
    """Split of a dataset."""
    name: str | None = None
    """Configuration of a dataset of the hub, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a dataset of the hub."""
    streaming: bool = False
    """Read a dataset while it is downloaded, without keeping it on disk."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"path of a data source is a file, a folder or hf://owner/name, got {self.path!r}")
        object.__setattr__(self, "path", str(user_path(self.path)) if self.path.startswith("~") else self.path)
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind of {self.path} is one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not self.field or not self.split:
            raise ConfigError(f"field and split of {self.path} are names, got {self.field!r} and {self.split!r}")
        if self.path.startswith(HUB) and self.kind not in ("auto", "dataset"):
            raise ConfigError(f"{self.path} is a dataset of the hub, so its kind is dataset, not {self.kind}")
        if self.path == STANDARD_LIBRARY and self.kind not in ("auto", "text"):
            raise ConfigError(f"{self.path} is plain text, so its kind is text, not {self.kind}")
        changed = [name for name in ("name", "revision", "streaming") if getattr(self, name) not in (None, False)]
        if changed and not self.is_dataset():
            raise ConfigError(
                f"{', '.join(changed)} belong to datasets, {self.path} is none; write hf://owner/name for one of the "
                "hub, or kind = 'dataset' for one on this machine"
            )

    @classmethod
    def of(cls, value: "str | os.PathLike[str] | Mapping[str, Any] | TextSource") -> "TextSource":
        """Make a source from what a recipe holds: a path, or a table of fields, none of which may be unknown."""
        if isinstance(value, TextSource):
            return value
        if isinstance(value, str | os.PathLike):
            return cls(path=os.fspath(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"a data source is a path or a table with a path, got {value!r:.200}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(f"a data source has no field {key!r}; {suggestion(key, known)}")
        if "path" not in value:
            raise ConfigError(f"a data source needs a path, got only {', '.join(map(str, value)) or 'an empty table'}")
        return cls(**value)

    def is_dataset(self) -> bool:
        """Whether the ``datasets`` package reads it."""
        return self.kind == "dataset" or self.path.startswith(HUB) or (self.kind == "auto" and is_saved(self.path))


Sources = Iterable[str | os.PathLike[str] | Mapping[str, Any] | TextSource]


def name_sources(sources: Sources) -> str:
    """Name sources for people, such as ``"notes, books and 3 more"``."""
    given = [TextSource.of(source).path for source in sources] or [STANDARD_LIBRARY]
    names = [
        "the Python standard library" if path == STANDARD_LIBRARY else os.path.basename(path.rstrip("/")) or path
        for path in given
    ]
    return printable(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


def printable(name: str) -> str:
    """A file name as text, whatever its bytes are."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_saved(path: str) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
