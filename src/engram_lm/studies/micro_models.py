"""The smallest models that studies train: dense, with experts, with memory; minutes of one core for a run."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from engram_lm.errors import ConfigError, check_whole
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramLMConfig
from engram_lm.planning.budget import allocate
from engram_lm.studies.text_flags import TextFlags
from engram_lm.training.data.text import cache_folder
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe import LikeOptions, ModelOptions
from engram_lm.training.schedules import ScheduleOptions

Size = Literal["100k", "500k", "2m"]
"""Active parameters."""
Family = Literal["dense", "moe", "engram", "dense_engram"]
"""``dense``, ``moe`` and ``engram`` are the presets of a size; ``dense_engram`` is memory in the dense backbone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of all arms of a study."""

    lr: float
    """Of the backbone."""
    table_lr_multiplier: float
    """Of the tables, relative to it."""


RATES: dict[Size, Rates] = {
    "100k": Rates(lr=2e-2, table_lr_multiplier=15.0),
    "500k": Rates(lr=1e-2, table_lr_multiplier=15.0),
    "2m": Rates(lr=6e-3, table_lr_multiplier=15.0),
}
"""Rates for each size, the same for all its families. Those of 100k were found by ``engram-lm study rates``
(``benchmarks/results/study_rates.json``); those of wider models are lower, about as their width is larger, and were not
tuned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroModelFlags(TextFlags):
    """Text, size and training of micro models. A study inherits from this and from `StudyCommand`, in this order.

    Batches are 16 sequences of 128 tokens, the vocabulary has 4,096 tokens. Documents are divided by their contents, so
    the held-out ones are the same in every study of the same text: 2 % are held out, and 1 % is for validation: rates
    were chosen there, with one seed, and results do not use it. The first 524,288 held-out tokens are evaluated on
    (262,144 for validation), or as many as there are. Token shards lie in the user's cache folder, so a text is
    tokenized once for all arms, seeds and studies, and the tokenizer is trained once for each study on a sample of its
    training text.

    The order of the text depends on the seed alone, so the arms of a seed see the same batches. First weights depend on
    the seed and the shapes; ``like=like(first)`` (`engram_lm.studies.text_flags.like`) lets an arm begin with those of
    another one wherever both have a weight of the same name. Of a larger matrix the part is taken that the smaller one
    has, and the first of more experts.

    Example::

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Rows(MicroModelFlags, StudyCommand):
            name: ClassVar[str] = "rows"

            def study(self) -> Study:
                dense = self.model("dense")
                models = {"none": dense} | {
                    f"rows-{rows}": self.model("dense_engram", memory={"rows_per_head": rows}, like=like(dense))
                    for rows in (1_000, 10_000)
                }
                arms = tuple(Arm(name=name, title=name, recipe=self.recipe(one)) for name, one in models.items())
                return Study(name=self.name, question="How many rows?", arms=arms, seeds=self.seeds)

    ``self.allocated(0.75)`` is a model at a ratio of experts to memory with the budget of ``self.model("moe")``. For
    another size or number of tokens take ``dataclasses.replace(self, size="500k", tokens=1_000_000)``.
    """

    size: Size = "100k"
    """Active parameters of the models: 0.1, 0.5 or 2 million."""
    tokens: int = 4_000_000
    """Tokens each model is trained on."""
    max_bytes: int = 256_000_000
    """Text to read at most."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    loss_tokens: int = 1 << 19
    """Held-out tokens that the loss is measured on at most, and tokens of each other text. The smallest models need as
    long for these as for training on 300 thousand."""
    lr: float | None = None
    """Peak learning rate of the backbone, for all arms; the one that `RATES` has for the size unless given."""
    table_lr_multiplier: float | None = None
    """Learning rate of the tables relative to it; the one that `RATES` has for the size unless given."""

    held_out_share: ClassVar[float] = 0.02
    validation_share: ClassVar[float] = 0.01
    may_compile: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(at_least=2, **{"--loss-tokens": self.loss_tokens})
        for name, value in (("--lr", self.lr), ("--table-lr-multiplier", self.table_lr_multiplier)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a finite number above 0, not {value}")

    @property
    def held_out_tokens(self) -> int:
        """The tokens that the flag names."""
        return self.loss_tokens

    @property
    def optimizer(self) -> OptimizerOptions:
        """The paper's optimizers: Muon for matrices, Adam for the rest and for tables; at the rates of the size."""
        rates = RATES[self.size]
        return OptimizerOptions(
            lr=rates.lr if self.lr is None else self.lr,
            table_lr_multiplier=(
                rates.table_lr_multiplier if self.table_lr_multiplier is None else self.table_lr_multiplier
            ),
        )

    @property
    def schedule(self) -> ScheduleOptions:
        """A short warm-up, and a linear fall over the last 40 % of the steps."""
        return ScheduleOptions(kind="wsd", warmup=0.05, decay=0.4, final=0.05)

    @property
    def cache(self) -> Path | None:
        """The user's cache folder, which all studies share."""
        return cache_folder(None)

    def config(self, family: Family = "engram", **backbone: Any) -> EngramLMConfig:
        """Configure the preset of a family, with other values in some fields, and without a tokenizer."""
        return EngramLMConfig.preset(self.preset(family), **backbone)

    def memory_config(self, changed: Mapping[str, Any] = {}) -> EngramConfig:
        """Configure the memory of the preset, with other values in some fields."""
        own = self.config("engram").memory_config
        assert own is not None, "the preset has memory"
        return EngramConfig.from_dict({**own.to_dict(), **changed})

    def preset(self, family: Family) -> str:
        """Name the preset of a family."""
        return f"{'engram' if family == 'dense_engram' else family}-micro-{self.size}"

    def model(
        self,
        family: Family,
        *,
        backbone: Mapping[str, Any] | None = None,
        memory: Mapping[str, Any] | None = None,
        like: tuple[LikeOptions, ...] = (),
        **options: Any,
    ) -> ModelOptions:
        """Choose a model of the size.

        Args:
            family: What it has beside attention.
            backbone: Fields of `EngramLMConfig` to change.
            memory: Fields of `EngramConfig` to change, such as ``rows_per_head`` or ``layers``.
            like: Models whose first weights it takes over.
            **options: Other fields of a recipe's ``[model]``.
        """
        fields = dict(backbone or {})
        if family == "dense_engram":
            dense = self.config("dense")
            own = {name: getattr(dense, name) for name in ("first_k_dense_replace", "intermediate_size")}
            if "num_hidden_layers" in fields:
                own["first_k_dense_replace"] = fields["num_hidden_layers"]
            fields = own | fields
        return ModelOptions(
            preset=self.preset(family), backbone=fields, memory=_plain(memory or {}), like=like, **options
        )

    def allocated(
        self,
        ratio: float,
        *,
        num_experts: int | None = None,
        memory: Mapping[str, Any] | None = None,
        like: tuple[LikeOptions, ...] = (),
    ) -> ModelOptions:
        """Divide the sparse budget of a model of experts between experts and memory (paper, section 3.1).

        Total and active parameters are those of the model of experts within 0.5 %.

        Args:
            ratio: The experts' share, from 0 to 1; at 1 the model of experts itself is returned.
            num_experts: Routed experts of the model of experts, which decide the budget; the preset's where None.
            memory: Fields of `EngramConfig` to change, but for ``rows_per_head``, which follows from the budget.
            like: Models whose first weights it takes over.

        Raises:
            ConfigError: The budget cannot be divided like that.
        """
        moe = self.config("moe", **({} if num_experts is None else {"n_routed_experts": num_experts}))
        given = self.memory_config(memory or {})
        found = allocate(moe, ratio, given)
        if found.memory is None:
            return self.model("moe", backbone=found.backbone, like=like)
        rows = {"rows_per_head": found.rows_per_head}
        return self.model("engram", backbone=found.backbone, memory={**(memory or {}), **rows}, like=like)

    def prepare(self, out: Path) -> None:
        """Read the text, and train its tokenizer."""
        self.prepare_tokenizer(out)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a recipe's file holds them: lists, not tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
