"""Gates over a long text, averaged: by block and stream, by order, by how frequent the N-gram is, by kind of token."""

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from engram_lm.analysis.gates.trace import NgramGate
from engram_lm.analysis.protocol import ModelAnalysis, ModelFindings, PlainResult, Reading
from engram_lm.analysis.subject import Subject
from engram_lm.errors import check_whole
from engram_lm.evaluation.token_text import REPLACEMENT, spelled, text_places
from engram_lm.hashing.counting import NgramCounter, NgramEntries, ngram_keys, ngrams_of

# Dimension key: G blocks with memory, S streams, O orders, F classes of frequency, K classes of tokens, V vocabulary.

FREQUENCY_CLASSES = ("1", "2-9", "10-99", "100-999", "1,000-9,999", "10,000 and more")
"""How often an N-gram occurs in the text that was read."""
TOKEN_CLASSES = ("letters", "digits", "punctuation", "space", "other")
"""``other`` are tokens that mix the classes, special tokens, and pieces of a character."""

_OF_CATEGORY = {"L": 0, "M": 0, "N": 1, "P": 2, "S": 2, "Z": 3}
_OTHER = 4
_CLASS_BEGINS = (2, 10, 100, 1_000, 10_000)
_NUM_BINS = 20
_NUM_TENTHS = 10


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GateAverages(PlainResult):
    """Gates of one model over a text. A mean over no positions is NaN (None in `to_dict`).

    The N-gram of a position is the one whose order adds most to the gate's score, summed over streams; see
    `engram_lm.analysis.gates.trace.GateTrace.fired`.
    """

    also = ("frequency_classes", "token_classes")
    frequency_classes: ClassVar[tuple[str, ...]] = FREQUENCY_CLASSES
    """Labels of axis F."""
    token_classes: ClassVar[tuple[str, ...]] = TOKEN_CLASSES
    """Labels of axis K."""

    blocks: tuple[int, ...]
    """Blocks that read memory, counted from 0: axis G."""
    orders: tuple[int, ...]
    """N-gram orders: axis O."""
    num_positions: int
    """Positions that count: those that are alive and where everything is finite."""
    num_dead: int
    """Positions left out because no N-gram ends there."""
    num_not_finite: int
    """Positions left out because a gate or score is NaN or infinite."""
    mean: np.ndarray
    """Mean gate, float64 ``[G, S]``."""
    std: np.ndarray
    """Standard deviation of the gate, float64 ``[G, S]``."""
    bin_edges: np.ndarray
    """Edges of the histogram's bins, from 0 to 1, float64 ``[bins + 1]``."""
    histogram: np.ndarray
    """Number of positions in each bin, int64 ``[G, S, bins]``."""
    by_order: np.ndarray
    """Mean gate by the order of the position's N-gram, float64 ``[G, O, S]``."""
    order_positions: np.ndarray
    """Number of positions behind each mean of `by_order`, int64 ``[G, O]``."""
    by_frequency: np.ndarray
    """Mean gate by how often the position's N-gram occurs in the text (`FREQUENCY_CLASSES`), float64 ``[G, F, S]``."""
    frequency_positions: np.ndarray
    """Number of positions behind each mean of `by_frequency`, int64 ``[G, F]``."""
    by_token_class: np.ndarray
    """Mean gate by what the token at the position is made of (`TOKEN_CLASSES`), float64 ``[G, K, S]``."""
    token_class_positions: np.ndarray
    """Number of positions behind each mean of `by_token_class`, int64 ``[K]``."""
    by_token_frequency: np.ndarray
    """Mean gate by tenths of the distinct tokens that occur, the most frequent tenth first, float64 ``[G, 10, S]``."""
    token_frequency_positions: np.ndarray
    """Number of positions behind each mean of `by_token_frequency`, int64 ``[10]``."""
    ngrams: tuple[tuple[NgramGate, ...], ...]
    """For each block the N-grams with the highest mean gate over positions and streams."""
    min_count: int
    """The least number of positions at which an N-gram of `ngrams` fired."""
    ngram_share: float
    """Share of the distinct N-grams that `by_frequency` and `ngrams` know. It is 1 unless the text has more distinct
    N-grams than could be held; they are then a random sample, and the numbers of each one are still exact."""


