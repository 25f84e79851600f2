"""The recipe of an adaptation: everything that decides it, as one value."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from engram_lm.adapt.placement import Placement
from engram_lm.errors import ConfigError, check_whole, suggestion
from engram_lm.training.data.text_source import STANDARD_LIBRARY, TextSource, name_sources
from engram_lm.training.dependence import DependenceOptions
from engram_lm.training.recipe import PATHS, AdapterOptions, LoraOptions
from engram_lm.training.recipe_file import RecipeFile
from engram_lm.training.retention import RetentionOptions
from engram_lm.training.schedules import ScheduleOptions
from engram_lm.training.writing import WritingOptions

ArmName = str
"""What is compared: a name of `ARM_NAMES`, and behind it any of `FEATURES`, each after a plus sign."""

ARM_NAMES = (
    "memory",
    "lora",
    "memory_lora",
    "full",
    "random_table",
    "permuted_hash",
    "one_row",
    "embeddings",
    "transfer",
)
"""Ways to adapt a model; `engram_lm.studies.adaptation.arms` says what each is."""
FEATURES = ("occupancy", "sparse", "retention")
_WITHOUT = {
    "occupancy": ("lora", "full", "embeddings", "random_table"),
    "sparse": ("lora", "full", "embeddings", "random_table", "one_row"),
    "retention": ("full", "embeddings"),
}
"""Arms that cannot have a feature."""
_WHY = {
    "occupancy": "it has no rows that training writes",
    "sparse": "it trains no rows that can be told apart by the texts that read them",
    "retention": "it has no base beside it that it could be held to",
}
"""What they lack."""
"""What can be added to some of them, also there."""

_CONTROLS: tuple[ArmName, ...] = ("random_table", "permuted_hash", "lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The pretrained model."""

    model: str = "runs/base-cpu/model"
    """Folder, or name on the Hub, of a causal language model of transformers and its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    layer_list: str | None = None
    """Path of its decoder layers, such as ``model.layers``, where structure does not tell."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type its weights are loaded in; auto is as stored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainOptions:
    """What is trained and evaluated on."""

    domain: Annotated[tuple[TextSource, ...], PATHS] = ()
    """Text of the domain that the model should learn: files or folders, or tables of ``path``, ``kind``, ``field`` and
    ``split``, as for ``engram-lm train``. Must be given."""
    held_out: float = 0.06
    """Share of the domain's documents, chosen by their contents, that the result is measured on. If there are too few
    documents, it is that share of the tokens, from the end."""
    validation: float = 0.02
    """Share of the domain that is used to choose learning rates, and for nothing else."""
    held_out_tokens: int = 65_536
    """Tokens of the held-out share that are used at most; half as many of the validation share are used."""
    retained: Annotated[Literal["standard-library"] | tuple[TextSource, ...], PATHS] = ()
    """Texts unlike the domain, to measure what the model forgets: files or folders, each of them a text of its own, or
    ``standard-library`` for the Python sources that ``engram-lm train`` trains on unless told otherwise. What is
    reported as the old text is the mean over them. Without them forgetting is not measured."""
    retained_held_out: float = 0.01
    """Share of the documents of each that is used. With the ``data.held_out`` of the recipe that trained the base,
    these are the documents that the base was not trained on. 0 uses all of the text."""
    retained_tokens: int = 65_536
    """Tokens of each retained text that are used at most."""
    general: Annotated[tuple[TextSource, ...], PATHS] = ()
    """Where text comes from that the model knew before and should not forget: what ``[writing]`` compares with, and
    what ``[retention]`` is measured on. It must not be what forgetting is measured on: see ``general_held_out``."""
    general_held_out: float = 0.0
    """Share of its documents that is not used for that. Over the sources of ``retained`` and with
    ``retained_held_out``, these are the documents that forgetting is measured on."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    cache: Path | None = None
    """Folder of token shards, which runs share; where None, ``engram-lm/shards`` in ``$XDG_CACHE_HOME`` or ~/.cache."""

    def __post_init__(self) -> None:
        check_whole(
            at_least=2,
            held_out_tokens=self.held_out_tokens,
            retained_tokens=self.retained_tokens,
            sequence_length=self.sequence_length,
        )
        if not (0 < self.held_out < 1 and 0 <= self.validation < 1 and self.held_out + self.validation < 1):
            raise ConfigError(
                f"held_out is a share above 0, validation one from 0, and both leave something to train on; not "
                f"{self.held_out} and {self.validation}"
            )
        if not 0 <= self.retained_held_out < 1:
            raise ConfigError(f"retained_held_out is a share from 0 and below 1, not {self.retained_held_out}")

    @property
    def retained_texts(self) -> dict[str, TextSource]:
        """The retained texts by name: that of the file or folder, with a number where several have the same."""
        sources = (TextSource(path=STANDARD_LIBRARY),) if isinstance(self.retained, str) else self.retained
        found: dict[str, TextSource] = {}
        for number, source in enumerate(sources, 1):
            name = name_sources([source])
            found[name if name not in found and name != "validation" else f"{name} ({number})"] = source
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryOptions(AdapterOptions):
    """The memory that is added: fields of ``EngramConfig``."""

    layers: tuple[int | Placement, ...] = ("middle",)
    """Decoder layers that read memory before they run, counted from 0, or places: ``early`` (layer 1), ``middle`` (the
    layer before the middle) and ``late`` (the layer after three quarters). Nothing is computed backward below them."""
    occupancy: Literal["none", "rows", "ngrams"] = "ngrams"
    """Whether memory speaks only where training has written rows, by row or by whole N-grams, and otherwise leaves the
    base as it is. A random table, whose rows are never written, has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ConfigError("layers names at least one decoder layer, such as [1] or ['early', 'middle']")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankOptions(LoraOptions):
    """The low-rank matrices that memory is compared with, and joined with."""

    rank: int | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Rank; auto takes the one whose operations per token are nearest to those of the memory's matrices."""

    def _check_rank(self) -> None:
        if self.rank != "auto" and self.rank < 1:
            raise ConfigError(f"rank is at least 1 or 'auto', not {self.rank}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How long to train, on what, and how often."""

    num_steps: int | None = None
    """Optimizer steps of the arm ``memory``, whose operations are the budget of every arm. Or give ``epochs``."""
    epochs: float | None = None
    """Times through the domain's text, in place of ``num_steps``."""
    equal: Literal["compute", "tokens"] = "compute"
    """What every arm gets as much of as the arm ``memory`` does: training operations, or tokens."""
    seeds: int = 1
    """Repetitions with another hash, other first numbers and another order of the text. All arms of a seed see the same
    batches."""
    batch_size: int = 16
    """Sequences in a step."""
    micro_batch_size: int | None = None
    """Sequences that are computed at a time; gradients are added up. All where None."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto takes bfloat16 where the device has it in hardware."""
    device: str = "auto"
    """Where to train, as torch names it; auto takes an accelerator where there is one."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    curve_points: int = 6
    """How often the held-out loss is measured during training."""
    curve_tokens: int = 16_384
    """Held-out tokens used for each of these measurements."""
    look_inside: bool = True
    """Whether trained memory is also measured switched off and with its rows exchanged, which takes as long as
    measuring every text twice more."""

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.epochs is None):
            raise ConfigError("give either num_steps or epochs")
        check_whole(num_steps=self.num_steps, seeds=self.seeds)
        check_whole(batch_size=self.batch_size, micro_batch_size=self.micro_batch_size)
        check_whole(at_least=0, curve_points=self.curve_points)
        check_whole(at_least=2, curve_tokens=self.curve_tokens)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is a finite number above 0, not {self.epochs}")
        if not 0 < self.max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm is a finite number above 0, not {self.max_grad_norm}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateOptions:
    """Learning rates. Where several are given, the first seed tries each and the lowest validation loss decides."""

    memory: tuple[float, ...] = (1.6e-2,)
    """Rates of ``memory``. Its controls and ``transfer`` use the one that is chosen for it."""
    lora: tuple[float, ...] = (4e-3,)
    """Rates of ``lora``."""
    memory_lora: tuple[float, ...] = (4e-3,)
    """Rates of ``memory_lora``."""
    full: tuple[float, ...] = (1e-3,)
    """Rates of ``full``."""
    table_lr_multiplier: float = 5.0
    """Learning rate of the tables, relative to the arm's own."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices. Tables have none."""

    def __post_init__(self) -> None:
        for name in ("memory", "lora", "memory_lora", "full"):
            rates = getattr(self, name)
            if not rates or len(set(rates)) != len(rates) or not all(0 < rate < math.inf for rate in rates):
                raise ConfigError(f"{name} is one or several different rates above 0, not {list(rates)}")
        if not (0 <= self.table_lr_multiplier < math.inf and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                f"table_lr_multiplier and weight_decay are at least 0, not {self.table_lr_multiplier} and "
                f"{self.weight_decay}"
            )

    def of(self, arm: ArmName) -> tuple[float, ...]:
        """The rates to try for an arm."""
        plain = arm.partition("+")[0]
        rates: tuple[float, ...] = getattr(self, plain if plain in ("lora", "memory_lora", "full") else "memory")
        return rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmOptions:
    """What is trained and compared."""

    names: tuple[ArmName, ...] = ("memory",)
    """memory; lora; memory_lora (both); full (every weight); random_table (rows that stay as drawn); permuted_hash (an
    N-gram reads other rows at every position); one_row (the same row everywhere); embeddings (means of the model's own
    token embeddings, and no rows); transfer (rows made of the base's hidden states). Behind a plus sign, as in
    ``memory+occupancy`` or ``lora+retention``: occupancy (memory speaks only where training has written), sparse (only
    rows whose use stands out against ``data.general`` are trained), retention (the model is held to what its base says
    of ``data.general``). What the sections of the recipe turn on, every arm has."""

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(f"names lists one arm or several, each once, not {list(self.names)}")
        for name in self.names:
            plain, *features = name.split("+")
            if plain not in ARM_NAMES:
                raise ConfigError(f"there is no arm {name!r}; {suggestion(plain, ARM_NAMES)}")
            for feature in features:
                if feature not in FEATURES or features.count(feature) > 1:
                    raise ConfigError(f"the arm {name!r} has each of {', '.join(FEATURES)} at most once behind a plus")
                if plain in _WITHOUT[feature]:
                    raise ConfigError(f"the arm {plain!r} cannot have {feature!r}: {_WHY[feature]}")

    def with_controls(self) -> Self:
        """Add the controls."""
        return dataclasses.replace(self, names=tuple(dict.fromkeys((*self.names, *_CONTROLS))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Benchmarks that the base and every trained model answer, to measure what the model still can do."""

    names: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, as for ``engram-lm eval --tasks``; none are run where empty."""
    limit: int | None = None
    """Questions of each task at most; all of them where None."""
    few_shot: int | None = None
    """Examples before each question; the task's own number where None."""
    data: Path | None = None
    """Folder with the tasks' data, for machines without a network: see ``engram-lm eval --task-data``."""

    def __post_init__(self) -> None:
        check_whole(limit=self.limit)
        check_whole(at_least=0, few_shot=self.few_shot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationRecipe(RecipeFile):
    """Everything that decides an adaptation. A recipe file is this, in TOML, one section per field."""

    prog: ClassVar[str] = "engram-lm adapt"
    # What decides where work is done and how much of it, and not what comes out of each part.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"data.cache", "train.micro_batch_size", "train.device", "train.seeds", "arms.names"}
    )

    base: BaseOptions = dataclasses.field(default_factory=BaseOptions)
    """The pretrained model."""
    data: DomainOptions = dataclasses.field(default_factory=DomainOptions)
    """What is trained and evaluated on."""
    memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)
    """The memory that is added."""
    lora: LowRankOptions = dataclasses.field(default_factory=LowRankOptions)
    """The low-rank matrices that it is compared with."""
    train: StepOptions
    """How long to train, on what, and how often."""
    rates: RateOptions = dataclasses.field(default_factory=RateOptions)
    """Learning rates of the arms."""
    schedule: ScheduleOptions = dataclasses.field(default_factory=ScheduleOptions)
    """How they change."""
    writing: WritingOptions = dataclasses.field(default_factory=WritingOptions)
    """Which rows are trained, in every arm whose rows are."""
    retention: RetentionOptions = dataclasses.field(default_factory=RetentionOptions)
    """How strongly the model is held to what it says of ``data.general``, in every arm but ``full`` and
    ``embeddings``, which have no base beside them to be held to."""
    dependence: DependenceOptions = dataclasses.field(default_factory=DependenceOptions)
    """How strongly the model is made to depend on its memory, in every arm with memory."""
    tasks: TaskOptions = dataclasses.field(default_factory=TaskOptions)
    """Benchmarks for what the model still can do."""
    arms: ArmOptions = dataclasses.field(default_factory=ArmOptions)
    """What is trained and compared."""
