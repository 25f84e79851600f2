"""``engram-lm eval``: the loss of a model on text, and its scores in benchmarks."""

import contextlib
import dataclasses
import json as json_module
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from engram_lm.errors import ConfigError, check_flags, check_whole
from engram_lm.evaluation.benchmarks import check_lengths, check_tasks, need_harness, run_tasks
from engram_lm.evaluation.diagnostics.measure import diagnose, num_passes
from engram_lm.evaluation.diagnostics.tables import print_diagnostics
from engram_lm.evaluation.diagnostics.text import find_reference
from engram_lm.evaluation.long_ppl import KeyTokens, document_limits, long_ppl
from engram_lm.evaluation.recall import print_recall, recall_and_reading
from engram_lm.evaluation.recall_questions import recall_questions
from engram_lm.evaluation.result_files import print_table, write_results
from engram_lm.evaluation.task_list import list_tasks
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.files import user_path
from engram_lm.progress import NOTHING, Progress
from engram_lm.serving.load import ModelFlags, load_model
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.documents import Corpus, pack, read_documents
from engram_lm.training.held_out import HeldOutLoss, held_out_loss

_TEXT_BATCH = 16
"""Sequences of a text at a time, where the caller does not say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(ModelFlags):
    """Measure the loss of a model on text, or ask it the questions of benchmarks, or both.

    The model is a quickstart run, or any folder with a causal language model and its tokenizer; --adapter adds memory
    to it. Benchmarks are tasks of lm-evaluation-harness (the extra eval), RULER, and task files: one question per line,
    {"prompt": "The capital of France is", "choices": [" Rome", " Paris"], "answer": 1}, or without choices and with the
    answer itself; "id" and "family" (what scores are averaged over) may be given too.

    Examples::

        engram-lm eval runs/quickstart --data notes.txt
        engram-lm eval SmolLM2-135M --adapter memory --tasks hellaswag,arc_challenge --limit 500
        engram-lm eval runs/quickstart --tasks capitals.jsonl dates.jsonl --json
        engram-lm eval runs/notes/model --data held-out.txt --diagnostics --recall notes.txt
        engram-lm eval runs/long/model --tasks ruler_synthetic_4096 --limit 50 --data books/ --long-ppl
        engram-lm eval --list --tasks engram-paper
    """

    model: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="MODEL")] = None
    """Folder of the model."""
    data: tuple[str, ...] = ()
    """Text: files, folders, or hf://owner/name for a dataset of the Hugging Face hub."""
    tasks: tuple[str, ...] = ()
    """Names of tasks and groups, with commas or spaces between them; patterns such as 'arc_*'; task files (.jsonl); or
    YAML files of lm-evaluation-harness."""
    list: bool = False
    """Say which tasks there are; with --tasks what those consist of, and which data they read."""
    task_data: Path | None = None
    """Folder from which alone the data sets of tasks are read, for machines without a network; YAML files in its folder
    tasks are tasks too."""
    limit: int | None = None
    """Ask no more than this many questions of each task, from its beginning."""
    few_shot: int | None = None
    """Examples before each question; by default what each task says."""
    chat_template: bool = False
    """Write each question as a chat, as the tokenizer's template does."""
    run_unsafe_code: bool = False
    """Agree that tasks such as humaneval run what the model writes, on this machine and without any protection."""
    max_length: int | None = None
    """Tokens that the model sees at most of a question, or of a document of --long-ppl; by default what its
    configuration says."""
    seed: int = 1234
    """Chooses examples, and whatever else a task leaves to chance."""
    out: Path | None = None
    """Folder for results and answers as lm-evaluation-harness writes them."""
    sequence_length: int | None = None
    """Tokens in a sequence; by default what the model was trained with, 1024 at most."""
    batch_size: int | None = None
    """Sequences at a time; by default 16 of a text, and for tasks as many as fit."""
    max_tokens: int | None = None
    """Tokens to evaluate at most, from the beginning of the text."""
    diagnostics: bool = False
    """Also say for which tokens of the text the model pays: by frequency, on rare words that a document repeats, after
    known N-grams; with the memory on and off, with standard errors."""
    reference: tuple[str, ...] = ()
    """Text in which --diagnostics counts how frequent something is, best the one that the model was trained on. Where
    MODEL or --adapter lies in the folder of a training run, that run's text is the default."""
    long_ppl: bool = False
    """Also measure LongPPL on the documents of --data: the perplexity at the tokens that need a long context."""
    evaluator: Path | None = None
    """Folder of the model that finds these tokens for --long-ppl; by default MODEL itself, which compares no models."""
    short_context: int | None = None
    """Tokens of the short context that --long-ppl compares a long one with; 4,096 by default."""
    recall: tuple[str, ...] = ()
    """Text, best the one that the model was trained on, of which --limit questions are made (256 by default): what the
    model recalls of it, and what it reads in the question itself. They are asked with the memory on and off."""
    device: str = "cpu"
    """Device to run on, as torch names it."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "sequence_length", "batch_size", "max_tokens", "limit", "max_length", "short_context")
        check_whole(at_least=0, **{"--few-shot": self.few_shot, "--seed": self.seed})
        if self.list:
            return
        if self.model is None:
            raise ConfigError("name the folder of a model, or ask with --list which tasks there are")
        if not self.data and not self.recall and not self.task_names:
            raise ConfigError("name what to evaluate on: text with --data or --recall, or benchmarks with --tasks")
        if self.out is not None and not self.task_names:
            raise ConfigError("--out is for the results of --tasks")
        if (self.diagnostics and not self.data) or (self.reference and not self.diagnostics):
            raise ConfigError("--diagnostics are of the text that --data names, and --reference is for --diagnostics")
        if self.long_ppl and not self.data:
            raise ConfigError("--long-ppl is of the documents that --data names")
        if (self.evaluator is not None or self.short_context is not None) and not self.long_ppl:
            raise ConfigError("--evaluator and --short-context are for --long-ppl")

    @property
    def task_names(self) -> Sequence[str]:
        """The names that --tasks gives."""
        return [name for words in self.tasks for name in words.split(",") if name]

    def run(self) -> int:
        """Print loss, perplexity, bits per byte and speed, and the scores of tasks."""
        names = self.task_names
        if names or self.list or self.recall:
            need_harness()
        if self.list:
            list_tasks(names, self.task_data, as_json=self.json)
            return 0
        if names:
            check_tasks(names, self.task_data)
        assert self.model is not None
        if self.out is not None:
            user_path(self.out).mkdir(parents=True, exist_ok=True)  # now: not after all questions were asked
        corpus = read_documents(self.data) if self.data else None
        texts = [document.text for document in read_documents(self.recall).documents] if self.recall else ()
        items = recall_questions(texts, num_questions=self.limit or 256, seed=self.seed) if self.recall else ()
        model, tokenizer = load_model(self.model, device=self.device, tables=self, adapter=self.adapter)
        # Whatever the model is too short for is refused now, before anything is measured.
        if names:
            check_lengths(names, model, tokenizer, self.max_length)
        asked = self._long_ppl_options(model, tokenizer) if self.long_ppl else {}
        values: dict[str, Any] = {"model": str(self.model)}
        if self.adapter is not None:
            values["adapter"] = self.adapter
        if corpus is not None:
            values |= self._measure_loss(corpus, model, tokenizer)
            if self.long_ppl:
                values |= self._measure_long_ppl(corpus, model, tokenizer, asked)
        if names:
            values |= self._ask(names, model, tokenizer)
        if items:
            values |= self._recall(items, model, tokenizer)
        if self.json:
            print(json_module.dumps(values))
        return 0

    def _measure_loss(self, corpus: Corpus, model: Any, tokenizer: Any) -> dict[str, Any]:
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        length = self.sequence_length or min(longest, 1024)
        details: dict[str, Any] = {}
        if self.diagnostics:
            found, details = self._diagnose(corpus, model, tokenizer, length)
        else:
            tokens = pack(corpus.documents, tokenizer)
            with _progress("evaluating", min(len(tokens) - 1, self.max_tokens or len(tokens))) as advance:
                found = held_out_loss(
                    model,
                    tokens,
                    length=length,
                    batch_size=self.batch_size or _TEXT_BATCH,
                    max_tokens=self.max_tokens,
                    num_bytes=corpus.num_bytes if self.max_tokens is None else None,
                    beginning=beginning_tokens(tokenizer),
                    on_progress=advance,
                )
        if not self.json:
            print(f"loss            {found.loss:.4f} nats per token")
            print(f"perplexity      {found.perplexity:.2f}")
            if found.bits_per_byte is not None:
                print(f"bits per byte   {found.bits_per_byte:.4f}")
            documents = f"{len(corpus.documents):,} document{'s' * (len(corpus.documents) != 1)}"
            print(f"text            {documents}, {found.num_tokens:,} tokens, sequences of {length}")
            for reason, number in corpus.skipped.items():
                print(f"skipped         {number} files: {reason}")
            print(f"speed           {found.tokens_per_second:,.0f} tokens/s")
            if details:
                print_diagnostics(details["diagnostics"])
        values = {"files": len(corpus.documents), "skipped": corpus.skipped, "sequence_length": length}
        return {**values, **dataclasses.asdict(found), **details}

    def _diagnose(self, corpus: Corpus, model: Any, tokenizer: Any, length: int) -> tuple[HeldOutLoss, dict[str, Any]]:
        """Measure the loss together with the diagnostics, which share a pass over the text."""
        folders = [Path(folder) for folder in (self.adapter, self.model) if folder is not None]
        reference = find_reference(self.reference, folders, tokenizer, note=Console(stderr=True).print)
        parts = [pack([document], tokenizer) for document in corpus.documents]
        num_tokens = sum(map(len, parts))
        with _progress("evaluating", num_passes(model) * min(num_tokens, self.max_tokens or num_tokens)) as advance:
            found = diagnose(
                model,
                tokenizer,
                np.concatenate(parts),
                document_ends=np.cumsum([len(part) for part in parts]),
                length=length,
                batch_size=self.batch_size or _TEXT_BATCH,
                max_tokens=self.max_tokens,
                num_bytes=corpus.num_bytes if self.max_tokens is None else None,
                reference=reference,
                on_progress=advance,
            )
        return next(iter(found.losses.values())), {"diagnostics": found.to_dict()}

    def _long_ppl_options(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Load the evaluator, and refuse options of `long_ppl` that would not do for these models."""
        judge = (None, None) if self.evaluator is None else load_model(self.evaluator, device=self.device)
        options: dict[str, Any] = {
            "evaluator": judge[0],
            "evaluator_tokenizer": judge[1],
            "options": KeyTokens() if self.short_context is None else KeyTokens(short_context=self.short_context),
            "max_length": self.max_length,
        }
        document_limits(model, tokenizer, **options)
        return options

    def _measure_long_ppl(
        self, corpus: Corpus, model: Any, tokenizer: Any, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        with _progress("finding key tokens", len(corpus.documents)) as advance:
            found = long_ppl(
                model,
                tokenizer,
                [document.text for document in corpus.documents],
                on_progress=advance,
                **options,
            )
        if not self.json:
            value = (
                "– (no token needs more than the short context)" if found.long_ppl is None else f"{found.long_ppl:.2f}"
            )
            print(f"LongPPL         {value}")
            cut = f", {found.num_cut:,} of them cut" if found.num_cut else ""
            print(
                f"key tokens      {found.num_key_tokens:,} of {found.num_tokens:,}, in {found.num_documents:,} "
                f"documents longer than the short context{cut}"
            )
        return {"long_ppl": {"evaluator": str(self.evaluator or self.model), **dataclasses.asdict(found)}}

    def _ask(self, names: Sequence[str], model: Any, tokenizer: Any) -> dict[str, Any]:
        with _asking() as advance:
            results = run_tasks(
                model,
                tokenizer,
                names,
                limit=self.limit,
                num_fewshot=self.few_shot,
                task_data=self.task_data,
                batch_size=self.batch_size,
                max_length=self.max_length,
                seed=self.seed,
                chat_template=self.chat_template,
                run_unsafe_code=self.run_unsafe_code,
                on_progress=advance,
            )
        if self.out is not None:
            write_results(self.out, results)
        if not self.json:
            print_table(results)
        return {"tasks": results.to_dict(), "num_truncated": results.num_truncated}

    def _recall(self, items: Sequence[TaskItem], model: Any, tokenizer: Any) -> dict[str, Any]:
        with _asking() as advance:
            found = recall_and_reading(
                model, tokenizer, items, batch_size=self.batch_size, max_length=self.max_length, on_progress=advance
            )
        if not self.json:
            print_recall(found)
        return {"recall": {name: dataclasses.asdict(family) for name, family in found.items()}}


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    with Progress().tasks(NOTHING) as tasks:
        tasks.begin(what, total)
        yield lambda more: tasks.advance(what, more)


@contextlib.contextmanager
def _asking() -> Iterator[Callable[[int, int], None]]:
    with Progress().tasks(NOTHING) as tasks:
        tasks.begin("asking")
        yield lambda done, total: tasks.show("asking", done, total)
