"""Studies that put candidates beside the paper's layer: memories that are listed in one place each, at equal bytes."""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, ClassVar, Literal

from engram_lm.errors import ConfigError, check_flags, suggestion
from engram_lm.memory import EngramConfig
from engram_lm.studies.budget import price
from engram_lm.studies.candidate_report import candidate_figures, candidate_finding, tokens_per_second
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.diagnostics import diagnose_models
from engram_lm.studies.micro_models import MicroModelFlags
from engram_lm.studies.rates import VALIDATION_LOSS, with_unused_seed
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import HELD_OUT_LOSS, Arm, Budget, Measure, Study, TrainedArm, kept, short_digest
from engram_lm.studies.text_flags import like
from engram_lm.training.data.text import EvaluationText, TrainingText
from engram_lm.training.data.text_source import TextSource
from engram_lm.training.dry_run import priced_config
from engram_lm.training.recipe import CheckpointOptions, ModelOptions, Recipe

REFERENCE = "engram"
"""Name of the paper's layer, which every candidate is compared with."""
_TWIN = "-flops"
"""End of the name of a twin that takes as many operations as the paper's layer."""
_ALIKE = 0.01
"""Relative difference of operations below which a candidate needs no twin."""
_NARROWEST = 8
"""Channels that a feed-forward network keeps at least."""


def listed_name(name: str) -> str:
    """The name of a candidate in its list, which a twin of it is known by too."""
    return name.removesuffix(_TWIN)


