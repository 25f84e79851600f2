"""What an adaptation found: losses seed by seed, differences that are more than chance, and one sentence."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.number_text import NOTHING, spread_of, spread_text

__all__ = [
    "Difference",
    "Headline",
    "arm_runs",
    "arm_title",
    "compare",
    "finite_loss",
    "forgetting",
    "headline",
    "loss_before",
    "losses",
    "values_text",
]

_MEMORY = "memory"
# What memory has to beat, the most telling first: the same compute without memory, then memory that cannot learn.
_RIVALS = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "random_table": "a random table",
    "permuted_hash": "a permuted hash",
}
_SPREADS = 2.0
"""Standard deviations over seeds that a difference must exceed to be called one."""


@dataclasses.dataclass(frozen=True)
class Headline:
    """What came out, as a title and a few sentences."""

    title: str
    """The finding."""
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


def losses(arm: Mapping[str, Any], text: str = "domain") -> dict[Any, float]:
    """Final loss of every seed of an arm, in nats per token; a seed without a finite loss is left out.

    Args:
        arm: An entry of ``arms`` of a result.
        text: ``"domain"`` or ``"retained"``.
    """
    found = {run.get("seed"): finite_loss(run.get(text)) for run in arm_runs(arm)}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def forgetting(result: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[Any, float]:
    """By how much the loss on the old text rose, for every seed, in nats per token; empty where not measured."""
    before = loss_before(result, "retained")
    return {} if before is None else {seed: loss - before for seed, loss in losses(arm, "retained").items()}


def compare(result: Mapping[str, Any], name: str, other: str, text: str = "domain") -> Difference | None:
    """Loss of one arm minus that of another, seed by seed; None where no seed has both.

    Args:
        result: A result in the format ``engram.adaptation.1``.
        name: An arm.
        other: Another one, or ``"base"`` for the model before training.
        text: ``"domain"`` or ``"retained"``.
    """
    arms = result.get("arms") or {}
    own, before = losses(arms.get(name) or {}, text), loss_before(result, text)
    if other == "base":
        theirs = dict.fromkeys(own, before) if before is not None else {}
    else:
        theirs = dict(losses(arms.get(other) or {}, text))
    differences = [loss - theirs[seed] for seed, loss in own.items() if theirs.get(seed) is not None]
    if not differences:
        return None
    return Difference(statistics.fmean(differences), spread_of(differences), len(differences))


def headline(result: Mapping[str, Any]) -> Headline:
    """Say whether memory learned the domain, better or worse than what, and what was forgotten.

    A difference counts as one where it is more than twice its standard deviation over the seeds.

    Args:
        result: A result in the format ``engram.adaptation.1``.
    """
    arms = result.get("arms") or {}
    if not arm_runs(arms.get(_MEMORY) or {}):
        return Headline("No memory was trained, so there is nothing to say of it", _numbers(result, tuple(arms)))
    gain = compare(result, _MEMORY, "base")
    if gain is None:
        why = "no seed ended with a finite loss" if not losses(arms[_MEMORY]) else "the base was not evaluated"
        return Headline(f"Whether memory helped is not known: {why}", _numbers(result, tuple(arms)))
    rival = next((name for name in _RIVALS if name in arms and compare(result, _MEMORY, name)), None)
    shown = [name for name in dict.fromkeys((_MEMORY, rival or _MEMORY, "full")) if name in arms]
    said = [_numbers(result, shown)]
    for name in shown:
        runs, lost = len(arm_runs(arms[name])), len(arm_runs(arms[name])) - len(losses(arms[name]))
        if lost:
            title = arm_title(arms[name], name)
            said.append(f"{lost} of {runs} seeds of {title} ended without a finite loss and are left out.")
    for control in ("random_table", "permuted_hash"):
        against = None if control == rival else compare(result, _MEMORY, control)
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
    if rival is None:
        return f"Memory lowers the domain loss by {amount}" + _changed(result)
    title = _RIVALS[rival]
    against = compare(result, _MEMORY, rival)
    assert against is not None
    word = "lower" if against.mean < 0 else "higher"
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
    difference = compare(result, _MEMORY, rival, "retained")
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
    change = compare(result, _MEMORY, "base", "retained")
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
        found = {name: list(losses(arms[name], text).values()) for name in names}
        parts = [] if before is None else [f"before {before:.3f}"]
        parts += [f"{arm_title(arms[name], name)} {values_text(values)}" for name, values in found.items() if values]
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


def values_text(values: Sequence[float], *, signed: bool = False) -> str:
    """Write the mean of a value over seeds, with its standard deviation where there are several."""
    return spread_text(statistics.fmean(values), spread_of(values), signed=signed) if values else NOTHING
