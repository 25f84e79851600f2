"""``engram-lm study ablations``: the paper's memory with one thing changed at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from engram_lm.errors import ConfigError, check_flags
from engram_lm.page.figure import Picture
from engram_lm.page.number_text import NOTHING, signed_text
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.figures import forest
from engram_lm.studies.fits import arm_losses, difference, estimate, estimate_text, is_whole
from engram_lm.studies.micro_models import MicroModelFlags
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.published_sweeps import ABLATIONS
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm, with_seed
from engram_lm.studies.summary import ENOUGH_SEEDS, seeds_note, study_finding
from engram_lm.studies.text_flags import like
from engram_lm.training.recipe import Recipe

Group = Literal[
    "controls", "layers", "streams", "gate", "token_map", "convolution", "orders", "heads", "width", "rate", "optimizer"
]
"""What is changed in the arms of a group."""

REFERENCE, AGAIN = "reference", "controls-again"
_OTHER_SEEDS = 1_000
"""What is added to the seeds of the reference when it is trained again as a control."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationStudy(MicroModelFlags, StudyCommand):
    """Change one thing at a time in the paper's memory, and measure what each of them is worth.

    The reference is the paper's layer, scaled down: bigrams and trigrams of canonical tokens, read in the second block
    by four streams through a gate with a signed square root, and refined by a short convolution. Every other model
    differs in one thing and has a table of as many bytes; what else it holds and costs stands in the table. Two
    controls show the noise: the reference with other multipliers in its hash, and with other seeds, so that neither its
    first weights nor the order of its text are paired. Two more read almost no rows, or rows that are never trained.

    Groups can be chosen with --groups and added later with --resume. Rates were tuned for the reference: an optimizer
    that is worse here could be better at a rate of its own.

    Examples::

        engram-lm study ablations --dry-run
        engram-lm study ablations --data corpus/ --groups controls gate orders --seeds 5
    """

    name: ClassVar[str] = "ablations"
    result_format: ClassVar[str] = "engram.ablations.1"

    groups: tuple[Group, ...] = get_args(Group)
    """What is changed."""
    rows_per_head: int = 6_000
    """Rows asked for per head; the table holds 96 numbers for each of them at the smallest size."""
    streams: int = 4
    """Residual streams of the reference, as in the paper; 1 is faster and leaves out the group of streams."""

    tokens: int = 1_000_000
    """Tokens each model is trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "seeds", "rows_per_head", "streams")
        if not self.groups or len(set(self.groups)) < len(self.groups):
            raise ConfigError(f"--groups names at least one group, and each of them once, not {self.groups}")

    def study(self) -> Study:
        """The reference, and the arms of the chosen groups."""
        known = {arm.name: arm for arm in self._arms()}
        return Study(
            name=self.name,
            question="What is each part of the memory worth?",
            arms=tuple(arm for name, arm in known.items() if name == REFERENCE or group_of(name) in self.groups),
            budget=Budget(equal=("bytes", "tokens"), tolerance=0.1),
            seeds=self.seeds,
            figures=figures,
            finding=ablation_finding,
            recipe_of=_recipe_of,
        )

    def _arms(self) -> Iterator[Arm]:
        """All arms there are, by group."""
        dense = self.config("dense")
        width, blocks = dense.hidden_size * 3 // 2, dense.num_hidden_layers
        rows, one = self.rows_per_head, {"layers": (1,), "memory_dim": width, "num_heads": 4}
        rate = self.optimizer.table_lr_multiplier

        def arm(name: str, title: str, about: str = "", *, is_control: bool = False, **options: Any) -> Arm:
            return Arm(name=name, title=title, about=about, is_control=is_control, recipe=self._recipe(one, **options))

        yield arm(REFERENCE, "reference", f"{self.streams} streams, block 1, orders 2 and 3, 4 heads, rate × {rate:g}")
        yield arm("controls-none", "no memory", is_control=True, has_memory=False)
        yield arm("controls-hash", "other multipliers (A/A)", "the same model with another hash", memory={"seed": 1})
        yield arm(AGAIN, "other seeds (A/A)", "the same model, neither its weights nor its text paired")
        yield arm("controls-rows", "few rows", "2 to 19 rows a head", is_control=True, memory={"rows_per_head": 1})
        yield arm("controls-frozen", "random rows", "rows stay as they were drawn", model={"frozen_tables": True})
        for block in range(blocks):
            if block != 1:
                yield arm(f"layers-{block}", f"block {block}", memory={"layers": (block,)})
        both = (1, blocks // 2) if blocks > 3 else (0, 1)
        halves = {"layers": both, "memory_dim": width // 2}
        yield arm("layers-two", f"blocks {both[0]} and {both[1]}", "each with rows of half the width", memory=halves)
        if self.streams > 1:
            yield arm("streams-single", "fused once", "one gate for what attention reads", fusion="single")
            yield arm("streams-one", "one stream", "another backbone, too", streams=1)
            yield arm("streams-one_none", "one stream, no memory", is_control=True, streams=1, has_memory=False)
        yield arm("gate-plain", "no square root", "the gate of the paper's Eq. 4", memory={"gate": "plain"})
        yield arm("gate-none", "no gate", memory={"gate": "none"})
        yield arm("token_map-raw", "raw tokens", "no canonical tokens", memory={"token_map": "raw"})
        yield arm("convolution-none", "no convolution", memory={"kernel_size": 0})
        for orders in ((2,), (3,), (2, 3, 4), (1, 2, 3)):
            name = "-".join(map(str, orders))
            yield arm(f"orders-{name}", f"orders {', '.join(map(str, orders))}", memory={"orders": orders})
        for heads in (1, 2, 8):
            yield arm(f"heads-{heads}", f"{heads} head{'s' * (heads > 1)} an order", memory={"num_heads": heads})
        for times, words in ((0.5, "half"), (2, "twice")):
            changed = {"memory_dim": int(width * times), "rows_per_head": round(rows / times)}
            yield arm(f"width-{words}", f"rows of {words} the width", f"{1 / times:g} × as many rows", memory=changed)
        for multiplier in (1, 5, 50, 100):
            yield arm(f"rate-{multiplier}", f"table rate × {multiplier}", optimizer={"table_lr_multiplier": multiplier})
        for tables in ("row_wise_adam", "row_wise_adagrad", "sinkhorn"):
            about = "at the rate that was tuned for row_adam"
            yield arm(f"optimizer-{tables}", f"tables by {tables}", about, optimizer={"tables": tables})

    def _recipe(
        self,
        base: Mapping[str, Any],
        *,
        memory: Mapping[str, Any] | None = None,
        has_memory: bool = True,
        streams: int | None = None,
        fusion: str = "every_stream",
        model: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """The reference with other choices. Arms begin with the same weights wherever they have the same ones."""
        backbone: dict[str, Any] = {"num_streams": streams or self.streams}
        plain = self.model("dense", backbone=backbone)
        if not has_memory:
            return self.recipe(plain)
        base = {**base, "rows_per_head": self.rows_per_head}
        first = like(plain)
        if streams is None and fusion == "every_stream" and len((memory or {}).get("layers", (1,))) == 1:
            first += like(self.model("dense_engram", backbone=backbone, memory=base), part="memory")
        if fusion != "every_stream":
            backbone["memory_fusion"] = fusion
        chosen = {**base, **(memory or {})}
        recipe = self.recipe(self.model("dense_engram", backbone=backbone, memory=chosen, like=first, **(model or {})))
        return dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, **(optimizer or {})))

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Estimate the differences to the reference, with intervals."""
        result = super().measure(seeds, runner)
        return {**result, "differences": differences(result)}