class GateStatistics(ModelAnalysis):
    """Averages the gates of all models that have gates. Feed it with `engram_lm.analysis.read_text`.

    Args:
        num_ngrams: N-grams to list for each block.
        min_count: List only N-grams that fired at this many positions or more; None means 1 to 5, depending on the
            length of the text.
        max_ngrams: Distinct N-grams of all orders that are held, at most; each takes 64 bytes, and 8 for each gate and
            block.

    Raises:
        ConfigError: A number is impossible.

    Source: paper, section 6.5 (gates that fire where an N-gram completes); the averages are ours.
    """

    wants = frozenset({"gates", "order_scores"})

    def __init__(self, *, num_ngrams: int = 50, min_count: int | None = None, max_ngrams: int = 1 << 20) -> None:
        check_whole(at_least=0, num_ngrams=num_ngrams)
        check_whole(min_count=min_count, max_ngrams=max_ngrams)
        self.num_ngrams, self.min_count, self.max_ngrams = num_ngrams, min_count, max_ngrams

    def why_not(self, subject: Subject) -> str | None:
        """Apply to the models with gated memory."""
        return subject.ungated

    def sums_for(self, subject: Subject, applied: Sequence[Subject]) -> "_Sums":
        """Return empty sums."""
        return _Sums(subject, self.max_ngrams)

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """Return what adding up one position takes."""
        needed = [0]
        for subject in subjects:
            if subject.spec is not None and subject.ungated is None:
                gates = len(subject.memories) * _num_streams(subject)
                needed.append(len(subject.spec.orders) * (64 + 12 * subject.spec.orders[-1] + 24 * gates))
        return max(needed)

    def result(self) -> ModelFindings[GateAverages]:
        """Return the averages of what was read, and the N-grams of each model, a `NgramEntries`.

        Their ``first`` holds ``orders`` (int64 ``[N]``) and ``tokens`` (raw tokens, oldest first, -1 where nothing was
        visible, int32 ``[N, highest order]``); ``sums`` holds ``counts`` (positions at which each was looked up),
        ``fired`` (positions at which it added most to the gate's score, int64 ``[N, G]``) and ``gate_sums`` (the gates
        at those, float64 ``[N, G, S]``).
        """
        ngrams = {name: sums.ngrams.entries() for name, sums in self.sums.items()}
        models = {name: sums.averages(self.num_ngrams, self.min_count) for name, sums in self.sums.items()}
        return ModelFindings(models, self.left_out, ngrams)


def _num_streams(subject: Subject) -> int:
    return next(iter(subject.memories.values())).config.num_streams


