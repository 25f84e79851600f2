"""Training a model with memory by ``transformers.Trainer``, TRL's ``SFTTrainer`` and their like.

A mix-in adds what they lack: an optimizer of rows for the tables, clipping of sparse gradients, tables under
DistributedDataParallel, and checkpoints that hold the memory.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from engram_lm.adapt.adapter import CONTAINER, MemoryAdapter
from engram_lm.errors import ConfigError, MissingExtraError
from engram_lm.memory.layer import EngramLayer
from engram_lm.planning.shape import TableOptimizer
from engram_lm.training.dependence import DependenceOptions
from engram_lm.training.optimizers import (
    CombinedOptimizer,
    OptimizerOptions,
    build_optimizer,
    clip_gradients,
    is_trainable_table,
)
from engram_lm.training.reference_model import References, found_as_reference
from engram_lm.training.table_gradients import SharedTables, share_tables, sparse_tables
from engram_lm.training.trainer_checkpoints import is_memory, refuse_what_is_not_saved, restore_adapters, restore_model
from engram_lm.training.trainer_losses import OtherLosses, RetentionTraining, stop_at_first_trained
from engram_lm.training.writing import WritableRows, trained_tables

if importlib.util.find_spec("accelerate") is None:
    raise MissingExtraError(
        "transformers.Trainer needs accelerate: install the extra with `pip install 'engram-lm[hf]'`, or train with a "
        "loop of your own and engram_lm.training.optimizers.build_optimizer"
    )

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

from transformers import Trainer


def train_memory(
    model: nn.Module, backbone: Literal["frozen", "full"] = "frozen", *, adapters: Iterable[str] | None = None
) -> None:
    """Choose what is trained, by setting ``requires_grad`` of every parameter of a model.

    With ``"frozen"`` the memory is trained; LoRA and whatever else peft trains stays as peft has set it, whichever was
    attached first. With ``"full"`` everything is trained.

    Args:
        model: A model with attached memory, also inside peft.
        backbone: What happens to the parameters that do not belong to memory.
        adapters: Names of the memory adapters to train; the others are frozen. None trains all.

    Raises:
        ConfigError: No memory is attached, or none with such a name; or ``backbone`` is something else.
    """
    if backbone not in ("frozen", "full"):
        raise ConfigError(f"backbone must be 'frozen' or 'full', not {backbone!r}; for LoRA, 'frozen' and peft")
    found = _adapters(model)
    wanted = set(found) if adapters is None else set(adapters)
    if not found or wanted - found.keys():
        raise ConfigError(
            f"memory adapters {sorted(wanted) or 'to train'} are asked for, the model has {sorted(found) or 'none'}; "
            "attach with engram_lm.attach(model, tokenizer, config) first"
        )
    memory = {id(parameter) for adapter in found.values() for parameter in adapter.own_parameters()}
    if backbone == "full" or getattr(model, "peft_config", None) is None:
        for parameter in model.parameters():
            if id(parameter) not in memory and parameter.is_floating_point():
                parameter.requires_grad_(backbone == "full")
    for name, adapter in found.items():
        for parameter in adapter.own_parameters():
            parameter.requires_grad_(name in wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableTraining:
    """How a trainer treats memory tables. Everything else is as its ``TrainingArguments`` say."""

    lr_multiplier: float = 5.0
    """Learning rate of tables, relative to ``learning_rate`` at every step of its schedule (paper, Table 5)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of rows, in steps that touch them (paper: 0). ``args.weight_decay`` is not for tables."""
    optimizer: TableOptimizer = "row_adam"
    """The optimizer of tables with sparse gradients. Tables with dense gradients have AdamW."""
    bias_correction: Literal["step", "row"] = "step"
    """Whether ``row_adam`` and ``row_wise_adam`` correct by the optimizer's steps or by each row's own updates."""

    def __post_init__(self) -> None:
        self.options(lr=0.0, betas=(0.9, 0.999), eps=1e-8)

    def options(self, *, lr: float, betas: tuple[float, float], eps: float) -> OptimizerOptions:
        """Combine these options with a trainer's arguments."""
        return OptimizerOptions(
            backbone="adamw",
            tables=self.optimizer,
            lr=lr,
            table_lr_multiplier=self.lr_multiplier,
            table_weight_decay=self.weight_decay,
            table_bias_correction=self.bias_correction,
            betas=betas,
            eps=eps,
        )


