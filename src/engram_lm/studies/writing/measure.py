"""Read streams with one trained model in every way that is compared, and measure what that is worth."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engram_lm.studies.writing.count_cache import CacheReading, CountCache, fit_shares, follow, mix
from engram_lm.studies.writing.reader import UPDATES, Reader, Update, best_rate, read_stream, tune, updates_of
from engram_lm.studies.writing.streams import Domain, Fact, Question, ask, invent_facts, tell
from engram_lm.training.loss import token_losses

# Dimension key: N predicted tokens.

PLAIN, CACHE, QUICK_CACHE = "none", "cache", "quick_cache"
"""Names of three ways to read: nothing is learned, a cache counts each chunk once it is read, and a cache counts each
token once it is read."""
_STRETCHES = 16
"""Points of a curve over a stream."""


def ways(updates: Sequence[Update]) -> dict[str, tuple[Update, str | None]]:
    """All ways to read by name: an update of the model, and the cache beside it, if any."""
    plain = updates[0]
    found: dict[str, tuple[Update, str | None]] = {update.name: (update, None) for update in updates}
    found |= {CACHE: (plain, CACHE), QUICK_CACHE: (plain, QUICK_CACHE)}
    return found | {f"{update.name}_and_cache": (update, CACHE) for update in updates[1:]}


def title_of(way: str) -> str:
    """What a reader sees."""
    titles = {update.name: update.title for update in UPDATES}
    titles |= {f"{update.name}_and_cache": f"{update.title}, and count cache" for update in UPDATES}
    return (titles | {CACHE: "count cache", QUICK_CACHE: "count cache, token by token"})[way]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """What all models of a study read."""

    domains: Mapping[str, Domain]
    """Text of other kinds, by name."""
    old: np.ndarray
    """Held-out text of the old kind, on which forgetting is measured; int32 ``[N + 1]``."""
    back: np.ndarray
    """Other held-out text of the old kind, which is read after each stream; int32 ``[N + 1]``."""
    around: np.ndarray
    """Held-out text of the old kind, in which facts are told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How streams are read."""

    chunk: int
    """Tokens that a model reads before it learns from them."""
    order: int
    """Tokens of the cache's N-grams at most."""
    facts: int
    """Facts that are told."""


def tuned(model: Any, texts: Texts, setting: Setting, on_chunk: Callable[[], None]) -> dict[str, Any]:
    """Choose the rate of each update, and the cache's shares beside each, on the validation streams together.

    Returns:
        ``rates``: for each update the ``rate`` and what was ``tried``, as pairs of rate and mean loss. ``shares``: for
        each way with a cache, the shares of `mix`.
    """
    streams = [domain.validation for domain in texts.domains.values()]
    caches = {
        kind: _joined([follow(_cache(model, setting), stream, chunk=chunk) for stream in streams])
        for kind, chunk in ((CACHE, setting.chunk), (QUICK_CACHE, 1))
    }
    updates, nats, rates = updates_of(model), dict[str, np.ndarray](), dict[str, Any]()
    for update in updates:
        found: dict[float, np.ndarray] = {}

        def loss_at(rate: float, update: Update = update, found: dict[float, np.ndarray] = found) -> float:
            parts = [
                read_stream({"": Reader(model, update, rate)}, stream, chunk=setting.chunk, on_chunk=on_chunk)[""]
                for stream in streams
            ]
            found[rate] = np.concatenate(parts)
            return float(found[rate].mean())

        tried = tune(loss_at, update.first_rate) if update.what != "nothing" else {0.0: loss_at(0.0)}
        rate = best_rate(tried)
        nats[update.name] = found[rate]
        rates[update.name] = {"rate": rate, "tried": [[key, loss] for key, loss in sorted(tried.items())]}
    shares = {
        way: fit_shares(nats[update.name], caches[kind], setting.order).tolist()
        for way, (update, kind) in ways(updates).items()
        if kind is not None
    }
    return {"rates": rates, "shares": shares}


def measured(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    setting: Setting,
    choices: Mapping[str, Any],
    *,
    seed: int,
    on_chunk: Callable[[], None],
) -> dict[str, Any]:
    """Let a model read its seed's stream of every domain, and facts, in every way.

    Returns:
        ``domains``: by name and way the ``loss`` on the stream, its ``curve`` in equal stretches, the loss on
        ``old_before`` and ``old_after`` it, the loss on the way ``back`` (which the model still learns from),
        ``seconds`` per token and the numbers ``kept``, changed weights or counts. ``facts``: by way the share that is
        ``known_before`` and ``known`` after they were told, and the nats of an ``answer_before`` and after, ``answer``.
    """
    read = _Read(model, setting, choices, on_chunk)
    domains = {name: read.domain(domain.streams[seed], texts) for name, domain in texts.domains.items()}
    facts = invent_facts(setting.facts, seed)
    told = tell(facts, texts.around, tokenizer, chunk=setting.chunk)
    return {"domains": domains, "facts": read.facts(facts, told, tokenizer)}


