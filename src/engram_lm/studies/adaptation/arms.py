"""What is trained: the arms of the comparison, each put on the base model and taken off again."""

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from engram_lm.adapt import MemoryAdapter, attach
from engram_lm.adapt.controls import RowMap, permuted_hash
from engram_lm.errors import MissingExtraError
from engram_lm.memory import EngramConfig
from engram_lm.studies.adaptation.recipe import ArmName, LoraOptions

__all__ = ["ARMS", "Arm", "Dressed", "dressed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to adapt the base."""

    title: str
    """For people, in two or three words."""
    about: str
    """What it is, in a sentence."""
    memory: bool = False
    """Whether it has memory."""
    lora: bool = False
    """Whether it has low-rank matrices."""
    whole: bool = False
    """Whether the base's own weights are trained."""
    frozen_table: bool = False
    """Whether the rows stay as they were drawn."""
    permuted: bool = False
    """Whether an N-gram reads other rows at every position."""
    transfer: bool = False
    """Whether rows begin as the base's hidden states, whatever the recipe says."""

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with, and not to be used."""
        return self.frozen_table or self.permuted


ARMS: dict[ArmName, Arm] = {
    "memory": Arm(title="memory", about="memory is trained, the base stays as it is", memory=True),
    "lora": Arm(
        title="LoRA",
        about="low-rank matrices are trained, of as many operations per token as the memory's, beside the frozen base",
        lora=True,
    ),
    "memory_lora": Arm(
        title="memory + LoRA", about="both are trained, the base stays as it is", memory=True, lora=True
    ),
    "full": Arm(title="full fine-tuning", about="every weight of the base is trained", whole=True),
    "random_table": Arm(
        title="random table",
        about="memory whose rows stay as they were drawn; a gain that is left is the projections' alone",
        memory=True,
        frozen_table=True,
    ),
    "permuted_hash": Arm(
        title="permuted hash",
        about="memory where an N-gram reads other rows at every position; a gain that is left is none of knowing it",
        memory=True,
        permuted=True,
    ),
    "transfer": Arm(
        title="memory, transferred",
        about="memory whose rows begin as the base's hidden states for the domain's frequent N-grams",
        memory=True,
        transfer=True,
    ),
}
"""Every arm by its name in a recipe."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dressed:
    """A base model with an arm on it."""

    adapter: MemoryAdapter | None
    """Its memory."""
    peft_model: Any
    """peft's view of it, where it has low-rank matrices."""
    row_map: RowMap | None
    """What the arm does with row numbers."""

    def save(self, folder: Path) -> None:
        """Write what was trained: ``memory/`` and ``lora/``."""
        if self.adapter is not None:
            self.adapter.save_pretrained(folder / "memory")
        if self.peft_model is not None:
            self.peft_model.save_pretrained(folder / "lora")


@contextlib.contextmanager
def dressed(
    model: Any,
    tokenizer: Any,
    arm: Arm,
    *,
    memory: EngramConfig,
    lora: LoraOptions,
    rank: int,
    targets: list[str],
    seed: int,
    layer_list: str | None = None,
) -> Iterator[Dressed]:
    """Put an arm on the base model inside a ``with`` block; afterwards the base is exactly what it was.

    What the arm trains requires a gradient, and nothing else does.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        arm: What to put on it.
        memory: Geometry of the memory.
        lora: Options of the low-rank matrices.
        rank: Their rank.
        targets: Names of the matrices that get them.
        seed: Decides all first numbers.
        layer_list: Path of the decoder layers, where structure does not tell.

    Raises:
        MissingExtraError: The arm needs peft, which is not installed.
    """
    if arm.lora and importlib.util.find_spec("peft") is None:
        raise MissingExtraError(
            "this arm trains LoRA with peft, which is not installed; install the extra with `pip install "
            "'engram-lm[lora]'`, or leave the arm out of arms.names (--controls adds it)"
        )
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()} if arm.whole else {}
    model.requires_grad_(arm.whole)
    peft_model = adapter = None
    torch.manual_seed(seed)
    try:
        if arm.lora:
            peft_model = _add_lora(model, lora, rank, targets)
        if arm.memory:
            adapter = attach(model, tokenizer, memory, layer_list=layer_list)
            if arm.frozen_table:
                adapter.memory_tables.requires_grad_(False)
            if arm.permuted:
                adapter.row_map = permuted_hash(adapter.spec)
        yield Dressed(adapter, peft_model, None if adapter is None else adapter.row_map)
    finally:
        if adapter is not None:
            adapter.close()
        if peft_model is not None:
            peft_model.unload()
            if hasattr(model, "peft_config"):  # peft leaves it behind
                del model.peft_config
        if kept:
            model.load_state_dict(kept)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
            parameter.grad = None


def _add_lora(model: Any, lora: LoraOptions, rank: int, targets: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    alpha = 2 * rank if lora.alpha is None else lora.alpha
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": lora.dropout}
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that is going out of use there.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        # GPT-2's matrices lie the other way around.
        turned = all(isinstance(model.get_submodule(name), Conv1D) for name in targets)
        chosen = LoraConfig(**options, target_modules=targets, fan_in_fan_out=turned, task_type="CAUSAL_LM")
        return get_peft_model(model, chosen)
