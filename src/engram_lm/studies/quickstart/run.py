"""The quickstart: train a model with memory and its memory-less twin side by side, compare them, write a report."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from engram_lm.analysis.gates.trace import GateTrace, gate_trace
from engram_lm.errors import ConfigError, RunFolderError
from engram_lm.files import write_atomically
from engram_lm.hashing import TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.serving.generate import continue_text
from engram_lm.studies.quickstart.arms import Arm, build_arms
from engram_lm.studies.quickstart.curves import save_curves
from engram_lm.studies.quickstart.progress import Progress
from engram_lm.studies.quickstart.report import render_report
from engram_lm.studies.quickstart.summary import terminal_table
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.documents import Corpus, Document, pack, read_documents, split_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.held_out import HeldOutLoss, held_out_loss
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.loop import StepRecord, Trainer, TrainOptions, best_dtype, find_device
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.run_folder import RunFolder, commit, run_facts, to_json

__all__ = ["Quickstart"]

_FIRST_BLOCKS = (0, 1, 2)
_CURVE_POINTS = 8
"""Times that held-out loss is measured along the way."""
_CURVE_TOKENS = 16_384
"""Held-out tokens used for a point of the curve; the final figure uses all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train a small memory model and its memory-less twin on local text, compare them, and write a report.

    With no arguments it needs no network and about five minutes on two CPU cores: the corpus is the Python standard
    library's own sources on this machine. Both models see the same batches in the same order, start from the same
    weights where they have the same, and spend the same operations per token.

    The run folder is a Hugging Face checkpoint of the memory model with its tokenizer; beside it are result.json,
    metrics.jsonl, curves.png, samples.txt and report.html, and the twin in twin/.
    """

    data: tuple[Path, ...] = ()
    """Text files or folders to train on, instead of the standard library."""
    out: Path = Path("runs/quickstart")
    """Run folder. An earlier run there is kept under a numbered name."""
    seeds: int = 1
    """Repetitions with other weights and another order of batches; gives mean and standard deviation."""
    controls: bool = False
    """Also train with a table that stays random, and with the table's bytes in a wider feed-forward (slow)."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    tokens: int = 1_300_000
    """Tokens each model is trained on."""
    batch_size: int = 16
    """Sequences in a batch."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    lr: float = 4e-3
    """Peak learning rate."""
    table_lr_multiplier: float = 5.0
    """Learning rate of the table relative to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto takes bfloat16 where the processor multiplies it in hardware."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained."""
    hidden_size: int = 128
    """Width of the models."""
    blocks: int = 4
    """Transformer blocks."""
    memory_layers: tuple[int, ...] = _FIRST_BLOCKS
    """Blocks that read memory, counted from 0; the first three, or all of fewer, unless given."""
    memory_dim: int = 128
    """Width of the memory vector, over all heads."""
    heads: int = 8
    """Hash heads per order."""
    rows_per_head: int = 32_768
    """Rows asked for per head."""
    max_bytes: int = 64_000_000
    """Text to read at most."""

    def __post_init__(self) -> None:
        if self.memory_layers == _FIRST_BLOCKS:
            object.__setattr__(self, "memory_layers", tuple(range(min(len(_FIRST_BLOCKS), self.blocks))))
        for name in ("seeds", "tokens", "batch_size", "sequence_length", "blocks", "max_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.vocab_size < 258:
            raise ConfigError(
                f"--vocab-size must be at least 258 (all bytes and two special tokens), not {self.vocab_size}"
            )
        if self.hidden_size % 32:
            raise ConfigError(f"--hidden-size must be a multiple of 32 (the width of a head), not {self.hidden_size}")
        if not (0 < self.lr < math.inf and 0 <= self.table_lr_multiplier < math.inf):
            raise ConfigError("--lr must be above 0 and --table-lr-multiplier at least 0")
        self.memory()  # refuses what cannot be
        if max(self.memory_layers) >= self.blocks:
            raise ConfigError(f"--memory-layers {self.memory_layers} reach past the {self.blocks} blocks")

    @property
    def num_steps(self) -> int:
        """Optimizer steps that the tokens make."""
        return max(1, round(self.tokens / (self.batch_size * self.sequence_length)))

    def run(self) -> int:
        """Do all of it.

        Returns:
            Exit status: 0, or 130 after an interruption (what was trained is saved then too).
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        console = Console(stderr=True)
        memory = self.memory()
        folder = RunFolder(self.out)
        try:
            with Interrupt() as interrupt:
                study = _Study(self, memory, console, interrupt)
                result = study.run(folder.aside)
                moved = folder.publish()
        except BaseException as error:
            if (folder.aside / "model.safetensors").is_file():
                console.print(f"what was trained so far is in {folder.aside}", highlight=False, soft_wrap=True)
            else:
                folder.discard()
            if isinstance(error, SafetensorError):  # what safetensors makes of a full disk
                raise RunFolderError(f"cannot write {folder.aside}: {error}") from error
            raise
        if moved is not None:
            console.print(f"the earlier run was moved to {moved}")
        if self.json:
            print(to_json(result), end="")
        else:
            Console().print(terminal_table(result))
            Console().print(_last_words(result, self.out), highlight=False)
        return 130 if result["interrupted"] else 0

    def memory(self) -> EngramConfig:
        """Memory of the model that has one."""
        return EngramConfig(
            hidden_size=self.hidden_size,
            layers=self.memory_layers,
            memory_dim=self.memory_dim,
            num_heads=self.heads,
            rows_per_head=self.rows_per_head,
            table_std=0.02,
            value_init="zero",
        )

    def backbone(self) -> dict[str, Any]:
        """Fields of the backbone's configuration."""
        heads = self.hidden_size // 32
        return {
            "num_hidden_layers": self.blocks,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "q_lora_rank": None,
            "kv_lora_rank": self.hidden_size // 2,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "max_position_embeddings": self.sequence_length,
            # The usual 0.02 is for wider models: at this width attention then forms late, at a step that depends on
            # the seed, and the seeds differ by more than the models do.
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
        }


class _Study:
    """One quickstart under way."""

    def __init__(self, options: Quickstart, memory: EngramConfig, console: Console, interrupt: Interrupt) -> None:
        self.options, self.memory, self.console, self.interrupt = options, memory, console, interrupt
        self.device = find_device(options.device)
        self.dtype = best_dtype(self.device) if options.dtype == "auto" else options.dtype
        self.started = time.time()
        self.commit = commit()  # now: the tree may change under a long run
        self.cut_short = False

    def run(self, folder: Path) -> dict[str, Any]:
        options = self.options
        with Progress(self.console) as progress:
            progress.note("reading text")
            corpus = read_documents(options.data, max_bytes=options.max_bytes)
            train_files, held_out_files = split_documents(corpus)
            progress.note(f"training a tokenizer on {len(train_files):,} files, {corpus.num_bytes / 1e6:.1f} MB")
            tokenizer = train_tokenizer((file.text for file in train_files), options.vocab_size)
            with progress.task("tokenizing", sum(len(file.text) for file in corpus.documents)) as advance:
                train_tokens = pack(train_files, tokenizer, on_progress=advance)
                held_out_tokens = pack(held_out_files, tokenizer, on_progress=advance)
            token_map = TokenMap.from_tokenizer(tokenizer)
            results: dict[str, Any] = {}
            arms: dict[str, Arm] = {}
            with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
                for seed in range(options.seeds):
                    batches = Batches(train_tokens, options.batch_size, options.sequence_length, seed)
                    built = build_arms(
                        tokenizer,
                        token_map,
                        self.memory,
                        options.backbone(),
                        context=options.sequence_length,
                        seed=seed,
                        controls=options.controls,
                    )
                    for arm in built.values():
                        arm.model.to(self.device)
                    runs = self._train(built, batches, held_out_tokens, seed, progress, metrics)
                    if not arms:
                        # The first seed's models are the ones that are kept, and are safe from here on.
                        arms = built
                        _save_models(folder, arms, tokenizer)
                    if self.cut_short and results:
                        break  # a seed that was cut short says nothing beside whole ones
                    for name, run in runs.items():
                        results.setdefault(name, []).append(run)
                    if self.interrupt.asked:
                        break
            progress.note("writing samples and report")
            facts = _data_facts(corpus, train_files, held_out_files, train_tokens, held_out_tokens)
            result = self._result(arms, results, facts, _samples(arms, tokenizer, held_out_files, options))
            traces = _gate_texts(arms["memory"].model, tokenizer, held_out_files)
            _write(folder, arms, result, traces)
        return result

    def _train(
        self,
        arms: dict[str, Arm],
        batches: Batches,
        held_out: np.ndarray,
        seed: int,
        progress: Progress,
        metrics: Any,
    ) -> dict[str, dict[str, Any]]:
        """Train all arms in step: batch by batch, one after the other, so that a slow minute slows all of them."""
        options = self.options
        train_options = TrainOptions(num_steps=options.num_steps, dtype=self.dtype)
        optimizer = OptimizerOptions(backbone="adamw", lr=options.lr, table_lr_multiplier=options.table_lr_multiplier)
        trainers = {name: Trainer(arm.model, batches, train_options, optimizer) for name, arm in arms.items()}
        records: dict[str, list[StepRecord]] = {name: [] for name in arms}
        held_out_curves: dict[str, list[tuple[int, float]]] = {name: [] for name in arms}
        points = {round(options.num_steps * (i + 1) / _CURVE_POINTS) for i in range(_CURVE_POINTS - 1)}
        label = f"seed {seed}: " if options.seeds > 1 else ""
        with progress.training(f"{label}training {len(arms)} models", options.num_steps, list(arms)) as show:
            for step in range(1, options.num_steps + 1):
                for name, trainer in trainers.items():
                    record = trainer.step()
                    records[name].append(record)
                    metrics.write(json.dumps({"arm": name, "seed": seed, **record.to_dict()}) + "\n")
                show(records)
                if step in points:
                    for name, arm in arms.items():
                        point = self._evaluate(arm, held_out[: _CURVE_TOKENS + 1])
                        held_out_curves[name].append((records[name][-1].num_tokens, point.loss))
                if self.interrupt.asked and step < options.num_steps:
                    self.cut_short = True
                    progress.note(f"interrupted after step {step} of {options.num_steps}; saving what was trained")
                    break
        runs = {}
        with progress.task("evaluating on held-out files", len(arms) * (len(held_out) - 1)) as advance:
            for name, arm in arms.items():
                final = self._evaluate(arm, held_out, advance)
                # The curve's last point is of the same tokens as its others.
                last = self._evaluate(arm, held_out[: _CURVE_TOKENS + 1])
                seconds = sum(record.seconds for record in records[name])
                tokens = records[name][-1].num_tokens
                runs[name] = {
                    "seed": seed,
                    "loss": final.loss,
                    "perplexity": final.perplexity,
                    "num_evaluated_tokens": final.num_tokens,
                    "num_steps": len(records[name]),
                    "tokens": tokens,
                    "tokens_per_second": tokens / seconds,
                    "seconds": seconds,
                    "median_step_seconds": statistics.median(record.seconds for record in records[name]),
                    "train_curve": _smoothed(records[name]),
                    "held_out_curve": [*held_out_curves[name], (tokens, last.loss)],
                }
        return runs

    def _evaluate(self, arm: Arm, tokens: np.ndarray, on_progress: Any = lambda count: None) -> HeldOutLoss:
        options = self.options
        return held_out_loss(
            arm.model, tokens, length=options.sequence_length, dtype=self.dtype, on_progress=on_progress
        )

    def _result(
        self,
        arms: dict[str, Arm],
        runs: dict[str, list[dict[str, Any]]],
        facts: dict[str, Any],
        samples: list[dict[str, Any]],
    ) -> dict[str, Any]:
        options = self.options
        settings = {key: list(map(str, value)) if key == "data" else value for key, value in vars(options).items()}
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        settings |= {"dtype": self.dtype, "num_steps": options.num_steps, "memory": self.memory.to_dict()}
        nats_to_bits_per_byte = 1 / (np.log(2) * facts["bytes_per_token"])
        described = {}
        for name, arm in arms.items():
            for run in runs[name]:
                run["bits_per_byte"] = run["loss"] * nats_to_bits_per_byte
            sizes = arm.sizes
            described[name] = {
                "title": arm.title,
                "about": arm.about,
                "parameters": {
                    "vocabulary": sizes.vocabulary,
                    "backbone": sizes.backbone - sizes.vocabulary,
                    "memory_layers": sizes.memory_layers,
                    "memory_tables": sizes.memory_tables,
                    "total": sizes.total,
                },
                "flops_per_token": sizes.flops_per_token,
                "runs": runs[name],
                "loss": _mean_and_std([run["loss"] for run in runs[name]]),
            }
        gains = [twin["loss"] - memory["loss"] for memory, twin in zip(runs["memory"], runs["twin"], strict=True)]
        return {
            "format": "engram.quickstart.1",
            **run_facts(self.started, self.commit),
            "data": facts,
            "settings": settings,
            "seeds": [run["seed"] for run in runs["memory"]],
            "interrupted": self.cut_short or len(runs["memory"]) < options.seeds,
            "arms": described,
            "difference": {**_mean_and_std(gains), "per_seed": gains},
            "step_time_ratio": statistics.median(
                memory["median_step_seconds"] / twin["median_step_seconds"]
                for memory, twin in zip(runs["memory"], runs["twin"], strict=True)
            ),
            "samples": samples,
        }


def _mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _smoothed(records: Sequence[StepRecord], points: int = 100) -> list[tuple[int, float]]:
    """Mean loss of equal stretches of training."""
    size = max(1, len(records) // points)
    stretches = [records[start : start + size] for start in range(0, len(records), size)]
    return [(stretch[-1].num_tokens, statistics.fmean(record.loss for record in stretch)) for stretch in stretches]


def _data_facts(
    corpus: Corpus,
    train_files: Sequence[Document],
    held_out_files: Sequence[Document],
    train_tokens: np.ndarray,
    held_out_tokens: np.ndarray,
) -> dict[str, Any]:
    held_out_bytes = sum(len(file.text.encode()) for file in held_out_files)
    return {
        "source": corpus.source,
        "files": len(corpus.documents),
        "bytes": corpus.num_bytes,
        "skipped": corpus.skipped,
        "train_files": len(train_files),
        "held_out_files": len(held_out_files),
        "train_tokens": len(train_tokens),
        "held_out_tokens": len(held_out_tokens),
        "bytes_per_token": held_out_bytes / len(held_out_tokens),
    }


def _samples(
    arms: dict[str, Arm], tokenizer: PreTrainedTokenizerFast, files: Sequence[Document], options: Quickstart
) -> list[dict[str, Any]]:
    """Let both models continue the middle of some held-out files."""
    samples = []
    for file in sorted(files, key=lambda file: -len(file.text))[:3]:
        text = _excerpt(file.text, 160)
        continuations = {
            name: continue_text(arms[name].model, tokenizer, text, max_new_tokens=48, temperature=0.7, top_k=40, seed=0)
            for name in ("memory", "twin")
        }
        samples.append({"prompt": text, "source": file.name, "continuations": continuations})
    return samples


def _gate_texts(model: Any, tokenizer: PreTrainedTokenizerFast, files: Sequence[Document]) -> list[GateTrace]:
    model.eval()
    texts = [_excerpt(file.text, 700) for file in sorted(files, key=lambda file: -len(file.text))[:3]]
    return [gate_trace(model, tokenizer, text) for text in texts]


def _excerpt(text: str, length: int) -> str:
    """Some lines from the middle of a text."""
    start = max(text.rfind("\n", 0, len(text) // 2) + 1, 0)
    return text[start : start + length].strip("\n") or text[:length]


def _save_models(folder: Path, arms: dict[str, Arm], tokenizer: PreTrainedTokenizerFast) -> None:
    for name, place in (("memory", folder), ("twin", folder / "twin")):
        arms[name].model.save_pretrained(place)
        tokenizer.save_pretrained(place)


def _write(folder: Path, arms: dict[str, Arm], result: dict[str, Any], traces: list[GateTrace]) -> None:
    write_atomically(folder / "result.json", to_json(result))
    write_atomically(folder / "report.html", render_report(result, traces))
    save_curves(result, folder / "curves.png")
    lines = []
    for sample in result["samples"]:
        lines.append(f"prompt, from {sample['source']}:\n{sample['prompt']}\n")
        lines += [f"--- {arms[name].title}:\n{text}\n" for name, text in sample["continuations"].items()]
    write_atomically(folder / "samples.txt", "\n".join(lines))


def _last_words(result: dict[str, Any], out: Path) -> str:
    gain, std = result["difference"]["mean"], result["difference"]["std"]
    spread = "" if std is None else f" ± {std:.3f} over {len(result['seeds'])} seeds"
    verdict = "lower" if gain > 0 else "higher"
    stopped = ""
    if result["interrupted"]:
        whole = result["arms"]["memory"]["runs"][0]["num_steps"] == result["settings"]["num_steps"]
        stopped = " (interrupted: "
        stopped += f"only {len(result['seeds'])} seeds)" if whole else "both models stopped at the same step)"
    return (
        f"Held-out loss is {abs(gain):.3f}{spread} nats per token {verdict} with memory{stopped}, in "
        f"{result['seconds'] / 60:.1f} minutes.\n"
        f"  look:     {out}/report.html\n"
        f"  continue: engram-lm generate {out} --prompt 'def main'\n"
        f"  evaluate: engram-lm eval {out} --data FILES"
    )
