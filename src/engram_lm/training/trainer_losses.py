"""The retention and dependence losses inside of a trainer of Hugging Face."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engram_lm.adapt.adapter import MemoryAdapter
from engram_lm.errors import ConfigError, check_whole
from engram_lm.training.data.batches import Batches
from engram_lm.training.dependence import DependenceOptions, mean_of_sequences, memory_off, missing_gain
from engram_lm.training.loss import NOT_SCORED
from engram_lm.training.retention import RetentionLoss, RetentionOptions

# Dimension key: B batch, L length, V vocabulary.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RetentionTraining:
    """How a trainer holds a model to what its frozen base says of general text."""

    tokens: Any
    """General text, as one array of tokens, integers ``[num_tokens]``: more than ``length`` of them."""
    weight: float = 1.0
    """What the mean of KL(base || model) over positions is multiplied by before it is added to the trainer's loss, at
    least 0."""
    per_device_batch_size: int = 2
    """Sequences of general text that each process computes beside each batch of its own."""
    length: int = 256
    """Tokens in such a sequence, at least 1."""
    seed: int = 0
    """Decides their order."""
    beginning: tuple[int, ...] = ()
    """Tokens that begin each sequence: `engram_lm.tokenizing.beginning_tokens` of the tokenizer."""

    def __post_init__(self) -> None:
        RetentionOptions(weight=self.weight, batch_size=self.per_device_batch_size)  # refuses what cannot be
        check_whole(length=self.length)


class OtherLosses:
    """What `MemoryTrainerMixin` adds to the loss of its trainer.

    Args:
        trainer: The trainer, whose ``__init__`` has run.
        adapters: The memories of its model.
        retention: The retention loss; None for none.
        dependence: The dependence loss; None for none.

    Raises:
        ConfigError: The model has no frozen base, or (``dependence``) no memory.
        DataError: The general text is too short.
    """

    def __init__(
        self,
        trainer: Any,
        adapters: Mapping[str, MemoryAdapter],
        retention: RetentionTraining | None,
        dependence: DependenceOptions | None,
    ) -> None:
        self._trainer, self._adapters = trainer, adapters
        self._retention = retention if retention is not None and retention.weight else None
        self._dependence = dependence if dependence is not None and dependence.weight else None
        self._sums: dict[str, list[Tensor]] = {}
        self._part = 0
        if self._dependence is not None and not adapters:
            raise ConfigError("the dependence loss compares a model with and without attached memory; attach one first")
        if self._retention is not None:
            args = trainer.args
            self._loss = RetentionLoss(_with_head(trainer.model))
            self._batches = Batches(
                self._retention.tokens,
                self._retention.per_device_batch_size * args.world_size * args.gradient_accumulation_steps,
                self._retention.length,
                self._retention.seed,
                beginning=self._retention.beginning,
            )

    @property
    def is_any(self) -> bool:
        """Whether there is anything to add."""
        return self._retention is not None or self._dependence is not None

    @property
    def needs_outputs(self) -> bool:
        """Whether `add` needs the outputs of the model."""
        return self._dependence is not None

    def begin(self) -> None:
        """Forget the parts of a batch that an earlier training was stopped in, and what it would still have logged."""
        self._part, self._sums = 0, {}

    def add(self, loss: Tensor, outputs: Any, model: Any, inputs: Mapping[str, Any], *, num_items: Any) -> Tensor:
        """Add the losses of one batch of one process, weighed, to the trainer's own.

        Args:
            loss: The trainer's own.
            outputs: What the model returned for the batch, where `needs_outputs`.
            model: The model, without what the trainer has wrapped it in.
            inputs: The batch, with its labels.
            num_items: ``num_items_in_batch`` of the trainer.
        """
        trainer = self._trainer
        # A trainer divides means by the parts of an accumulated batch, and leaves what is a share of it already.
        is_share = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_share is None:
            counted = trainer.model_accepts_loss_kwargs and num_items is not None
            is_share = counted or trainer.compute_loss_func is not None
        found: dict[str, tuple[Tensor, float]] = {}
        if self._dependence is not None:
            found["dependence_loss"] = self._missing(outputs, model, inputs), self._dependence.weight
        if self._retention is not None:
            own = self._retention.per_device_batch_size
            start = (self._part * trainer.args.world_size + trainer.args.process_index) * own
            batch = self._batches.part(trainer.state.global_step, start, start + own).to(loss.device)
            found["retention_loss"] = self._loss(batch.inputs), self._retention.weight
        # Steps are counted by the trainer, parts of one here.
        self._part = 0 if trainer.accelerator.sync_gradients else self._part + 1
        divisor = 1
        if is_share:
            divisor = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
        for name, (value, weight) in found.items():
            self._sums.setdefault(name, []).append(value.detach())
            loss = loss + value * (weight / divisor)
        return loss

    def means(self) -> dict[str, float]:
        """The mean of each loss since the last call, unweighed, over all processes; collective."""
        found, self._sums = self._sums, {}
        reduced = {
            name: self._trainer.accelerator.reduce(torch.stack(values).mean(), "mean") for name, values in found.items()
        }
        return {name: float(value) for name, value in reduced.items()}

    def _missing(self, outputs: Any, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        assert self._dependence is not None
        labels, logits = inputs.get("labels"), getattr(outputs, "logits", None)
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
            raise ConfigError(
                "the dependence loss needs labels in each batch and logits from the model, and this trainer has not "
                "both; train without it"
            )
        others = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        with torch.no_grad(), memory_off(model, self._adapters.values()):
            off = model(**others).logits
        targets = torch.nn.functional.pad(labels, (0, 1), value=NOT_SCORED)[:, 1:]
        return missing_gain(
            mean_of_sequences(off, targets), mean_of_sequences(logits, targets), self._dependence.margin
        )


def _with_head(model: Any) -> Any:
    """The causal language model inside of peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def stop_at_first_trained(model: Any, args: Any) -> None:
    """Let the backward pass end at the first trained weight, also with activation checkpointing.

    transformers and peft give the embeddings' outputs a gradient then, which reentrant checkpointing needs; the other
    kind would only compute the gradients of all blocks of a frozen base, those below the first memory too.

    Args:
        model: The model of a trainer.
        args: Its ``TrainingArguments``.
    """
    is_on = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    options = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    if is_on and not options.get("use_reentrant", False):
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.disable_input_require_grads()
