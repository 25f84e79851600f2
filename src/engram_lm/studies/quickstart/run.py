"""The quickstart: train a model with memory and its memory-less twin side by side, compare them, write a report."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from engram_lm.errors import ConfigError, DataError, RunFolderError, check_flags
from engram_lm.files import write_atomically
from engram_lm.memory import EngramConfig
from engram_lm.page.figure import save_pictures
from engram_lm.studies.budget import check_budget, estimated_seconds
from engram_lm.studies.command import plain_flags
from engram_lm.studies.diagnostics import diagnose_models
from engram_lm.studies.progress import StudyProgress
from engram_lm.studies.quickstart.report import curve_pictures, render_report
from engram_lm.studies.quickstart.result import (
    data_facts,
    gate_texts,
    held_out_documents,
    quickstart_result,
    write_samples,
)
from engram_lm.studies.quickstart.summary import MEMORY, TWIN, last_words, terminal_table
from engram_lm.studies.runner import Runner
from engram_lm.studies.small_models import SmallModelFlags
from engram_lm.studies.study import Arm, Budget, Study
from engram_lm.studies.text_flags import like
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.loop import best_dtype, find_device
from engram_lm.training.run_folder import RunFolder, commit, run_facts, to_json

_FIRST_BLOCKS = (0, 1, 2)
_CURVE_POINTS = 7
"""Times that held-out loss is measured along the way."""
_WORK = "work"
"""The folder of the training runs, in the folder that is written aside; it is removed at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart(SmallModelFlags):
    """Train a small memory model and its memory-less twin on local text, compare them, and write a report.

    With no arguments it needs no network and about five minutes on two CPU cores: the corpus is the Python standard
    library's own sources on this machine. Both models see the same batches in the same order, start from the same
    weights where they have the same, and spend the same operations per token.

    The run folder is a Hugging Face checkpoint of the memory model with its tokenizer; beside it are result.json,
    metrics.jsonl, curves.png, samples.txt and report.html, and the twin in twin/.
    """

    out: Path = Path("runs/quickstart")
    """Run folder. An earlier run there is kept under a numbered name."""
    seeds: int = 1
    """Repetitions with other weights and another order of batches; gives mean and standard deviation."""
    minutes: float | None = None
    """Train for about this many minutes, all models and seeds together, in place of --tokens. The speed is estimated
    from this machine's CPU, and is right within a factor of about two."""
    controls: bool = False
    """Also train with a table that stays random, and with the table's bytes in a wider feed-forward (slow)."""
    json: bool = False
    """Print the result as JSON instead of a table."""
    memory_layers: tuple[int, ...] = _FIRST_BLOCKS
    """Blocks that read memory, counted from 0; the first three, or all of fewer, unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_layers == _FIRST_BLOCKS:
            object.__setattr__(self, "memory_layers", tuple(range(min(len(_FIRST_BLOCKS), self.blocks))))
        check_flags(self, "seeds")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes must be more than 0, not {self.minutes}")
        self.memory()  # refuses what cannot be
        if max(self.memory_layers) >= self.blocks:
            raise ConfigError(f"--memory-layers {self.memory_layers} reach past the {self.blocks} blocks")

    def memory(self) -> EngramConfig:
        """Memory of the model that has one."""
        return self.memory_in(self.memory_layers)

    def study(self) -> Study:
        """Compare a model with memory with its memory-less twin, and with the controls.

        The twin's feed-forward is wider, so that both spend the same operations on a token. Weights that two models
        have in common start as the same numbers, and those of the twin's extra width as others.
        """
        memory = self.memory()
        with_memory = self.model(memory)
        twin = self.model(None, wider=self.width_of(memory.flops_per_token()), like=like(with_memory))
        arms = [
            (MEMORY, "with memory", f"reads {memory.num_heads_total * len(memory.layers)} rows per token", with_memory),
            (
                TWIN,
                "without memory",
                "its feed-forward is wider, so that it spends the same operations per token",
                twin,
            ),
        ]
        if self.controls:
            frozen = dataclasses.replace(with_memory, frozen_tables=True)
            # A channel of the feed-forward is three numbers for each of the block's own, and six operations.
            channels = self.width_of(2 * memory.num_parameters())
            wide = self.model(None, wider=channels, like=like(with_memory))
            arms += [
                ("random_table", "random table", "the same model, but its table stays as it was drawn", frozen),
                ("wide", "wide feed-forward", "no memory; the table's bytes went into a wider feed-forward", wide),
            ]
        return Study(
            name="quickstart",
            question="Does memory help on this text?",
            arms=tuple(
                Arm(
                    name=name,
                    title=title,
                    about=about,
                    recipe=self.recipe(model, curve_points=_CURVE_POINTS),
                    is_control=name not in (MEMORY, TWIN),
                )
                for name, title, about, model in arms
            ),
            budget=Budget(equal=("flops",), tolerance=0.01),
            seeds=self.seeds,
        )

    def run(self) -> int:
        """Do all of it; return the exit status: 0, or 130 after an interruption, when what was trained is saved too."""
        if self.minutes is not None:
            return dataclasses.replace(self, minutes=None, tokens=self._tokens_in(self.minutes)).run()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        progress = StudyProgress("what is trained by then, and compares the models as they are")
        device = find_device(self.device)
        dtype = best_dtype(device) if self.dtype == "auto" else self.dtype
        folder = RunFolder(self.out)
        try:
            with Interrupt() as interrupt:
                result = self._compare(folder.aside, dtype, progress, interrupt)
                moved = folder.publish()
        except BaseException as error:
            if next(folder.aside.rglob("model.safetensors"), None) is not None:
                progress.note(f"what was trained so far is in {folder.aside}")
            else:
                folder.discard()
            if isinstance(error, SafetensorError):  # what safetensors makes of a full disk
                raise RunFolderError(f"cannot write {folder.aside}: {error}") from error
            raise
        if moved is not None:
            progress.note(f"the earlier run was moved to {moved}")
        if self.json:
            print(to_json(result), end="")
        else:
            Console().print(terminal_table(result))
            Console().print(last_words(result, self.out), highlight=False)
        return 130 if result["interrupted"] else 0

    def _tokens_in(self, minutes: float) -> int:
        """Estimate how many tokens each model can be trained on in some minutes."""
        seconds = estimated_seconds(self.study())
        if seconds is None:
            raise ConfigError(f"--minutes estimates the speed of a CPU, not of {self.device}; give --tokens instead")
        return max(self.batch_size * self.sequence_length, round(self.tokens * 60 * minutes / seconds))

    def _compare(self, out: Path, dtype: str, progress: StudyProgress, interrupt: Interrupt) -> dict[str, Any]:
        """Train and compare the arms; write everything into a folder."""
        started, made_at = time.time(), commit()  # now: the tree may change under a long run
        work = out / _WORK
        study = self.study()
        check_budget(study)
        progress.note("reading text and training a tokenizer")
        names = self.prepare_tokenizer(work)
        runner = Runner(study, work, mode="interleaved", progress=progress, interrupt=interrupt, keep_unfinished=True)
        text = runner.text(study.arms[0].recipe)
        outcome = runner.run()
        # A seed that was cut short says nothing beside whole ones.
        seeds = outcome.seeds or ((outcome.cut_short,) if outcome.cut_short else ())
        if not seeds:
            raise KeyboardInterrupt
        failed = [seeds[0][name].failed for name in (MEMORY, TWIN) if seeds[0][name].failed is not None]
        if failed:
            raise DataError(failed[0])
        progress.note("writing samples and report")
        models = {name: trained.load(self.device) for name, trained in seeds[0].items() if trained.failed is None}
        for name, place in ((MEMORY, out), (TWIN, out / "twin")):
            shutil.copytree(seeds[0][name].folder / "model", place, dirs_exist_ok=True)
        documents = held_out_documents(text, models[MEMORY][1], names)
        data = data_facts(text, documents)
        chosen = {"dtype": dtype, "num_steps": self.num_steps, "memory": self.memory().to_dict()}
        result = {
            "format": "engram.quickstart.1",
            **run_facts(started, made_at),
            "data": data,
            "settings": plain_flags(self) | chosen,
            **quickstart_result(seeds, data["bytes_per_token"]),
            "diagnostics": diagnose_models(
                {seeds[0][name].arm.title: models[name][0] for name in (MEMORY, TWIN)},
                models[MEMORY][1],
                text,
                study.arms[0].recipe,
            ),
            "interrupted": outcome.interrupted,
            "samples": write_samples(models, documents),
        }
        lines = (
            json.dumps({"arm": name, "seed": trained.seed, **line}) + "\n"
            for seed in seeds
            for name, trained in seed.items()
            for line in trained.records
        )
        write_atomically(out / "metrics.jsonl", "".join(lines))
        write_atomically(out / "report.html", render_report(result, gate_texts(models, documents)))
        save_pictures(curve_pictures(result), out)
        write_atomically(out / "samples.txt", _samples_text(result))
        write_atomically(out / "result.json", to_json(result))
        shutil.rmtree(work)
        return result


def _samples_text(result: Mapping[str, Any]) -> str:
    lines = []
    for sample in result["samples"]:
        lines.append(f"prompt, from {sample['source']}:\n{sample['prompt']}\n")
        lines += [f"--- {result['arms'][name]['title']}:\n{text}\n" for name, text in sample["continuations"].items()]
    return "\n".join(lines)