def group_of(name: str) -> str:
    """The group of an arm by its name; the reference is in none."""
    return name.partition("-")[0]


def _recipe_of(arm: Arm, seed: int) -> Recipe:
    return with_seed(arm, seed + _OTHER_SEEDS * (arm.name == AGAIN))


def differences(result: Mapping[str, Any]) -> dict[str, Any]:
    """Differences of held-out loss to the reference, by arm, with intervals of 95 %; arms that diverged have none.

    Errors are pooled over the arms that are paired with the reference and resemble it. Each other arm (the control with
    other seeds, and those that the budget does not bind) has intervals of its own errors, which are wide.
    """
    arms = result["arms"]
    known = [name for name, arm in arms.items() if is_whole(arm)]
    alike = [name for name in known if name != AGAIN and not arms[name]["is_control"]]
    found: dict[str, Any] = {}
    if REFERENCE not in known or not result["seeds"]:
        return found
    for name in known:
        if name != REFERENCE:
            pool = alike if name in alike else [REFERENCE, name]
            losses = arm_losses(result, pool)
            assert losses is not None, "all of these have a loss in every seed"
            found[name] = estimate(losses, difference(pool.index(REFERENCE), pool.index(name))).to_dict()
    return found


def ablation_finding(result: Mapping[str, Any]) -> Finding:
    """Say which changes are told from noise, and list all differences beside the paper's."""
    found, arms = result["differences"], result["arms"]
    rows = []
    for name, arm in arms.items():
        if name == REFERENCE:
            continue
        paper, cost, first = ABLATIONS.get(name), arm["cost"], arms[REFERENCE]["cost"]
        rows.append(
            [
                arm["title"],
                group_of(name).replace("_", " "),
                estimate_text(found.get(name), "+.4f"),
                NOTHING if paper is None else f"{paper:+.4f}",
                *(f"{cost[key] / first[key] - 1:+.1%}" for key in ("bytes", "flops")),
            ]
        )
    table = Table(
        title="What a change costs",
        columns=("Change", "Group", "Loss over the reference", "Paper", "Bytes", "FLOPs"),
        rows=rows,
        note="Nats per token, with intervals of 95 %; above 0 the change is worse. Of many arms, one in twenty leaves "
        "its interval by chance. Paper: section 6.2, single runs of 12 blocks; its reference has two layers, but "
        "for the places of layers, which are compared with layer 2. Bytes and FLOPs: relative to the reference.",
    )
    return Finding(
        headline=_headline(result),
        detail=f"{seeds_note(len(result['seeds']))} {_noise_text(result)}".strip(),
        tables=[table, *study_finding(result).tables],
    )


