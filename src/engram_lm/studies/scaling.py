"""``engram-lm study scaling``: what a larger table is worth to one backbone, for Engram and its two plainest rivals."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from engram_lm.errors import ConfigError, check_flags
from engram_lm.page.figure import MARKERS, Picture
from engram_lm.page.number_text import NOTHING, count_text, spread_text
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.fits import arm_losses, bend, difference, estimate, estimate_text, is_whole, slope
from engram_lm.studies.micro_models import MicroModelFlags
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.published_sweeps import SCALING, SCALING_WITHOUT
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm
from engram_lm.studies.summary import difference_cells, seeds_note
from engram_lm.studies.text_flags import like
from engram_lm.tables.byte_size import byte_size
from engram_lm.training.recipe import CheckpointOptions, ModelOptions

Layer = Literal["engram", "bigrams", "over_encoding"]
"""What reads the table."""

WITHOUT = "none"
"""Name of the model without memory."""
_TITLES: Mapping[Layer, str] = {"engram": "Engram", "bigrams": "bigrams alone", "over_encoding": "OverEncoding"}
_NUMBER_BYTES = 4  # rows are trained in float32
_FEWEST_POINTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingStudy(MicroModelFlags, StudyCommand):
    """Give one dense backbone ever larger tables, and see how far the loss falls for each tenfold size.

    This is the right half of the paper's Figure 3. Tables of Engram, of the same layer with bigrams alone (as many rows
    of the same width, all of order 2) and of OverEncoding have equal bytes at every size and the same hash; a token
    reads as much of a large one as of a small one, and training costs the same. The result gives the slope for each
    decade with its interval, the slope between neighboring sizes against the tokens that a row has seen, and what sets
    the rivals apart at equal bytes. Sizes and seeds can be added later with --resume.

    Examples::

        engram-lm study scaling
        engram-lm study scaling --data corpus/ --rows 1250 20000 320000 --layers engram over_encoding --resume
    """

    name: ClassVar[str] = "scaling"

    rows: tuple[int, ...] = (1_250, 5_000, 20_000, 80_000, 320_000, 1_280_000)
    """Rows of each of the 8 heads; at the smallest size (rows of 8 numbers) from 0.3 to 330 MB."""
    layers: tuple[Layer, ...] = ("engram", "bigrams", "over_encoding")
    """What reads the tables; the first is what the others are compared with at equal bytes."""
    layer_rates: tuple[float, ...] = ()
    """Learning rates of the tables relative to the backbone's, one for each of --layers in their order, in place of
    --table-lr-multiplier: rows that no norm follows, such as OverEncoding's, take a lower one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "seeds")
        if not self.rows or not self.layers or min(self.rows) < 2:
            raise ConfigError("name at least one number of --rows, from 2, and one of --layers")
        if len(set(self.rows)) < len(self.rows) or len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"--rows and --layers name one value twice: {self.rows}, {self.layers}")
        if self.layer_rates and len(self.layer_rates) != len(self.layers):
            raise ConfigError(f"--layer-rates are one for each of --layers {self.layers}, not {self.layer_rates}")
        if not all(0 < rate < math.inf for rate in self.layer_rates):
            raise ConfigError(f"--layer-rates are finite numbers above 0, not {self.layer_rates}")

    def study(self) -> Study:
        """The backbone alone, and a group of arms for every size; equal within it but for what reads the table."""
        dense = self.model("dense")
        arms = [Arm(name=WITHOUT, title="no memory", recipe=self.recipe(dense), group=WITHOUT)]
        for rows, layer in itertools.product(self.rows, self.layers):
            model = self._model(layer, rows)
            size = _NUMBER_BYTES * self.memory_config(model.memory).table_parameters()
            # A table of hundreds of megabytes has twice as much in its optimizer, which a finished run does not keep.
            recipe = dataclasses.replace(self._tuned(layer).recipe(model), checkpoint=CheckpointOptions(keep_last=0))
            arms.append(
                Arm(
                    name=f"{layer}-{rows}",
                    title=f"{_TITLES[layer]}, {byte_size(size, 1)}",
                    about=f"{self.tokens / rows:,.1f} tokens for each row of a head",
                    recipe=recipe,
                    x=float(size),
                    group=f"{count_text(rows)} rows",
                )
            )
        return Study(
            name=self.name,
            question="How much does a larger table lower the loss, and does it matter what reads it?",
            arms=tuple(arms),
            # Layers differ in their projections by a few thousand numbers.
            budget=Budget(equal=("total", "tokens"), tolerance=0.02),
            seeds=self.seeds,
            figures=figures,
            finding=scaling_finding,
        )

    @property
    def _rates(self) -> dict[Layer, float]:
        """The rates of those layers that have their own."""
        return dict(zip(self.layers, self.layer_rates, strict=True)) if self.layer_rates else {}

    def _tuned(self, layer: Layer) -> "ScalingStudy":
        """The same flags with the layer's own rate of the tables, where it has one."""
        rates = self._rates
        return dataclasses.replace(self, table_lr_multiplier=rates[layer]) if layer in rates else self

    def _model(self, layer: Layer, rows: int) -> ModelOptions:
        """The backbone with a table of some rows in each of as many heads, whatever reads it."""
        memory: dict[str, Any] = {"rows_per_head": rows}
        first = like(self.model("dense"))
        if layer == "over_encoding":
            memory |= {"layer": layer, "layers": (0,), "gate": "none", "kernel_size": 0}
        else:
            first += like(self.model("dense_engram"), part="memory")
        if layer == "bigrams":
            memory |= {"orders": (2,), "num_heads": self.memory_config().num_heads_total}
        return self.model("dense_engram", memory=memory, like=first)

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Fit the loss of every layer to the logarithm of its bytes."""
        result = super().measure(seeds, runner)
        return {**result, "tokens": self.tokens, "layer_rates": self._rates, "lines": dict(self._lines(result))}

    def _lines(self, result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What is fitted to each layer, for those sizes whose runs all ended well."""
        for number, layer in enumerate(self.layers):
            names = {rows: f"{layer}-{rows}" for rows in sorted(self.rows)}
            known = {rows: name for rows, name in names.items() if is_whole(result["arms"][name])}
            losses = arm_losses(result, list(known.values())) if known else None
            if losses is None:
                continue
            x = np.log10([result["arms"][name]["x"] for name in known.values()])
            found: dict[str, Any] = {"title": _TITLES[layer], "rows": list(known), "slope": None, "bend": None}
            if len(known) > 1:
                found["slope"] = estimate(losses, slope(x), seed=number).to_dict()
            if len(known) >= _FEWEST_POINTS:
                found["bend"] = estimate(losses, bend(x), seed=number).to_dict()
            found["steps"] = []
            for place, (smaller, larger) in enumerate(itertools.pairwise(known)):
                decades = x[place + 1] - x[place]
                step = estimate(losses, _per_decade(place, float(decades)), seed=number)
                tokens = self.tokens / np.sqrt(smaller * larger)
                found["steps"].append({"rows": [smaller, larger], "tokens_per_row": float(tokens), **step.to_dict()})
            yield layer, found


