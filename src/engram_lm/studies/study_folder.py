"""The folder of a study that can be gone on with: one mark says what its finished models depend on."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import MismatchError, RunFolderError
from engram_lm.files import read_json, write_atomically
from engram_lm.training.run_folder import hold_folder, to_json

__all__ = ["take_folder"]

_MARK = "study.json"


@contextlib.contextmanager
def take_folder(
    out: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    may_change: Sequence[str] = (),
    decided_by: str = "options",
) -> Iterator[None]:
    """Hold a folder as this study's inside a ``with`` block; see `hold_folder`.

    Args:
        out: The folder.
        settings: What the finished models depend on, as JSON can hold it.
        resume: Whether a study that is there is gone on with.
        may_change: Settings that may be others than those it was begun with.
        decided_by: What settings come from, for the message.

    Raises:
        RunFolderError: It is something else's, holds a study already, is damaged or cannot be written, or another
            process works in it.
        MismatchError: It was begun with other settings.
    """
    with hold_folder(out, _MARK, kind="a study", work="at work") as known:
        if known and not resume:
            raise RunFolderError(
                f"{out} holds a study already; go on with it with --resume, or name another folder with --out"
            )
        if known:
            earlier = read_json(out / _MARK, error=RunFolderError, advice="name another folder with --out")
            now = json.loads(json.dumps(settings))
            if {**earlier, **{name: now[name] for name in may_change}} != now:
                raise MismatchError(
                    f"{out} was begun with other {decided_by} (see {_MARK} there); give the same ones, or name another "
                    "folder with --out"
                )
        write_atomically(out / _MARK, to_json(settings))
        yield
