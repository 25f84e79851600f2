"""``engram-lm analyze``: see what the memory of a model does, as numbers, pictures and a page."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from engram_lm.analysis.part import AnalyzeOptions, load_parts
from engram_lm.analysis.registry import PARTS
from engram_lm.analysis.report import print_summary, render_report
from engram_lm.analysis.run import Findings, analyze
from engram_lm.analysis.subject import Subject, find_subject
from engram_lm.errors import ConfigError, check_flags
from engram_lm.evaluation.tasks import read_tasks
from engram_lm.files import write_atomically
from engram_lm.page.figure import save_pictures
from engram_lm.progress import NOTHING, Progress
from engram_lm.serving.load import ModelFlags, load_model
from engram_lm.training.data.documents import Corpus, read_documents
from engram_lm.training.run_folder import RunFolder, commit, run_facts, to_json

_RESULT = "analysis.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analyze(ModelFlags):
    """See what the memory of a model does: when its gates open, what each layer predicts, what is lost without it.

    A model is a quickstart run, or any folder with a causal language model and its tokenizer. Models with the same
    tokenizer are compared layer by layer. --adapter and the table flags apply to the first model; name a folder twice
    to compare the model with and without the memory of an adapter.

    The folder --out receives analysis.json, pictures, and report.html, a page that opens offline.

    Examples::

        engram-lm analyze runs/quickstart runs/quickstart/twin --data notes.txt
        engram-lm analyze runs/quickstart --data books/ --parts gates,rows --max-tokens 1000000
    """

    models: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL...")]
    """Folders of the models."""
    data: tuple[Path, ...]
    """Text files or folders."""
    out: Path | None = None
    """Folder for the results; by default runs/analysis-NAME. An earlier analysis there is kept under a numbered
    name."""
    parts: str = ",".join(PARTS)
    """What to look at, separated by commas."""
    max_tokens: int | None = 200_000
    """Tokens of the text to read, at most, from the start; none reads all of it."""
    suppression_tokens: int = AnalyzeOptions.suppression_tokens
    """Tokens that go through the models with their memory suppressed, once for each way of suppressing it."""
    tasks: tuple[Path, ...] = ()
    """Files of questions (JSON lines) for the suppressed models, as for engram-lm eval."""
    sequence_length: int | None = None
    """Tokens in a window of the text; by default what the models were trained with, 512 at most."""
    batch_size: int = AnalyzeOptions.batch_size
    """Windows that are read at once, at most."""
    memory_mib: int = AnalyzeOptions.budget_bytes >> 20
    """MiB of hidden states, predictions, scores and counts that may be kept at once; a small budget means fewer windows
    at once."""
    device: str = "cpu"
    """Where to run, by its name in torch."""
    json: bool = False
    """Print the result as JSON instead of a summary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "max_tokens", "suppression_tokens", "sequence_length", "batch_size", "memory_mib")
        if not self.models:
            raise ConfigError("name at least one model folder to analyze; `engram-lm quickstart` makes one")
        if not self.data:
            raise ConfigError("name the text to read, files or folders, with --data")
        self.chosen_parts()  # refuses unknown names

    def chosen_parts(self) -> tuple[str, ...]:
        """Return the names of the parts, in the order of the report."""
        named = {part.strip() for part in self.parts.split(",")} - {""}
        AnalyzeOptions(parts=tuple(sorted(named)))
        return tuple(part for part in PARTS if part in named)

    def run(self) -> int:
        """Analyze the models and write the folder."""
        started, made_at = time.time(), commit()
        console = Console(stderr=True)
        out = self.out or Path("runs") / f"analysis-{self.models[0].resolve().name}"
        folder = RunFolder(out, mark=_RESULT)
        try:
            corpus = read_documents(self.data)
            options = AnalyzeOptions(
                parts=self.chosen_parts(),
                length=self.sequence_length,
                max_tokens=self.max_tokens,
                suppression_tokens=self.suppression_tokens,
                budget_bytes=self.memory_mib << 20,
                batch_size=self.batch_size,
                items=tuple(read_tasks(self.tasks)) if self.tasks else (),
            )
            subjects: list[Subject] = []
            for path, name in zip(self.models, _names(self.models, adapter=self.adapter is not None), strict=True):
                flags, adapter = (None, None) if subjects else (self, self.adapter)  # these are for the first model
                model, tokenizer = load_model(path, device=self.device, tables=flags, adapter=adapter)
                subjects.append(find_subject(model, tokenizer, name=name))
            findings = self._analyze(subjects, corpus, options, console)
            result = {
                "format": "engram.analysis.1",
                **run_facts(started, made_at),
                "settings": {
                    **{key: value for key, value in vars(options).items() if key != "items"},
                    "num_questions": len(options.items),
                    "device": self.device,
                    "adapter": self.adapter,
                },
                "data": {"source": corpus.source, "files": len(corpus.documents), "skipped": corpus.skipped},
                "models": [_described(subject, path) for subject, path in zip(subjects, self.models, strict=True)],
                "texts": findings.texts,
                "parts": findings.parts,
            }
            write_atomically(folder.aside / _RESULT, to_json(result))
            drawn = (part.picture(result) for part in load_parts(findings.parts))
            pictures = save_pictures(filter(None, drawn), folder.aside)
            write_atomically(folder.aside / "report.html", render_report(result, findings.page_only))
            moved = folder.publish()
        except BaseException:
            folder.discard()
            raise
        if moved is not None:
            console.print(f"the earlier analysis was moved to {moved}", highlight=False, soft_wrap=True)
        if self.json:
            print(to_json(result), end="")
        else:
            print_summary(result, Console())
            for name in ("report.html", _RESULT, *(path.name for path in pictures)):
                print(f"  {out / name}")
        return 0

    def _analyze(self, subjects: list[Subject], corpus: Corpus, options: AnalyzeOptions, console: Console) -> Findings:
        with Progress(console).tasks(NOTHING) as tasks:
            stages = [""]

            def begin(stage: str, total: int) -> None:
                stages.append(stage)
                tasks.begin(stage, total)

            return analyze(
                subjects,
                corpus.documents,
                options,
                on_stage=begin,
                on_progress=lambda done: tasks.advance(stages[-1], done),
            )


def _names(paths: tuple[Path, ...], *, adapter: bool) -> list[str]:
    """Name models by their folders, with as much of the path as it takes to tell them apart."""
    names = [path.resolve().name or str(path) for path in paths]
    if adapter:
        names[0] += " + memory"
    longer = [
        f"{path.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    # Numbers are needed for a folder that was named twice, and for two whose parents have the same name too.
    return [f"{name} {index + 1}" if longer.count(name) > 1 else name for index, name in enumerate(longer)]


def _described(subject: Subject, path: Path) -> dict[str, Any]:
    spec = subject.spec
    return {
        "name": subject.name,
        "path": str(path),
        "kind": type(subject.model).__name__,
        "layers": subject.num_layers,
        "hidden_size": subject.hidden_size,
        "streams": subject.num_streams,
        "vocabulary": len(subject.tokenizer),
        "vocabulary_digest": subject.vocabulary_digest,
        "memory_blocks": list(subject.memories),
        "orders": [] if spec is None else list(spec.orders),
        "heads": 0 if spec is None else spec.num_heads,
        "compressed_tokens": spec is not None and spec.vocab_size < spec.num_tokens,
    }