class _Read:
    """One model, its choices and what is read with them."""

    def __init__(self, model: Any, setting: Setting, choices: Mapping[str, Any], on_chunk: Callable[[], None]) -> None:
        self.model, self.setting, self.on_chunk = model, setting, on_chunk
        self.updates = updates_of(model)
        self.rates = {name: found["rate"] for name, found in choices["rates"].items()}
        self.shares = {way: np.array(shares) for way, shares in choices["shares"].items()}

    def domain(self, stream: np.ndarray, texts: Texts) -> dict[str, Any]:
        """What each way comes to on a stream, and afterwards."""
        chunk = self.setting.chunk
        readers, caches = self._readers(), {kind: _cache(self.model, self.setting) for kind in (CACHE, QUICK_CACHE)}
        before = readers[PLAIN].losses(texts.old, chunk=chunk)
        nats = read_stream(readers, stream, chunk=chunk, on_chunk=self.on_chunk)
        counted, cache_seconds = self._follow(caches, stream)
        after = {name: reader.losses(texts.old, chunk=chunk) for name, reader in readers.items()}
        kept = {name: self._changed(reader) for name, reader in readers.items()} | {
            kind: cache.num_counts for kind, cache in caches.items()
        }
        old = {kind: cache.read(texts.old) for kind, cache in caches.items()}
        seconds = {name: reader.seconds / (len(stream) - 1) for name, reader in readers.items()}
        back = read_stream(readers, texts.back, chunk=chunk, on_chunk=self.on_chunk)
        counted_back, _ = self._follow(caches, texts.back)
        found = {}
        for way, (update, kind) in ways(self.updates).items():
            name = update.name
            each = self._mixed(way, nats[name], counted)
            found[way] = {
                "loss": float(each.mean()),
                "curve": [float(part.mean()) for part in np.array_split(each, _STRETCHES)],
                "old_before": float(before.mean()),
                "old_after": float(self._mixed(way, after[name], old).mean()),
                "back": float(self._mixed(way, back[name], counted_back).mean()),
                "seconds": seconds[name] + (0.0 if kind is None else cache_seconds[kind] / (len(stream) - 1)),
                "kept": kept[name] * (name != PLAIN) + (0 if kind is None else kept[kind]),
            }
        return found

    def facts(self, facts: Sequence[Fact], told: np.ndarray, tokenizer: Any) -> dict[str, Any]:
        """How many facts each way knows, before and after they are told."""
        readers, caches = self._readers(), {kind: _cache(self.model, self.setting) for kind in (CACHE, QUICK_CACHE)}
        questions = ask(facts, tokenizer)
        before = self._answers(readers, caches, questions)
        read_stream(readers, told, chunk=self.setting.chunk, on_chunk=self.on_chunk)
        self._follow(caches, told)
        after = self._answers(readers, caches, questions)
        return {
            way: {
                "known_before": before[way][0],
                "known": after[way][0],
                "answer_before": before[way][1],
                "answer": after[way][1],
            }
            for way in after
        }

    def _readers(self) -> dict[str, Reader]:
        return {update.name: Reader(self.model, update, self.rates[update.name]) for update in self.updates}

    def _follow(
        self, caches: Mapping[str, CountCache], stream: np.ndarray
    ) -> tuple[dict[str, CacheReading], dict[str, float]]:
        """Let the caches read a stream; what they say of it, and how long it took."""
        found, seconds = {}, {}
        for kind, cache in caches.items():
            started = time.perf_counter()
            found[kind] = follow(cache, stream, chunk=self.setting.chunk if kind == CACHE else 1)
            seconds[kind] = time.perf_counter() - started
        return found, seconds

    def _mixed(self, way: str, nats: np.ndarray, counted: Mapping[str, CacheReading]) -> np.ndarray:
        """The nats of a way to read, of those of its model and of what its cache says."""
        kind = ways(self.updates)[way][1]
        return nats if kind is None else mix(nats, counted[kind], self.shares[way])

    def _changed(self, reader: Reader) -> int:
        """Count the weights that differ from those of the trained model."""
        pairs = zip(reader.model.parameters(), self.model.parameters(), strict=True)
        return sum(int((ours != theirs).sum()) for ours, theirs in pairs)

    def _answers(
        self, readers: Mapping[str, Reader], caches: Mapping[str, CountCache], questions: Sequence[Sequence[Question]]
    ) -> dict[str, tuple[float, float]]:
        """By way, the share of facts whose true answer is the likeliest, and the mean nats of a true answer."""
        every = [question for choices in questions for question in choices]
        nats = {name: _question_nats(reader.model, every) for name, reader in readers.items()}
        counted = [{kind: cache.read(one.tokens, one.first) for kind, cache in caches.items()} for one in every]
        found = {}
        for way, (update, _) in ways(self.updates).items():
            each = [
                float(self._mixed(way, one, of_caches).sum())
                for one, of_caches in zip(nats[update.name], counted, strict=True)
            ]
            by_fact = np.array(each).reshape(len(questions), -1)
            found[way] = (float((by_fact.argmin(1) == 0).mean()), float(by_fact[:, 0].mean()))
        return found


def _question_nats(model: Any, questions: Sequence[Question]) -> list[np.ndarray]:
    """The nats of the tokens of each answer; shorter questions are filled up behind, where nothing is read."""
    longest = max(len(one.tokens) for one in questions)
    ids = torch.from_numpy(np.stack([np.pad(one.tokens, (0, longest - len(one.tokens))) for one in questions]))
    found = token_losses(model, ids[:, :-1], ids[:, 1:]).double().numpy()
    return [row[one.first - 1 : len(one.tokens) - 1] for row, one in zip(found, questions, strict=True)]


def _cache(model: Any, setting: Setting) -> CountCache:
    return CountCache(model.get_input_embeddings().num_embeddings, setting.order)


def _joined(readings: Sequence[CacheReading]) -> CacheReading:
    return CacheReading(*(np.concatenate(column) for column in zip(*readings, strict=True)))