class MemoryTrainerMixin(_Trainer):
    """Lets a trainer of Hugging Face train a model with memory, as in ``class T(MemoryTrainerMixin, SFTTrainer)``.

    - **Optimizer**: what ``args`` say for everything but the tables (``optim``, ``learning_rate``, ``weight_decay``,
      Adam's constants), and an optimizer of rows for tables, with their multiple of the learning rate. Both are one
      `CombinedOptimizer`, whose groups are those that schedules, accelerate and checkpoints see. Norms and convolution
      of the memory have no weight decay.
    - **Clipping**: ``max_grad_norm`` bounds the norm of all gradients together, sparse ones by their merged rows.
    - **Several processes**: DistributedDataParallel (``torchrun``, ``accelerate launch``), see `share_tables`.
    - **Checkpoints**: ``engram_adapters/NAME`` in each holds the adapter as `MemoryAdapter.save_pretrained` writes it.
      Beside it is what else is trained: nothing with a frozen backbone, peft's adapter with peft, and otherwise the
      model without the memory. Resuming and ``load_best_model_at_end`` read both.
    - **References**: a model that TRL's trainers load by name to compare with (DPO, KTO, GRPO and RLOO with ``beta``)
      gets the memory, and the weights, that the model has when the trainer is made; with peft, where they switch its
      adapters off instead, the memory is then read as it was. A ``ref_model`` that is given is left as it is.
    - Memory that was trainable stays so when the trainer itself wraps the model in peft (``peft_config``).
    - **Gradient checkpointing** (not reentrant, the default) computes nothing backward below the first trained weight.

    Args:
        *args: The trainer's own.
        tables: How tables are trained; None means the defaults.
        writing: The rows that may be trained, from `engram_lm.training.writing.choose_rows`; None means all.
        retention: Holds the model to what its frozen base says of general text; None does not.
        dependence: Asks memory for a gain on every sequence of a batch with ``labels``; None does not.
        **kwargs: The trainer's own.

    The means of the two losses are logged as ``retention_loss`` and ``dependence_loss``, and are part of ``loss``.

    Raises:
        ConfigError: Retention or dependence for a model without a frozen base or without memory. When training begins:
            memory together with FSDP, DeepSpeed or DataParallel; rows to be written that would decay.
        MismatchError: When training begins: the rows were chosen for another memory.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        tables: TableTraining | None = None,
        writing: WritableRows | None = None,
        retention: RetentionTraining | None = None,
        dependence: DependenceOptions | None = None,
        **kwargs: Any,
    ) -> None:
        self.table_training = tables or TableTraining()
        self._writing, self._restriction = writing, contextlib.ExitStack()
        self._shared_tables: SharedTables | None = None
        model = kwargs.get("model", args[0] if args else None)
        memory = _adapters(model).values() if isinstance(model, nn.Module) else ()
        trained = [parameter for adapter in memory for parameter in adapter.parameters() if parameter.requires_grad]
        with found_as_reference(model):
            super().__init__(*args, **kwargs)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._other_losses = OtherLosses(self, _adapters(self.model), retention, dependence)
        names = inspect.signature(super().__init__).parameters
        self._references = References(self, {**dict(zip(names, args, strict=False)), **kwargs})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``transformers.Trainer.train``."""
        try:
            with self._references.used():
                return super().train(*args, **kwargs)
        finally:
            self._end_sharing()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; see ``transformers.Trainer.evaluate``."""
        with self._references.used():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; see ``transformers.Trainer.predict``."""
        with self._references.used():
            return super().predict(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, once, and prepare the tables for several processes."""
        opt_model: nn.Module = self.model if model is None else model
        self._other_losses.begin()  # each time a trainer begins to train, it asks for its optimizer
        stop_at_first_trained(opt_model, self.args)  # the trainer has switched checkpointing on before
        if (adapters := _trained(opt_model)) or sparse_tables(opt_model):
            self._refuse_other_strategies()
            refuse_what_is_not_saved(self.model, adapters)
        self._end_sharing()
        if self._writing is not None:
            self._restriction = _restricted(opt_model, self._writing, self.table_training)
        if sparse_tables(opt_model):
            self._shared_tables = share_tables(opt_model, is_due=lambda: bool(self.accelerator.sync_gradients))
        if self.optimizer is not None:
            return self.optimizer
        tables = {id(module.weight) for module in opt_model.modules() if is_trainable_table(module)}
        trained = [parameter for parameter in opt_model.parameters() if parameter.requires_grad]
        with _without_gradient(parameter for parameter in trained if id(parameter) in tables):
            optimizers: list[torch.optim.Optimizer] = [super().create_optimizer(opt_model)]
        made = optimizers[0]
        if any(id(parameter) in tables for parameter in trained):
            args = self.args
            options = self.table_training.options(
                lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
            )
            with _without_gradient(parameter for parameter in trained if id(parameter) not in tables):
                optimizers += build_optimizer(opt_model, options).optimizers
            for optimizer in optimizers[1:]:
                for group in optimizer.param_groups:
                    group.pop("param_names", None)  # the trainer's own groups have none, and either all have or none
            made = self.optimizer = CombinedOptimizer(optimizers)
        return made

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters with weight decay: the trainer's choice without the memory's norms and convolution."""
        plain = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, EngramLayer)
            for parameter in module.parameters(recurse=False)
        }
        named = dict(model.named_parameters(remove_duplicate=False))
        return [name for name in super().get_decay_parameter_names(model) if id(named.get(name)) not in plain]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._clip(model, self.args.max_grad_norm) if sparse_tables(model) else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None or not sparse_tables(model):
            return super()._get_grad_norm(model, grad_norm)
        return self._clip(model, float("inf"))

    def _clip(self, model: nn.Module, max_norm: float) -> float:
        self.accelerator.unscale_gradients()
        return clip_gradients(model.parameters(), max_norm)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the trained adapters, and whatever else of the model is trained."""
        adapters = _trained(self.model)
        if not adapters:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._saves_model():
            if state_dict is None and self._saves_plain_model():
                state_dict = {name: value for name, value in self.model.state_dict().items() if not is_memory(name)}
            super()._save(output_dir, state_dict)
        elif (tokenizer := self.processing_class or getattr(self.data_collator, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(folder)
        for name, adapter in adapters.items():
            # Rows that are read from elsewhere do not change.
            own = all(isinstance(table, nn.Module) for table in adapter.tables.values())
            adapter.write(folder / CONTAINER / name, tables=own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapters = _trained(self.model)
        if adapters and self._saves_plain_model():
            restore_model(self.model, resume_from_checkpoint)
        elif not adapters or self._saves_model():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_adapters(adapters, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        adapters = _trained(self.model)
        if adapters and self._saves_plain_model():
            restore_model(self.model, self.state.best_model_checkpoint)
        elif not adapters or self._saves_model():
            super()._load_best_model()
        restore_adapters(adapters, self.state.best_model_checkpoint)

    def _saves_model(self) -> bool:
        """Whether something beside attached memory is trained and has to be saved."""
        memory = {id(parameter) for adapter in _adapters(self.model).values() for parameter in adapter.own_parameters()}
        return any(parameter.requires_grad and id(parameter) not in memory for parameter in self.model.parameters())

    def _saves_plain_model(self) -> bool:
        """Whether checkpoints hold the model itself, without the memory, and not peft's adapters."""
        return getattr(self.model, "peft_config", None) is None and self._saves_model()

    def _refuse_other_strategies(self) -> None:
        kind = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else None
        if kind is not None:
            raise ConfigError(
                f"{kind} would divide the memory, which neither its optimizer of rows nor its checkpoints know; train "
                "with DistributedDataParallel: torchrun or accelerate launch, without such a configuration"
            )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"this process sees {self.args.n_gpu} GPUs, over which the trainer would spread copies of the model "
                "(DataParallel); start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one"
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Compute the trainer's own loss and, in training, add the others."""
        others = self._other_losses
        if not (model.training and others.is_any):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        batch = dict(inputs)  # some trainers take labels out of theirs
        outputs = None
        if return_outputs or others.needs_outputs:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        else:
            loss = super().compute_loss(model, inputs, **kwargs)
        plain = self.accelerator.unwrap_model(model)
        loss = others.add(loss, outputs, plain, batch, num_items=kwargs.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the means of the other losses where the trainer's own is logged."""
        if "loss" in logs:
            logs.update(self._other_losses.means())
        super().log(logs, *args, **kwargs)

    def _end_sharing(self) -> None:
        self._restriction.close()
        if self._shared_tables is not None:
            self._shared_tables.remove()
            self._shared_tables = None


class MemoryTrainer(MemoryTrainerMixin, Trainer):
    """``transformers.Trainer`` for a model with memory: `engram_lm.attach`ed, or an `EngramForCausalLM`.

    See `MemoryTrainerMixin` for what differs from the ordinary trainer.

    Example:
        >>> adapter = engram_lm.attach(model, tokenizer, EngramConfig(hidden_size=2048))  # doctest: +SKIP
        >>> train_memory(model)  # doctest: +SKIP
        >>> MemoryTrainer(model, TrainingArguments("out"), train_dataset=dataset).train()  # doctest: +SKIP
    """


def _adapters(model: nn.Module) -> dict[str, MemoryAdapter]:
    """Find the attached adapters by name, also inside peft."""
    return {module.name: module for module in model.modules() if isinstance(module, MemoryAdapter)}


def _trained(model: nn.Module) -> dict[str, MemoryAdapter]:
    return {
        name: adapter
        for name, adapter in _adapters(model).items()
        if any(parameter.requires_grad for parameter in adapter.own_parameters())
    }


def _restricted(model: nn.Module, writing: WritableRows, training: TableTraining) -> contextlib.ExitStack:
    """Let only the rows that may be written be trained, until what is returned is closed."""
    adapters = list(_trained(model).values())
    tables = trained_tables(adapters[0].tables if len(adapters) == 1 else getattr(model, "tables", {}))
    if len(adapters) > 1 or not tables:
        raise ConfigError(
            f"writing says which rows of one memory are trained, and {len(adapters) or 'no'} memories are; freeze the "
            "others (train_memory(model, adapters=[...])), or leave writing out"
        )
    if training.weight_decay and any(table.gradient == "dense" for table in tables.values()):
        raise ConfigError(
            "with gradient='dense', weight decay of tables also changes rows that may not be written; set "
            "TableTraining(weight_decay=0), or make the tables with sparse gradients"
        )
    return writing.restrict(tables)


@contextlib.contextmanager
def _without_gradient(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make some trainable parameters look frozen inside a ``with`` block."""
    hidden = list(parameters)
    try:
        for parameter in hidden:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in hidden:
            parameter.requires_grad_(True)
