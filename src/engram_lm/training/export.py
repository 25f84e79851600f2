"""``engram-lm export``: the model in a checkpoint, written as a Hugging Face folder."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engram_lm.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""
TOKENIZER = "tokenizer"
"""The folder of a run that holds its tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a checkpoint as a Hugging Face folder, for eval, generate and from_pretrained.

    Tables are copied in pieces, so they may be larger than memory.

    Examples::

        engram-lm export runs/nano model
        engram-lm export runs/nano/checkpoints/step-00002000 model --dtype bfloat16
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """A run, whose newest complete checkpoint is taken, or the folder of one checkpoint."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to make. It must be missing or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default the type they were trained in."""
    tokenizer: Path | None = None
    """Folder of the tokenizer to put beside the model; by default the run's own, if it has one."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Write the folder and say what is in it."""
        from engram_lm.training.checkpoints import latest_checkpoint, read_facts
        from engram_lm.training.checkpoints.saved_state import STATE_NAME
        from engram_lm.training.checkpoints.training_state import SPEC_DIGEST, export_model

        checkpoint: Path | None = self.source
        run = self.source
        if (self.source / STATE_NAME).exists():
            run = self.source.resolve().parent.parent
        else:
            checkpoint = latest_checkpoint(self.source / CHECKPOINTS) or latest_checkpoint(self.source)
        if checkpoint is None:
            raise CheckpointError(
                f"{self.source} is neither a checkpoint nor a run with a complete one in {CHECKPOINTS}/; name the "
                "folder that `engram-lm train` was given with --out"
            )
        tokenizer = self.tokenizer
        if tokenizer is None and (run / TOKENIZER).is_dir():
            tokenizer = run / TOKENIZER
        export_model(checkpoint, self.out, tokenizer=tokenizer, dtype=self.dtype)
        files = sorted(self.out.glob("*.safetensors"))
        values = {
            "checkpoint": str(checkpoint),
            "out": str(self.out),
            "spec_digest": read_facts(checkpoint).get(SPEC_DIGEST),
            "num_files": len(files),
            "num_bytes": sum(file.stat().st_size for file in files),
            "tokenizer": None if tokenizer is None else str(tokenizer),
        }
        if self.json:
            print(json_module.dumps(values))
            return 0
        print(f"checkpoint      {checkpoint}")
        print(f"model           {self.out}, {values['num_bytes']:,} bytes of weights")
        print(f"tokenizer       {values['tokenizer'] or 'none: name its folder with --tokenizer'}")
        return 0