def _per_decade(place: int, decades: float) -> Any:
    change = difference(place, place + 1)
    return lambda means: change(means) / decades


def published() -> dict[str, dict[str, Any]]:
    """The slopes of the points of the paper's Figure 3; they are single runs and have no intervals."""
    return {
        name: {"slope": estimate(np.array([losses]), slope(np.log10(slots))).to_dict()}
        for name, (slots, losses) in SCALING.items()
    }


def scaling_finding(result: Mapping[str, Any]) -> Finding:
    """Say how far a tenfold table lowers the loss, beside the paper, and list all arms."""
    lines = result["lines"]
    slopes = [
        [found["title"], estimate_text(found["slope"], "+.4f"), estimate_text(found["bend"], "+.4f")]
        for found in lines.values()
    ]
    slopes += [
        [f"paper: {name}", estimate_text(found["slope"], "+.4f"), NOTHING] for name, found in published().items()
    ]
    steps = [
        [
            found["title"],
            " to ".join(count_text(rows) for rows in step["rows"]),
            f"{step['tokens_per_row']:,.1f}",
            estimate_text(step, "+.4f"),
        ]
        for found in lines.values()
        for step in found["steps"]
    ]
    without = result["arms"][WITHOUT]["summary"]["loss"]
    rows = [["no memory", spread_text(without["mean"], without["std"]), NOTHING, NOTHING, NOTHING]]
    rows += [_row(arm, without) for name, arm in result["arms"].items() if name != WITHOUT]
    tables = [
        Table(
            title="What ten times the bytes are worth",
            columns=("Layer", "Slope per decade", "Bend"),
            rows=slopes,
            note="Nats per token, with intervals of 95 % from the errors of the runs. Bend: the second derivative by "
            "decades; above 0 the fall becomes flatter. The paper's are single runs, by slots.",
        ),
        Table(
            title="From size to size",
            columns=("Layer", "Rows of a head", "Tokens per row", "Slope per decade"),
            rows=steps,
            note="Tokens per row: what training reads of a row on average, at the mean of the two sizes.",
        ),
        Table(
            title="All models",
            columns=("Arm", "Held-out loss", "Gain over no memory", "To the first at equal bytes", "p"),
            rows=rows,
            note="Nats per token; differences are paired by seed.",
        ),
    ]
    return Finding(
        headline=_headline(lines), detail=f"{seeds_note(len(result['seeds']))} {_scope(result)}", tables=tables
    )


