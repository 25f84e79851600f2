"""Several optimizers as one: one list of groups, one state, one step."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers.exact_state import ExactStateOptimizer
from engram_lm.training.optimizers.groups import sort_parameters
from engram_lm.training.optimizers.muon import Muon
from engram_lm.training.optimizers.options import OptimizerOptions
from engram_lm.training.optimizers.row_wise import RowWiseAdagrad, RowWiseAdam
from engram_lm.training.optimizers.rows import RowAdam, RowOptimizer, Sharing
from engram_lm.training.optimizers.sinkhorn import SinkhornMomentum


class CombinedOptimizer(ExactStateOptimizer):
    """Several optimizers that look like one: to schedulers of torch, to checkpoints, to a training loop.

    ``param_groups`` are the live groups of all optimizers, ``state`` is one dict that they share, and ``state_dict``
    has torch's usual form, by the number of the parameter. Every group has a ``name``, and an ``lr_multiplier`` that
    `set_lr` applies. Both are ordinary options of the group, so that no wrapper of the model and no scheduler loses
    them.

    Args:
        optimizers: Optimizers of different parameters, either all with parameter names or none. They are used only
            through this object from then on.

    Raises:
        ConfigError: There is no optimizer.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        if not self.optimizers:
            raise ConfigError("there is nothing to combine: the model has no trainable parameter")
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for number, group in enumerate(groups):
            group.setdefault("name", f"group{number}")
            group.setdefault("lr_multiplier", 1.0)
        self._is_complete = False
        super().__init__(groups, {})
        self._is_complete = True
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
        self._share()

    def _share(self) -> None:
        """Make all optimizers use this one's state and groups."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = list(itertools.islice(groups, len(optimizer.param_groups)))
            optimizer.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse, because nothing says which of the optimizers a new group belongs to."""
        if self._is_complete:
            raise ConfigError("a combined optimizer takes no further groups; build it anew with all parameters")
        super().add_param_group(param_group)

    def _step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def set_lr(self, rate: float) -> None:
        """Set every group's learning rate to ``rate`` times its ``lr_multiplier``."""
        for group in self.param_groups:
            group["lr"] = rate * group["lr_multiplier"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, options of groups included. Tensors are copied and keep their saved type."""
        super().load_state_dict(state_dict)
        self._share()

    def allocate_state(self) -> None:
        """Allocate all state as it is before the first step, so that saved state can be written into it."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, ExactStateOptimizer):
                optimizer.allocate_state()
            elif isinstance(optimizer, torch.optim.AdamW):
                _allocate_adamw(optimizer)
            else:
                raise ConfigError(
                    f"the state of {type(optimizer).__name__} is not known before its first step; take a step, or use "
                    "AdamW or an optimizer of engram_lm.training.optimizers"
                )

    def named_state(self) -> dict[str, Tensor]:
        """Name the live state tensors: "parameter name/state name". Empty before `allocate_state` or the first step.

        Counters have no dimension; all others have the parameter's first dimension or its whole shape.
        """
        named = {}
        for group in self.param_groups:
            if "param_names" not in group:
                raise ConfigError("parameters have no names here; pass (name, parameter) pairs to the optimizers")
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, value in self.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        named[f"{name}/{key}"] = value
        return named


def build_optimizer(
    model: nn.Module, options: OptimizerOptions | None = None, *, group: "dist.ProcessGroup | None" = None
) -> CombinedOptimizer:
    """Make the optimizers of a model and combine them.

    Groups are called ``matrices`` (Muon), ``decayed`` and ``plain`` (AdamW), ``tables`` (a row optimizer) and
    ``dense_tables`` (AdamW, for tables made with ``gradient="dense"``); empty groups are left out.

    Args:
        model: Any model. Wrap it (DDP, FSDP2) and shard its tables first, because both replace parameters.
        options: How to train; the defaults where None.
        group: The ranks that train this model together. If given, Muon divides its work among them where they hold the
            same matrices. If None, sharded tables are divided over all ranks.

    Raises:
        ConfigError: Nothing in the model is trainable, a table's gradient is dense and its optimizer is not
            ``row_adam``, or rows would decay although the memory has occupancy.
    """
    options = options or OptimizerOptions()
    kinds = sort_parameters(model)
    if kinds.dense_tables and options.tables != "row_adam":
        raise ConfigError(
            f"tables='{options.tables}' updates touched rows only, and {next(iter(kinds.dense_tables))} is made with "
            "gradient='dense'; make it with gradient='sparse' (table_gradient of the memory's configuration)"
        )

    def named(name: str, parameters: dict[str, nn.Parameter], **group_options: Any) -> list[dict[str, Any]]:
        group = {"params": list(parameters.items()), "name": name, "lr_multiplier": 1.0, **group_options}
        return [{**group, "lr": options.lr * group["lr_multiplier"]}] if parameters else []

    if options.table_weight_decay and any(getattr(table, "first_rows", None) for table in model.modules()):
        raise ConfigError(
            "table_weight_decay would also change rows that were read and not trained, at padding for example, and "
            "with occupancy they would count as written; set it to 0"
        )
    table = {"lr_multiplier": options.table_lr_multiplier, "weight_decay": options.table_weight_decay}
    matrices, decayed = kinds.matrices, kinds.decayed
    if options.backbone == "adamw":
        matrices, decayed = {}, {**matrices, **decayed}
    optimizers: list[torch.optim.Optimizer] = []
    if found := named("matrices", matrices, weight_decay=options.weight_decay):
        muon: dict[str, Any] = {"momentum": options.momentum, "update_rms": options.update_rms, "copies": group}
        optimizers.append(Muon(found, lr=options.lr, **muon))
    if found := [
        *named("decayed", decayed, weight_decay=options.weight_decay),
        *named("plain", kinds.plain, weight_decay=0.0),
        *named("dense_tables", kinds.dense_tables, **table),
    ]:
        optimizers.append(torch.optim.AdamW(found, lr=options.lr, betas=options.betas, eps=options.eps, fused=True))
    if found := named("tables", kinds.tables, **table):
        optimizers.append(_row_optimizer(found, options, Sharing(kinds.num_sharded > 0, group)))
    return CombinedOptimizer(optimizers)


def _row_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions, sharing: Sharing) -> RowOptimizer:
    """Make the optimizer of tables that ``options.tables`` names; what each keeps is in `TABLE_STATE_BYTES`."""
    moments: dict[str, Any] = {
        "betas": options.betas,
        "eps": options.eps,
        "bias_correction": options.table_bias_correction,
    }
    match options.tables:
        case "row_adam":
            return RowAdam(groups, **moments)
        case "row_wise_adam":
            return RowWiseAdam(groups, first_moment=options.table_first_moment, **moments)
        case "row_wise_adagrad":
            return RowWiseAdagrad(groups)
        case "sinkhorn":
            return SinkhornMomentum(groups, momentum=options.momentum, update_rms=options.update_rms, sharing=sharing)


def _allocate_adamw(optimizer: torch.optim.AdamW) -> None:
    """Allocate AdamW's state as its first step would."""
    for group in optimizer.param_groups:
        on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            device = parameter.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
            for name in names:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
