"""One arm of a study in a process of its own: ``python -m engram_lm.studies.arm_process RECIPE.toml RUN``.

It does what ``engram-lm train RECIPE.toml --out RUN --resume`` does, and notes it where training diverges.
"""

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram_lm.errors import DivergedError, EngramError
from engram_lm.files import write_atomically
from engram_lm.training.distribution import start
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.run import Run

__all__ = ["FAILED", "main", "note_divergence"]

FAILED = "failed.json"
"""The file of a run that says why training diverged."""


def note_divergence(run: Path, error: DivergedError) -> None:
    """Write down that training diverged, so that it is not tried again."""
    write_atomically(run / FAILED, json.dumps({"failed": str(error)}) + "\n")


def main(recipe_file: Path, run: Path) -> int:
    """Train one arm, or go on with it, on one thread.

    Returns:
        Exit status: 0 where it is finished or diverged, 130 after a signal, 1 after another error.
    """
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = Recipe.read(recipe_file)
    try:
        with start(None if recipe.train.device == "auto" else recipe.train.device) as ranks:
            progress = RunProgress(Console(stderr=True))
            result = Run(recipe, run, ranks, resume=True, progress=progress).execute()
    except DivergedError as error:
        note_divergence(run, error)
        return 0
    except (EngramError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 130 if result["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
