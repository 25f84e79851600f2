"""One arm, one seed, one learning rate: put on the base, trained, measured, taken off."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engram_lm.adapt import MemoryAdapter
from engram_lm.adapt.controls import in_turn, shuffled_rows
from engram_lm.adapt.transfer import transfer_rows
from engram_lm.memory import EngramConfig
from engram_lm.studies.adaptation.arms import ARMS, Dressed, dressed
from engram_lm.studies.adaptation.diagnostics import collisions, gate_statistics, occupancy
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName
from engram_lm.studies.adaptation.text import AdaptationText, HeldOutText
from engram_lm.training.data.batches import Batches
from engram_lm.training.flops import forward_flops_per_token, training_flops_per_token
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.loop import StepRecord, Trainer, TrainOptions
from engram_lm.training.optimizers import OptimizerOptions

__all__ = ["ArmCost", "Bench"]


_MOST_SKIPPED = 10
"""Steps in a row whose gradient may be infinite before a run ends with an error."""
_COUNTED_TOKENS = 1 << 20
"""Tokens of the domain whose N-grams are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmCost:
    """What an arm holds and takes."""

    num_trainable: int
    """Numbers that are trained."""
    num_trainable_outside_tables: int
    """Those of them that are multiplied by, and not looked up."""
    flops_per_token: float
    """Operations of training on one token."""
    preparation_flops: float
    """Operations before training: those of taking hidden states."""
    lora_rank: int | None
    """Rank of its low-rank matrices."""