class _Sums:
    """What is added up for one model."""

    def __init__(self, subject: Subject, max_ngrams: int) -> None:
        assert subject.spec is not None
        self.subject, self.spec, self.blocks = subject, subject.spec, tuple(subject.memories)
        self.orders = self.spec.orders
        num_streams = _num_streams(subject)
        gates = (len(self.blocks), num_streams)
        self.num_dead = self.num_not_finite = self.num_positions = 0
        self.total, self.squares = np.zeros(gates), np.zeros(gates)
        self.histogram = np.zeros((*gates, _NUM_BINS), np.int64)
        self.order_total = np.zeros((len(self.blocks), len(self.orders), num_streams))
        self.order_positions = np.zeros(self.order_total.shape[:2], np.int64)
        self.token_total = np.zeros((*gates, subject.vocab_size))
        self.token_counts = np.zeros(subject.vocab_size, np.int64)
        self.ngrams = NgramCounter(max_ngrams)

    def add(self, reading: Reading) -> None:
        alive = reading.visible.cpu().numpy() > 0
        good = alive & reading.finite.cpu().numpy()
        self.num_dead += int((~alive).sum())
        self.num_not_finite += int((alive & ~good).sum())
        self.num_positions += int(good.sum())
        gates = np.stack([reading.gates[block].cpu().numpy() for block in self.blocks], axis=2)  # [B, L, G, S]
        scores = np.stack([reading.order_scores[block].sum(-1).cpu().numpy() for block in self.blocks], axis=2)
        tokens = reading.tokens.cpu().numpy()
        found, strongest = gates[good].astype(np.float64), scores.argmax(-1)  # [n, G, S], [B, L, G]
        self.total += found.sum(0)
        self.squares += np.square(found).sum(0)
        bins = np.minimum((found * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
        for index, orders in enumerate(strongest[good].T):
            np.add.at(self.order_total[index], orders, found[:, index])
            np.add.at(self.order_positions[index], orders, 1)
            for stream in range(found.shape[2]):
                np.add.at(self.histogram[index, stream], bins[:, index, stream], 1)
                np.add.at(self.token_total[index, stream], tokens[good], found[:, index, stream])
        np.add.at(self.token_counts, tokens[good], 1)
        assert reading.codes is not None
        visible, highest = reading.visible.cpu().numpy(), self.orders[-1]
        seen = np.full((*tokens.shape, highest), -1, np.int32)
        for distance in range(min(highest, tokens.shape[1])):
            shown = visible[:, distance:] > distance
            seen[:, distance:, highest - 1 - distance] = np.where(shown, tokens[:, : tokens.shape[1] - distance], -1)
        ngrams = ngrams_of(self.spec, reading.codes.cpu().numpy())[alive]
        for place, order in enumerate(self.orders):
            # Columns that an order lacks are -1, which tells the orders apart.
            raw, canonical = seen[alive].copy(), ngrams.copy()
            raw[:, : highest - order], canonical[:, : highest - order] = -1, -1
            # An N-gram is counted wherever it is looked up, but only finite gates are added up.
            fired = (strongest == place)[alive] & good[alive][:, None]
            self.ngrams.add(
                ngram_keys(canonical, self.spec.num_canonical),
                first={"orders": np.full(len(raw), order), "tokens": raw},
                sums={
                    "fired": fired.astype(np.int64),
                    "gate_sums": np.where(fired[..., None], gates[alive], 0).astype(np.float64),
                },
            )

    def averages(self, num_ngrams: int, min_count: int | None) -> GateAverages:
        mean, entries = _mean(self.total, self.num_positions), self.ngrams.entries()
        frequency_total = np.zeros((len(FREQUENCY_CLASSES), *self.total.shape))
        frequency_positions = np.zeros((len(FREQUENCY_CLASSES), len(self.blocks)), np.int64)
        if len(entries):
            classes = np.searchsorted(_CLASS_BEGINS, entries.counts, side="right")
            np.add.at(frequency_total, classes, entries.sums["gate_sums"])
            np.add.at(frequency_positions, classes, entries.sums["fired"])
        occurring = np.flatnonzero(self.token_counts)
        by_class, class_positions = self._by_group(
            occurring, token_classes(self.subject.tokenizer, occurring), len(TOKEN_CLASSES)
        )
        # Among equally frequent tokens the lower id comes first.
        ranked = occurring[np.argsort(-self.token_counts[occurring], kind="stable")]
        tenths = np.arange(len(ranked)) * _NUM_TENTHS // max(len(ranked), 1)
        by_tenth, tenth_positions = self._by_group(ranked, tenths, _NUM_TENTHS)
        if min_count is None:
            min_count = min(max(1, self.num_positions // 2000), 5)
        return GateAverages(
            blocks=self.blocks,
            orders=self.orders,
            num_positions=self.num_positions,
            num_dead=self.num_dead,
            num_not_finite=self.num_not_finite,
            mean=mean,
            std=np.sqrt(np.maximum(_mean(self.squares, self.num_positions) - np.square(mean), 0)),
            bin_edges=np.linspace(0, 1, _NUM_BINS + 1),
            histogram=self.histogram.copy(),
            by_order=_mean(self.order_total, self.order_positions[..., None]),
            order_positions=self.order_positions.copy(),
            by_frequency=_mean(frequency_total, frequency_positions[..., None]).swapaxes(0, 1),
            frequency_positions=frequency_positions.T,
            by_token_class=by_class,
            token_class_positions=class_positions,
            by_token_frequency=by_tenth,
            token_frequency_positions=tenth_positions,
            ngrams=tuple(self._strongest(entries, index, num_ngrams, min_count) for index in range(len(self.blocks))),
            min_count=min_count,
            ngram_share=self.ngrams.share,
        )

    def _by_group(self, tokens: np.ndarray, groups: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Average over groups of tokens: means [G, groups, S] and positions [groups]."""
        total, positions = np.zeros((num_groups, *self.total.shape)), np.zeros(num_groups, np.int64)
        np.add.at(total, groups, self.token_total[..., tokens].transpose(2, 0, 1))
        np.add.at(positions, groups, self.token_counts[tokens])
        return _mean(total, positions[:, None, None]).swapaxes(0, 1), positions

    def _strongest(self, entries: NgramEntries, index: int, number: int, min_count: int) -> tuple[NgramGate, ...]:
        chosen = entries.chosen(entries.sums["fired"][:, index] >= min_count)
        fired = chosen.sums["fired"][:, index]
        means = chosen.sums["gate_sums"][:, index].mean(-1) / np.maximum(fired, 1)
        best = np.lexsort([chosen.keys, -fired, -means])[:number]
        return tuple(
            NgramGate(
                text=spelled(self.subject.tokenizer, chosen.first["tokens"][place]),
                order=int(chosen.first["orders"][place]),
                mean_gate=float(means[place]),
                num_positions=int(fired[place]),
            )
            for place in best.tolist()
        )


def _mean(total: np.ndarray, count: Any) -> np.ndarray:
    count = np.asarray(count, np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=np.broadcast_to(count > 0, total.shape))


def token_classes(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Find the class of each raw token: indices into `TOKEN_CLASSES`, int64 ``[n]``.

    Space around a token does not count, unless there is nothing else. Ids that no tokenizer produces are ``other``.
    """
    ids = np.asarray(tokens, np.int64).tolist()
    known = [ids[place] for place in text_places(tokenizer, ids)]
    # A tokenizer makes a batch of one out of no tokens.
    texts = known and tokenizer.batch_decode(
        [[token] for token in known], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    classes = {token: _class_of(text) for token, text in zip(known, texts, strict=True)}
    return np.array([classes.get(token, _OTHER) for token in ids], np.int64)


def _class_of(text: str) -> int:
    inside = text.strip()
    if not inside:
        return _OF_CATEGORY["Z"]  # a token that is a space alone may be decoded to nothing
    if REPLACEMENT in inside:
        return _OTHER
    found = {_OF_CATEGORY.get(unicodedata.category(character)[0], _OTHER) for character in inside}
    return found.pop() if len(found) == 1 else _OTHER