def _scope(result: Mapping[str, Any]) -> str:
    """What can be claimed of a result, and what cannot."""
    active = round(result["arms"][WITHOUT]["cost"]["active"], -4)
    own = ", ".join(f"{rate:g} for {_TITLES[layer]}" for layer, rate in result.get("layer_rates", {}).items())
    rates = f"sizes (of tables, relative to the backbone: {own})" if own else "sizes and layers"
    return (
        f"They show what bytes are worth to one backbone of {count_text(active)} active parameters after "
        f"{count_text(result['tokens'])} tokens of this text, at learning rates that are the same for all {rates}. "
        "They do not show where a larger table stops to pay: its rows are seen less often, and more tokens "
        "would train them better."
    )


def _row(arm: Mapping[str, Any], without: Mapping[str, Any]) -> list[str]:
    found = arm["summary"]["loss"]
    known = found["mean"] is not None and without["mean"] is not None
    return [
        arm["title"],
        spread_text(found["mean"], found["std"]),
        f"{without['mean'] - found['mean']:+.3f}" if known else NOTHING,
        *difference_cells(found.get("difference")),
    ]


def _headline(lines: Mapping[str, Any]) -> str:
    for found in lines.values():
        if found["slope"] is not None:
            return (
                f"Ten times the bytes change the loss of {found['title']} by "
                f"{estimate_text(found['slope'], '+.3f')} nats per token"
            )
    return "Too few sizes were trained to their end to see a slope"


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the losses by bytes, the paper's by slots, and how fast they fall by the tokens that a row has seen."""

    def draw(figure: Any) -> None:
        ours, theirs, falling = figure.subplots(1, 3)
        without = result["arms"][WITHOUT]["summary"]["loss"]["mean"]
        if without is not None:
            ours.axhline(without, color="0.4", linestyle="--", label="no memory")
        for number, (layer, found) in enumerate(result["lines"].items()):
            arms = [result["arms"][f"{layer}-{rows}"] for rows in found["rows"]]
            style = {"color": f"C{number}", "label": found["title"], "capsize": 3}
            marks = f"{MARKERS[number]}-"
            spreads = [arm["summary"]["loss"]["std"] or 0.0 for arm in arms]
            ours.errorbar(
                [arm["x"] for arm in arms],
                [arm["summary"]["loss"]["mean"] for arm in arms],
                yerr=spreads,
                fmt=marks,
                **style,
            )
            values = [step["value"] for step in found["steps"]]
            ends = [step["interval"] or [step["value"]] * 2 for step in found["steps"]]
            bars = [[value - low, high - value] for value, (low, high) in zip(values, ends, strict=True)]
            if bars:
                places = [step["tokens_per_row"] for step in found["steps"]]
                falling.errorbar(places, values, yerr=np.abs(np.transpose(bars)), fmt=marks, **style)
        theirs.axhline(SCALING_WITHOUT, color="0.4", linestyle="--", label="experts alone")
        for name, (slots, losses) in SCALING.items():
            number = 2 if name == "OverEncoding" else 0
            theirs.plot(slots, losses, f"{MARKERS[number]}-", color=f"C{number}", label=name)
        falling.axhline(0, color="0.6", linewidth=0.8)
        ours.set(xlabel="bytes of the table", ylabel="held-out loss, nats per token", title="here")
        theirs.set(xlabel="slots of 1,280 numbers", title="paper, single runs")
        falling.set(
            xlabel="tokens seen per row", ylabel="nats per decade of bytes", title="from size to size, with 95 %"
        )
        for axes in (ours, theirs, falling):
            axes.set_xscale("log")
            axes.grid(color="0.9")
            axes.legend(frameon=False, fontsize=8)

    title = "Loss by bytes of the table, and how fast it falls by the tokens that a row has seen"
    return [Picture(name="scaling", title=title, size=(13.0, 4.2), draw=draw)]