def _unchanged(study: "CandidateStudy") -> Mapping[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A memory, or a control, that is compared with the paper's layer."""

    name: str
    """What ``--arms`` calls it."""
    title: str
    """What a reader sees, in two or three words."""
    about: str = ""
    """What is special about it, in a sentence."""
    memory: Callable[["CandidateStudy"], Mapping[str, Any]] | None = _unchanged
    """Fields of `EngramConfig` that differ from those of the paper's layer, the ``reference`` of the study that it is
    given; None is a model without memory. Unless ``rows_per_head`` is among them, it follows from the bytes of the
    paper's layer."""
    fit: Literal["rows", "width"] = "rows"
    """What follows from the bytes: the rows of each head; or the width of rows, where there is one for each token."""
    every_block: bool = False
    """Whether every block has it, and not the block of the paper's layer."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of a recipe's ``[model]``."""
    table_rate: float | None = None
    """Learning rate of its table relative to the backbone's, where it was tuned for this candidate."""
    is_control: bool = False
    """Whether it only shows what a difference consists of; the bytes of a control may be others."""
    equal_flops: bool = False
    """Whether its feed-forward networks are made wider or narrower until a token takes as many operations as with the
    paper's layer."""
    extra_bytes: Callable[["CandidateStudy"], int] | None = None
    """Bytes that it needs beside its weights when it is used, such as those of a store that it searches; less those of
    weights that it needs in training alone."""
    evaluate: Callable[[TrainedArm, TrainingText], Mapping[str, Any]] | None = None
    """Measures what the trained model alone does not give: ``loss``, on the held-out text in nats per token, ``texts``,
    the loss on each other text, and ``search``, what searching takes (`engram_lm.studies.rivals.knn.evaluate`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateStudy(MicroModelFlags, StudyCommand):
    """What studies of candidates share; each has a list of them."""

    candidates: ClassVar[Sequence[Candidate]] = ()
    """All of them. The paper's layer is the first."""
    question: ClassVar[str] = ""
    """What the study asks."""

    arms: tuple[str, ...] = ()
    """Candidates by name; all unless given. The paper's layer is always among them."""
    arm_rates: tuple[str, ...] = ()
    """Learning rates of tables for some candidates, as NAME=RATE and relative to the backbone's, in place of their own
    and of --table-lr-multiplier."""
    rows_per_head: int = 20_000
    """Rows of each head of the paper's layer. Its table has 64 numbers for each of them at the smallest size, and the
    others as many numbers in all."""
    tune: tuple[float, ...] = ()
    """Rates of tables to choose from, in place of the comparison: every candidate with a table is trained at each, on a
    seed and measured on documents that no result uses."""
    equal_flops: bool = False
    """Add to each candidate that takes more or fewer operations a twin that takes as many as the paper's layer: its
    feed-forward networks are narrower or wider."""
    other_data: tuple[str, ...] = ()
    """Other texts to measure the loss on, as NAME=PATH; nothing is trained on them."""
    tokens: int = 1_000_000
    """Tokens each model is trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "seeds", "rows_per_head")
        known = [one.name for one in self.candidates]
        for name in (*self.arms, *self._rates):
            if name not in known:
                raise ConfigError(f"there is no candidate {name!r}; {suggestion(name, known)}")
        if not all(0 < rate < math.inf for rate in self.tune) or len(set(self.tune)) < len(self.tune):
            raise ConfigError(f"--tune names rates above 0 that differ, not {self.tune}")
        self._other_texts  # noqa: B018  # refuses what cannot be

    @property
    def _rates(self) -> dict[str, float]:
        """Rates of the tables by candidate, where the flag gives them."""
        found = {}
        for name, value in _pairs(self.arm_rates, "--arm-rates", "NAME=RATE"):
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = math.nan
            if not 0 < found[name] < math.inf:
                raise ConfigError(f"a rate of --arm-rates is a finite number above 0, not {value!r}")
        return found

    @property
    def _other_texts(self) -> tuple[EvaluationText, ...]:
        return tuple(
            EvaluationText(name=name, sources=(TextSource(path=path),), max_tokens=self.held_out_tokens)
            for name, path in _pairs(self.other_data, "--other-data", "NAME=PATH")
        )

    @property
    def reference(self) -> EngramConfig:
        """The paper's layer at this size."""
        return self.memory_config({"rows_per_head": self.rows_per_head})

    @property
    def chosen(self) -> list[Candidate]:
        """The candidates of this study, with the twins of equal operations, in the order of the list."""
        named = [one for one in self.candidates if not self.arms or one.name in (REFERENCE, *self.arms)]
        found = [one for one in named if self._fits(one)]
        if not self.equal_flops:
            return found
        wanted = price(self._recipe(found[0])).flops
        twins = [
            dataclasses.replace(one, name=f"{one.name}{_TWIN}", title=f"{one.title}, equal FLOPs", equal_flops=True)
            for one in found
            if one.memory is not None
            and not one.equal_flops
            and abs(price(self._recipe(one)).flops / wanted - 1) > _ALIKE
        ]
        return [*found, *(one for one in twins if self._width(one) >= _NARROWEST)]

    def _fits(self, one: Candidate) -> bool:
        """Whether the backbone has the blocks that a candidate is read in."""
        last = -1 if one.memory is None else max(one.memory(self).get("layers", self.reference.layers))
        return last < self.config("dense").num_hidden_layers

    def study(self) -> Study:
        """The paper's layer and the chosen candidates, all of which have the same backbone and the same bytes."""
        if self.tune:
            return self._tuning()
        return Study(
            name=self.name,
            question=self.question,
            arms=tuple(
                Arm(
                    name=one.name,
                    title=one.title,
                    about=one.about,
                    recipe=self._recipe(one),
                    is_control=one.is_control,
                    extra_bytes=0 if one.extra_bytes is None else one.extra_bytes(self),
                )
                for one in self.chosen
            ),
            budget=Budget(equal=("bytes", "tokens"), tolerance=0.02),
            seeds=self.seeds,
            measures=(HELD_OUT_LOSS, *(_loss_on(text.name) for text in self._other_texts)),
            figures=candidate_figures,
            finding=candidate_finding,
        )

    def _tuning(self) -> Study:
        """Every chosen candidate with a table that is trained, in a group of its own with an arm for each rate."""
        arms = []
        for one, rate in itertools.product(self.chosen, self.tune):
            config = priced_config(self._recipe(one)).memory_config
            if config is None or not config.entry.has_table or one.model.get("frozen_tables") or one.evaluate:
                continue
            tuned = dataclasses.replace(self, tune=(), arm_rates=(f"{listed_name(one.name)}={rate!r}",))
            name, title = f"{one.name}-x{rate:g}", f"{one.title}, tables × {rate:g}"
            arms.append(Arm(name=name, title=title, recipe=tuned._recipe(one), x=rate, group=one.name))
        return Study(
            name=self.name,
            question="Which learning rate suits the table of each candidate?",
            arms=tuple(arms),
            seeds=self.seeds,
            measures=(VALIDATION_LOSS,),
            recipe_of=with_unused_seed,
        )

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Measure the candidates that measure their loss themselves, and how fast each was trained."""
        if self.tune:
            return super().measure(seeds, runner)
        own = {one.name: one.evaluate for one in self.chosen if one.evaluate is not None}
        measured, searches = [], dict[str, list[Any]]()
        for seed in seeds:
            arms = dict(seed)
            for name in (name for name in own if seed[name].failed is None):
                runner.stop_if_asked()
                arm = seed[name]
                runner.progress.note(f"seed {arm.seed}: searching with {arm.arm.title}")
                found = kept(
                    arm.folder.with_name(
                        f"{name}.evaluated-{short_digest((arm.arm.recipe, arm.arm.extra_bytes))}.json"
                    ),
                    functools.partial(own[name], arm, runner.text(arm.arm.recipe)),
                )
                arms[name] = _with_losses(arm, found)
                searches.setdefault(name, []).append(found["search"])
            measured.append(arms)
        result = super().measure(measured, runner)
        result["by_kind"] = self._by_kind(seeds, own, runner) if seeds else None
        for name, arm in result["arms"].items():
            arm["tokens_per_second"] = tokens_per_second(arm)
            arm["searches"] = searches.get(name, [])
            arm["table_rate"] = seeds[0][name].arm.recipe.optimizer.table_lr_multiplier if seeds else None
        return result

    def _by_kind(self, seeds: Sequence[Mapping[str, TrainedArm]], left_out: Container[str], runner: Runner) -> Any:
        """Say for which tokens the models of the first seed pay, and by how much more than the paper's layer."""
        arms = {name: arm for name, arm in seeds[0].items() if arm.failed is None and name not in left_out}
        if REFERENCE not in arms or not all((arm.folder / "model").is_dir() for arm in arms.values()):
            return None

        def find() -> dict[str, Any]:
            runner.progress.note("measuring all models by kind of token")
            loaded = {name: arm.load() for name, arm in arms.items()}
            recipe, tokenizer = arms[REFERENCE].arm.recipe, loaded[REFERENCE][1]
            models = {name: model for name, (model, _) in loaded.items()}
            return {"found": diagnose_models(models, tokenizer, runner.text(recipe), recipe)}

        named = short_digest([(name, arm.arm.recipe) for name, arm in arms.items()])
        return kept(arms[REFERENCE].folder.with_name(f"by-kind-{named}.json"), find)["found"]

    def _recipe(self, one: Candidate) -> Recipe:
        """A candidate as a recipe: its memory in the backbone of all, with the same first weights as far as they go."""
        rate = self._rates.get(listed_name(one.name), one.table_rate)
        tuned = self if rate is None else dataclasses.replace(self, table_lr_multiplier=rate)
        recipe = tuned.recipe(self._model(one, self._width(one) if one.equal_flops else None))
        return dataclasses.replace(
            recipe,
            evaluation=dataclasses.replace(recipe.evaluation, texts=self._other_texts),
            # Tables have twice as much in their optimizers, which a finished run does not keep.
            checkpoint=CheckpointOptions(keep_last=0),
        )

    def _model(self, one: Candidate, width: int | None = None) -> ModelOptions:
        """A candidate's model; ``width`` is that of its feed-forward networks, where it is not the usual one."""
        backbone = {} if width is None else {"intermediate_size": width}
        first = like(self.model("dense"))
        if one.memory is None:
            return self.model("dense", backbone=backbone, like=first if backbone else (), **one.model)
        base, dense = self.reference, self.config("dense")
        changed = dict(one.memory(self))
        # What feed-forward networks save or take belongs to the same bytes.
        wider = 0 if width is None else width - dense.intermediate_size
        room = base.num_parameters() - 3 * dense.hidden_size * dense.num_hidden_layers * wider
        if one.every_block:
            changed["layers"] = tuple(range(dense.num_hidden_layers))
        if one.fit == "width":
            changed |= {"rows_per_head": self.vocab_size}
        fixed = {"rows_per_head": 1, **changed}
        config = EngramConfig.from_dict({**base.to_dict(), **fixed})
        if one.fit == "width":
            config = fit_width(config, room)
        elif "rows_per_head" not in changed and config.entry.has_table:
            config = fit_rows(config, room)
        changed |= {"rows_per_head": config.rows_per_head, "memory_dim": config.memory_dim}
        if len(config.layers) == len(base.layers):
            first += like(self.model("dense_engram"), part="memory")
        return self.model("dense_engram", backbone=backbone, memory=changed, like=first, **one.model)

    def _width(self, one: Candidate) -> int:
        """Width of the feed-forward networks with which a candidate takes as many operations as the paper's layer."""
        dense = self.config("dense")
        per_channel = 18 * dense.hidden_size * dense.num_hidden_layers * self.num_steps
        per_channel *= self.batch_size * self.sequence_length
        width, wanted = dense.intermediate_size, price(self.recipe(self._model(self.candidates[0]))).flops
        for _ in range(3):  # the bytes that narrower networks save go to the table, and wider rows take operations
            more = round((wanted - price(self.recipe(self._model(one, width))).flops) / per_channel)
            if not more or width + more < 1:
                return width + more
            width += more
        return width


def fit_rows(config: EngramConfig, num_parameters: int) -> EngramConfig:
    """Choose the rows of every head so that tables and layers come to a number of parameters, as nearly as they can.

    Raises:
        ConfigError: There is no room for a single row.
    """
    rows, per_row = 1, len(config.num_table_rows()) * config.memory_dim
    for _ in range(8):
        config = dataclasses.replace(config, rows_per_head=rows)
        more = round((num_parameters - config.num_parameters()) / per_row)
        if not more:
            break
        rows += more
        if rows < 1:
            raise ConfigError(f"{num_parameters:,} parameters have no room for a row of the layer {config.layer!r}")
    return config


def fit_width(config: EngramConfig, num_parameters: int) -> EngramConfig:
    """Choose the width of rows so that tables and layers come to a number of parameters, as nearly as they can."""
    step = config.num_heads_total
    widths = range(step, 1 << 14, step)
    # What a layer holds beside its table grows with the width as well.
    place = bisect.bisect_left(
        widths, num_parameters, key=lambda width: dataclasses.replace(config, memory_dim=width).num_parameters()
    )
    near = [dataclasses.replace(config, memory_dim=width) for width in widths[max(0, place - 1) : place + 1]]
    return min(near, key=lambda one: abs(one.num_parameters() - num_parameters))


def _loss_on(name: str) -> Measure:
    """The loss on another text, which training measured after its last step."""

    def of(trained: TrainedArm) -> float | None:
        found: float | None = trained.result.get("texts", {}).get(name, {}).get("loss")
        return found

    return Measure(name=f"loss_{name}", title=f"loss on {name}", unit="nats per token", of=of)


def _with_losses(trained: TrainedArm, found: Mapping[str, Any]) -> TrainedArm:
    held_out = {**(trained.result.get("held_out") or {}), "loss": found["loss"]}
    return dataclasses.replace(trained, result={**trained.result, "held_out": held_out, "texts": found["texts"]})


def _pairs(given: Sequence[str], flag: str, form: str) -> list[tuple[str, str]]:
    """Take NAME=VALUE apart."""
    found = [(name, value) for one in given for name, _, value in [one.partition("=")]]
    names = [name for name, _ in found]
    if not all(name and value for name, value in found) or len(set(names)) < len(names):
        raise ConfigError(f"{flag} takes values such as {form}, each name once, not {' '.join(given)}")
    return found
