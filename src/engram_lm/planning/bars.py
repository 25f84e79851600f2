"""Bars in a terminal: where something goes, in characters that every terminal has."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def print_bars(
    console: "Console",
    title: str,
    values: Mapping[str, float],
    write: Callable[[float], str],
) -> None:
    """Draw a bar for each positive value, the longest first, with the value and its share of all of them.

    Args:
        console: Where to print; its width and characters are kept to.
        title: What is divided.
        values: Amounts by name, the parts of one whole without their sum; those that are not positive are left out.
        write: Writes an amount.
    """
    from rich.text import Text

    found = {name.replace("_", " "): value for name, value in values.items() if value > 0}
    if not found:
        return
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    total, most = sum(found.values()), max(found.values())
    names, amounts = max(map(len, found)), {name: write(value) for name, value in found.items()}
    width = max(map(len, amounts.values()))
    room = max(8, min(_LONGEST, console.width - names - width - 14))
    console.print(Text(title, style="italic"))
    for name, value in found.items():
        share = f"{value / total:6.1%}"
        bar = _bar(value / most, room, ascii_only=console.options.ascii_only)
        console.print(Text.assemble(f"  {name:<{names}}  {amounts[name]:>{width}} {share}  ", (bar, "cyan")))


def _bar(share: float, room: int, *, ascii_only: bool) -> str:
    """Draw a bar of up to ``room`` characters; anything but nothing is seen."""
    eighths = max(1, round(8 * room * share))
    whole, rest = divmod(eighths, 8)
    if ascii_only:
        return "#" * max(1, whole)
    return "█" * whole + _EIGHTHS[rest].strip()
