"""What memory does inside, as a section of the page: which rows are in use, and how far the gates open."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_lm.page.frame import Html, section, table
from engram_lm.page.number_text import count_text, mean_of, number_text
from engram_lm.studies.adaptation.finding import arm_title

__all__ = ["diagnostics_section"]

_COLLISIONS = {
    "num_tokens": "Tokens counted",
    "rows_hit": "Rows read",
    "ngrams_per_row": "N-grams per row read",
    "shared": "Rows shared",
    "shared_positions": "Reads of shared rows",
}
_GATES = {
    "mean": "Mean",
    "p10": "10th percentile",
    "p50": "Median",
    "p90": "90th percentile",
    "share_above_half": "Above a half",
}

Arms = Mapping[str, Sequence[Mapping[str, Any]]]
"""For every arm, by its title, its runs."""


def diagnostics_section(result: Mapping[str, Any]) -> str:
    """Lay out occupancy, collisions and gates of every arm with memory, by block.

    Args:
        result: A result in the format ``engram.adaptation.1``.

    Returns:
        A section of the page; nothing where no run has any of them.
    """
    arms = {arm_title(arm, name): arm.get("runs") or () for name, arm in (result.get("arms") or {}).items()}
    tables = [_row_use(arms), _gates(arms)]
    if not any(tables):
        return ""
    return section(
        "diagnostics",
        "Inside the memory",
        "<p>Means over seeds. <em>Occupancy</em> is the share of rows that training has touched; rows are "
        "<em>shared</em> where two N&#8209;grams of the domain or more read them. A gate of 0 lets nothing of what was "
        "looked up into the model, 1 all of it; the bar goes from the 10th to the 90th percentile over held-out text, "
        "with a mark at the median. Blocks are counted from 0.</p>" + "\n".join(tables),
    )


def _row_use(arms: Arms) -> str:
    rows = []
    for title, runs in arms.items():
        for block in _blocks(runs, ("occupancy", "collisions")):
            share = mean_of(_number((run.get("occupancy") or {}).get(block)) for run in runs)
            counted = {key: _mean_in_block(runs, "collisions", block, key) for key in _COLLISIONS}
            cells = [_percent(value) if key.startswith("shared") else _amount(value) for key, value in counted.items()]
            rows.append([title, block, _percent(share), *cells])
    columns = ("Rows", "Block", "Occupancy", *_COLLISIONS.values())
    return table(columns, rows, label="Use of rows by block", kind="arms") if rows else ""


def _gates(arms: Arms) -> str:
    rows = []
    for title, runs in arms.items():
        for block in _blocks(runs, ("gates",)):
            gate = {key: _mean_in_block(runs, "gates", block, key) for key in _GATES}
            cells = [_percent(value) if key.startswith("share") else number_text(value) for key, value in gate.items()]
            rows.append([title, block, *cells, _gate_range(gate)])
    columns = ("Gates", "Block", *_GATES.values(), "From 0 to 1")
    return table(columns, rows, label="Gates by block", kind="arms") if rows else ""


def _gate_range(gate: Mapping[str, float | None]) -> Html:
    """A bar from the 10th to the 90th percentile of a gate, between 0 and 1, with a mark at the median."""
    low, middle, high = (min(1.0, max(0.0, gate.get(name) or 0.0)) * 100 for name in ("p10", "p50", "p90"))
    return Html(
        '<svg class="gate-range" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<path d="M0 5H100" stroke="var(--line)" stroke-width="2"/>'
        f'<path d="M{low:.1f} 5H{high:.1f}" stroke="currentColor" stroke-width="4"/>'
        f'<path d="M{middle:.1f} 0V10" stroke="var(--ink)" stroke-width="1"/></svg>'
    )


def _blocks(runs: Iterable[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    found = {block for run in runs for kind in kinds for block in run.get(kind) or {}}
    return sorted(found, key=lambda block: (len(str(block)), str(block)))


def _mean_in_block(runs: Iterable[Mapping[str, Any]], kind: str, block: str, key: str) -> float | None:
    return mean_of(_number(((run.get(kind) or {}).get(block) or {}).get(key)) for run in runs)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _percent(share: float | None) -> str:
    return number_text(None if share is None else share * 100, 1) + ("" if share is None else " %")


def _amount(value: float | None) -> str:
    return number_text(value) if isinstance(value, float) and value < 1000 and value % 1 else count_text(value)
