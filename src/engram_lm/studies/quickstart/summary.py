"""The result of a quickstart in words and rows, for the terminal and for the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from engram_lm.page.number_text import NOTHING, count_text, mean_of, number_text, signed_text, spread_text
from engram_lm.studies.summary import ENOUGH_SEEDS, paired_difference

MEMORY, TWIN = "memory", "twin"
"""Names of the model with memory and of its memory-less twin."""

COLUMNS = (
    "Held-out loss",
    "Perplexity",
    "Gain over twin",
    "Backbone",
    "Vocabulary",
    "Memory layers",
    "Memory tables",
    "Total parameters",
    "Active FLOPs per token",
    "Tokens/s",
    "Minutes",
)
"""What is said of every arm, in order; `arm_rows` gives a cell for each. Loss and gain are in nats per token."""


def headline(result: Mapping[str, Any]) -> tuple[str, str]:
    """Say which model predicts held-out text better, and by how much, whichever it is; then the numbers behind it."""
    arms, difference = result["arms"], result.get("difference") or {}
    mean, spread = difference.get("mean"), difference.get("std")
    if mean is None or not {MEMORY, TWIN} <= arms.keys():
        known = {arm["title"]: spread_text(arm["loss"]["mean"], arm["loss"]["std"]) for arm in arms.values()}
        losses = [f"{title}: {loss} nats per token" for title, loss in known.items()]
        return "No comparison yet", "; ".join(losses) or "No model was evaluated."
    amount = f"{abs(mean):.3f} nats per token"
    wins, seeds = sum(value > 0 for value in difference["per_seed"]), len(difference["per_seed"])
    if amount.startswith("0.000"):
        title = "Memory made no difference to the held-out loss"
    elif 0 < wins < seeds:
        title = f"The seeds disagree: memory wins {wins} of {seeds}"
    elif mean > 0:
        title = f"Memory lowers the held-out loss by {amount}"
    else:
        title = f"Memory did not help: it raises the held-out loss by {amount}"
    ours, theirs = (number_text(_mean(arms[name], "perplexity")) for name in (MEMORY, TWIN))
    detail = f"Perplexity {ours} with memory, {theirs} without. "
    if spread is None:
        return title, f"{detail}One seed, so how much of this is chance is not known."
    detail += f"Twin minus memory is {signed_text(mean)} ± {spread:.3f} nats per token (mean ± standard deviation over "
    p_value = difference.get("p_value")
    sure = "" if p_value is None or seeds < ENOUGH_SEEDS else f"; p = {p_value:.2g}, paired t-test"
    return title, f"{detail}{seeds} seeds{sure})."


def arm_rows(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Describe every arm: its title, and one cell for each of `COLUMNS`. Numbers are means over the seeds."""
    twin = _losses(result["arms"].get(TWIN, {"runs": ()}))
    rows = []
    for name, arm in result["arms"].items():
        gain, minutes = paired_difference(twin, _losses(arm)), _mean(arm, "seconds")
        kinds = ("backbone", "vocabulary", "memory_layers", "memory_tables", "total")
        cells = [
            spread_text(arm["loss"]["mean"], arm["loss"]["std"]),
            number_text(_mean(arm, "perplexity")),
            NOTHING if name == TWIN else spread_text(gain["mean"], gain["std"], signed=True),
            *(count_text(arm["parameters"].get(kind)) for kind in kinds),
            count_text(arm.get("flops_per_token")),
            count_text(_mean(arm, "tokens_per_second")),
            number_text(None if minutes is None else minutes / 60),
        ]
        rows.append((str(arm["title"]), cells))
    return rows


def run_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Describe every run: arm, seed, tokens, held-out loss, perplexity, bits per byte, tokens per second, minutes."""
    return [
        [
            str(arm["title"]),
            str(run["seed"]),
            count_text(run.get("tokens")),
            number_text(run.get("loss"), 4),
            number_text(run.get("perplexity")),
            number_text(run.get("bits_per_byte"), 4),
            count_text(run.get("tokens_per_second")),
            number_text(run["seconds"] / 60 if run.get("seconds") is not None else None),
        ]
        for arm in result["arms"].values()
        for run in arm["runs"]
    ]


def terminal_table(result: Mapping[str, Any]) -> Table:
    """Lay the arms side by side, a line for each of `COLUMNS`, which fits a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, title=Text(headline(result)[0], style="bold"), title_justify="left")
    table.add_column("")
    rows = arm_rows(result)
    for title, _ in rows:
        table.add_column(Text(title), justify="right")
    for index, column in enumerate(COLUMNS):
        # Text, not markup: titles come from a file.
        table.add_row(column, *(Text(cells[index]) for _, cells in rows))
    return table


def last_words(result: Mapping[str, Any], out: Path) -> str:
    """Say what came out in a sentence, and what to do with the run folder, which ``out`` names as the user did."""
    gain, std = result["difference"]["mean"], result["difference"]["std"]
    spread = "" if std is None else f" ± {std:.3f} over {len(result['seeds'])} seeds"
    stopped = ""
    if result["interrupted"]:
        whole = result["arms"][MEMORY]["runs"][0]["num_steps"] == result["settings"]["num_steps"]
        stopped = f"only {len(result['seeds'])} seeds" if whole else "both models stopped at the same step"
        stopped = f" (interrupted: {stopped})"
    return (
        f"Held-out loss is {abs(gain):.3f}{spread} nats per token {'lower' if gain > 0 else 'higher'} with memory"
        f"{stopped}, in {result['seconds'] / 60:.1f} minutes.\n"
        f"  look:     {out}/report.html\n"
        f"  continue: engram-lm generate {out} --prompt 'def main'\n"
        f"  evaluate: engram-lm eval {out} --data FILES"
    )


def _losses(arm: Mapping[str, Any]) -> dict[int, float | None]:
    return {run["seed"]: run.get("loss") for run in arm["runs"]}


def _mean(arm: Mapping[str, Any], key: str) -> float | None:
    return mean_of(run.get(key) for run in arm["runs"])
