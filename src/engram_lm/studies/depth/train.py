"""One model of the study: trained, measured on held-out text, and kept, or found to be kept already."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import RunFolderError
from engram_lm.files import new_folder
from engram_lm.hashing import TokenMap
from engram_lm.planning.sizes import model_sizes
from engram_lm.studies.depth.arms import DepthArm, build_arm
from engram_lm.studies.depth.text import StudyText
from engram_lm.studies.quickstart.run import Quickstart
from engram_lm.training.data.batches import Batches
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.loop import StepRecord, Trainer, TrainOptions, best_dtype, find_device
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.progress import RunProgress
from engram_lm.training.run_folder import to_json

__all__ = ["read_trained", "train_arm"]

_TRAINED = "trained.json"
_CURVE_POINTS = 50


def train_arm(
    arm: DepthArm,
    folder: Path,
    options: Quickstart,
    text: StudyText,
    *,
    seed: int,
    progress: RunProgress,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Train one model, measure its held-out loss and keep it; all arms of a seed see the same batches in one order.

    Args:
        arm: Which model.
        folder: Where it is kept, as a model folder; a finished one that is there is taken as it is.
        options: Sizes of the model and of its training.
        text: What to train on.
        seed: Decides the weights and the order.
        progress: Where to show it.
        interrupt: Ends training between two steps; nothing is kept then.

    Returns:
        What `read_trained` gives; None where it was interrupted.

    Raises:
        DataError: The text is shorter than a sequence, or training came to numbers that are not finite.
        RunFolderError: A finished model's facts are damaged.
    """
    if (folder / _TRAINED).is_file():
        return read_trained(folder)
    device = find_device(options.device)
    dtype = best_dtype(device) if options.dtype == "auto" else options.dtype
    token_map = TokenMap.from_tokenizer(text.tokenizer)
    model: Any = build_arm(arm, options.memory(), options.backbone(), text.tokenizer, token_map, seed=seed)
    model.to(device)
    trainer = Trainer(
        model,
        Batches(text.train, options.batch_size, options.sequence_length, seed),
        TrainOptions(num_steps=options.num_steps, dtype=dtype),
        OptimizerOptions(backbone="adamw", lr=options.lr, table_lr_multiplier=options.table_lr_multiplier),
    )
    records: list[StepRecord] = []
    with progress.training(0, options.num_steps) as show:
        for _ in range(options.num_steps):
            if interrupt.asked:
                return None
            records.append(trainer.step())
            show(records[-1], None)
    held_out = held_out_loss(model, text.held_out, length=options.sequence_length, dtype=dtype)
    sizes = model_sizes(model.config, context=options.sequence_length)
    facts = {
        "seed": seed,
        "blocks": list(arm.blocks),
        "loss": held_out.loss,
        "num_evaluated_tokens": held_out.num_tokens,
        "num_steps": len(records),
        "tokens": records[-1].num_tokens,
        "seconds": sum(record.seconds for record in records),
        "train_curve": _curve(records),
        "parameters": {
            "backbone": sizes.backbone,
            "memory_layers": sizes.memory_layers,
            "memory_tables": sizes.memory_tables,
        },
        "flops_per_token": sizes.flops_per_token,
    }
    with new_folder(folder) as aside:
        model.save_pretrained(aside)
        text.tokenizer.save_pretrained(aside)
        (aside / _TRAINED).write_text(to_json(facts), encoding="utf-8")
    return facts


def read_trained(folder: Path) -> dict[str, Any]:
    """Read what a finished model's training gave.

    Raises:
        RunFolderError: The file is damaged.
    """
    path = folder / _TRAINED
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        if not math.isfinite(facts["loss"]) or {"seed", "blocks", "tokens", "flops_per_token"} - facts.keys():
            raise ValueError("a number is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}); remove {folder}, and --resume trains this model again"
        ) from error
    return facts


def _curve(records: Sequence[StepRecord]) -> list[tuple[int, float]]:
    """Mean loss of equal stretches of training, by tokens."""
    size = max(1, len(records) // _CURVE_POINTS)
    stretches = [records[start : start + size] for start in range(0, len(records), size)]
    return [(stretch[-1].num_tokens, statistics.fmean(record.loss for record in stretch)) for stretch in stretches]
