"""``engram-lm study depth``: train a model with memory at every depth and one without, compare loss and layers."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram_lm.analysis.subject import find_subject
from engram_lm.errors import ConfigError
from engram_lm.files import write_atomically
from engram_lm.serving.load import load_model
from engram_lm.studies.depth.arms import BASELINE, DepthArm, default_split, plan_arms, table_config
from engram_lm.studies.depth.figures import save_figures
from engram_lm.studies.depth.measure import MeasureOptions, measure
from engram_lm.studies.depth.summary import summarize, terminal_table
from engram_lm.studies.depth.text import StudyText, open_text
from engram_lm.studies.depth.train import train_arm
from engram_lm.studies.quickstart.run import Quickstart
from engram_lm.studies.study_folder import take_folder
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.progress import RunProgress
from engram_lm.training.run_folder import commit, run_facts, to_json

__all__ = ["DepthStudy"]

_RESULT, _TEXT = "result.json", "text"
_OF_THE_MODEL = (
    "tokens",
    "batch_size",
    "sequence_length",
    "lr",
    "table_lr_multiplier",
    "dtype",
    "device",
    "vocab_size",
    "hidden_size",
    "blocks",
    "memory_dim",
    "heads",
    "rows_per_head",
    "max_bytes",
)
"""Flags that mean what they mean in the quickstart."""
_MEASURED = ("seeds", "parts", "analysis_tokens", "positions", "top_k")
_FREE = ("out", "resume", "json", *_MEASURED)
"""Flags that may change when a study goes on: no finished model depends on them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthStudy:
    """Ask where memory belongs, and how much depth it stands for: one module at every block, and none.

    Small models are trained one after the other on the same batches, from the same initial weights where they have the
    same: one without memory (its feed-forward is wider, so that it spends the same operations per token), one for every
    block that may read memory, and one whose budget is divided between two blocks. Their held-out losses are the
    paper's layer sweep; the logit lens and CKA against the model without memory say how many layers memory saves.

    With no arguments it takes minutes on two CPU cores. The folder holds every model, result.json, and a picture for
    each part.

    Examples::

        engram-lm study depth
        engram-lm study depth --out runs/depth --seeds 3 --resume
    """

    out: Path = Path("runs/depth")
    """Folder of the study."""
    data: tuple[Path, ...] = ()
    """Text files or folders to train on, instead of the Python standard library's own sources."""
    seeds: int = 1
    """Repetitions with other weights and another order of batches; gives mean and standard deviation."""
    parts: tuple[Literal["sweep", "lens", "cka"], ...] = ("sweep", "lens", "cka")
    """What to do. Without sweep, the only single module is at block 1."""
    resume: bool = False
    """Go on with the study in the folder; finished models are not trained again."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    blocks: int = 6
    """Transformer blocks, from 2."""
    split: tuple[int, ...] = ()
    """Two blocks, counted from 0, that divide the budget between them; like the paper's (1 and 2 of 6) unless given."""
    tokens: int = 500_000
    """Tokens each model is trained on."""
    batch_size: int = 16
    """Sequences in a batch."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    lr: float = 4e-3
    """Peak learning rate."""
    table_lr_multiplier: float = 5.0
    """Learning rate of the table relative to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products in training."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained."""
    hidden_size: int = 96
    """Width of the models."""
    streams: int = 1
    """Residual streams; the paper has 4."""
    memory_dim: int = 128
    """Width of the memory vector of one module, over all heads; each of two has half of it."""
    heads: int = 8
    """Hash heads per order."""
    rows_per_head: int = 16_384
    """Rows asked for per head."""
    max_bytes: int = 6_000_000
    """Text to read at most."""

    analysis_tokens: int = 8_192
    """Held-out tokens that lens and CKA read."""
    positions: Literal["all", "word_ends", "names", "ngrams"] = "word_ends"
    """Where CKA compares hidden states; the paper takes the last token of a named entity."""
    top_k: int = 2
    """Layers that a layer's soft alignment averages over; the paper takes 5 of its 30."""

    def __post_init__(self) -> None:
        if self.blocks < 2:
            raise ConfigError(f"--blocks must be at least 2, or there is no depth to choose, not {self.blocks}")
        if not self.split:
            object.__setattr__(self, "split", default_split(self.blocks))
        if self.split and (len(self.split) != 2 or len(set(self.split)) != 2):
            raise ConfigError(f"--split names two blocks, not {self.split}")
        if self.streams < 1:
            raise ConfigError(f"--streams must be at least 1, not {self.streams}")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"--parts names each of sweep, lens and cka at most once, and at least one: {self.parts}")
        for name in ("seeds", "analysis_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        model = self.model()  # refuses sizes that cannot be
        for arm in self.arms():
            if any(not 0 <= block < self.blocks for block in arm.blocks):
                raise ConfigError(f"--split {self.split} names blocks beyond the {self.blocks}, counted from 0")
            table_config(arm, model.memory())

    def model(self) -> Quickstart:
        """Sizes of the models and of their training, as the quickstart has them."""
        values = {name: getattr(self, name) for name in _OF_THE_MODEL}
        return _Model(**values, memory_layers=(0,), streams=self.streams)

    def arms(self) -> tuple[DepthArm, ...]:
        """The models of the study."""
        return plan_arms(self.blocks, self.split, sweep="sweep" in self.parts)

    def run(self) -> int:
        """Do all of it.

        Returns:
            Exit status: 0, or 130 after an interruption (``--resume`` goes on then).

        Raises:
            RunFolderError: The folder is something else's, cannot be written, or what is in it is damaged.
            MismatchError: It was begun with other options.
            DataError: The text is too short.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        started, made_at = time.time(), commit()
        progress = RunProgress(Console(stderr=True))
        out = self.out.expanduser().resolve()
        take_folder(out, self._settings(), resume=self.resume)
        progress.note("reading and tokenizing the text")
        text = open_text(out / _TEXT, self.data, vocab_size=self.vocab_size, max_bytes=self.max_bytes)
        seeds = []
        with Interrupt() as interrupt:
            for seed in range(self.seeds):
                found = self._seed(seed, out / f"seed-{seed}", text, progress, interrupt)
                if found is None:
                    progress.note(f"interrupted; go on with: engram-lm study depth --out {self.out} --resume")
                    return 130
                seeds.append(found)
            # Last, so that a study that goes on does not do it again before it trains what is missing.
            for finished in seeds:
                finished.update(self._measured(finished["seed"], out, text, progress, interrupt))
        result = {
            "format": "engram.depth.1",
            **run_facts(started, made_at),
            "data": text.facts,
            "settings": self._settings() | {name: _plain(getattr(self, name)) for name in _MEASURED},
            "seeds": seeds,
            "summary": summarize(seeds, {arm.name: arm.title for arm in self.arms()}),
        }
        pictures = save_figures(result, out)
        write_atomically(out / _RESULT, to_json(result))
        if self.json:
            print(to_json(result), end="")
        else:
            console = Console()
            console.print(terminal_table(result))
            for path in (out / _RESULT, *pictures):
                console.print(f"  {path}", highlight=False, soft_wrap=True)
        return 0

    def _seed(
        self, seed: int, folder: Path, text: StudyText, progress: RunProgress, interrupt: Interrupt
    ) -> dict[str, Any] | None:
        """Train all arms; None where it was interrupted."""
        options, arms = self.model(), self.arms()
        found: dict[str, Any] = {"seed": seed, "arms": {}}
        for number, arm in enumerate(arms, 1):
            progress.note(f"seed {seed}, model {number} of {len(arms)}: {arm.title}")
            trained = train_arm(
                arm, folder / arm.name, options, text, seed=seed, progress=progress, interrupt=interrupt
            )
            if trained is None:
                return None
            found["arms"][arm.name] = trained
            progress.note(f"held-out loss {trained['loss']:.4f}")
        return found

    def _measured(
        self, seed: int, out: Path, text: StudyText, progress: RunProgress, interrupt: Interrupt
    ) -> dict[str, Any]:
        """Look at the layers of a seed's models."""
        parts = tuple(part for part in self.parts if part != "sweep")
        if not parts:
            return {}

        def stop_if_asked(num_tokens: int = 0) -> None:
            if interrupt.asked:
                raise KeyboardInterrupt  # every model is finished and kept

        stop_if_asked()
        arms = self.arms()
        progress.note(f"seed {seed}: {' and '.join(parts)} of {len(arms)} models")
        subjects = [
            find_subject(*load_model(out / f"seed-{seed}" / arm.name, device=self.device), name=arm.name)
            for arm in arms
        ]
        options = MeasureOptions(
            parts=parts,
            length=self.sequence_length,
            max_tokens=self.analysis_tokens,
            positions=self.positions,
            top_k=self.top_k,
        )
        found = measure(subjects, text.held_out, options, baseline=BASELINE, on_progress=stop_if_asked)
        for part in parts:
            if "not_applicable" in found[part]:
                progress.note(f"{part} does not apply: {found[part]['not_applicable']}")
        return found

    def _settings(self) -> dict[str, Any]:
        """What the finished models depend on, and so must not change under ``--resume``."""
        return {name: _plain(value) for name, value in vars(self).items() if name not in _FREE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model(Quickstart):
    """The quickstart's model, with residual streams."""

    streams: int = 1

    def memory(self) -> Any:
        return dataclasses.replace(super().memory(), num_streams=self.streams)

    def backbone(self) -> dict[str, Any]:
        return super().backbone() | {"num_streams": self.streams}


def _plain(value: Any) -> Any:
    return [str(item) if isinstance(item, Path) else item for item in value] if isinstance(value, tuple) else value