@dataclasses.dataclass(eq=False)
class Bench:
    """The base model and all that its arms share."""

    recipe: AdaptationRecipe
    """What is asked."""
    model: Any
    """The base, on its device."""
    tokenizer: Any
    """Its tokenizer."""
    text: AdaptationText
    """What is trained and measured on."""
    memory: EngramConfig
    """Geometry of the memory."""
    rank: int
    """Of LoRA."""
    targets: list[str]
    """Names of the matrices that LoRA is beside."""
    dtype: Literal["float32", "bfloat16"]
    """Type of matrix products."""
    _counted: dict[str, dict[str, float]] | None = dataclasses.field(default=None, init=False)

    @contextlib.contextmanager
    def arm(self, name: ArmName, seed: int) -> Iterator[Dressed]:
        """Put an arm on the base inside a ``with`` block."""
        recipe = self.recipe
        with dressed(
            self.model,
            self.tokenizer,
            ARMS[name],
            memory=self.memory,
            lora=recipe.lora,
            rank=self.rank,
            targets=self.targets,
            seed=seed,
            layer_list=recipe.base.layer_list,
        ) as found:
            yield found

    def cost(self, name: ArmName) -> ArmCost:
        """Find out what an arm costs."""
        with self.arm(name, seed=0) as on:
            tables = [] if on.adapter is None else list(on.adapter.memory_tables.parameters())
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            looked_up = sum(parameter.numel() for parameter in tables if parameter.requires_grad)
            total = sum(parameter.numel() for parameter in trained)
            transferred = self._transferred(name) * forward_flops_per_token(
                self.model, self.recipe.data.sequence_length
            )
            return ArmCost(
                num_trainable=total,
                num_trainable_outside_tables=total - looked_up,
                flops_per_token=training_flops_per_token(self.model, self.recipe.data.sequence_length),
                preparation_flops=transferred,
                lora_rank=self.rank if ARMS[name].lora else None,
            )

    def spec_digest(self) -> str:
        """Digest of the hash that the memory will have."""
        with self.arm("memory", seed=0) as on:
            assert on.adapter is not None
            return on.adapter.spec.digest

    def measure(self, text: HeldOutText | None, max_tokens: int | None = None) -> dict[str, Any] | None:
        """Measure the loss of the model as it stands; None where there is no text."""
        if text is None:
            return None
        found = held_out_loss(
            self.model,
            text.tokens,
            length=self.recipe.data.sequence_length,
            max_tokens=max_tokens,
            num_bytes=text.num_bytes if max_tokens is None else None,
            dtype=self.dtype,
        )
        values = {"loss": found.loss, "perplexity": found.perplexity, "num_tokens": found.num_tokens}
        return values if max_tokens is not None else {**values, "bits_per_byte": found.bits_per_byte}

    def measure_both(self) -> dict[str, Any]:
        """Measure the loss on the domain and on the retained text."""
        return {"domain": self.measure(self.text.held_out), "retained": self.measure(self.text.retained)}

    def run(
        self,
        name: ArmName,
        *,
        seed: int,
        rate: float,
        num_steps: int,
        save: Path | None,
        on_step: Callable[[StepRecord], bool],
        validate: bool,
    ) -> dict[str, Any] | None:
        """Train an arm and measure it.

        Args:
            name: Which arm.
            seed: Decides its first numbers and the order of the text.
            rate: Peak learning rate.
            num_steps: Steps, with which the schedule ends.
            save: Where to write what was trained; None where it is not kept.
            on_step: Called after each step; whether to stop.
            validate: Whether to measure the loss that learning rates are chosen by.

        Returns:
            An entry of ``arms.NAME.runs`` in ``result.json``; None where it was stopped.

        Raises:
            DataError: The loss became infinite.
        """
        recipe, started = self.recipe, time.perf_counter()
        with self.arm(name, seed) as on:
            if on.adapter is not None and (num_tokens := self._transferred(name)):
                transfer_rows(
                    on.adapter,
                    self.train_tokens(num_tokens),
                    num_ngrams=self.memory.rows_per_head,
                    source=recipe.memory.transfer_source,
                    length=recipe.data.sequence_length,
                    seed=seed,
                    layer_list=recipe.base.layer_list,
                )
            batches = Batches(
                self.text.train,
                recipe.train.batch_size,
                recipe.data.sequence_length,
                seed,
                num_tokens=self.text.num_tokens,
            )
            options = TrainOptions(
                num_steps=num_steps,
                micro_batch_size=recipe.train.micro_batch_size,
                max_grad_norm=recipe.train.max_grad_norm,
                max_skipped_steps=_MOST_SKIPPED,
                dtype=self.dtype,
            )
            optimizer = OptimizerOptions(
                backbone="adamw",
                lr=rate,
                table_lr_multiplier=recipe.rates.table_lr_multiplier,
                weight_decay=recipe.rates.weight_decay,
            )
            trainer = Trainer(self.model, batches, options, optimizer, recipe.schedule)
            num_points = recipe.train.curve_points + 1
            points = {round(num_steps * part / num_points) for part in range(1, num_points)}
            curve = [[0, self._point()]]
            for step in range(1, num_steps + 1):
                record = trainer.step()
                if on_step(record):
                    return None
                if step in points and step < num_steps:
                    curve.append([record.num_tokens, self._point()])
            # The last point is of the same tokens as the others, and so not the result's loss.
            curve.append([record.num_tokens, self._point()])
            found: dict[str, Any] = {"seed": seed, "lr": rate, **self.measure_both(), "curve": curve}
            found["validation"] = self.measure(self.text.validation) if validate else None
            found |= self._look_inside(on, trainer)
            if save is not None:
                on.save(save)
        return {**found, "num_steps": num_steps, "seconds": time.perf_counter() - started}

    def train_tokens(self, num_tokens: int) -> np.ndarray:
        """The first tokens that are trained on, so many or all; int64."""
        return self.text.train.slice(0, min(self.text.num_tokens, num_tokens))

    def _transferred(self, name: ArmName) -> int:
        """Tokens whose hidden states an arm's rows are made of."""
        arm, memory = ARMS[name], self.recipe.memory
        wanted = arm.transfer or (memory.initialization == "transfer" and arm.memory and not arm.is_control)
        return min(memory.transfer_tokens, self.text.num_tokens) if wanted else 0

    def _collisions(self, adapter: MemoryAdapter) -> dict[str, dict[str, float]]:
        # The hash and the text are the same for all arms and seeds.
        if self._counted is None:
            length = self.recipe.data.sequence_length
            tokens = self.train_tokens(_COUNTED_TOKENS)
            # As in training, where no N-gram reaches back over the start of a sequence.
            self._counted = collisions(adapter, tokens[: len(tokens) // length * length].reshape(-1, length))
        return self._counted

    def _point(self) -> float:
        found = self.measure(self.text.held_out, self.recipe.train.curve_tokens)
        assert found is not None
        return float(found["loss"])

    def _look_inside(self, on: Dressed, trainer: Trainer) -> dict[str, Any]:
        """Measure the memory off and its rows exchanged, and what it does."""
        adapter = on.adapter
        if adapter is None:
            return dict.fromkeys(("memory_off", "rows_shuffled", "occupancy", "collisions", "gates"))
        with adapter.disabled():
            off = self.measure_both()
        gates = gate_statistics(
            self.model,
            adapter,
            self.text.held_out.tokens,
            length=self.recipe.data.sequence_length,
            dtype=self.dtype,
        )
        adapter.row_map = in_turn([on.row_map, shuffled_rows(adapter.spec)])
        shuffled = self.measure_both()
        adapter.row_map = on.row_map
        return {
            "memory_off": off,
            "rows_shuffled": shuffled,
            "occupancy": occupancy(adapter, trainer.table_use.touched),
            # Of a hash that looks at positions there is no count of N-grams.
            "collisions": self._collisions(adapter) if on.row_map is None else None,
            "gates": gates,
        }
