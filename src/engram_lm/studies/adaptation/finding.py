"""What an adaptation found: losses seed by seed, differences that are more than chance, one sentence, and tables.

A result is one in the format ``engram.adaptation.1``, in which arms, numbers and texts may be missing or not finite.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from engram_lm.page.number_text import NOTHING, count_text, mean_of, number_text, spread_of, spread_text
from engram_lm.studies.summary import paired_difference

COLUMNS = (
    "Model",
    "Domain loss",
    "Change on old text",
    "Benchmarks kept",
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
    "Benchmarks kept": "Benchmarks",
    "Domain loss, memory off": "Memory off",
    "Trainable outside tables": "Trainable",
    "Trainable in tables": "In tables",
}
"""Columns of a terminal, and what they are called there."""
_ONLY_MEANS = ("Domain loss, memory off",)
# What memory has to beat, the most telling first: the same compute without memory, then memory that cannot learn.
_RIVALS = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "random_table": "a random table",
    "permuted_hash": "a permuted hash",
}
_SPREADS = 2.0
"""Standard deviations over seeds that a difference must exceed to be called one."""


class Headline(NamedTuple):
    """What came out."""

    title: str
    """The finding, in a sentence."""
    detail: str
    """The numbers behind it."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of losses, in nats per token, between two arms of the same seeds."""

    mean: float
    spread: float | None
    """Standard deviation of the difference over seeds; None of one seed."""
    num_seeds: int

    @property
    def verdict(self) -> str:
        """``"lower"``, ``"higher"``, ``"equal"`` (no difference beyond the spread), or ``"unknown"`` (one seed)."""
        if f"{abs(self.mean):.3f}" == "0.000":
            return "equal"
        if self.spread is None:
            return "unknown"
        if abs(self.mean) <= _SPREADS * self.spread:
            return "equal"
        return "lower" if self.mean < 0 else "higher"

    @property
    def text(self) -> str:
        """The mean with its sign, and the spread."""
        return spread_text(self.mean, self.spread, signed=True)


def losses(arm: Mapping[str, Any], text: str = "domain", *, kind: str | None = None) -> dict[Any, float]:
    """Final loss of an arm on ``"domain"`` or ``"retained"`` text in nats per token, for every seed that has one.

    ``kind`` names another measurement of the trained model, such as ``"memory_off"``.
    """
    found = {}
    for run in arm_runs(arm):
        loss = finite_loss((run if kind is None else run.get(kind) or {}).get(text))
        if loss is not None:
            found[run.get("seed")] = loss
    return found