def _headline(result: Mapping[str, Any]) -> str:
    tested = {
        name: one
        for name, one in result["differences"].items()
        if group_of(name) != "controls" and not result["arms"][name]["is_control"] and one["interval"] is not None
    }
    if not tested or len(result["seeds"]) < ENOUGH_SEEDS:
        return "There are too few seeds to tell a change from noise"

    def named(is_clear: Callable[[float, float], bool], *, worst_first: bool) -> str:
        clear = [name for name, one in tested.items() if is_clear(*one["interval"])]
        clear.sort(key=lambda name: tested[name]["value"], reverse=worst_first)
        words = [f"{result['arms'][name]['title']} ({signed_text(tested[name]['value'])})" for name in clear]
        return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "") if words else "none"

    worse = named(lambda low, high: low > 0, worst_first=True)
    better = named(lambda low, high: high < 0, worst_first=False)
    return f"Worse than the reference: {worse}. Better: {better}"


def _noise_text(result: Mapping[str, Any]) -> str:
    """Say how far two equal models differ, where the controls were trained."""
    words = []
    for name, what in (("controls-hash", "with another hash"), (AGAIN, "with other seeds")):
        if (one := result["differences"].get(name)) is not None:
            spread = result["arms"][name]["summary"]["loss"]["difference"]["std"]
            words.append(f"{what} by {one['value']:+.4f}")
            words[-1] += "" if spread is None else f" ± {spread:.4f}"
    return f"The noise: the reference differs from itself {' and '.join(words)}." if words else ""


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw all differences with their intervals, group by group."""
    arms = {name: arm for name, arm in result["arms"].items() if name in result["differences"]}
    rows = {
        name: (arm["title"], result["differences"][name], arm["summary"]["loss"]["difference"]["per_seed"])
        for name, arm in arms.items()
    }
    if not rows:
        return []
    groups = [group_of(name) for name in rows]
    label = "held-out loss over the reference, nats per token"
    return [forest(list(rows.values()), groups, name="ablations", title="What a change costs", label=label)]
