"""The gates' part of an analysis: passages colored by gate, typed text, N-grams to sort, and averages."""

import importlib.resources
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from engram_lm.analysis.gates.averages import GateStatistics
from engram_lm.analysis.gates.trace import GateTrace, TraceKeeper
from engram_lm.analysis.part import Part, Work
from engram_lm.analysis.protocol import Analysis, ModelFindings
from engram_lm.analysis.subject import Subject
from engram_lm.evaluation.token_text import REPLACEMENT, spelled, visible_text
from engram_lm.hashing.counting import NgramEntries
from engram_lm.page.figure import DASHES, Picture
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import count_text, number_text

_MOST_NGRAMS = 1 << 20
_NUM_PASSAGES = 6
_NUM_FREQUENT, _NUM_OPEN = 1000, 500
"""N-grams that the page holds for a model: those that fired most often, and those that opened the gates widest."""
_MOST_VALUES = 300_000
"""Gates and scores of passages that the page holds for a model; with more blocks or streams it has fewer passages."""


class Phrase(NamedTuple):
    """An N-gram of a text and how far it opened the gates."""

    text: str
    """What it spells where it first occurs."""
    last: str
    """What its last token spells; the gate belongs to that token."""
    order: int
    """Tokens in it."""
    num_positions: int
    """Positions of the text at which it was looked up."""
    fired: np.ndarray
    """For each block the positions at which it added most to the gate's score, int64 ``[G]``."""
    gates: np.ndarray
    """Mean gate over those positions, NaN if there are none, float64 ``[G, S]``."""


class GateView(NamedTuple):
    """What the page shows of the gates of one model."""

    traces: tuple[GateTrace, ...]
    """Passages of the text."""
    phrases: tuple[Phrase, ...]
    """N-grams of the text."""


