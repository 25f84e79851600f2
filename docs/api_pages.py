"""Fills ``api.md``: one section for each folder that exists, and the files of training, in the order of the data."""

import pathlib
from typing import Any

FOLDERS = (
    "hashing",
    "tables",
    "memory",
    "model",
    "adapt",
    "training",
    "training.data.packing",
    "training.data.batches",
    "training.distribution",
    "training.optimizers",
    "training.schedules",
    "training.loop",
    "training.checkpoints",
    "training.checkpoints.training_state",
    "training.recipe",
    "training.base_model",
    "training.job",
    "training.run",
    "training.huggingface",
    "training.table_gradients",
    "serving",
    "evaluation",
    "analysis",
    "studies",
    "errors",
)
PACKAGE = pathlib.Path(__file__).parents[1] / "src" / "engram_lm"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append a mkdocstrings block for every existing folder to the API page; leave other pages alone."""
    if page.file.src_uri != "api.md":
        return markdown
    exists = [name for name in FOLDERS if _is_there(PACKAGE.joinpath(*name.split(".")))]
    return markdown + "".join(f"\n## {name}\n\n::: engram_lm.{name}\n" for name in exists)


def _is_there(path: pathlib.Path) -> bool:
    return (path / "__init__.py").exists() or path.with_suffix(".py").exists()
