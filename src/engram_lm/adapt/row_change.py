"""What a row patch is made of: new numbers for rows of a table, and the facts that they were fitted to."""

import dataclasses
import math

import torch
from torch import Tensor

from engram_lm.errors import ConfigError

# The types that the numbers of a trainable table can have.
_ROW_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class RowChange:
    """Rows of one table, before and after.

    Raises:
        ConfigError: A tensor has another shape or type, the rows do not ascend, or a number is not finite.
    """

    rows: Tensor
    """Row numbers, different and ascending, int64 ``[N]`` on the host."""
    before: Tensor
    """The old numbers of the rows, in the table's type, ``[N, E]`` on the host."""
    after: Tensor
    """Their new numbers, of the same type and shape."""

    def __post_init__(self) -> None:
        rows, before, after = self.rows, self.before, self.after
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows):
            raise ConfigError(f"row numbers are int64 [num_rows], at least one, got {rows.dtype} {list(rows.shape)}")
        if int(rows[0]) < 0 or not bool((rows[1:] > rows[:-1]).all()):
            raise ConfigError("row numbers start from 0, ascend and differ; sort them and name each once")
        for what, values in (("before", before), ("after", after)):
            if values.dtype not in _ROW_DTYPES or values.dim() != 2 or not values.shape[1] or len(values) != len(rows):
                raise ConfigError(
                    f"the rows {what} are floating numbers [{len(rows)}, width], got {values.dtype} "
                    f"{list(values.shape)}"
                )
            if not bool(values.isfinite().all()):
                raise ConfigError(f"the rows {what} hold numbers that are not finite")
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            raise ConfigError(
                f"the rows are {before.dtype} {list(before.shape)} before and {after.dtype} {list(after.shape)} after; "
                "a patch changes neither type nor width"
            )

    @property
    def num_rows(self) -> int:
        """Number of rows that are changed."""
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of the row numbers and of the rows before and after."""
        return sum(tensor.numel() * tensor.itemsize for tensor in (self.rows, self.before, self.after))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A continuation that rows were fitted to. It records the fit; applying a patch does not read it."""

    prompt: str
    """The text before."""
    target: str
    """The text that should follow."""
    prompt_tokens: tuple[int, ...]
    """The prompt as raw tokens, with the tokens that the tokenizer puts in front of every text."""
    target_tokens: tuple[int, ...]
    """The target as raw tokens."""
    loss_before: float = math.nan
    """Mean loss of the target's tokens before the fit, in nats per token; NaN until it is known."""
    loss_after: float = math.nan
    """The same with the fitted rows."""
    is_greedy: bool = False
    """Whether each of the target's tokens is the most likely one, with the fitted rows."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and target, raw tokens."""
        return self.prompt_tokens + self.target_tokens


def bits(values: Tensor) -> Tensor:
    """View numbers ``[N, E]`` as their bytes: compared this way, 0 and -0 differ and a NaN equals itself."""
    return values.contiguous().view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have the same type and shape and hold the same bits."""
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(bits(first), bits(second))
