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
    *,
    full: float | None = None,
) -> None:
    """Draw a bar for each positive value.

    Args:
        console: Where to print; its width and characters are kept to.
        title: What is divided, or compared.
        values: Amounts by name; those that are not positive are left out. Where ``full`` is None they are the parts of
            one whole, without their sum: the largest comes first, and each has its share of all of them behind it.
        write: Writes an amount.
        full: What a bar of full length stands for, where the values are no parts of a whole. They stay in their order.
    """
    from rich.text import Text

    found = {name.replace("_", " "): value for name, value in values.items() if value > 0}
    if not found:
        return
    if full is None:
        found = dict(sorted(found.items(), key=lambda item: -item[1]))
    total, most = sum(found.values()), max(found.values()) if full is None else full
    names, amounts = max(map(len, found)), {name: write(value) for name, value in found.items()}
    width = max(map(len, amounts.values()))
    room = max(8, min(_LONGEST, console.width - names - width - 14))
    console.print(Text(title, style="italic"))
    for name, value in found.items():
        share = f" {value / total:6.1%}" if full is None else ""
        bar = _bar(value / most, room, ascii_only=console.options.ascii_only)
        console.print(Text.assemble(f"  {name:<{names}}  {amounts[name]:>{width}}{share}  ", (bar, "cyan")))


def _bar(share: float, room: int, *, ascii_only: bool) -> str:
    """Draw a bar of up to ``room`` characters; anything but nothing is seen."""
    eighths = max(1, round(8 * room * share))
    whole, rest = divmod(eighths, 8)
    if ascii_only:
        return "#" * max(1, whole)
    return "█" * whole + _EIGHTHS[rest].strip()
