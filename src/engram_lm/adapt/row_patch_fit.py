"""Fitting a fact: a few gradient steps on the rows that its N-grams address, and on nothing else."""

# Dimension key: L length, N rows, E row width, V vocabulary, T target tokens.

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.adapt.patchable import PatchableMemory
from engram_lm.adapt.row_change import Fact, RowChange, bits
from engram_lm.errors import ConfigError, check_whole
from engram_lm.hashing.collisions import row_collisions
from engram_lm.model.table_place import table_name
from engram_lm.tokenizing import text_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How rows are fitted to facts.

    Raises:
        ConfigError: A value is impossible.
    """

    positions: Literal["target", "all"] = "target"
    """The positions whose rows may change: those that a target token is predicted from (the prompt's last token to the
    target's second-last), or ``"all"``, the whole prompt too."""
    orders: tuple[int, ...] | None = None
    """Orders of the N-grams at those positions; None is the highest alone, whose N-grams are the rarest elsewhere."""
    max_collisions: int | None = None
    """Rows that more than this many other N-grams of the reference text read are left alone; None changes any row."""
    max_steps: int = 200
    """The most gradient steps (Adam) to take, from 1."""
    learning_rate: float = 0.1
    """Step size, from 0, as a multiple of the root mean square of the rows before."""
    margin: float = 1.0
    """Stop once every target token is ahead of the likeliest other token by this much, from 0, in nats."""

    def __post_init__(self) -> None:
        if self.positions not in ("target", "all"):
            raise ConfigError(f"positions is 'target' or 'all', got {self.positions!r}")
        if self.orders is not None and (not isinstance(self.orders, tuple) or not self.orders):
            raise ConfigError(f"orders is a tuple such as (3,), or None for the highest, got {self.orders!r}")
        check_whole(max_steps=self.max_steps)
        if self.max_collisions is not None:
            check_whole(at_least=0, max_collisions=self.max_collisions)
        for name in ("learning_rate", "margin"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is a number from 0, got {value!r}")


class _Score(NamedTuple):
    """How well a model continues a prompt with the target."""

    loss: float
    """Mean loss of the target's tokens, in nats."""
    lead: float
    """How far the least certain target token is ahead of the likeliest other one, in nats; negative if it is behind."""


def read_facts(tokenizer: Any, facts: Sequence[tuple[str, str]]) -> list[Fact]:
    """Turn facts, pairs (prompt, target) of texts, into tokens."""
    found = []
    for pair in facts:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ConfigError(f"a fact is a pair (prompt, target) of texts, got {pair!r:.100}")
        prompt, target = pair
        before, whole = (tuple(text_tokens(tokenizer, text).tolist()) for text in (prompt, prompt + target))
        # A tokenizer may join the end of the prompt with the target, but generation starts from the prompt alone.
        fits = whole[: len(before)] == before
        after = whole[len(before) :] if fits else tuple(tokenizer(target, add_special_tokens=False)["input_ids"])
        if not before or not after:
            raise ConfigError(f"a fact needs a prompt and a target of at least one token each, got {pair!r:.100}")
        found.append(Fact(prompt=prompt, target=target, prompt_tokens=before, target_tokens=after))
    if not found:
        raise ConfigError("there are no facts to fit; pass at least one pair (prompt, target)")
    return found


def reference_tokens(reference: Any, tokenizer: Any) -> np.ndarray:
    """Return a reference, a text or raw tokens, as raw tokens, int64 ``[num_tokens]``."""
    if isinstance(reference, str):
        if tokenizer is None:
            raise ConfigError("the reference is a text; pass tokenizer= beside it, or its tokens")
        reference = text_tokens(tokenizer, reference)
    tokens = np.asarray(reference)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ConfigError(f"a reference is a text or raw tokens [num_tokens], got {tokens.dtype} {list(tokens.shape)}")
    return tokens.astype(np.int64)


def addressed_rows(
    memory: PatchableMemory, facts: Sequence[Fact], options: FitOptions, reference: np.ndarray | None = None
) -> dict[str, Tensor]:
    """Find the rows that a fit may change: table to row numbers, different and ascending, int64 ``[N]``."""
    spec = memory.spec
    orders = spec.orders[-1:] if options.orders is None else options.orders
    if not set(orders) <= set(spec.orders):
        raise ConfigError(f"orders {orders} are asked for, the hash has {spec.orders}")
    if (options.max_collisions is None) != (reference is None):
        raise ConfigError("max_collisions and reference belong together: pass both, or neither")
    columns = [column for column in range(spec.num_heads_total) if spec.orders[column // spec.num_heads] in orders]
    found: dict[str, list[np.ndarray]] = {}
    for fact in facts:
        tokens = np.array([fact.tokens])
        codes = spec.encode(tokens)
        chosen = codes[0] >= 0
        chosen[: 0 if options.positions == "all" else len(fact.prompt_tokens) - 1] = False
        chosen[-1] = False  # nothing is predicted from the target's last token
        rows = spec.rows_for_layers(codes)
        for block, layer in zip(spec.blocks, spec.layers, strict=True):
            found.setdefault(table_name(spec, block), []).append(rows[layer][0][chosen][:, columns].reshape(-1))
    distinct = {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}
    num_addressed = sum(map(len, distinct.values()))
    if reference is not None:
        assert options.max_collisions is not None
        for name, rows_N in distinct.items():
            besides = [fact.tokens for fact in facts]
            layers = memory.layers_of(name)
            counts = [row_collisions(spec, layer, reference, rows_N, besides=besides).num_ngrams for layer in layers]
            distinct[name] = rows_N[np.sum(counts, axis=0) <= options.max_collisions]
    if not any(map(len, distinct.values())):
        raise ConfigError(
            f"no row is left to fit: the facts address {num_addressed} rows, all of them read by more than "
            f"{options.max_collisions} other N-grams of the reference; raise max_collisions"
            if num_addressed
            else "the facts address no row: all their positions are dead tokens of the hash's segments"
        )
    return {name: torch.from_numpy(rows) for name, rows in distinct.items() if len(rows)}


def score_fact(logits: Tensor, fact: Fact) -> tuple[Tensor, _Score]:
    """Compare the logits ``[L, V]`` of a fact's tokens with its target: the loss with its gradient, and the score."""
    start = len(fact.prompt_tokens) - 1
    target = torch.tensor(fact.target_tokens, device=logits.device)[:, None]
    chances_TV = logits[start : start + len(target)].float().log_softmax(-1)
    own = chances_TV.gather(-1, target)
    others = chances_TV.detach().scatter(-1, target, -math.inf).amax(-1, keepdim=True)
    loss = -own.mean()
    return loss, _Score(float(loss.detach()), float((own.detach() - others).min()))


def fit_rows(
    memory: PatchableMemory,
    facts: Sequence[Fact],
    rows: Mapping[str, Tensor],
    options: FitOptions,
    on_step: Callable[[int, float], None],
) -> tuple[dict[str, RowChange], tuple[Fact, ...]]:
    """Find new numbers for rows, so that the facts' targets become the most likely continuations.

    The model is left as it was, with its weights, gradients, ``requires_grad`` and training mode. Nothing is random.
    Returns the rows whose bits changed, by table, and the facts with their losses. If ``margin`` was not reached, these
    are the rows with which the least certain target token did best.
    """
    _check_projections(memory)
    # The caller may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(memory.model):
        before = {name: memory.read(name, numbers) for name, numbers in rows.items()}
        begin = {name: memory.beginning(name, numbers) for name, numbers in rows.items()}
        leaves = {
            name: values.to(memory.device_of(name), torch.promote_types(values.dtype, torch.float32))
            .clone()
            .requires_grad_()
            for name, values in begin.items()
        }
        optimizer = torch.optim.Adam(
            [
                {"params": [leaf], "lr": options.learning_rate * max(float(leaf.detach().square().mean().sqrt()), 1e-6)}
                for leaf in leaves.values()
            ]
        )
        first: list[_Score] = []
        best: tuple[float, list[_Score], dict[str, Tensor]] | None = None
        for step in range(options.max_steps + 1):
            scores, gradients = _evaluate(memory, facts, rows, leaves)
            loss = sum(score.loss for score in scores) / len(scores)
            on_step(step, loss)
            if not math.isfinite(loss):
                raise ConfigError(f"the loss is {loss} at step {step}; choose a smaller learning_rate")
            first = first or scores
            lead = min(score.lead for score in scores)
            done = lead >= options.margin
            if best is None or lead > best[0]:
                best = lead, scores, {name: leaf.detach().clone() for name, leaf in leaves.items()}
            if done or step == options.max_steps:
                break
            if not any(bool(gradient.any()) for gradient in gradients):
                raise ConfigError(
                    "the rows that the facts address have no effect on them (their gradient is 0); train the memory "
                    'first, or choose more rows with orders=... and positions="all"'
                )
            for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
    assert best is not None
    changes = {}
    for name, numbers in rows.items():
        after = best[2][name].cpu().to(before[name].dtype)
        changed = (bits(after) != bits(begin[name])).any(-1)
        if bool(changed.any()):
            changes[name] = RowChange(numbers[changed], before[name][changed], after[changed])
    if not changes:
        raise ConfigError(
            f"the facts hold already: every target token leads by {options.margin} nats or more, or no step improves "
            "the least certain one; there is nothing to patch"
        )
    fitted = zip(facts, first, best[1], strict=True)
    return changes, tuple(
        dataclasses.replace(fact, loss_before=begin.loss, loss_after=end.loss, is_greedy=end.lead > 0)
        for fact, begin, end in fitted
    )


def _evaluate(
    memory: PatchableMemory, facts: Sequence[Fact], rows: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> tuple[list[_Score], list[Tensor]]:
    """Score each fact by itself, which needs no padding, and add up the gradients of the leaves."""
    scores, total = [], [torch.zeros_like(leaf) for leaf in leaves.values()]
    with memory.reading(rows, leaves):
        for fact in facts:
            loss, score = score_fact(memory.logits(fact.tokens), fact)
            scores.append(score)
            # Only the gradients of these tensors: backward() would leave gradients all over the model.
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            total = [sum_ if one is None else sum_ + one for sum_, one in zip(total, found, strict=True)]
    return scores, total


@torch.no_grad()
def _check_projections(memory: PatchableMemory) -> None:
    """Refuse a memory that adds nothing yet, whatever its rows are."""
    for layer in memory.layers.values():
        weight = layer.key_value.weight
        if weight.is_meta or bool(weight[-layer.config.hidden_size :].any()):
            return
    raise ConfigError(
        "the value projections of this memory are still zero, as attach() leaves them, so no row has any effect; train "
        "the memory (its projections) before rows are fitted to facts"
    )
