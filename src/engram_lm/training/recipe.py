"""The recipe of a training run: everything that decides it, as one value."""

import dataclasses
import math
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from engram_lm.adapt.placement import Placement, resolve_layers
from engram_lm.errors import ConfigError, check_whole
from engram_lm.memory import EngramConfig
from engram_lm.training.data.text import EvaluationText
from engram_lm.training.data.text_source import TextSource
from engram_lm.training.dependence import DependenceOptions
from engram_lm.training.loop import TrainOptions
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe_file import RecipeFile
from engram_lm.training.retention import RetentionOptions
from engram_lm.training.schedules import ScheduleOptions
from engram_lm.training.stage import StageOptions
from engram_lm.training.writing import WritingOptions

PATHS = tyro.conf.arg(constructor=tuple[str, ...], metavar="[PATH [PATH ...]]")
"""How ``--keys`` shows a key that takes text: as paths, because a flag's help cannot show the tables it also takes."""
_DEEP = 1 << 30
"""A number of layers that no model reaches, for checks before the model is known."""
TABLES = tyro.conf.arg(constructor=tuple[str, ...], metavar="[{KEY = VALUE, ...} ...]")
"""How ``--keys`` shows a key that takes a list of tables."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureOptions:
    """Shape of a model of this project."""

    preset: str = "engram-nano"
    """A preset of ``engram-lm plan``: dense-, moe- or engram- with -micro-100k, -micro-500k, -micro-2m,
    -nano, -tiny or -small, or one of the paper's."""
    config: Path | None = None
    """A config.json, or a folder that holds one, in place of a preset."""
    backbone: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ``EngramLMConfig`` to change, such as ``num_hidden_layers``."""
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ``EngramConfig`` to change, such as ``rows_per_head``."""

    def __post_init__(self) -> None:
        if (self.backbone or self.memory) and self.config is not None:
            raise ConfigError("backbone and memory change a preset; with config or weights, edit its config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikeOptions(ArchitectureOptions):
    """Another model, whose first numbers are taken over."""

    part: Literal["all", "memory"] = "all"
    """``all`` takes every weight that has the same name in both models. ``memory`` takes the memory layers alone and
    pairs them in order, whichever blocks they are in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(ArchitectureOptions):
    """Which model is trained."""

    weights: Path | None = None
    """A Hugging Face folder of this project, whose model and tokenizer training goes on from, in place of a preset."""
    base: str | None = None
    """A pretrained causal language model of transformers, a folder or its name on the Hub, to start from in place of a
    preset. With ``[adapter]`` or ``[lora]`` it stays as it is and those are trained; without them all of it is."""
    revision: str | None = None
    """Branch, tag or commit of ``base`` on the Hub."""
    layer_list: str | None = None
    """Path of the base's decoder layers, such as ``model.layers``, where structure does not tell."""
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type that the base's weights are loaded in; auto is as stored."""
    like: Annotated[tuple[LikeOptions, ...], TABLES] = ()
    """Models whose first weights this one takes over, in order, in place of its own: tables of ``preset``, ``config``,
    ``backbone``, ``memory`` and ``part``. From a larger matrix the part that the smaller one has is taken. So arms of a
    study begin with the same numbers wherever they can."""
    frozen_tables: bool = False
    """Whether the rows of memory stay as they are at first."""

    def __post_init__(self) -> None:
        if self.config is not None and self.weights is not None:
            raise ConfigError("config and weights both say which model is trained; keep one of them")
        if (self.backbone or self.memory) and self.weights is not None:
            raise ConfigError("backbone and memory change a preset; with config or weights, edit its config.json")
        if self.base is not None and (self.weights or self.config or self.backbone or self.memory):
            raise ConfigError("base says which model is trained; leave out config, weights, backbone and memory")
        if self.like and (self.weights is not None or self.base is not None):
            raise ConfigError("like decides the first weights of a new model; those of weights and base are known")
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The memory that is added to a pretrained model. What is not named here is a field of ``EngramConfig``."""

    initialization: Literal["random", "transfer"] = "random"
    """How rows begin: drawn, or made of the base model's own hidden states for the text's frequent N-grams."""
    transfer_tokens: int = 131_072
    """Tokens whose hidden states are taken for that, at least 2; the pass over them counts as training."""
    transfer_source: Literal["last", "block"] = "last"
    """Whose hidden states: of the last decoder layer, or those that go into the layer that reads the memory."""
    control: Literal["none", "permuted_hash", "one_row", "embeddings"] = "none"
    """For comparisons, what memory reads in place of its rows: other rows at every position, so that rows cannot learn
    what N-grams mean; the same row everywhere; or no rows, but means of the model's own token embeddings."""
    layers: tuple[int | Placement, ...] = ()
    """Decoder layers that read memory before they run, counted from 0, or places: ``early`` (layer 1), ``middle`` (the
    layer before the middle) and ``late`` (the layer after three quarters). No memory is added where empty."""
    orders: tuple[int, ...] = (2, 3)
    """Orders of the N-grams that are looked up."""
    num_heads: int = 8
    """Hash heads per order."""
    memory_dim: int | None = None
    """Width of the memory vector over all heads; the model's hidden size, as near as the heads divide it, where
    None."""
    rows_per_head: int = 32_768
    """Rows asked for per head."""
    tables: Literal["per_layer", "shared"] = "per_layer"
    """One table for each layer, or one for all of them."""
    signs: Literal["none", "hashed"] = "none"
    """Whether rows are multiplied by a sign that the N-gram's row in the next head decides."""
    gate: Literal["signed_sqrt", "plain", "none"] = "signed_sqrt"
    """What the gate's score goes through before its sigmoid."""
    kernel_size: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    table_std: float = 0.02
    """Standard deviation of the first rows."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the rows. The optimizer's state stays in float32; updates of bfloat16 rows are rounded at random, so that
    small ones are not lost."""
    occupancy: Literal["none", "rows", "ngrams"] = "none"
    """Whether memory speaks only where training has written rows, by row or by whole N-grams, and otherwise leaves the
    base as it is."""
    seed: int = 0
    """Seed of the hash multipliers, and of the first rows with ``occupancy``."""

    def __post_init__(self) -> None:
        check_whole(at_least=2, transfer_tokens=self.transfer_tokens)
        if self.layers:
            self.for_base(max(self.memory_dim or 0, 64), _DEEP)  # refuses what cannot be

    def for_base(self, hidden_size: int, num_layers: int) -> EngramConfig:
        """Configure the memory of a model of this width and depth.

        Raises:
            ConfigError: An impossible memory.
        """
        heads = self.num_heads * len(self.orders)
        own = ("initialization", "transfer_tokens", "transfer_source", "control", "table_dtype")
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in own}
        values["layers"] = resolve_layers(self.layers, num_layers)
        if heads and self.memory_dim is None:
            values["memory_dim"] = max(1, round(hidden_size / heads)) * heads
        return EngramConfig(hidden_size=hidden_size, value_init="zero", **values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank matrices (LoRA) beside those of a pretrained model. They are trained by peft, in the extra ``lora``."""

    rank: int = 0
    """Their rank; 0 adds none."""
    alpha: float | None = None
    """Their product is multiplied by alpha / rank; twice the rank where None."""
    dropout: float = 0.0
    """Share of their inputs that is dropped in training, from 0 and below 1."""
    targets: tuple[str, ...] = ("all-linear",)
    """Ends of the names of the matrices that get them; ``all-linear`` is every matrix of the decoder layers."""

    def __post_init__(self) -> None:
        self._check_rank()
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is a finite number above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1 or not self.targets:
            raise ConfigError(
                f"dropout is from 0 and below 1 and targets not empty, not {self.dropout}, {self.targets}"
            )

    def _check_rank(self) -> None:
        check_whole(at_least=0, rank=self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How text becomes tokens."""

    path: str | None = None
    """A tokenizer's folder, or its name on the Hub. None takes that of ``weights`` or ``base``, or trains one."""
    vocab_size: int = 8192
    """Number of tokens of a tokenizer that is trained, at least 258."""
    train_bytes: int = 32_000_000
    """Text that it is trained on, in bytes, from the beginning of the sources."""

    def __post_init__(self) -> None:
        check_whole(at_least=258, vocab_size=self.vocab_size)  # all bytes and two special tokens
        check_whole(train_bytes=self.train_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained on."""

    sources: Annotated[tuple[TextSource, ...], PATHS] = ()
    """Where text comes from; the Python standard library's own sources where empty."""
    cache: Path | None = None
    """Folder of token shards, which runs share; where None, ``engram-lm/shards`` in ``$XDG_CACHE_HOME`` or ~/.cache."""
    max_bytes: int | None = None
    """Text to read at most, in bytes, at least 1. Of more files than this, some are taken, by their names. None reads
    all of it."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    held_out: float = 0.01
    """Share of the documents that is never trained on, chosen by their contents. If there are too few documents, it is
    that share of the text, from the end. 0 holds nothing out."""
    validation: float = 0.0
    """Share beside ``held_out`` for choices such as that of a learning rate; the trained model is evaluated on it as
    the text ``validation``."""
    held_out_sources: Annotated[tuple[TextSource, ...], PATHS] = ()
    """Where text to evaluate on comes from, in place of ``held_out``."""
    general: Annotated[tuple[TextSource, ...], PATHS] = ()
    """Where text comes from that the model knew before and should not forget: what ``[writing]`` compares with, and
    what ``[retention]`` is measured on. ``["python:standard-library"]`` names Python's own sources."""
    general_held_out: float = 0.0
    """Share of its documents that is not used for that. With the ``held_out`` of ``evaluation.texts`` over the same
    sources, these are the documents that are evaluated on there."""
    restart_documents: bool = False
    """Whether positions, attention and N-grams start anew at each document within a sequence. The short convolution of
    memory does not: it reads up to nine tokens of the previous document."""

    def __post_init__(self) -> None:
        check_whole(max_bytes=self.max_bytes)
        check_whole(at_least=2, sequence_length=self.sequence_length)
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is a share from 0 and below 1, not {self.held_out}")
        if self.validation and not (self.validation > 0 and self.held_out > 0 and self.held_out + self.validation < 1):
            raise ConfigError(
                f"validation is a share beside held_out, and both leave something to train on; not {self.validation} "
                f"and {self.held_out}"
            )
        if not 0 <= self.general_held_out < 1:
            raise ConfigError(f"general_held_out is a share from 0 and below 1, not {self.general_held_out}")
        if self.validation and self.held_out_sources:
            raise ConfigError("validation is a share of sources; with held_out_sources there are no such shares")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(TrainOptions):
    """How many steps, of what."""

    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because their gradient is not finite, before training ends with an error."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # type: ignore[assignment]
    """Type of matrix products; weights stay in float32. Auto takes bfloat16 where the device has it in hardware."""
    compile: Literal["no", "auto", "yes"] = "no"  # type: ignore[assignment]
    """Whether the passes of a model of ours are compiled by ``torch.compile``, which takes a minute at first and makes
    small models about twice as fast. Auto does so on one process that has a compiler. Results differ by rounding."""
    batch_size: int = 16
    """Sequences in a step, over all processes."""
    seed: int = 0
    """Decides the first weights and the order of the text."""
    device: str = "auto"
    """Where to train, as torch names it; auto takes an accelerator where there is one."""
    gradient_checkpointing: bool = False
    """Whether blocks are computed twice, to keep less of them in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"batch_size is at least 1 and seed from 0 to 2^63 - 1, not {self.batch_size} and {self.seed}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """When held-out loss is measured, and on what."""

    every: int = 500
    """Steps between measurements; 0 measures only at the end."""
    points: int | None = None
    """Measurements along the way, spread evenly over the run, in place of ``every``; at least 0."""
    start: bool = False
    """Whether held-out loss is also measured before the first step."""
    max_tokens: int = 65_536
    """Held-out tokens used each time, at least 2; half as many of ``data.validation``."""
    curve_tokens: int | None = None
    """Held-out tokens used for each measurement before the last one, at least 2; ``max_tokens`` where None. The last
    point of the curve is then also of these tokens, and the loss of the result is of ``max_tokens``."""
    texts: Annotated[tuple[EvaluationText, ...], TABLES] = ()
    """Other texts that the model is evaluated on after the last step, such as one that it should not forget: tables of
    ``name``, ``sources``, ``held_out`` and ``max_tokens``."""

    def __post_init__(self) -> None:
        check_whole(at_least=0, every=self.every, points=self.points)
        check_whole(at_least=2, max_tokens=self.max_tokens, curve_tokens=self.curve_tokens)
        if len({text.name for text in self.texts}) < len(self.texts):
            raise ConfigError(f"texts need different names, not {[text.name for text in self.texts]}")

    def steps(self, num_steps: int) -> Container[int]:
        """The steps of a run after which held-out loss is measured."""
        if self.points is not None:
            along = {round(num_steps * part / (self.points + 1)) for part in range(1, self.points + 1)}
        else:
            along = set(range(self.every, num_steps, self.every)) if self.every else set()
        return along | {num_steps}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When everything is saved."""

    every: int = 500
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep_last: int = 2
    """Checkpoints that are kept; 0 keeps one while training goes on, and none after its end."""
    asynchronous: bool = True
    """Whether training continues while a checkpoint is written, which takes a second copy of it in memory."""
    write_model: bool = True
    """Whether what was trained is written into the run folder at the end."""

    def __post_init__(self) -> None:
        check_whole(at_least=0, every=self.every, keep_last=self.keep_last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the work is divided under ``torchrun``. Tables are always divided by rows."""

    backbone: Literal["ddp", "fsdp2"] = "ddp"
    """Whether each process holds the whole backbone (DDP) or a share of it (FSDP2)."""
    deduplicate: bool = True
    """Whether a row that a process reads several times is sent to it once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is written down."""

    every: int = 1
    """Steps between lines of metrics.jsonl."""
    details_every: int = 100
    """Steps between lines that also have norms by group, use of the tables and expert load; 0 writes none."""
    tensorboard: Literal["auto", "yes", "no"] = "auto"
    """Whether to write TensorBoard's event files too; auto does so if ``tensorboard`` is installed."""
    wandb: Literal["auto", "yes", "no"] = "auto"
    """Whether to send metrics to Weights & Biases; auto does if ``wandb`` is installed and ``WANDB_PROJECT`` is set."""
    peak_tflops: float | None = None
    """Best speed of one device, in 10^12 operations per second, for MFU. None measures a CPU and looks up a known
    accelerator."""

    def __post_init__(self) -> None:
        check_whole(every=self.every)
        check_whole(at_least=0, details_every=self.details_every)
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops is a finite number above 0, not {self.peak_tflops}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(RecipeFile):
    """Everything that decides a training run. A recipe file is this, in TOML, one section per field."""

    prog: ClassVar[str] = "engram-lm train"
    # What decides where, how fast and how often, and not what comes out beyond rounding.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "evaluation",
            "checkpoint",
            "parallel",
            "log",
            "data.cache",
            "train.micro_batch_size",
            "train.device",
            "train.compile",
        }
    )

    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    """Which model is trained."""
    stage: StageOptions = dataclasses.field(default_factory=StageOptions)
    """How ``model.weights`` go on with longer sequences than they were trained on."""
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    """The memory that is added to ``model.base``."""
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)
    """The low-rank matrices that are added to ``model.base``."""
    tokenizer: TokenizerOptions = dataclasses.field(default_factory=TokenizerOptions)
    """How text becomes tokens."""
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    """What is trained on."""
    train: RunOptions
    """How many steps, of how many sequences, in which type."""
    writing: WritingOptions = dataclasses.field(default_factory=WritingOptions)
    """Which rows of memory are trained."""
    retention: RetentionOptions = dataclasses.field(default_factory=RetentionOptions)
    """How strongly a model with a frozen base is held to what its base says of ``data.general``."""
    dependence: DependenceOptions = dataclasses.field(default_factory=DependenceOptions)
    """How strongly a model with a frozen base is made to depend on its memory."""
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    """How gradients become updates."""
    schedule: ScheduleOptions = dataclasses.field(default_factory=ScheduleOptions)
    """How the learning rate changes."""
    evaluation: EvaluationOptions = dataclasses.field(default_factory=EvaluationOptions)
    """When held-out loss is measured."""
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    """When everything is saved."""
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    """How the work is divided under torchrun."""
    log: LogOptions = dataclasses.field(default_factory=LogOptions)
    """What is written down."""

    def __post_init__(self) -> None:
        if self.model.base is None and (self.adapter.layers or self.lora.rank):
            raise ConfigError("[adapter] and [lora] are added to a pretrained model; name it as model.base")
        if self.train.compile == "yes" and (self.model.base is not None or self.parallel.backbone == "fsdp2"):
            raise ConfigError("train.compile = 'yes' is for models of this project, without model.base and fsdp2")
        if self.model.weights is None and self.stage.factor is not None:
            raise ConfigError(
                "[stage] goes on with a model of this project on longer sequences; name its folder as model.weights"
            )
        uses_general = [
            name
            for name, used in (
                ("writing.rule", self.writing.rule != "all"),
                ("retention.weight", self.retention.weight),
            )
            if used
        ]
        if uses_general and not self.data.general:
            raise ConfigError(
                f"{' and '.join(uses_general)} need text that the model knew before; name it as data.general, such as "
                '["python:standard-library"]'
            )
        if self.writing.rule != "all" and (self.model.frozen_tables or (self.model.base and not self.adapter.layers)):
            raise ConfigError("writing.rule chooses rows of memory to train, and none is trained here")
        if self.retention.weight and not (self.model.base and (self.adapter.layers or self.lora.rank)):
            raise ConfigError(
                "retention.weight holds a model to its frozen base, and all of this one is trained; add [adapter] or "
                "[lora] to a model.base"
            )
        if self.dependence.weight and not (self.model.base and self.adapter.layers):
            raise ConfigError("dependence.weight is for memory that is added to a model.base; add [adapter]")
        if self.adapter.control == "embeddings" and self.checkpoint.write_model:
            raise ConfigError(
                "adapter.control = 'embeddings' has no memory that could be saved; set checkpoint.write_model = false"
            )