def forgetting(result: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[Any, float]:
    """By how much the loss on the old text rose, for every seed, in nats per token; empty where not measured."""
    found = {run.get("seed"): change_on_old_text(result, run) for run in arm_runs(arm)}
    return {seed: change for seed, change in found.items() if change is not None}


def compare(result: Mapping[str, Any], name: str, other: str, text: str = "domain") -> Difference | None:
    """Loss of one arm minus that of another, or of ``"base"``, seed by seed; None where no seed has both."""
    arms = result.get("arms") or {}
    own = losses(arms.get(name) or {}, text)
    if other == "base":
        theirs = dict.fromkeys(own, loss_before(result, text))
    else:
        theirs = dict(losses(arms.get(other) or {}, text))
    found = paired_difference(own, theirs)
    return None if found["mean"] is None else Difference(found["mean"], found["std"], len(found["per_seed"]))


def change_on_old_text(result: Mapping[str, Any], entry: Mapping[str, Any], name: str | None = None) -> float | None:
    """By how much a run raised the loss on the old text, or on one text of it, in nats per token; None if unknown."""
    before: Any = (result.get("before") or {}, entry)
    old, new = (one.get("retained") if name is None else (one.get("texts") or {}).get(name) for one in before)
    old_loss, new_loss = finite_loss(old), finite_loss(new)
    return None if old_loss is None or new_loss is None else new_loss - old_loss


def share_kept(result: Mapping[str, Any], entry: Mapping[str, Any], name: str | None = None) -> float | None:
    """What share of the base's benchmark scores a run has kept: the mean over benchmarks, or of one; None if unknown.

    Above 1 the model answers better than the base did. Benchmarks where a lower score is better, such as perplexities,
    have no such share and are left out.
    """
    before = (result.get("before") or {}).get("tasks") or {}
    after = entry.get("tasks") or {}
    shares = [
        after[task]["value"] / before[task]["value"]
        for task in before
        if name in (None, task) and task in after and before[task]["value"] and _is_share(before[task])
    ]
    return mean_of(shares)


def kept_columns(result: Mapping[str, Any]) -> list[str]:
    """The columns of `kept_rows`: old texts and benchmarks, by name."""
    before = result.get("before") or {}
    return ["Model", *(before.get("texts") or {}), *(before.get("tasks") or {})]


def kept_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Say text by text how the loss changed, and benchmark by benchmark what is scored: the base, then every arm."""
    before = result.get("before") or {}
    texts, tasks = before.get("texts") or {}, before.get("tasks") or {}
    scores = [
        f"{_score_text(task, task.get('value'))} ± {_score_text(task, task.get('stderr'))}" for task in tasks.values()
    ]
    rows = [["Base, untouched", *(number_text(finite_loss(text), 3) for text in texts.values()), *scores]]
    for name, arm in (result.get("arms") or {}).items():
        runs = arm_runs(arm)
        changes = [[change_on_old_text(result, run, text) for run in runs] for text in texts]
        cells = [_values_text(_known(change), signed=True) for change in changes]
        for task, before_it in tasks.items():
            found = [(run.get("tasks") or {}).get(task) or {} for run in runs]
            cells.append(_score_text(before_it, mean_of(one.get("value") for one in found)))
        rows.append([arm_title(arm, name), *cells])
    return rows


def _known(values: Sequence[float | None]) -> dict[int, float]:
    return {place: value for place, value in enumerate(values) if value is not None}


def _is_share(task: Mapping[str, Any]) -> bool:
    """Whether a benchmark's score is a share of what can be had; results that do not say hold accuracies alone."""
    return task.get("higher_is_better") is not False


def _score_text(task: Mapping[str, Any], value: float | None) -> str:
    """Write a benchmark's score in percent, or as it is where a lower one is better."""
    if value is None or not _is_share(task):
        return number_text(value)
    return number_text(100 * value, 1)


def judged_arm(result: Mapping[str, Any]) -> str:
    """Name the arm that the finding is about: ``memory``, or the first trained arm of memory and more."""
    arms = result.get("arms") or {}
    trained = [name for name in arms if name.partition("+")[0] == "memory" and arm_runs(arms[name])]
    return "memory" if "memory" in trained or not trained else trained[0]


def adapter_arm(result: Mapping[str, Any]) -> str | None:
    """Name the arm whose memory of the first seed is the run's ``adapter`` folder; None where no arm has one."""
    arms, useful = result.get("arms") or {}, ("memory", "memory_lora", "transfer")
    return next((name for name in arms if name.partition("+")[0] in useful and losses(arms[name])), None)


def headline(result: Mapping[str, Any]) -> Headline:
    """Say whether memory learned the domain, better or worse than what, and what was forgotten.

    A difference counts as one where it is more than twice its standard deviation over the seeds.
    """
    arms, memory = result.get("arms") or {}, judged_arm(result)
    if not arm_runs(arms.get(memory) or {}):
        return Headline("No memory was trained, so there is nothing to say of it", _numbers(result, tuple(arms)))
    gain = compare(result, memory, "base")
    if gain is None:
        why = "no seed ended with a finite loss" if not losses(arms[memory]) else "the base was not evaluated"
        return Headline(f"Whether memory helped is not known: {why}", _numbers(result, tuple(arms)))
    rival = next((name for name in _RIVALS if name in arms and compare(result, memory, name)), None)
    shown = [name for name in dict.fromkeys((memory, rival or memory, "full")) if name in arms]
    said = [_numbers(result, shown)]
    for name in shown:
        runs, lost = len(arm_runs(arms[name])), len(arm_runs(arms[name])) - len(losses(arms[name]))
        if lost:
            title = arm_title(arms[name], name)
            said.append(f"{lost} of {runs} seeds of {title} ended without a finite loss and are left out.")
    for control in ("random_table", "permuted_hash"):
        against = None if control == rival else compare(result, memory, control)
        if against is not None and against.verdict in {"equal", "higher"}:
            said.append(f"But {_RIVALS[control]} does as well, so it is not the memory's content that helps.")
    if gain.num_seeds == 1:
        said.append("One seed, so how much of this is chance is not known.")
    return Headline(_finding(result, gain, rival), " ".join(said))


def _finding(result: Mapping[str, Any], gain: Difference, rival: str | None) -> str:
    amount = f"{abs(gain.mean):.3f} nats per token"
    if gain.verdict == "equal":
        return f"Memory made no difference to the domain loss{_within(gain)}" + _changed(result)
    if gain.mean > 0:
        verb = "raises" if gain.verdict == "higher" else "raised, in the one seed run,"
        return f"Memory did not help: it {verb} the domain loss by {amount}" + _changed(result)
    against = None if rival is None else compare(result, judged_arm(result), rival)
    if rival is None or against is None:
        return f"Memory lowers the domain loss by {amount}" + _changed(result)
    title, word = _RIVALS[rival], "lower" if against.mean < 0 else "higher"
    said = {
        "lower": f"Memory learns the domain better than {title}",
        "higher": f"Memory learns the domain worse than {title}",
        "equal": f"Memory and {title} learn the domain equally well{_within(against)}",
        "unknown": f"In one seed, memory ends with a {word} domain loss than {title}",
    }[against.verdict]
    return said + _forgotten(result, rival, against.verdict)


def _within(difference: Difference) -> str:
    """What a difference that is none was compared with; a single seed has no spread."""
    return "" if difference.spread is None else ", within the spread over seeds"


def _forgotten(result: Mapping[str, Any], rival: str, learned: str) -> str:
    """The second half of the finding: what memory forgot, compared with its rival."""
    difference = compare(result, judged_arm(result), rival, "retained")
    if difference is None:
        return ""
    verdict = difference.verdict
    if verdict == "unknown":
        verdict = "lower" if difference.mean < 0 else "higher"
    word = {"lower": "less", "higher": "more", "equal": "as much"}[verdict]
    joint = "but" if (learned, verdict) in {("lower", "higher"), ("higher", "lower")} else "and"
    return f"; memory forgets {word}" if learned == "equal" else f", {joint} forgets {word}"


def _changed(result: Mapping[str, Any]) -> str:
    """The second half of the finding where there is nothing to compare with: what became of the old text."""
    change = compare(result, judged_arm(result), "base", "retained")
    if change is None:
        return ""
    if change.verdict == "equal":
        return ", and leaves that on the old text as it was"
    return f", and {'raises' if change.mean > 0 else 'lowers'} that on the old text by {abs(change.mean):.3f}"


def _numbers(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Losses before and after, in a sentence for each text."""
    arms, sentences = result.get("arms") or {}, []
    for text, what in (("domain", "Domain loss"), ("retained", "Loss on the old text")):
        before = loss_before(result, text)
        found = {name: losses(arms[name], text) for name in names}
        parts = [] if before is None else [f"before {before:.3f}"]
        parts += [f"{arm_title(arms[name], name)} {_values_text(values)}" for name, values in found.items() if values]
        if parts:
            sentences.append(f"{what}: {', '.join(parts)}.")
    return " ".join(sentences) + " In nats per token." if sentences else "No model was evaluated."


def finite_loss(evaluation: Mapping[str, Any] | None) -> float | None:
    """Loss of an evaluation, in nats per token; None where there is none or it is not finite."""
    loss = None if evaluation is None else evaluation.get("loss")
    return float(loss) if loss is not None and math.isfinite(loss) else None


def arm_title(arm: Mapping[str, Any], name: str) -> str:
    """What an arm is called, with a capital letter."""
    title = str(arm.get("title") or name)
    return title[:1].upper() + title[1:]


def arm_runs(arm: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The finished runs of an arm, one for each seed."""
    return arm.get("runs") or ()


def loss_before(result: Mapping[str, Any], text: str) -> float | None:
    """Loss of the base on ``"domain"`` or ``"retained"`` text, in nats per token; None where not measured."""
    return finite_loss((result.get("before") or {}).get(text))


def _values_text(by_seed: Mapping[Any, float], *, signed: bool = False) -> str:
    """Write the mean of a value over seeds, with its standard deviation where there are several."""
    values = list(by_seed.values())
    return spread_text(mean_of(values), spread_of(values), signed=signed)


def arm_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Describe the base and every arm: a cell for each of `COLUMNS`, means over seeds with their standard deviation."""
    unchanged = NOTHING if loss_before(result, "retained") is None else "0.000"
    base = number_text(loss_before(result, "domain"), 3)
    known = share_kept(result, result.get("before") or {})
    scored = NOTHING if known is None else "100 %"
    rows = [["Base, untouched", base, unchanged, scored, NOTHING, NOTHING, "0", "0", "0", "0"]]
    for name, arm in (result.get("arms") or {}).items():
        runs, found = arm_runs(arm), losses(arm)
        domain = _values_text(found)
        if not found:
            domain = "no finite loss" if runs else "not run"
        elif len(found) < len(runs):
            domain += f" ({len(found)} of {len(runs)} seeds)"
        trainable, outside = arm.get("num_trainable"), arm.get("num_trainable_outside_tables")
        counts = [
            outside,
            None if trainable is None or outside is None else trainable - outside,
            arm.get("num_tokens"),
            arm.get("training_flops"),  # with those of the hidden states that rows were made of
        ]
        change = _values_text(forgetting(result, arm), signed=True)
        kept = mean_of(share_kept(result, run) for run in runs)
        scores = NOTHING if kept is None else f"{number_text(100 * kept, 1)} %"
        without = [_values_text(losses(arm, kind=kind)) for kind in ("memory_off", "rows_shuffled")]
        rows.append([arm_title(arm, name), domain, change, scores, *without, *map(count_text, counts)])
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


def terminal_table(result: Mapping[str, Any]) -> Table:
    """Lay the arms out, a line each, so that it fits a terminal of 80 columns.

    Tokens and FLOPs are left to `markdown_table` and the page, and columns that no arm fills are left out.
    """
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
    """Write those of `COLUMNS` that are known as a Markdown table of the base and every arm, ending in a line break."""
    rows = arm_rows(result)
    filled = [place for place in range(len(COLUMNS)) if any(row[place] != NOTHING for row in rows)]
    return _markdown_lines([COLUMNS[place] for place in filled], [[row[place] for place in filled] for row in rows])


def kept_markdown(result: Mapping[str, Any]) -> str:
    """Write `kept_rows` as a Markdown table, ending in a line break."""
    return _markdown_lines(kept_columns(result), kept_rows(result))


def _markdown_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [columns, (":--", *["--:"] * (len(columns) - 1)), *rows]
    return "".join(f"| {' | '.join(map(_markdown, line))} |\n" for line in lines)


def _markdown(cell: str) -> str:
    # A title comes from a file: neither a cell of its own, nor a line, nor markup.
    text = " ".join(cell.split())
    return "".join(f"\\{sign}" if sign in "\\|`*_<>[]" and cell not in (":--", "--:") else sign for sign in text)
