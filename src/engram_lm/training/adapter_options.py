"""What a recipe adds to a pretrained model: memory, low-rank matrices, or both."""

import dataclasses
import math
from typing import Any, Literal

from engram_lm.errors import ConfigError, check_whole
from engram_lm.memory import EngramConfig

__all__ = ["AdapterOptions", "LoraOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The memory that is added to a pretrained model. What is not named here is a field of ``EngramConfig``."""

    initialization: Literal["random", "transfer"] = "random"
    """How rows begin: drawn, or made of the base model's own hidden states for the text's frequent N-grams."""
    transfer_tokens: int = 131_072
    """Tokens whose hidden states are taken for that, at least 2; the pass over them counts as training."""
    transfer_source: Literal["last", "block"] = "last"
    """Whose hidden states: of the last decoder layer, or those that go into the layer that reads the memory."""
    permuted_hash: bool = False
    """Whether an N-gram reads other rows at every position, so that rows cannot learn what N-grams mean: a control."""
    layers: tuple[int, ...] = ()
    """Decoder layers that read memory before they run, counted from 0; no memory is added where empty."""
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
    seed: int = 0
    """Seed of the hash multipliers."""

    def __post_init__(self) -> None:
        check_whole(at_least=2, transfer_tokens=self.transfer_tokens)
        if self.layers:
            self.for_width(max(self.memory_dim or 0, 64))  # refuses what cannot be

    def for_width(self, hidden_size: int) -> EngramConfig:
        """Configure the memory of a model of this width.

        Raises:
            ConfigError: An impossible memory.
        """
        heads = self.num_heads * len(self.orders)
        own = ("initialization", "transfer_tokens", "transfer_source", "permuted_hash")
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in own}
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
