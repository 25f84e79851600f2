"""``engram-lm study allocation``: how much of a sparse budget should be experts, and how much memory."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from engram_lm.errors import ConfigError, check_flags
from engram_lm.page.figure import MARKERS, Picture
from engram_lm.page.number_text import NOTHING, count_text, signed_text
from engram_lm.planning.sizes import ModelSizes, model_sizes
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.fits import (
    Estimate,
    arm_losses,
    best_share,
    difference,
    estimate,
    estimate_text,
    is_whole,
    lowest_of_parabola,
)
from engram_lm.studies.micro_models import MicroModelFlags, Size
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.published_sweeps import ALLOCATION, ALLOCATION_EXPERTS
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm
from engram_lm.studies.summary import seeds_note, study_finding
from engram_lm.studies.text_flags import like
from engram_lm.training.dry_run import priced_config
from engram_lm.training.recipe import Recipe

_PUBLISHED_CHOSEN = 6
"""Routed experts that a token of the paper's models visits."""
_FEWEST_POINTS = 4
"""Arms that a curve of three numbers needs to say anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationStudy(MicroModelFlags, StudyCommand):
    """Divide one sparse budget between experts and memory, from experts alone to as few as a token visits.

    This is the left half of the paper's Figure 3. All models of a sweep have the same total and active parameters and
    see the same batches; a leading dense block pays for memory's projections. Where the loss is lowest follows from two
    curves: a parabola in the share, as the paper draws, and a sum of two logarithms, one of the experts and one of the
    table, which leaves experts alone out. Several sizes, sparsities and numbers of tokens make several sweeps, and the
    result says whether the optimum moves between them. Sweeps and shares can be added later with --resume.

    Examples::

        engram-lm study allocation
        engram-lm study allocation --data corpus/ --experts 64 128 --token-counts 1000000 4000000 --resume
    """

    name: ClassVar[str] = "allocation"

    ratios: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0)
    """Shares of the sparse budget for experts; the first is what the others are compared with. 1 is experts alone, and
    0 leaves as many as a token visits."""
    experts: tuple[int, ...] = (64,)
    """Routed experts of the model of experts alone; each number is a sparsity, and a sweep of its own."""
    sizes: tuple[Size, ...] = ()
    """Sizes to sweep, in place of --size."""
    token_counts: tuple[int, ...] = ()
    """Tokens to train on, each of them a sweep, in place of --tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "seeds")
        for name in ("ratios", "experts", "sizes", "token_counts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"--{name.replace('_', '-')} names one value twice: {values}")
        if not self.experts or len(self.ratios) < 2:
            raise ConfigError("a sweep needs a number of --experts and at least two --ratios")
        if any(tokens < 1 for tokens in self.token_counts):
            raise ConfigError(f"--token-counts are at least 1, not {self.token_counts}")

    def study(self) -> Study:
        """One group of arms for every size, sparsity and number of tokens."""
        return Study(
            name=self.name,
            question="How much of a sparse budget should be experts, and how much memory?",
            arms=tuple(arm for sweep in self._sweeps() for arm in self._arms(*sweep)),
            budget=Budget(equal=("active", "total", "tokens")),
            seeds=self.seeds,
            figures=figures,
            finding=allocation_finding,
        )

    def _sweeps(self) -> Iterator[tuple["AllocationStudy", int]]:
        sizes, counts = self.sizes or (self.size,), self.token_counts or (self.tokens,)
        for size, experts, tokens in itertools.product(sizes, self.experts, counts):
            yield dataclasses.replace(self, size=size, tokens=tokens), experts

    def _arms(self, flags: "AllocationStudy", experts: int) -> Iterator[Arm]:
        """The arms of one sweep. They take over the backbone of experts alone and the memory layer of the preset."""
        group = _group(flags, experts)
        first = (*like(flags.allocated(1.0, num_experts=experts)), *like(flags.model("engram"), part="memory"))
        for ratio in self.ratios:
            model = flags.allocated(ratio, num_experts=experts, like=first[:1] if ratio == 1 else first)
            recipe = flags.recipe(model)
            sizes = _sizes(recipe)
            yield Arm(
                name=f"{flags.size}-{experts}-{flags.tokens}-rho-{ratio:g}",
                title=f"{ratio:.0%} experts",
                about=f"{group}; {sizes.without_vocabulary / sizes.active:.1f} parameters for each active one",
                recipe=recipe,
                x=_share(sizes),
                group=group,
            )

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Fit both curves to every sweep, and compare where they are lowest."""
        result = super().measure(seeds, runner)
        num_experts = {_group(*sweep): sweep[1] for sweep in self._sweeps()}
        groups = {
            group: _fit(result, [arm for arm in runner.study.arms if arm.group == group], number, num_experts[group])
            for number, group in enumerate(dict.fromkeys(arm.group for arm in runner.study.arms))
        }
        (first, reference), *others = groups.items()
        moves = {
            kind: {
                group: found[kind].minus(reference[kind]).to_dict()
                for group, found in others
                if found[kind] is not None and reference[kind] is not None
            }
            for kind in ("parabola", "logarithms")
        }
        sweeps = {
            group: {key: one.to_dict() if isinstance(one, Estimate) else one for key, one in found.items()}
            for group, found in groups.items()
        }
        return {**result, "sweeps": sweeps, "moves": {"from": first, **moves}}


def _group(flags: AllocationStudy, experts: int) -> str:
    """Name a sweep."""
    return f"{flags.size} active, {experts} experts, {count_text(flags.tokens)} tokens"


def _sizes(recipe: Recipe) -> ModelSizes:
    return model_sizes(priced_config(recipe), context=recipe.data.sequence_length)


def _share(sizes: ModelSizes) -> float:
    """The share of the sparse parameters that experts have, after rounding to whole experts and rows."""
    return (sizes.routed_experts - sizes.chosen_experts) / sizes.sparse


def _fit(result: Mapping[str, Any], arms: Sequence[Arm], number: int, num_experts: int) -> dict[str, Any]:
    """What one sweep says; the number of the sweep decides its draws.

    ``num_experts`` are those of the model of experts alone, which need not be among the arms.

    Arms that diverged in some seed are left out of the fits.
    """
    known = [arm for arm in arms if is_whole(result["arms"][arm.name])]
    places = [arm.x for arm in known if arm.x is not None]
    found: dict[str, Any] = {"shares": places, "parabola": None, "logarithms": None, "best": None, "gain": None}
    losses = arm_losses(result, [arm.name for arm in known]) if known else None
    if losses is None:
        return found
    best = int(np.argmin(losses.mean(0)))
    found["best"] = known[best].name
    if known[0] is arms[0] and best:
        found["gain"] = estimate(losses, difference(0, best), seed=number)
    if len(known) >= _FEWEST_POINTS:
        found["parabola"] = estimate(losses, lowest_of_parabola(places), seed=number)
    inside = [place for place, x in enumerate(places) if x < 1]
    if len(inside) >= _FEWEST_POINTS:
        chosen = priced_config(arms[0].recipe).num_experts_per_tok
        curve = best_share([places[i] for i in inside], num_chosen=chosen, num_experts=num_experts)
        found["logarithms"] = estimate(losses[:, inside], curve, seed=number)
    return found


def published() -> dict[str, dict[str, Any]]:
    """What the same fits say of the points of the paper's Figure 3; they are single runs and have no intervals."""
    found = {}
    for name, (shares, losses) in ALLOCATION.items():
        row, inside = np.array([losses]), [share for share in shares if share < 1]
        curve = best_share(inside, num_chosen=_PUBLISHED_CHOSEN, num_experts=ALLOCATION_EXPERTS[name])
        found[name] = {
            "best": shares[int(np.argmin(losses))],
            "gain": {"value": min(losses) - losses[-1], "interval": None},
            "parabola": estimate(row, lowest_of_parabola(shares)).to_dict(),
            "logarithms": estimate(row[:, : len(inside)], curve).to_dict(),
        }
    return found


def allocation_finding(result: Mapping[str, Any]) -> Finding:
    """Say where the loss of every sweep is lowest, beside the paper's, and list all arms."""
    rows = []
    for group, found in result["sweeps"].items():
        best = NOTHING if found["best"] is None else f"{result['arms'][found['best']]['x']:.2f}"
        rows.append([group, best, *_cells(found)])
    rows += [[name, f"{found['best']:.2f}", *_cells(found)] for name, found in published().items()]
    tables = [
        Table(
            title="Where the loss is lowest",
            columns=("Sweep", "Lowest arm", "Its gain over the first", "Parabola", "Two logarithms"),
            rows=rows,
            note="Shares of the sparse budget in experts, with intervals of 95 % from the errors of the runs. The "
            "lowest arm was chosen after the fact, which flatters its gain. A share of 0.00 is the edge of the "
            "sweep, where fits are cut off, and its interval too. The paper's points are single runs, and their gains "
            "those over experts alone.",
        )
    ]
    moves = [
        [group, *(estimate_text(result["moves"][kind].get(group), "+.2f") for kind in ("parabola", "logarithms"))]
        for group in list(result["sweeps"])[1:]
    ]
    if moves:
        note = f"Compared with {result['moves']['from']}; an interval that holds 0 shows no move."
        tables.append(
            Table(title="Does it move", columns=("Sweep", "Parabola", "Two logarithms"), rows=moves, note=note)
        )
    detail = f"{seeds_note(len(result['seeds']))} {_scope(result)}"
    return Finding(headline=_headline(result), detail=detail, tables=[*tables, *_named(study_finding(result), result)])


def _scope(result: Mapping[str, Any]) -> str:
    """What can be claimed of a result, and what cannot."""
    costs = [arm["cost"] for arm in result["arms"].values()]
    seen = _range(f"{one:.1f}" for one in sorted(cost["tokens"] / cost["total"] for cost in costs))
    active = _range(count_text(one) for one in sorted(round(cost["active"], -4) for cost in costs))
    return (
        f"They show how experts and memory share a budget in models of {active} active parameters that saw {seen} "
        "tokens for each of all parameters, on this text. They do not show where the optimum is for larger models or "
        "longer training (the paper's saw about 10 tokens for each parameter), nor that a parabola is the right curve: "
        "the two fits differ by what that is worth."
    )


def _range(words: Iterable[str]) -> str:
    found = list(dict.fromkeys(words))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _cells(found: Mapping[str, Any]) -> list[str]:
    gain = found["gain"]
    gained = NOTHING if gain is None else signed_text(gain["value"])
    return [gained, estimate_text(found["parabola"]), estimate_text(found["logarithms"])]


def _named(plain: Finding, result: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of all arms, whose rows say which sweep they belong to where there are several."""
    arms = list(result["arms"].values())
    for table in plain.tables:
        rows = table.rows
        if len(result["sweeps"]) > 1 and len(rows) == len(arms):
            rows = [[f"{row[0]} ({arm['group']})", *row[1:]] for row, arm in zip(rows, arms, strict=True)]
        yield dataclasses.replace(table, rows=rows)


def _headline(result: Mapping[str, Any]) -> str:
    group, found = next(iter(result["sweeps"].items()))
    if found["best"] is None:
        return "No sweep was trained to its end"
    words = f"With {group}, the loss is lowest with {result['arms'][found['best']]['title']}"
    if found["parabola"] is not None:
        words += f"; a parabola is lowest at {estimate_text(found['parabola'])}"
    return words


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw every sweep beside the paper's two, as differences to the first arm."""

    def draw(figure: Any) -> None:
        ours, theirs = figure.subplots(1, 2)
        for number, (group, found) in enumerate(result["sweeps"].items()):
            arms = [arm for arm in result["arms"].values() if arm["group"] == group]
            _draw_sweep(ours, arms, found, number, group)
        for number, (name, (shares, losses)) in enumerate(ALLOCATION.items()):
            relative = [loss - losses[-1] for loss in losses]
            theirs.plot(shares, relative, f"{MARKERS[number]}-", color=f"C{number}", label=name, markersize=4)
            theirs.axvline(published()[name]["parabola"]["value"], color=f"C{number}", linestyle=":")
        for axes, title in (
            (ours, "here, mean ± spread of paired differences"),
            (theirs, "paper, single runs, over experts alone"),
        ):
            axes.set(xlabel="share of the sparse budget in experts, ρ", title=title)
            axes.axhline(0, color="0.6", linewidth=0.8)
            axes.grid(color="0.9")
            axes.legend(frameon=False, fontsize=7)
        ours.set_ylabel("held-out loss over the first arm's, nats per token")

    title = "Loss by the share of experts, and where parabolas are lowest (dotted; shaded: 95 %)"
    return [Picture(name="allocation", title=title, size=(10.5, 4.4), draw=draw)]


def _draw_sweep(
    axes: Any, arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any], number: int, group: str
) -> None:
    color = f"C{number}"
    points = [(arms[0]["x"], 0.0, 0.0)]
    for arm in arms[1:]:
        difference_ = arm["summary"]["loss"]["difference"]
        if difference_["mean"] is not None:
            points.append((arm["x"], difference_["mean"], difference_["std"] or 0.0))
            axes.plot([arm["x"]] * len(difference_["per_seed"]), difference_["per_seed"], ".", color=color, alpha=0.4)
    x, means, spreads = zip(*sorted(points), strict=True)
    axes.errorbar(x, means, yerr=spreads, fmt=f"{MARKERS[number % len(MARKERS)]}-", color=color, capsize=3, label=group)
    if found["parabola"] is not None:
        axes.axvline(found["parabola"]["value"], color=color, linestyle=":")
        if found["parabola"]["interval"] is not None:
            axes.axvspan(*found["parabola"]["interval"], color=color, alpha=0.08)
