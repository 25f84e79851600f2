"""The folder of a study that can be gone on with: one mark says what its finished models depend on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import MismatchError, RunFolderError
from engram_lm.files import write_atomically
from engram_lm.training.run_folder import to_json

__all__ = ["take_folder"]

_MARK = "study.json"


def take_folder(
    out: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    may_change: Sequence[str] = (),
    decided_by: str = "options",
) -> None:
    """Make a folder this study's, or find that it is.

    Args:
        out: The folder.
        settings: What the finished models depend on, as JSON can hold it.
        resume: Whether a study that is there is gone on with.
        may_change: Settings that may be others than those it was begun with.
        decided_by: What settings come from, for the message.

    Raises:
        RunFolderError: It is something else's, holds a study already, is damaged or cannot be written.
        MismatchError: It was begun with other settings.
    """
    mark = out / _MARK
    try:
        if mark.is_file():
            if not resume:
                raise RunFolderError(
                    f"{out} holds a study already; go on with it with --resume, or name another folder with --out"
                )
            try:
                earlier = json.loads(mark.read_bytes())
            except ValueError as error:
                raise RunFolderError(f"{mark} is damaged ({error}); name another folder with --out") from error
            now = json.loads(json.dumps(settings))
            if not isinstance(earlier, dict) or {**earlier, **{name: now[name] for name in may_change}} != now:
                raise MismatchError(
                    f"{out} was begun with other {decided_by} (see {_MARK} there); give the same ones, or name another "
                    "folder with --out"
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunFolderError(
                f"{out} exists and is no study (it has no {_MARK}), so it is left alone; name another folder with --out"
            )
        write_atomically(mark, to_json(settings))
    except RunFolderError:  # an OSError too, that has said what is wrong
        raise
    except OSError as error:
        raise RunFolderError(f"cannot write to {out}: {error}; name another folder with --out") from error
