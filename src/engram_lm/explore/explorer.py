"""All that the page asks of a model: read a text, look at one token, add a fact and take it back. No widgets here."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engram_lm.adapt import FactEdit, RowPatch, attached_adapters
from engram_lm.adapt.edits.expressions import read_wordings
from engram_lm.adapt.edits.fit import JointFitOptions, JointFitProgress
from engram_lm.adapt.edits.scoring import score_wordings
from engram_lm.adapt.patchable import patchable_memory
from engram_lm.adapt.row_patch_proof import RowPatchProof
from engram_lm.analysis.gates.trace import GateTrace, TraceKeeper
from engram_lm.analysis.protocol import Analysis, NotApplicable
from engram_lm.analysis.reading import read_text
from engram_lm.analysis.rows.collisions import TextNgrams
from engram_lm.analysis.rows.neighbours import Neighbours, nearest_ngrams
from engram_lm.analysis.subject import OWN_MEMORY, Subject, find_subject
from engram_lm.errors import ConfigError, DataError, EngramError, TokenError, check_whole
from engram_lm.evaluation.suppressing import suppressed, without_ngrams
from engram_lm.explore.addresses import Addresses, Lookup, find_addresses, spell, spell_each
from engram_lm.explore.predictions import FactAnswer, LogitsKeeper, Prediction, changes, predictions, read_logits
from engram_lm.hashing import HashSpec
from engram_lm.tokenizing import begin, beginning_tokens, text_tokens

# Dimension key: L length, V vocabulary.

_COMPARED_NGRAMS = 1 << 13
"""N-grams of the reference among which neighbors are sought: the most frequent ones."""
_PROOF = {"window_tokens": 64, "max_windows": 12}
_MOST_CHARACTERS = 20_000
"""Characters of a text that are tokenized, at least; more where more tokens are to be read."""

WITH, WITHOUT, BEFORE_EDITS = "with memory", "without memory", "before your edits"
"""Names of predictions."""


@dataclasses.dataclass(frozen=True)
class Edits:
    """The facts that one visitor has added to one memory. They are the visitor's; the model never holds them."""

    memory: str = ""
    """Label of the memory."""
    patch: RowPatch | None = None
    """The facts, fitted together; None without any."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the facts."""
        return () if self.patch is None or self.patch.edit is None else tuple(f.prompt for f in self.patch.edit.facts)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """What a text is to one memory. Made by `Explorer.read`."""

    memory: str
    """Label of the memory; empty without one."""
    tokens: np.ndarray
    """Raw tokens that were read, int64 ``[L]``."""
    texts: tuple[str, ...]
    """What each of them spells, which gives back the text where there is a tokenizer, and otherwise its id."""
    addresses: Addresses | None
    """Where the memory looks; None without memory."""
    trace: GateTrace | None
    """Its gates; None without gates or without weights."""
    predictions: Mapping[str, tuple[Prediction, ...]]
    """By name, what is predicted after each token: see `WITH`, `WITHOUT` and `BEFORE_EDITS`. Empty without weights."""
    changed: np.ndarray | None
    """How far the memory changes each prediction, in nats: the Kullback-Leibler divergence of the prediction without
    it from the one with it; NaN where a number is not finite; float64 ``[L]``. None without memory or weights."""
    edited: np.ndarray
    """Whether a position reads a row that the visitor's facts have changed, bool ``[L]``."""
    notes: tuple[str, ...]
    """What a reader must know, in sentences."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenView:
    """What is known of one token of a view. Made by `Explorer.look`."""

    position: int
    """Its place in the view."""
    lookups: tuple[Lookup, ...]
    """The N-grams that end at it."""
    neighbours: Mapping[int, Neighbours | str]
    """By order, what lies nearest to an N-gram and what it promotes, or why that is not known."""
    predictions: Mapping[str, Prediction]
    """By name, what is predicted after it, with the N-grams that end here left out one by one."""


class Explorer:
    """Answers questions about a model and its memories, or about a hash alone, for any number of visitors at once.

    Nothing that belongs to a visitor is kept here: `Edits` go in and come out, and are read through an overlay during
    one call. Calls wait for one another, because they switch memory off and on.

    Args:
        name: What the model is called.
        tokenizer: Its tokenizer; None for a hash of raw ids, which are then typed in place of a text.
        model: The model; None for a hash alone.
        spec: The hash, where there is no model.
        reference: Returns raw tokens of a text ``[num_tokens]``, some hundred thousand: its frequent N-grams are those
            that are compared, and it is what facts must leave alone. Called once, when it is first needed.
        reference_name: What that text is.
        max_tokens: Tokens of a text that are read, at most.
    """

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Any,
        model: Any = None,
        spec: HashSpec | None = None,
        reference: Callable[[], np.ndarray] | None = None,
        reference_name: str = "",
        max_tokens: int = 256,
    ) -> None:
        check_whole(at_least=2, max_tokens=max_tokens)
        if (model is None) == (spec is None):
            raise ConfigError("an explorer looks at a model or at a hash: pass one of model and spec")
        self.name, self.tokenizer, self.model = name, tokenizer, model
        self.reference_name = reference_name
        self.subjects = {} if model is None else _subjects(model, tokenizer, name)
        self._spec, self._reference = spec, reference
        self._counted: TextNgrams | None = None
        self._lock = threading.RLock()
        limits = [max_tokens, *(one.max_length for one in self.subjects.values() if one.max_length is not None)]
        if model is not None:
            positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            limits += [positions] if positions else []
        self.max_tokens = min(limits)

    @property
    def memories(self) -> tuple[str, ...]:
        """Labels of the memories that can be looked at: `OWN_MEMORY`, also for a model without any, and adapters."""
        return tuple(self.subjects) or (OWN_MEMORY,)

    def spec(self, memory: str) -> HashSpec | None:
        """Return the hash of a memory; None for a model without memory."""
        return self._spec if self.model is None else self._subject(memory).spec

    @property
    def reference(self) -> TextNgrams | None:
        """The text whose frequent N-grams are compared; None without one."""
        with self._lock:
            if self._counted is None and self._reference is not None:
                tokens = self._reference()
                self._counted = TextNgrams(tokens, max_ngrams=max(1, len(tokens)))
            return self._counted

    def spell(self, token: int) -> str:
        """Write one token."""
        return spell(self.tokenizer, [token])

    def read(self, text: str, edits: Edits = Edits()) -> View:
        """Read a text.

        Raises:
            DataError: There are no tokens.
            TokenError: Ids must be typed, because there is no tokenizer, and the text is not a list of them; or an id
                is outside the vocabulary.
            EngramError: The model cannot read it.
        """
        tokens, notes = self._tokens(text)
        spec = self.spec(edits.memory)
        addresses = None if spec is None else find_addresses(spec, tokens)
        trace: GateTrace | None = None
        changed: np.ndarray | None = None
        found: dict[str, tuple[Prediction, ...]] = {}
        if self.model is not None:
            trace, found, changed, more = self._computed(tokens, edits)
            notes += more
        return View(
            memory=edits.memory,
            tokens=tokens,
            texts=spell_each(self.tokenizer, tokens),
            addresses=addresses,
            trace=trace,
            predictions=found,
            changed=changed,
            edited=self._edited_positions(addresses, edits, len(tokens)),
            notes=tuple(notes),
        )

    def look(
        self,
        view: View,
        position: int,
        edits: Edits = Edits(),
        *,
        block: int | None = None,
    ) -> TokenView:
        """Look at one token of a view, which was read with the same edits, and at what one block reads there.

        ``block`` is counted from 0; None means the first one with memory.
        """
        if not 0 <= position < len(view.tokens):
            raise ConfigError(f"the text has tokens 0 to {len(view.tokens) - 1}, there is no token {position}")
        found = {name: every[position] for name, every in view.predictions.items()}
        if view.addresses is None:
            return TokenView(position=position, lookups=(), neighbours={}, predictions=found)
        block = view.addresses.spec.blocks[0] if block is None else block
        lookups = view.addresses.lookups(position, block, self.tokenizer, self.reference)
        neighbours: dict[int, Neighbours | str] = {}
        if self.model is not None:
            with self._edited(edits):
                subject = self._subject(edits.memory)
                orders = view.addresses.spec.orders
                for one in lookups:
                    neighbours[one.order] = self._neighbours(subject, one)
                    mask = np.zeros((len(view.tokens), len(orders)), bool)
                    mask[view.addresses.same_ngram(position, one.order), orders.index(one.order)] = True
                    with without_ngrams(subject, torch.from_numpy(mask)):
                        logits = read_logits(subject, view.tokens)[position : position + 1]
                    found[f"without the {one.order}-gram"] = predictions(logits, self.spell)[0]
        return TokenView(position=position, lookups=lookups, neighbours=neighbours, predictions=found)

    def add_fact(
        self, fact: FactEdit, edits: Edits, *, on_progress: Callable[[JointFitProgress], None] = lambda progress: None
    ) -> Edits:
        """Fit a fact beside those that a visitor has added, and return all of them. The model is left as it was.

        Raises:
            ConfigError: There is no memory to write into, its rows have no effect, the fact is there already, a wording
                is longer than what can be read, or the model's numbers after it are not finite.
        """
        target = self._target(edits.memory)
        reference = self.reference
        with self._lock, _frozen(self.model):
            self._check_wordings(fact, edits.memory)
            patch = RowPatch.fit_facts(
                target,
                self.tokenizer,
                [fact],
                JointFitOptions(),
                reference=None if reference is None else reference.tokens,
                earlier=edits.patch,
                title="explore",
                on_progress=on_progress,
            )
        return dataclasses.replace(edits, patch=patch)

    def take_back(self, prompts: Sequence[str], edits: Edits) -> Edits:
        """Take facts out again: what remains is solved anew without them.

        Raises:
            ConfigError: There is no such fact.
        """
        if edits.patch is None:
            raise ConfigError("no fact has been added that could be taken back")
        return dataclasses.replace(edits, patch=edits.patch.without(list(prompts)))

    def proof(self, edits: Edits) -> RowPatchProof | None:
        """Show on the reference text what the facts touch and what they leave alone; None without facts or text."""
        reference = self.reference
        if edits.patch is None or reference is None:
            return None
        with self._lock:
            return edits.patch.proof(self._target(edits.memory), reference.tokens, **_PROOF)

    def answers(self, edits: Edits) -> dict[str, FactAnswer]:
        """Compute, for the prompt of each fact, what is predicted after it before the facts and with all of them."""
        if edits.patch is None or edits.patch.edit is None:
            return {}
        subject, target = self._subject(edits.memory), self._target(edits.memory)
        facts = edits.patch.edit.facts
        prompts = [text_tokens(self.tokenizer, fact.prompt) for fact in facts]

        def ask() -> list[Prediction]:
            return [predictions(read_logits(subject, tokens)[-1:], self.spell)[0] for tokens in prompts]

        with self._lock:
            before = ask()
            with self._edited(edits):
                now = ask()
                # Not what the patch says of itself: facts that came or went since its fit may have changed that.
                wordings = read_wordings(self.tokenizer, [dataclasses.replace(fact, paraphrases=()) for fact in facts])
                scores = score_wordings(patchable_memory(target), wordings)
        is_there = [(score.lead > 0) != fact.forget for fact, score in zip(facts, scores, strict=True)]
        return dict(zip(edits.prompts, map(FactAnswer, before, now, is_there), strict=True))

    # Inside ---------------------------------------------------------------------------------------------------------

    def _subject(self, memory: str) -> Subject:
        if memory not in self.subjects:
            raise ConfigError(f"there is no memory called {memory!r}; there are {', '.join(self.subjects)}")
        return self.subjects[memory]

    def _check_wordings(self, fact: FactEdit, memory: str) -> None:
        """Refuse a fact with a wording that the model cannot read, or after which its numbers are not finite."""
        for text in fact.wordings:
            tokens = text_tokens(self.tokenizer, text + fact.answer)
            if len(tokens) > self.max_tokens:
                raise ConfigError(
                    f"{text[:60]!r}... has {len(tokens):,} tokens with its answer, and at most {self.max_tokens:,} can "
                    "be read; shorten it"
                )
            if not bool(read_logits(self._subject(memory), tokens).isfinite().all()):
                raise ConfigError(f"the model's numbers after {text!r:.100} are not finite, so no fact can be fitted")

    def _target(self, memory: str) -> Any:
        """What `RowPatch` writes into: a memory adapter, or the model."""
        if self.model is None:
            raise ConfigError("this is a configuration without weights, so there are no rows to write into")
        return attached_adapters(self.model).get(memory, self.model)

    def _tokens(self, text: str) -> tuple[np.ndarray, list[str]]:
        """Tokenize what can be read, and say in a sentence what is left out."""
        longest = max(_MOST_CHARACTERS, 16 * self.max_tokens)
        size, text = len(text), text[:longest]
        if self.tokenizer is None:
            try:
                ids = text.replace(",", " ").split()
                tokens = np.array([int(one) for one in ids[: -1 if size > longest else None]], np.int64)
            except (ValueError, OverflowError) as error:
                raise TokenError(
                    "this configuration came without a tokenizer: type token ids, such as 17, 4, 256"
                ) from error
        else:
            tokens = text_tokens(self.tokenizer, text)
        given = 0 if self.tokenizer is None else len(begin(beginning_tokens(self.tokenizer), []))
        if len(tokens) <= given:
            raise DataError("there is no text to read; type a few words")
        notes = []
        if size > longest:
            num_read = min(len(tokens), self.max_tokens)
            notes.append(f"The text has {size:,} characters. The page reads the first {num_read:,} tokens.")
        elif len(tokens) > self.max_tokens:
            notes.append(f"The text has {len(tokens):,} tokens. The page reads the first {self.max_tokens:,}.")
        return tokens[: self.max_tokens], notes

    @contextlib.contextmanager
    def _edited(self, edits: Edits) -> Iterator[None]:
        """Let the model read a visitor's rows inside a ``with`` block, in which nobody else asks it anything."""
        with self._lock, contextlib.ExitStack() as stack:
            if edits.patch is not None:
                tables = edits.patch.tables
                stack.enter_context(
                    patchable_memory(self._target(edits.memory)).reading(
                        {name: change.rows for name, change in tables.items()},
                        {name: change.after for name, change in tables.items()},
                    )
                )
            yield

    def _computed(
        self, tokens: np.ndarray, edits: Edits
    ) -> tuple[GateTrace | None, dict[str, tuple[Prediction, ...]], np.ndarray | None, list[str]]:
        """Run the model with its memory, without it, and, if there are edits, as it was before them."""
        subject, notes = self._subject(edits.memory), []
        trace, found, changed = None, {}, None
        with self._edited(edits):
            keepers: dict[str, Analysis] = {"gates": TraceKeeper(), "logits": LogitsKeeper()}
            result = read_text([subject], tokens, keepers, length=len(tokens), budget_bytes=1 << 62)
            logits = result["logits"]
            if isinstance(result["gates"], NotApplicable):
                notes.append(f"The model shows no gates, because {result['gates'].reason}.")
            else:
                ((trace,),) = result["gates"].values()
            found[WITH if subject.memories else "the model"] = predictions(logits, self.spell)
            if subject.memories:
                with suppressed(subject):
                    without = read_logits(subject, tokens)
                found[WITHOUT] = predictions(without, self.spell)
                changed = changes(logits, without)
        if edits.patch is not None:
            with self._lock:
                found[BEFORE_EDITS] = predictions(read_logits(subject, tokens), self.spell)
        num_bad = int((~logits.isfinite().all(-1)).sum())
        if num_bad:
            notes.append(
                f"The model's predictions are not finite after {num_bad} of {len(tokens)} tokens (NaN or infinite)."
            )
        return trace, found, changed, notes

    def _neighbours(self, subject: Subject, lookup: Lookup) -> Neighbours | str:
        """Find neighbors, or say why there are none."""
        if lookup.is_cut:
            return "The N-gram is cut at the start of the text, so it is compared with no others."
        if self.reference is None:
            return "There is no text whose N-grams could be compared."
        try:
            return nearest_ngrams(
                subject, lookup.tokens, self.reference, block=lookup.block, k=6, max_ngrams=_COMPARED_NGRAMS
            )
        except EngramError as error:
            return f"{error}."

    def _edited_positions(self, addresses: Addresses | None, edits: Edits, length: int) -> np.ndarray:
        """Find the positions that read a row of the visitor's facts."""
        edited = np.zeros(length, bool)
        if addresses is None or edits.patch is None:
            return edited
        memory = patchable_memory(self._target(edits.memory))
        for block, layer in zip(addresses.spec.blocks, addresses.spec.layers, strict=True):
            for name, change in edits.patch.tables.items():
                if layer in memory.layers_of(name):
                    edited |= np.isin(addresses.rows[block], change.rows.numpy()).any(-1)
        return edited & (addresses.visible > 0)


def _subjects(model: Any, tokenizer: Any, name: str) -> dict[str, Subject]:
    """Find the memories that can be looked at: the model's own, and the attached ones by their names."""
    attached = [label for label, adapter in attached_adapters(model).items() if adapter.enabled]
    found = {label: find_subject(model, tokenizer, name=name, adapter=label) for label in [OWN_MEMORY, *attached]}
    if attached:  # what the user named comes first
        own = found.pop(OWN_MEMORY)
        found |= {OWN_MEMORY: own} if own.memories else {}
    return found


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Let no parameter ask for gradients inside a ``with`` block: only the rows of facts learn."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
