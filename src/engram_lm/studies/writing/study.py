"""``engram-lm study writing``: do rows that are written while a model runs help more than a cache of counts?"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from engram_lm.errors import ConfigError, DataError, check_flags
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.micro_models import MicroModelFlags
from engram_lm.studies.result import study_result
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm, kept, short_digest
from engram_lm.studies.suppression.families import FIRST_NAMES, LAST_NAMES
from engram_lm.studies.text_flags import like
from engram_lm.studies.writing.measure import Setting, Texts, measured, tuned
from engram_lm.studies.writing.streams import DESCRIPTIONS, name_of, open_domain
from engram_lm.studies.writing.summary import figures, summarize, writing_finding
from engram_lm.training.data.text_source import STANDARD_LIBRARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritingStudy(MicroModelFlags, StudyCommand):
    """Ask whether a model should write its memory's rows while it runs, or leave that to a cache of counts.

    A dense model and one with memory are trained. Both then read text of other kinds, chunk by chunk: the loss of a
    chunk is taken, then the model learns from it. Compared are no update, one gradient step on the rows that the
    chunk read, one on all weights, a cache that counts N-grams and has no gradients, and updates and cache together.
    Afterwards they are back at text of the old kind: how much of it did they forget? And facts about invented people
    are told once each, in text of the old kind, and asked for at the end.

    Learning rates and the cache's shares are chosen with the models of the first seed, on a stream of each kind that no
    result uses. Every seed reads streams of its own. A folder keeps what each seed came to, so an interrupted study
    goes on there with --resume.

    Examples::

        engram-lm study writing --data corpus/ --domains python:standard-library wikitext/
        engram-lm study writing --tokens 200000 --stream-tokens 4096 --seeds 1
    """

    name: ClassVar[str] = "writing"
    result_format: ClassVar[str] = "engram.writing.1"

    domains: tuple[str, ...] = ()
    """Kinds of text to change to: files, folders, python:standard-library or python:package-descriptions (those of the
    packages that are installed). The last two unless given, without the one that models are trained on."""
    stream_tokens: int = 32_768
    """Tokens of a stream, in whole sequences; every seed has one of each kind, and validation another one."""
    facts: int = 64
    """Facts that are told, one in every second sequence."""
    order: int = 4
    """Tokens of the cache's N-grams at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "seeds", "facts", "order")
        if self.stream_tokens < self.sequence_length:
            raise ConfigError(
                f"--stream-tokens {self.stream_tokens} is less than one sequence of {self.sequence_length} tokens"
            )
        if len(set(map(name_of, self.domains))) < len(self.domains):
            raise ConfigError(f"--domains are texts of different names, not {', '.join(self.domains)}")
        if self.facts > (most := len(FIRST_NAMES) * len(LAST_NAMES)):
            raise ConfigError(f"--facts {self.facts} is more than there are people, {most}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The kinds of text to change to."""
        trained = {str(path) for path in self.data} or {STANDARD_LIBRARY}
        return self.domains or tuple(one for one in (STANDARD_LIBRARY, DESCRIPTIONS) if one not in trained)

    @property
    def setting(self) -> Setting:
        """How streams are read."""
        return Setting(chunk=self.sequence_length, order=self.order, facts=self.facts)

    def study(self) -> Study:
        """A dense model, and the same one with memory."""
        dense = self.model("dense")
        memory = self.model("dense_engram", like=like(dense))
        return Study(
            name=self.name,
            question="Should a model write its memory while it runs, or is a cache of counts better?",
            arms=(
                Arm(name="dense", title="no memory", recipe=self.recipe(dense)),
                Arm(name="engram", title="with memory", recipe=self.recipe(memory)),
            ),
            budget=Budget(equal=("tokens",)),
            seeds=self.seeds,
            figures=figures,
            finding=writing_finding,
        )

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Read the streams with all models, in every way."""
        result = study_result(runner.study, seeds)
        whole = [arms for arms in seeds if all(one.failed is None for one in arms.values())]
        if not whole:
            raise DataError("no seed was trained to its end, so there is no model to read with")
        texts = self._texts(whole[0]["dense"], runner)
        settings = {key: value for key, value in self.settings().items() if key != "seeds"}  # more can be added later
        digest = short_digest((settings, [arm.recipe for arm in runner.study.arms]))
        chosen = kept(
            runner.out / f"choices-{digest}.json",
            lambda: {name: self._tuned(one, texts, runner) for name, one in whole[0].items()},
        )
        runs = [
            {
                "seed": arms["dense"].seed,
                "arms": {
                    name: kept(
                        one.folder.with_name(f"{name}.reading-{digest}.json"),
                        functools.partial(self._measured, one, texts, chosen[name], runner),
                    )
                    for name, one in arms.items()
                },
            }
            for arms in whole
        ]
        return {
            **result,
            "domains": [*map(name_of, self.sources)],
            "choices": chosen,
            "reading": runs,
            "summary": summarize(runs),
        }

    def _texts(self, trained: TrainedArm, runner: Runner) -> Texts:
        """Everything that is read, as tokens."""
        tokenizer, chunk = trained.load()[1], self.sequence_length
        held_out = runner.text(trained.arm.recipe).held_out
        assert held_out is not None, "micro models hold text out"
        num_tokens = self.stream_tokens // chunk * chunk
        num_old = min(num_tokens // 2 // chunk or 1, (len(held_out) - 1) // (3 * chunk)) * chunk
        if not num_old:
            raise DataError(
                f"{len(held_out):,} tokens are held out, and reading takes at least {3 * chunk + 1:,}; name more --data"
            )
        room = len(held_out) - 2 * num_old
        if room < 2 * self.facts * chunk + 1:
            raise DataError(
                f"telling {self.facts} facts takes {2 * self.facts * chunk + 1:,} tokens of held-out text, and "
                f"{room:,} are left for it; lower --facts, or name more --data"
            )
        domains = {
            name_of(source): open_domain(
                source, tokenizer, num_streams=self.seeds, num_tokens=num_tokens, max_bytes=self.max_bytes
            )
            for source in self.sources
        }
        parts = [held_out[start : start + num_old + 1] for start in (0, num_old)]
        return Texts(domains=domains, old=parts[0], back=parts[1], around=held_out[2 * num_old :])

    def _tuned(self, trained: TrainedArm, texts: Texts, runner: Runner) -> dict[str, Any]:
        runner.progress.note(f"choosing learning rates of the model {trained.arm.title}")
        return tuned(trained.load()[0], texts, self.setting, runner.stop_if_asked)

    def _measured(self, trained: TrainedArm, texts: Texts, choices: Any, runner: Runner) -> dict[str, Any]:
        runner.progress.note(f"seed {trained.seed}: reading with the model {trained.arm.title}")
        return measured(
            *trained.load(),
            texts,
            self.setting,
            choices,
            seed=trained.seed,
            on_chunk=runner.stop_if_asked,
        )