class GatesPart(Part):
    """When the gates open."""

    title = "gates"

    def analyses(self, work: Work) -> dict[str, Analysis]:
        """Average the gates, and keep those of a few passages."""
        fitting = max(1, work.options.count_bytes // max(map(_ngram_bytes, work.subjects)))
        return {
            self.name: GateStatistics(max_ngrams=min(fitting, _MOST_NGRAMS)),
            "passages": TraceKeeper(len(work.tokens), num_passages=_NUM_PASSAGES),
        }

    def page_only(self, work: Work, found: Mapping[str, Any]) -> dict[str, GateView]:
        """Return passages and frequent N-grams of each model with gates."""
        findings = found[self.name]
        if not isinstance(findings, ModelFindings):
            return {}
        return {
            subject.name: GateView(
                found["passages"][subject.name], frequent_phrases(findings.ngrams[subject.name], subject.tokenizer)
            )
            for subject in work.subjects
            if subject.name in findings.models
        }

    def details(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Say what the mean gates are."""
        for model, found in self.by_model(result).items():
            values = [value for block in found["mean"] for value in block if value is not None]
            if values:
                spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
                yield f"Mean gates of {model}: {spread}."

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return the mean gates of each block, and the N-grams that open them widest."""
        for model, found in self.by_model(result).items():
            for index, block in enumerate(found["blocks"]):
                mean = " ".join(number_text(value, 3) for value in found["mean"][index])
                top = ", ".join(f"{item['text']!r} {item['mean_gate']:.2f}" for item in found["ngrams"][index][:4])
                yield f"{model}, block {block}: mean {mean}; widest at {top or 'no N-gram'}"

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw a histogram for each block."""
        models = self.by_model(result)
        return self.drawn(6.4, 3.6, lambda figure: _draw_histograms(figure.subplots(), models)) if models else None

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, GateView]) -> str:
        """Return the passages, the N-grams and the averages."""
        passages = ngrams = averages = ""
        if page_only:
            passages = section(
                "gates", "Where the memory fires", _html("passages", model=_model_choice(list(page_only)))
            )
        if any(view.phrases for view in page_only.values()):
            ngrams = section("ngrams", "N-grams", _html("ngrams"))
        models = self.by_model(result)
        several = len(models) > 1 or len(result["parts"].get(self.name) or ()) > 1
        parts = [(f"<h3>{escape(name)}</h3>" if several else "") + _averages(found) for name, found in models.items()]
        if parts:
            averages = section("averages", "Gates on average", "\n".join(parts))
        return "\n".join(filter(None, (passages, ngrams, averages)))

    def script_data(self, result: Mapping[str, Any], page_only: Mapping[str, GateView]) -> Iterable[dict[str, Any]]:
        """Return passages and N-grams of each model: gates in thousandths, None where a value is not finite."""
        folds = {model["name"]: bool(model["compressed_tokens"]) for model in result["models"]}
        return [
            {
                "name": _shown(name),
                "folds": folds.get(name, False),
                "blocks": list(view.traces[0].blocks),
                "orders": list(view.traces[0].orders),
                "streams": view.traces[0].num_streams,
                "passages": [_passage(trace) for trace in _some(view.traces)],
                "phrases": [_phrase(phrase) for phrase in view.phrases],
            }
            for name, view in page_only.items()
            if view.traces
        ]


def _ngram_bytes(subject: Subject) -> int:
    """Bytes of an N-gram in `GateStatistics` while it merges."""
    num_gates = sum(memory.config.num_streams for memory in subject.memories.values())
    return 2 * (64 + 8 * (num_gates + len(subject.memories)))


def frequent_phrases(entries: NgramEntries, tokenizer: Any) -> tuple[Phrase, ...]:
    """Choose the N-grams of a text that fired most often, and those that opened the gates widest.

    N-grams that spell nothing by themselves (only space, or pieces of a character) are left out. Those that opened the
    gates widest have fired at two positions or more. The one that fired most often comes first.
    """
    if not len(entries):
        return ()
    gate_sums, fired = entries.sums["gate_sums"], entries.sums["fired"].sum(1)
    means = gate_sums.sum((1, 2)) / np.maximum(fired * gate_sums.shape[2], 1)
    frequent = np.lexsort([entries.keys, -fired])[:_NUM_FREQUENT]
    candidates = np.flatnonzero(fired >= 2)
    wide = candidates[np.lexsort([entries.keys[candidates], -means[candidates]])][:_NUM_OPEN]
    chosen = np.union1d(frequent, wide)
    chosen = chosen[fired[chosen] > 0]
    chosen = chosen[np.lexsort([entries.keys[chosen], -fired[chosen]])]
    return tuple(filter(None, (_phrase_of(entries, place, tokenizer) for place in chosen.tolist())))


def _phrase_of(entries: NgramEntries, place: int, tokenizer: Any) -> Phrase | None:
    tokens = [token for token in entries.first["tokens"][place].tolist() if token >= 0]
    text = spelled(tokenizer, tokens)
    last = text[len(spelled(tokenizer, tokens[:-1])) :] if len(tokens) > 1 else text
    if REPLACEMENT in text or not last.strip():
        return None
    fired, sums = entries.sums["fired"][place], entries.sums["gate_sums"][place]
    gates = np.divide(sums, fired[:, None], out=np.full(sums.shape, np.nan), where=fired[:, None] > 0)
    return Phrase(text, last, int(entries.first["orders"][place]), int(entries.counts[place]), fired, gates)


def _draw_histograms(axes: Any, models: Mapping[str, Mapping[str, Any]]) -> None:
    index = 0
    for name, found in models.items():
        for place, block in enumerate(found["blocks"]):
            counts = [sum(values) for values in zip(*found["histogram"][place], strict=True)]
            total = sum(counts) or 1
            label = f"{name}, block {block}" if len(models) > 1 else f"block {block}"
            style = {"color": f"C{index % 10}", "linestyle": DASHES[index % len(DASHES)]}
            axes.stairs([count / total for count in counts], found["bin_edges"], label=label, linewidth=1.6, **style)
            index += 1
    axes.set_xlim(0, 1)
    axes.set_xlabel("gate")
    axes.set_ylabel("share of positions and streams")
    axes.legend(frameon=False, fontsize=8)


def _model_choice(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    models = "".join(f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(names))
    return f'<label class="choice">Model <select id="model">{models}</select></label>'


def _html(name: str, **values: str) -> str:
    """Read a section that stands beside this file; the script fills it."""
    text = importlib.resources.files(__package__).joinpath(f"{name}.html").read_text(encoding="utf-8")
    return string.Template(text).substitute(values)


def _averages(found: Mapping[str, Any]) -> str:
    blocks = [f"Block {block}" for block in found["blocks"]]
    streams = np.array(found["mean"], dtype=float)
    rows = [
        [name, *(number_text(value, 3) for value in values)]
        for name, values in zip(blocks, streams.tolist(), strict=True)
    ]
    groups = (
        ("By order of the N-gram", [f"{order}-gram" for order in found["orders"]], "order"),
        ("By how often the N-gram occurs", found["frequency_classes"], "frequency"),
        ("By what the token is made of", found["token_classes"], "token_class"),
    )
    tables = [_titled("By block and stream", ["", *(f"Stream {index}" for index in range(streams.shape[1]))], rows)]
    tables += [_by_class(title, classes, blocks, found, key) for title, classes, key in groups]
    note = f"Means over {count_text(found['num_positions'])} positions"
    if found["num_dead"]:
        note += f"; {count_text(found['num_dead'])} more are left out because no N-gram ends there"
    if found["num_not_finite"]:
        note += f"; {count_text(found['num_not_finite'])} more are left out because a value is not finite"
    if found["ngram_share"] < 1:
        note += f"; frequencies are those of a random {100 * found['ngram_share']:.3g} % of the N-grams"
    note += ". All tables but the first one average over the streams."
    return f'<div class="columns averages">{"".join(tables)}</div><p class="note">{note}</p>'


def _by_class(title: str, classes: Sequence[str], blocks: Sequence[str], found: Mapping[str, Any], key: str) -> str:
    means = np.array(found[f"by_{key}"], dtype=float)  # [G, classes, S]
    known = np.isfinite(means)
    sums, counts = np.where(known, means, 0).sum(-1), known.sum(-1)
    values = np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)
    numbers = np.array(found[f"{key}_positions"])
    per_class = numbers.sum(0) if numbers.ndim > 1 else numbers
    share = 1 / len(blocks) if numbers.ndim > 1 else 1
    rows = [
        [name, *(number_text(value, 3) for value in values[:, index].tolist()), count_text(per_class[index] * share)]
        for index, name in enumerate(classes)
        if per_class[index]
    ]
    return _titled(title, ["", *blocks, "Positions"], rows)


def _titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div><h3>{title}</h3>{table(columns, rows, label=title)}</div>"


def _some(traces: Sequence[GateTrace]) -> Sequence[GateTrace]:
    held = np.cumsum([trace.gates.size + trace.order_scores.size for trace in traces])
    return traces[: max(1, int((held <= _MOST_VALUES).sum()))]


def _passage(trace: GateTrace) -> dict[str, Any]:
    """``gates[block][stream][token]`` and ``scores[block][stream][order][token]`` (hundredths)."""
    return {
        "tokens": [_shown(text) for text in trace.texts],
        "visible": trace.visible.tolist(),
        "gates": _scaled(trace.gates.transpose(0, 2, 1), 1000),
        "scores": _scaled(trace.order_scores.transpose(0, 3, 2, 1), 100),
    }


def _phrase(phrase: Phrase) -> list[Any]:
    numbers = (phrase.order, phrase.num_positions, phrase.fired.tolist(), _scaled(phrase.gates, 1000))
    return [_shown(phrase.text), _shown(phrase.last), *numbers]


def _shown(text: str) -> str:
    return visible_text(text.encode("utf-8", "replace").decode())


def _scaled(values: np.ndarray, factor: int) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return round(value * factor) if math.isfinite(value) else None

    return plain(np.asarray(values, float).tolist())
