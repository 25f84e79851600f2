"""Diagnostics as tables of text, for the terminal and for pages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engram_lm.page.number_text import NOTHING, count_text, number_text, signed_text

DIVISIONS = ("rare_words", "token_frequency", "ngrams_2", "ngrams_3")
"""What a page shows."""


def columns(found: Mapping[str, Any]) -> list[str]:
    """Return the headings of `rows`, for a `Diagnostics.to_dict`."""
    first, *others = found["models"]
    return ["", "tokens", f"bits, {first}", "per byte", *(f"{name}, more" for name in others)]


def rows(found: Mapping[str, Any], divisions: Sequence[str] | None = None) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the title of each division, empty for all tokens together, and a row for each of its groups.

    ``divisions`` names some; all where None.

    A row holds the group's name, its tokens, the first model's bits per token and per byte, and for every other model
    the bits per token above that.
    """
    yield "", [_row(found["total"])]
    for name, division in found["divisions"].items():
        if divisions is None or name in divisions:
            yield division["title"], [_row(group) for group in division["groups"]]


def about(found: Mapping[str, Any]) -> str:
    """Say what the numbers mean, in some sentences."""
    where = (
        f"in {found['reference']}, {count_text(found['reference_tokens'])} tokens"
        if found["reference"]
        else "elsewhere in the evaluated text (in its other documents, if there are several)"
    )
    errors = (
        f"Errors are standard errors over {found['num_blocks']:,} {found['blocks']}; those of differences are paired."
        if found["num_blocks"] > 1
        else "The text is too short for standard errors."
    )
    return (
        f"Occurrences are counted {where}; a word that occurs there fewer than {found['rare_below']} times is rare. It "
        "is near where the model still sees an earlier occurrence in the document, and far where it does not. " + errors
    )


def _row(group: Mapping[str, Any]) -> list[str]:
    first, *others = group["bits"].values()
    differences = [_with_error(signed_text, one["more"], one["more_error"]) for one in others]
    return [
        group["name"],
        f"{group['num_tokens']:,}",
        _with_error(lambda value: number_text(value, 3), first["per_token"], first["error"]),
        number_text(first["per_byte"], 3),
        *differences,
    ]


def _with_error(text: Any, value: float | None, error: float | None) -> str:
    if value is None:
        return NOTHING
    return text(value) + ("" if error is None else f" ± {error:.3f}")


def print_diagnostics(found: Mapping[str, Any]) -> None:
    """Print a `Diagnostics.to_dict` on the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, caption=about(found), caption_justify="left")
    for index, column in enumerate(columns(found)):
        shown.add_column(Text(column), justify="right" if index else "left")
    for title, some in rows(found):
        if title:
            shown.add_section()
            shown.add_row(Text(title, style="bold"))
        for row in some:
            shown.add_row(*map(Text, row))
    Console().print(shown)
