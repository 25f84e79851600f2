"""Every error the library raises on purpose, one tree.

Each message says what was expected, what was given and what to do. ``except EngramError`` catches all of them; the
second base class is what a caller who does not know this library would catch.
"""

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "EngramError",
    "HistoryError",
    "MismatchError",
    "MissingExtraError",
    "RemoteError",
    "RowRangeError",
    "RunFolderError",
    "TableClosedError",
    "TokenError",
    "TokenMapError",
    "check_flags",
    "check_whole",
    "closest",
    "suggestion",
]


class EngramError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(EngramError, ValueError):
    """A configuration that cannot be: missing, contradictory or impossible values."""


class TokenError(EngramError, ValueError):
    """A token id the vocabulary does not hold."""


class TokenMapError(EngramError, ValueError):
    """A tokenizer that does not give the canonical vocabulary that was promised, or none where one is needed."""


class MismatchError(EngramError, ValueError):
    """Two things built for different hashes, tokenizers or geometries."""


class RowRangeError(EngramError, IndexError):
    """A row number outside its table."""


class HistoryError(EngramError, RuntimeError):
    """Decode state asked for something it no longer holds."""


class TableClosedError(EngramError, RuntimeError):
    """A table used after ``close()``."""


class DataError(EngramError, ValueError):
    """Text that cannot be trained or evaluated on."""


class DivergedError(DataError):
    """Training whose loss or gradient is not finite any more."""


class CheckpointError(EngramError, ValueError):
    """Weights on disk that are missing, truncated, or of other names, types or shapes than their configuration says."""


class RunFolderError(EngramError, OSError):
    """A run folder that cannot be written or read."""


class RemoteError(EngramError, OSError):
    """A remote table that does not answer, or answers something else."""


class MissingExtraError(EngramError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


def closest(name: object, known: Iterable[object], *, cutoff: float = 0.6) -> str | None:
    """Find the known name that an unknown one is most like, at least by ``cutoff`` (0 to 1); None if there is none."""
    import difflib

    near = difflib.get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=cutoff)
    return near[0] if near else None


def suggestion(name: object, known: Iterable[object], *, prefix: str = "") -> str:
    """Say what an unknown name may have meant, for the end of an error's message.

    It is ``did you mean 'train'?``, with a prefix such as the section of a key, or ``there are train, eval, …``.
    """
    names = [str(one) for one in known]
    near = closest(name, names)
    return f"did you mean {prefix + near!r}?" if near else f"there are {', '.join(names)}"


def check_flags(command: object, *names: str) -> None:
    """Raise a `ConfigError` that names the first of some flags of a command whose number is below 1."""
    check_whole(**{f"--{name.replace('_', '-')}": getattr(command, name) for name in names})


def check_whole(*, at_least: int = 1, **numbers: int | None) -> None:
    """Raise a `ConfigError` that names the first number that is not whole, or smaller than ``at_least``.

    None stands for a number that was not given.
    """
    for name, value in numbers.items():
        if value is not None and (type(value) is not int or value < at_least):
            raise ConfigError(f"{name} is a whole number from {at_least}, got {value!r}")
