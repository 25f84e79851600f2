"""What goes wrong in a trainer of Hugging Face that knows nothing of memory, said once, when it begins to train."""

import inspect
import warnings
from typing import Any

from torch import nn


def warn_of_trainer(memory: nn.Module) -> None:
    """Warn where the training step that is computing now belongs to a trainer without `MemoryTrainerMixin`.

    TRL's trainers load a model to compare with by the name of the base, and with peft a checkpoint holds peft's
    adapters alone. Nothing that the memory is handed says who trains it, so the calls around this one are looked at.

    Args:
        memory: The adapter that is being read.
    """
    trainer = _computing_trainer()
    if trainer is None or hasattr(trainer, "table_training"):
        return
    faults = []
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and not any(type(part) is type(memory) for part in reference.modules()):
        faults.append("its reference model has no memory")
    trained = any(parameter.requires_grad for parameter in memory.parameters())
    if trained and getattr(trainer.model, "peft_config", None) is not None:
        if reference is None and hasattr(trainer, "ref_model") and getattr(trainer, "beta", None) != 0:
            faults.append(
                "it compares with the memory as trained so far, because only peft's adapters are switched off"
            )
        if str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) != "no":
            faults.append("its checkpoints hold peft's adapters without the memory")
    if faults:
        kind = type(trainer).__name__
        warnings.warn(
            f"{kind} knows nothing of memory: {'; '.join(faults)}. Train with a class of your own instead: "
            f"class Memory{kind}(MemoryTrainerMixin, {kind}): pass, from engram_lm.training.huggingface",
            RuntimeWarning,
            stacklevel=2,
        )


def _computing_trainer() -> Any:
    """Find the ``transformers.Trainer`` in whose training step this is called; None outside of one."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "training_step":
            owner = frame.f_locals.get("self")
            if any(
                f"{kind.__module__}.{kind.__name__}" == "transformers.trainer.Trainer" for kind in type(owner).__mro__
            ):
                return owner
        frame = frame.f_back
    return None
