"""What a model does without its memory: the memory's output set to zero, or its rows shuffled, layer by layer.

This is no comparison with a model that was trained without memory: the rest of the model still counts on it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.part import Entry, Part, Work
from engram_lm.analysis.protocol import PlainResult
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError
from engram_lm.evaluation.suppressing import How, memories_of, suppressed
from engram_lm.evaluation.task_scores import score_tasks
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.page.figure import Picture
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import NOTHING, count_text, number_text, signed_text
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.held_out import held_out_loss


@dataclasses.dataclass(frozen=True)
class Condition(PlainResult):
    """Which memory is suppressed, and how."""

    also = ("name",)

    blocks: tuple[int, ...] = ()
    """Blocks whose memory is suppressed, ascending, counted from 0; empty if the model is left as it is."""
    how: How | None = None
    """How it is suppressed; None if nothing is."""

    @property
    def name(self) -> str:
        """What people call it."""
        if self.how is None:
            return "memory on"
        what = "zero" if self.how == "zero" else "shuffled"
        return f"{what} in block{'s' * (len(self.blocks) > 1)} {', '.join(map(str, self.blocks))}"

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuppressionEffect(PlainResult):
    """What suppression does to the loss and to families of questions. Made by `suppression_effect`.

    Axes: C conditions, the first of which suppresses nothing; F families.
    """

    also = ("retained", "retained_error")

    conditions: tuple[Condition, ...]
    """What was suppressed, ``[C]``."""
    families: tuple[str, ...]
    """Families of questions, ``[F]``; empty if no questions were asked."""
    num_items: np.ndarray
    """Questions of each family, int64 ``[F]``."""
    exact_match: np.ndarray
    """Share of answers that greedy decoding gives, float64 ``[C, F]``."""
    accuracy: np.ndarray
    """Share of right choices, float64 ``[C, F]``; NaN for a family without choices."""
    chance: np.ndarray
    """Share of right choices if one guesses, float64 ``[F]``; NaN without choices."""
    answer_loss: np.ndarray
    """Nats per token of the right answers, float64 ``[C, F]``."""
    loss: np.ndarray
    """Nats per token of the text, float64 ``[C]``; NaN if there was no text."""

    @property
    def retained(self) -> np.ndarray:
        """`exact_match` relative to the one with memory, float64 ``[C, F]``; NaN if that is 0."""
        full = self.exact_match[:1]
        return np.divide(self.exact_match, full, out=np.full_like(self.exact_match, np.nan), where=full > 0)

    @property
    def retained_error(self) -> np.ndarray:
        """Standard error of `retained`, from the binomial errors of both shares, float64 ``[C, F]``.

        Both shares come from the same questions, so the true error is smaller.
        """
        share, count = self.exact_match, np.maximum(self.num_items, 1)
        variance = share * (1 - share) / count
        full, retained = share[:1], self.retained
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(variance + retained**2 * variance[:1]) / full
        error[0] = 0.0
        error[np.isnan(retained)] = np.nan
        return error


def conditions(subject: Any, how: Sequence[How] = ("zero", "shuffle")) -> tuple[Condition, ...]:
    """List what can be suppressed: nothing; then, in each way, all memory, and that of each block by itself."""
    blocks = tuple(memories_of(subject))
    parts = [blocks, *((block,) for block in blocks if len(blocks) > 1)]
    return (Condition(), *(Condition(part, way) for way in how for part in parts))


def suppression_effect(
    model: Any,
    tokenizer: Any,
    *,
    items: Sequence[TaskItem] = (),
    tokens: np.ndarray | None = None,
    chosen: Sequence[Condition] | None = None,
    length: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[Condition], None] = lambda condition: None,
) -> SuppressionEffect:
    """Measure what a model loses with its memory suppressed.

    Every condition runs over the questions and the text by itself, because a suppressed model computes other things
    than the whole model from the first suppressed block on.

    Args:
        model: As for `suppressed`, but the model or the `Subject`, not an adapter.
        tokenizer: Its tokenizer.
        items: Questions, as from `read_tasks`.
        tokens: Packed tokens of a text, integers ``[num_tokens]``, for the loss.
        chosen: What to suppress; None means `conditions`. ``Condition()`` is put first unless it is there.
        length: Tokens of the text that are seen at once.
        batch_size: Sequences that are computed at once.
        seed: Decides which rows ``"shuffle"`` reads.
        on_progress: Called with each condition when it is done.

    Raises:
        MismatchError: There is no memory.
        ConfigError: Neither questions nor a text were given, or a condition is impossible.
        DataError: A question or the text cannot be used.

    Example:
        >>> effect = suppression_effect(model, tokenizer, items=read_tasks("facts.jsonl"))  # doctest: +SKIP
        >>> dict(zip(effect.families, effect.retained[1]))  # doctest: +SKIP
    """
    if not len(items) and tokens is None:
        raise ConfigError("suppression is measured on questions (items), on a text (tokens) or on both; give one")
    asked = tuple(chosen) if chosen is not None else conditions(model)
    if not asked or asked[0] != Condition():
        asked = (Condition(), *asked)
    inner = model.model if isinstance(model, Subject) else model
    families = tuple(dict.fromkeys(item.family for item in items))
    values = {name: np.full((len(asked), len(families)), np.nan) for name in ("exact_match", "accuracy", "answer_loss")}
    loss, chance = np.full(len(asked), np.nan), np.full(len(families), np.nan)
    counts = np.zeros(len(families), np.int64)
    for row, condition in enumerate(asked):
        with contextlib.ExitStack() as stack:
            if condition.how is not None:
                stack.enter_context(suppressed(model, condition.blocks, condition.how, seed=seed))
            if families:
                scores = score_tasks(inner, tokenizer, items, batch_size=batch_size)
                for column, family in enumerate(map(scores.__getitem__, families)):
                    for measure, array in values.items():
                        array[row, column] = getattr(family, measure)  # None becomes NaN
                    chance[column], counts[column] = family.chance, family.num_items
            if tokens is not None:
                loss[row] = held_out_loss(
                    inner, tokens, length=length, batch_size=batch_size, beginning=beginning_tokens(tokenizer)
                ).loss
        on_progress(condition)
    return SuppressionEffect(conditions=asked, families=families, num_items=counts, chance=chance, loss=loss, **values)


class SuppressionPart(Part):
    """What is lost without the memory."""

    title = "suppression"

    def conclude(self, work: Work, found: Mapping[str, Any]) -> Iterator[Entry]:
        """Suppress the memory of each model that has one."""
        for subject in work.subjects:
            entry: Entry = {"models": [subject.name]}
            if not subject.memories:
                yield {**entry, "not_applicable": "it has no memory"}
            elif len(work.tokens) < 2:
                yield {**entry, "not_applicable": "a loss needs a text of at least two tokens"}
            else:
                chosen, most = conditions(subject), work.options.suppression_tokens
                work.on_stage(f"suppressing the memory of {subject.name}", len(chosen))
                effect = suppression_effect(
                    subject,
                    subject.tokenizer,
                    items=work.options.items,
                    tokens=work.tokens[: most + 1],
                    chosen=chosen,
                    length=work.length,
                    batch_size=work.options.batch_size,
                    on_progress=lambda condition: work.on_progress(1),
                )
                yield {**entry, "result": {**effect.to_dict(), "num_tokens": min(len(work.tokens) - 1, most)}}

    def by_model(self, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the effect on each model with memory, by name."""
        entries = result["parts"].get(self.name) or ()
        return {entry["models"][0]: entry["result"] for entry in entries if "result" in entry}

    def headline(self, result: Mapping[str, Any]) -> str | None:
        """Say how the loss changes without the memory, which is what the memory is worth to the model."""
        for model, effect in self.by_model(result).items():
            full, zero = effect["loss"][:2]
            if full is not None and zero is not None:
                verb = "rises" if zero > full else "falls"
                return f"Without its memory the loss of {model} {verb} from {full:.3f} to {zero:.3f} nats per token"
        return None

    def warnings(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Say for which models there is no loss."""
        for model, effect in self.by_model(result).items():
            if effect["loss"][0] is None:
                yield f"suppression of {model}: the loss is NaN or infinite"

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return what each way of suppressing adds to the loss."""
        for model, effect in self.by_model(result).items():
            for name, added in _added(effect):
                yield f"{model}, {name}: loss {signed_text(added)}"

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw what each way of suppressing adds to the loss, as bars."""
        effects = self.by_model(result)
        if not effects:
            return None
        num_bars = sum(len(effect["conditions"]) - 1 for effect in effects.values())
        return self.drawn(7.2, 1.0 + 0.36 * num_bars, lambda figure: _draw(figure.subplots(), effects))

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return bars of the loss that each way of suppressing adds, and a table of the questions."""
        effects = self.by_model(result)
        if not effects:
            return ""
        body = [
            "<p>The memory’s output is set to zero, or each row is replaced by another one of the same head, while the "
            "rest of the model stays as it is. This is no comparison with a model that was trained without memory: the "
            "rest of the model still counts on it.</p>"
        ]
        for name, effect in effects.items():
            heading = f"<h3>{escape(name)}</h3>" if len(effects) > 1 else ""
            body.append(heading + _bars(effect) + _questions(effect))
        return section("suppression", "Without the memory", "\n".join(body))


def _added(effect: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What each condition adds to the loss, where both losses are known."""
    full = effect["loss"][0]
    return [
        (condition["name"], loss - full)
        for condition, loss in zip(effect["conditions"][1:], effect["loss"][1:], strict=True)
        if loss is not None and full is not None
    ]


def _draw(axes: Any, effects: Mapping[str, Mapping[str, Any]]) -> None:
    bars = [
        (f"{model}: {name}" if len(effects) > 1 else name, added)
        for model, effect in effects.items()
        for name, added in _added(effect)
    ]
    axes.barh(range(len(bars)), [added for _, added in bars], color="C0")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("nats per token added to the loss")


def _bars(effect: Mapping[str, Any]) -> str:
    added = _added(effect)
    most = max((value for _, value in added), default=0.0)
    if most <= 0:
        return ""
    bars = "".join(
        f'<dt>{escape(name)}</dt><dd class="track" style="--w: {100 * max(value, 0) / most:.1f}%"></dd>'
        f"<dd>{signed_text(value)}</dd>"
        for name, value in added
    )
    return (
        f'<dl class="bars">{bars}</dl><p class="note">Nats per token added to the loss of {effect["loss"][0]:.3f}, '
        f"over {count_text(effect.get('num_tokens'))} tokens.</p>"
    )


def _questions(effect: Mapping[str, Any]) -> str:
    families = effect["families"]
    if not families:
        return ""
    columns = ["Memory", "Loss"]
    for family, number in zip(families, effect["num_items"], strict=True):
        columns += [f"{family}: right of {number:,}", f"{family}: retained"]
    rows = []
    for condition, loss, exact, retained in zip(
        effect["conditions"], effect["loss"], effect["exact_match"], effect["retained"], strict=True
    ):
        shares = [share for pair in zip(exact, retained, strict=True) for share in pair]
        rows.append([condition["name"], number_text(loss, 3), *map(_percent, shares)])
    return table(columns, rows, label="Questions answered with the memory suppressed, a wide table")


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"
