"""``engram-lm study depth``: train a model with memory at every depth and one without, compare loss and layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from engram_lm.analysis.cka.cka import Cka, CkaFindings
from engram_lm.analysis.lens import LogitLens
from engram_lm.analysis.reading import Analysis, NotApplicable, read_text
from engram_lm.analysis.subject import find_subject
from engram_lm.errors import ConfigError, check_flags
from engram_lm.memory import EngramConfig
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.depth.summary import BASELINE, depth_finding, figures, summarize
from engram_lm.studies.result import run_record
from engram_lm.studies.runner import Runner
from engram_lm.studies.small_models import SmallModelFlags
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm
from engram_lm.studies.text_flags import like
from engram_lm.training.loop import find_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthStudy(SmallModelFlags, StudyCommand):
    """Ask where memory belongs, and how much depth it stands for: one module at every block, and none.

    Small models are trained on the same batches, from the same initial weights where they have the same: one without
    memory (its feed-forward is wider, so that it spends the same operations per token), one for every block that may
    read memory, and one whose budget is divided between two blocks. Their held-out losses are the paper's layer sweep;
    the logit lens and CKA against the model without memory say how many layers memory saves.

    With no arguments it takes minutes on two CPU cores. The folder holds every model, result.json, report.html, and a
    picture for each part.

    Examples::

        engram-lm study depth
        engram-lm study depth --out runs/depth --seeds 3 --resume
    """

    name: ClassVar[str] = "depth"
    result_format: ClassVar[str] = "engram.depth.1"

    seeds: int = 1
    """Repetitions with other weights and another order of batches; gives mean and standard deviation."""
    parts: tuple[Literal["sweep", "lens", "cka"], ...] = ("sweep", "lens", "cka")
    """What to do. Without sweep, the only single module is at block 1."""

    blocks: int = 6
    """Transformer blocks, from 2."""
    split: tuple[int, ...] = ()
    """Two blocks, counted from 0, that divide the budget between them; like the paper's (1 and 2 of 6) unless given."""
    tokens: int = 500_000
    """Tokens each model is trained on."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained."""
    hidden_size: int = 96
    """Width of the models."""
    streams: int = 1
    """Residual streams; the paper has 4."""
    memory_dim: int = 128
    """Width of the memory vector of one module, over all heads; each of two has half of it."""
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
        super().__post_init__()
        if self.blocks < 2:
            raise ConfigError(f"--blocks must be at least 2, or there is no depth to choose, not {self.blocks}")
        if not self.split:
            object.__setattr__(self, "split", default_split(self.blocks))
        if self.split and (len(self.split) != 2 or len(set(self.split)) != 2):
            raise ConfigError(f"--split names two blocks, not {self.split}")
        if any(not 0 <= block < self.blocks for block in self.split):
            raise ConfigError(f"--split {self.split} names blocks beyond the {self.blocks}, counted from 0")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"--parts names each of sweep, lens and cka at most once, and at least one: {self.parts}")
        check_flags(self, "seeds", "streams", "analysis_tokens", "top_k")
        for blocks in ((0,), self.split or (0,)):
            self.memory_of(blocks)  # refuses what cannot be

    @property
    def num_streams(self) -> int:
        """Residual streams of the models."""
        return self.streams

    def memory_of(self, blocks: tuple[int, ...]) -> EngramConfig:
        """Memory at the start of some blocks.

        Two modules have rows of half the width, and each as many of them as one module, so that the tables of all arms
        hold as much (but for the primes, which differ by some rows) and their projections cost as much.
        """
        one = self.memory_in((0,))
        divisor = len(blocks) * one.num_heads_total
        if self.memory_dim % divisor:
            raise ConfigError(
                f"--memory-dim {self.memory_dim} is divided among {len(blocks)} modules of {one.num_heads_total} "
                f"heads; choose a multiple of {divisor}"
            )
        return self.memory_in(blocks, self.memory_dim // len(blocks))

    def study(self) -> Study:
        """No memory, one module at every block (at block 1 alone without the sweep), and a divided one.

        What two arms have in common starts as the same numbers: the backbone of all of them, and memory wherever it is
        inserted. The feed-forward of the model without memory is wider by what one module's operations are.
        """
        one = self.memory_of((0,))
        baseline = self.model(None, wider=self.width_of(one.flops_per_token()))
        single = range(self.blocks) if "sweep" in self.parts else [min(1, self.blocks - 1)]
        first = (*like(baseline), *like(self.model(one), part="memory"))
        arms = [Arm(name=BASELINE, title="no memory", recipe=self.recipe(baseline))]
        for block in single:
            recipe = self.recipe(self.model(self.memory_of((block,)), like=first))
            arms.append(Arm(name=f"block-{block}", title=f"memory in block {block}", recipe=recipe, x=float(block)))
        if self.split:
            name, title = (joint.join(map(str, self.split)) for joint in ("-", " and "))
            recipe = self.recipe(self.model(self.memory_of(self.split), like=like(baseline)))
            arms.append(Arm(name=f"blocks-{name}", title=f"memory in blocks {title}", recipe=recipe))
        return Study(
            name=self.name,
            question="Where does memory belong, and how much depth does it stand for?",
            arms=tuple(arms),
            budget=Budget(equal=("flops", "tokens"), tolerance=0.02),
            seeds=self.seeds,
            figures=figures,
            finding=depth_finding,
        )

    def prepare(self, out: Path) -> None:
        """Read the text, and train its tokenizer."""
        find_device(self.device)
        self.prepare_tokenizer(out)

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Compare the losses; look at the layers of every seed's models."""
        text = runner.text(runner.study.arms[0].recipe)
        found: list[dict[str, Any]] = []
        for number, arms in enumerate(seeds):
            facts = {name: _facts(one) for name, one in arms.items()}
            found.append({"seed": number, "arms": facts, **self._layers(number, arms, text.held_out, runner)})
        counts = {name: text.facts[name] for name in ("source", "bytes", "train_tokens", "held_out_tokens")}
        return {
            "data": {"files": text.facts["documents"], **counts},
            "seeds": found,
            "summary": summarize(found, {arm.name: arm.title for arm in runner.study.arms}),
        }

    def _layers(self, seed: int, arms: Mapping[str, TrainedArm], tokens: Any, runner: Runner) -> dict[str, Any]:
        """The logit lens of every model, and CKA with the model without memory, as plain values by arm."""
        chosen: dict[str, Analysis] = {"lens": LogitLens(), "cka": Cka(baseline=BASELINE, positions=self.positions)}
        chosen = {part: analysis for part, analysis in chosen.items() if part in self.parts}
        trained = {name: one for name, one in arms.items() if one.failed is None}
        if not chosen or BASELINE not in trained:
            return {}
        runner.stop_if_asked()
        runner.progress.note(f"seed {seed}: {' and '.join(chosen)} of {len(trained)} models")
        subjects = [find_subject(*one.load(self.device), name=name) for name, one in trained.items()]
        read = read_text(
            subjects,
            tokens,
            chosen,
            length=self.sequence_length,
            max_tokens=self.analysis_tokens,
            on_progress=runner.stop_if_asked,
        )
        found: dict[str, Any] = {}
        for part, result in read.items():
            if isinstance(result, NotApplicable):
                runner.progress.note(f"{part} does not apply: {result.reason}")
                found[part] = {"not_applicable": result.reason}
            elif isinstance(result, CkaFindings):
                found[part] = {one.column_model: one.to_dict(self.top_k) for one in result.maps}
            else:
                found[part] = result.to_dict()["models"]
        return found


def default_split(num_blocks: int) -> tuple[int, ...]:
    """The second block and the one before the middle, as layers 2 and 6 of 12 are in the paper; none of two blocks."""
    return (1, max(2, num_blocks // 2 - 1)) if num_blocks > 2 else ()


def _facts(trained: TrainedArm) -> dict[str, Any]:
    """What one model's training gave."""
    blocks = list(trained.arm.recipe.model.memory.get("layers", ()))
    found = {**run_record(trained, curve_points=50), "blocks": blocks, "parameters": None, "flops_per_token": None}
    if trained.failed is None:
        sizes = trained.sizes
        found["parameters"] = {kind: getattr(sizes, kind) for kind in ("backbone", "memory_layers", "memory_tables")}
        found["flops_per_token"] = sizes.flops_per_token
    return found
