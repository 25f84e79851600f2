"""How the parameters of a model are trained, as a recipe says it, and checks of such options."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

from engram_lm.errors import ConfigError
from engram_lm.planning.shape import BackboneOptimizer, TableOptimizer

BiasCorrection = Literal["step", "row"]
"""What corrects the bias of moments that began at zero: the optimizer's steps, or the touches of each row."""
FirstMoment = Literal["full", "none"]
"""Whether a row-wise optimizer keeps a first moment, which is as large as the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How the parameters of a model are trained."""

    backbone: BackboneOptimizer = "muon"
    """Optimizer of the matrices of hidden layers (paper: Muon); AdamW trains everything else but the tables."""
    tables: TableOptimizer = "row_adam"
    """Optimizer of the tables (paper: Adam; DeepSeek-V4.1: sinkhorn)."""
    lr: float = 4e-4
    """Learning rate of the backbone at a factor of 1 (paper, Table 5)."""
    table_lr_multiplier: float = 5.0
    """Learning rate of tables relative to the backbone's (paper, Table 5)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, the head, routers and stream mixers; others have none. At least 0."""
    table_weight_decay: float = 0.0
    """Decoupled weight decay of rows, in the steps that touch them. At least 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments of AdamW and of table optimizers like Adam, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment, in AdamW and the table optimizers (DeepSeek's models: 1e-20)."""
    momentum: float = 0.95
    """Momentum of Muon and of ``sinkhorn``, in [0, 1)."""
    update_rms: float = 0.18
    """Root mean square of an update of Muon and of ``sinkhorn``, relative to the learning rate (DeepSeek-V4.1)."""
    table_bias_correction: BiasCorrection = "step"
    """Bias correction of ``row_adam`` and ``row_wise_adam``: by the optimizer's steps, or by each row's touches."""
    table_first_moment: FirstMoment = "full"
    """First moment of ``row_wise_adam``: as large as the table, or none."""

    def __post_init__(self) -> None:
        for name, kind in (("backbone", BackboneOptimizer), ("tables", TableOptimizer)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        if len(self.betas) != 2:
            raise ConfigError(f"betas are two numbers, not {self.betas}")
        check_options(
            "an optimizer",
            lr=self.lr,
            table_lr_multiplier=self.table_lr_multiplier,
            weight_decay=self.weight_decay,
            table_weight_decay=self.table_weight_decay,
            eps=self.eps,
            update_rms=self.update_rms,
            betas=(*self.betas, self.momentum),
        )
        check_choice("table_bias_correction", self.table_bias_correction, BiasCorrection)
        check_choice("table_first_moment", self.table_first_moment, FirstMoment)


def check_options(optimizer: str, *, betas: Iterable[float] = (), **options: float) -> None:
    """Check that options are numbers from 0, and betas in [0, 1)."""
    betas = tuple(betas)
    if not all(value >= 0 for value in options.values()) or not all(0 <= beta < 1 for beta in betas):
        given = ", ".join([*(f"{name}={value}" for name, value in options.items()), *(["betas"] if betas else [])])
        needed = [f"{name} >= 0" for name in options] + (["betas in [0, 1)"] if betas else [])
        raise ConfigError(f"{optimizer} needs {', '.join(needed)}, not {given}" + (f" = {betas}" if betas else ""))


def check_choice(name: str, value: object, kind: Any) -> None:
    """Check that a value is one of the values of a ``Literal``."""
    if value not in get_args(kind):
        raise ConfigError(f"{name} must be {' or '.join(map(repr, get_args(kind)))}, not {value!r}")
