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
from engram_lm.adapt.decoder import find_decoder
from engram_lm.adapt.folder import BaseModel, LocalFiles, read_adapter
from engram_lm.errors import CheckpointError, ConfigError, MismatchError, MissingExtraError
from engram_lm.memory.layer import EngramLayer
from engram_lm.model.table_place import TablePlace
from engram_lm.planning.shape import TableOptimizer
from engram_lm.tables import ParameterTable
from engram_lm.training.optimizers import (
    CombinedOptimizer,
    OptimizerOptions,
    build_optimizer,
    clip_gradients,
    is_trainable_table,
)
from engram_lm.training.reference_model import References, found_as_reference
from engram_lm.training.table_gradients import SharedTables, share_tables, sparse_tables

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

# Rows of a table that are restored at a time.
_PIECE_ROWS = 1 << 16


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

    Args:
        *args: The trainer's own.
        tables: How tables are trained; None means the defaults.
        **kwargs: The trainer's own.

    Raises:
        ConfigError: When training begins: memory together with FSDP, DeepSpeed or DataParallel.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, tables: TableTraining | None = None, **kwargs: Any) -> None:
        self.table_training = tables or TableTraining()
        self._shared_tables: SharedTables | None = None
        model = kwargs.get("model", args[0] if args else None)
        memory = _adapters(model).values() if isinstance(model, nn.Module) else ()
        trained = [parameter for adapter in memory for parameter in adapter.parameters() if parameter.requires_grad]
        with found_as_reference(model):
            super().__init__(*args, **kwargs)
        for parameter in trained:
            parameter.requires_grad_(True)
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
        if (adapters := _trained(opt_model)) or sparse_tables(opt_model):
            self._refuse_other_strategies()
            _refuse_what_is_not_saved(self.model, adapters)
        if sparse_tables(opt_model):
            self._end_sharing()
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
                state_dict = {name: value for name, value in self.model.state_dict().items() if not _is_memory(name)}
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
            _restore_model(self.model, resume_from_checkpoint)
        elif not adapters or self._saves_model():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        _restore(adapters, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        adapters = _trained(self.model)
        if adapters and self._saves_plain_model():
            _restore_model(self.model, self.state.best_model_checkpoint)
        elif not adapters or self._saves_model():
            super()._load_best_model()
        _restore(adapters, self.state.best_model_checkpoint)

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

    def _end_sharing(self) -> None:
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


def _is_memory(name: str) -> bool:
    return CONTAINER in name.split(".")


def _refuse_what_is_not_saved(model: nn.Module, adapters: dict[str, MemoryAdapter]) -> None:
    """Refuse, before training, to train what a checkpoint would not hold or could not give back."""
    for name, adapter in adapters.items():
        if parametrized := [weight for weight, place in adapter.weights().items() if place.is_parametrized]:
            raise ConfigError(
                f"{', '.join(parametrized)} of the memory {name!r} are parametrized: a checkpoint holds the weights "
                "that they give, from which training could not go on exactly; remove the parametrizations "
                "first"
            )
    if getattr(model, "peft_config", None) is None or not hasattr(model, "get_base_model"):
        return
    from peft import get_peft_model_state_dict

    saved = {parameter.data_ptr() for adapter in adapters.values() for parameter in adapter.own_parameters()}
    for name in model.peft_config:  # type: ignore[union-attr]
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        saved |= {tensor.data_ptr() for tensor in state.values()}
    lost = [name for name, value in model.named_parameters() if value.requires_grad and value.data_ptr() not in saved]
    if lost:
        raise ConfigError(
            f"{len(lost)} parameters are trained and no checkpoint would hold them, because with peft a checkpoint "
            f"holds peft's adapters and the memory: {', '.join(lost[:3])}, …; name them in modules_to_save of peft's "
            "configuration, freeze them, or train the whole model without peft"
        )


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


def _restore_model(model: Any, checkpoint: str) -> None:
    """Read everything but the memory from a checkpoint, in place.

    Trainer itself takes the tensors by their names in the file, where the experts of a mixture, for example, are called
    otherwise than in the model; what it does not find stays as it is.
    """
    stored, report = type(model).from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    found = stored.state_dict()
    lacking = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    lacking |= {name for name in model.state_dict() if name not in found and not _is_memory(name)}
    if lacking:
        raise CheckpointError(
            f"{checkpoint} lacks {len(lacking)} weights of the model, such as {sorted(lacking)[0]}; it was written for "
            "another model: resume from another checkpoint, or begin anew"
        )
    model.load_state_dict(found, strict=False)


@torch.no_grad()
def _restore(adapters: dict[str, MemoryAdapter], checkpoint: str) -> None:
    """Read the weights of attached adapters from a checkpoint, in place."""
    for name, adapter in adapters.items():
        folder = Path(checkpoint) / CONTAINER / name
        if not folder.is_dir():
            raise CheckpointError(
                f"{checkpoint} holds no memory {name!r} (expected the folder {CONTAINER}/{name}); it was written "
                "without MemoryTrainerMixin, or for other adapters: resume from another checkpoint, or begin anew"
            )
        assert adapter.model is not None
        decoder = find_decoder(adapter.model, adapter.layer_list)
        stored = read_adapter(LocalFiles(folder), BaseModel.of(adapter.model, decoder))
        if stored.spec.digest != adapter.spec.digest:
            raise MismatchError(
                f"the memory {name!r} in {checkpoint} has the hash {stored.spec.digest}, the attached one "
                f"{adapter.spec.digest}; attach with the configuration and tokenizer of the run that is resumed"
            )
        for weight, place in adapter.weights().items():
            place.value.copy_(stored.layers[weight])
        tables = {key: table for key, table in adapter.tables.items() if isinstance(table, ParameterTable)}
        if not tables:
            continue
        opened = stored.open_tables(TablePlace(tier="mmap", read_ahead=False), None)
        try:
            for key, table in tables.items():
                for start in range(0, table.num_rows, _PIECE_ROWS):
                    rows = torch.arange(start, min(start + _PIECE_ROWS, table.num_rows))
                    table.store(rows, opened[key].gather(rows))
        finally:
            for stored_table in opened.values():
                stored_table.close()
