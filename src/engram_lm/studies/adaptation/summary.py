"""The arms of an adaptation in rows: for the terminal, for Markdown and for the page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engram_lm.page.number_text import NOTHING, count_text, number_text
from engram_lm.studies.adaptation.finding import (
    arm_runs,
    arm_title,
    finite_loss,
    forgetting,
    headline,
    loss_before,
    losses,
    values_text,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COLUMNS", "RUN_COLUMNS", "arm_rows", "markdown_table", "run_rows", "terminal_table"]

COLUMNS = (
    "Model",
    "Domain loss",
    "Change on old text",
    "Domain loss, memory off",
    "Domain loss, rows shuffled",
    "Trainable outside tables",
    "Trainable in tables",
    "Tokens",
    "Training FLOPs",
)
"""What is said of the base and of every arm, in order. Losses are in nats per token."""

RUN_COLUMNS = (
    "Model",
    "Seed",
    "Learning rate",
    "Domain loss",
    "Perplexity",
    "Bits per byte",
    "Old text loss",
    "Minutes",
)
"""What is said of every run, in order."""

_TERMINAL_COLUMNS = {
    "Domain loss": "Domain loss",
    "Change on old text": "On old text",
    "Domain loss, memory off": "Memory off",
    "Domain loss, rows shuffled": "Rows shuffled",
    "Trainable outside tables": "Trainable",
    "Trainable in tables": "In tables",
}
"""Columns of a terminal, and what they are called there."""
_ONLY_MEANS = ("Domain loss, memory off", "Domain loss, rows shuffled")


def arm_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Describe the base and every arm: a cell for each of `COLUMNS`, means over seeds with their standard deviation."""
    unchanged = NOTHING if loss_before(result, "retained") is None else "0.000"
    base = number_text(loss_before(result, "domain"), 3)
    rows = [["Base, untouched", base, unchanged, NOTHING, NOTHING, "0", "0", "0", "0"]]
    for name, arm in (result.get("arms") or {}).items():
        runs, found = arm_runs(arm), list(losses(arm).values())
        domain = values_text(found)
        if not found:
            domain = "no finite loss" if runs else "not run"
        elif len(found) < len(runs):
            domain += f" ({len(found)} of {len(runs)} seeds)"
        trainable, outside = arm.get("num_trainable"), arm.get("num_trainable_outside_tables")
        without = [
            [loss for run in runs if (loss := finite_loss((run.get(kind) or {}).get("domain"))) is not None]
            for kind in ("memory_off", "rows_shuffled")
        ]
        counts = [
            outside,
            None if trainable is None or outside is None else trainable - outside,
            arm.get("num_tokens"),
            arm.get("training_flops"),  # with those of the hidden states that rows were made of
        ]
        change = values_text(list(forgetting(result, arm).values()), signed=True)
        rows.append([arm_title(arm, name), domain, change, *map(values_text, without), *map(count_text, counts)])
    return rows


def run_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Describe every run: a cell for each of `RUN_COLUMNS`."""
    rows = []
    for name, arm in (result.get("arms") or {}).items():
        for run in arm_runs(arm):
            domain, seconds, rate = run.get("domain") or {}, run.get("seconds"), run.get("lr", arm.get("lr"))
            rows.append(
                [
                    arm_title(arm, name),
                    str(run.get("seed")),
                    NOTHING if rate is None else f"{rate:.3g}",
                    number_text(domain.get("loss"), 4),
                    number_text(domain.get("perplexity")),
                    number_text(domain.get("bits_per_byte"), 4),
                    number_text((run.get("retained") or {}).get("loss"), 4),
                    number_text(None if seconds is None else seconds / 60),
                ]
            )
    return rows


def terminal_table(result: Mapping[str, Any]) -> "Table":
    """Lay the arms out, a line each, so that it fits a terminal of 80 columns.

    Tokens and FLOPs are left to `markdown_table` and the page, and columns that no arm fills are left out.

    Args:
        result: A result in the format ``engram.adaptation.1``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [dict(zip(COLUMNS, row, strict=True)) for row in arm_rows(result)]
    columns = [column for column in _TERMINAL_COLUMNS if any(row[column] != NOTHING for row in rows)]
    title = Text(headline(result).title, style="bold")
    # A space between columns is the box's own.
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for column in columns:
        # Headings may break between words, numbers may not.
        table.add_column(_TERMINAL_COLUMNS[column].replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in rows:
        cells = [row[column].partition(" ±")[0] if column in _ONLY_MEANS else row[column] for column in columns]
        # Text, not markup: titles come from a file.
        table.add_row(*map(Text, [row["Model"], *cells]))
    return table


def markdown_table(result: Mapping[str, Any]) -> str:
    """Write all of `COLUMNS` for the base and every arm as a Markdown table, ending in a line break."""
    lines: list[Sequence[str]] = [COLUMNS, (":--", *["--:"] * (len(COLUMNS) - 1)), *arm_rows(result)]
    return "".join(f"| {' | '.join(map(_markdown, line))} |\n" for line in lines)


def _markdown(cell: str) -> str:
    # A title comes from a file: neither a cell of its own, nor a line, nor markup.
    text = " ".join(cell.split())
    return "".join(f"\\{sign}" if sign in "\\|`*_<>[]" and cell not in (":--", "--:") else sign for sign in text)
