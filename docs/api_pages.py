"""Fills ``api.md``: one section for each folder of the package that exists, in the order in which data moves."""

import pathlib
from typing import Any

FOLDERS = (
    "hashing",
    "tables",
    "memory",
    "model",
    "adapt",
    "training",
    "serving",
    "evaluation",
    "analysis",
    "studies",
    "errors",
)
PACKAGE = pathlib.Path(__file__).parents[1] / "src" / "engram"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append a mkdocstrings block for every existing folder to the API page; leave other pages alone."""
    if page.file.src_uri != "api.md":
        return markdown
    exists = [
        name for name in FOLDERS if (PACKAGE / name / "__init__.py").exists() or (PACKAGE / f"{name}.py").exists()
    ]
    return markdown + "".join(f"\n## {name}\n\n::: engram.{name}\n" for name in exists)
