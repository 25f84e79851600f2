"""The change of the memory vector that makes a frozen model give a fact's answer, whatever the wording.

A fact has one change, a *shift* (δ in the paper), of the rows that all of its expressions read. It is optimized through
the model, which sees it as the rows will have it: multiplied by the share that the closed form will leave of it,
wherever a text reads one of the fact's rows, through gate and convolution. Facts are fitted side by side, and each
stops when all of its wordings have the answer.
"""

# Dimension key: F facts, B texts, L tokens, H heads of one block, K heads of all blocks, E row width, R rows of a fact.

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engram_lm.adapt.edits.expressions import Wording
from engram_lm.adapt.edits.scoring import AnswerBatch, answer_logits, lead_and_loss
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.adapt.patchable import PatchableMemory
from engram_lm.errors import ConfigError
from engram_lm.tables import Table

_STEPS_BETWEEN_ALL = 3
"""Steps from one that computes all texts to the next; between them only those without their answer are computed."""
_RIDGE = 0.01
"""How weakly a direction may pass the value projection, as a share of the mean power, before it is left alone."""


Bases = dict[tuple[int, tuple[bool, ...]], Tensor]
"""Coordinates by block and the heads that are used."""


@dataclasses.dataclass(frozen=True, eq=False)
class FactRows:
    """Rows of one fact in one block, ascending, int64 ``[R]``, and the share of its shift that each gets, ``[R]``."""

    rows: Tensor
    shares: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    """How shifts are fitted; the fields are those of `JointFitOptions`."""

    max_steps: int
    learning_rate: float
    margin: float
    decay: float


def fit_shifts(
    memory: PatchableMemory,
    wordings: Sequence[Sequence[Wording]],
    rows: Sequence[Mapping[int, FactRows]],
    start: Tensor,
    forget: Sequence[bool],
    options: ShiftOptions,
    *,
    known: Bases,
    on_step: Callable[[int, int, float], None] = lambda step, num_open, loss: None,
) -> Tensor:
    """Fit the shifts of some facts side by side.

    Args:
        memory: The memory, whose rows already hold what was solved for, with the shifts ``start``.
        wordings: The texts of each fact.
        rows: For each fact, its rows and shares by block.
        start: The shifts that the rows hold now, float32 ``[F, K, E]``.
        forget: For each fact, whether its answer should be pushed back and not brought forward.
        options: Steps, step size, when to stop.
        known: Coordinates that were found for earlier groups; those of this group are added.
        on_step: Called with the step, from 0, the number of facts that are not there yet, and the mean loss.

    Returns:
        The new shifts ``[F, K, E]``: for each fact those with the highest lead that were seen.

    Raises:
        ConfigError: The loss is not finite, or rows have no effect.
    """
    each = memory.spec.num_heads_total
    basis = _bases(memory, rows, wordings[0][0], known)
    generator = torch.Generator().manual_seed(0)
    # Not zero: with occupancy a row of zeros is no row, and has no gradient.
    leaf = (1e-3 * torch.randn(start.flatten(1).shape, generator=generator)).requires_grad_()
    best, best_lead = start.clone(), torch.full((len(wordings),), -math.inf)
    optimizer = torch.optim.Adam([leaf], lr=options.learning_rate, betas=(0.9, 0.95))
    is_open = torch.ones(len(wordings), dtype=torch.bool)
    sign = torch.where(torch.tensor(list(forget)), -1.0, 1.0)
    # Which texts of a fact have not got the answer by the margin, when they were last computed.
    lags = [torch.ones(len(texts), dtype=torch.bool) for texts in wordings]
    with torch.inference_mode(False), torch.enable_grad(), evaluating(memory.model):
        for step in range(options.max_steps + 1):
            every = step % _STEPS_BETWEEN_ALL == 0 or step == options.max_steps
            facts = is_open.nonzero().flatten().tolist()
            whole = torch.tensor([every or not bool(lag.any()) for lag in lags])
            chosen = [
                (fact, place) for fact in facts for place in range(len(lags[fact])) if whole[fact] or lags[fact][place]
            ]
            owner = torch.tensor([fact for fact, _ in chosen])
            batch = AnswerBatch.of([wordings[fact][place] for fact, place in chosen])
            added = torch.einsum("fj,fij->fi", leaf, basis).view_as(start)
            with _shifted(memory, [rows[fact] for fact, _ in chosen], added, owner, each):
                lead, log_probability, loss = lead_and_loss(answer_logits(memory, batch), batch)
            lead = lead.detach().cpu()
            # Forgetting looks at the first token: once it is not chosen, the rest is never asked.
            first = batch.counted.int().argmax(-1, keepdim=True)
            turned = torch.where(sign[owner] > 0, lead.amin(-1), -lead.gather(-1, first).squeeze(-1))
            for (fact, place), value in zip(chosen, turned.tolist(), strict=True):
                lags[fact][place] = value < options.margin
            worst = torch.full((len(wordings),), math.inf).scatter_reduce_(0, owner, turned, "amin")
            better = is_open & whole & (worst > best_lead)
            best = torch.where(better[:, None, None], start + added.detach(), best)
            best_lead = torch.where(better, worst, best_lead)
            is_open &= ~(whole & (worst >= options.margin))
            began = log_probability.gather(-1, first.to(log_probability.device)).squeeze(-1)
            against = -torch.log1p(-began.exp().clamp(max=1 - 1e-6))
            losses = torch.where(sign[owner].to(loss.device) > 0, loss, against)
            per_fact = losses.new_zeros(len(wordings)).index_add_(0, owner.to(losses.device), losses)
            per_fact = per_fact / torch.bincount(owner, minlength=len(wordings)).clamp(min=1).to(losses.device)
            total = per_fact.sum()
            mean = float(total.detach()) / max(1, len(facts))
            on_step(step, int(is_open.sum()), mean)
            if not math.isfinite(mean):
                raise ConfigError(f"the loss is {mean} at step {step}; choose a smaller learning_rate")
            if not bool(is_open.any()) or step == options.max_steps:
                break
            (gradient,) = torch.autograd.grad(total, [leaf])
            if step == 0 and not bool(gradient.any()):
                raise ConfigError(
                    "the rows of these facts have no effect on their answers (the gradient is 0); train the memory "
                    "first, or give it value projections that are not zero"
                )
            optimizer.zero_grad()
            leaf.grad = gradient + options.decay * leaf.detach()
            optimizer.step()
    return best


@torch.no_grad()
def _bases(memory: PatchableMemory, rows: Sequence[Mapping[int, FactRows]], wording: Wording, known: Bases) -> Tensor:
    """Choose coordinates for the shift of each fact in which the model feels all directions alike, ``[F, K*E, K*E]``.

    A trained value projection passes some directions hundreds of times better than others, and an optimizer in the
    numbers of the rows would go nowhere else. In these coordinates every direction that the projection of the fact's
    heads passes at all changes hidden states alike: 1 by as much as they are large.
    """
    found = []
    sizes: dict[int, float] = {}
    for fact in rows:
        blocks = []
        for block, layer in memory.layers.items():
            each, width = memory.spec.num_heads_total, layer.config.head_dim
            offsets = torch.tensor(memory.spec.offsets(memory.spec.layers[memory.spec.blocks.index(block)]))
            heads = torch.zeros(each, dtype=torch.bool)
            heads[torch.searchsorted(offsets, fact[block].rows, right=True) - 1] = True
            key = block, tuple(heads.tolist())
            if key not in known:
                sizes = sizes or _hidden_sizes(memory, wording)
                hidden_size = layer.config.hidden_size
                value = layer.key_value.weight[-hidden_size:].detach().cpu().double()
                value = value * heads.repeat_interleave(width)
                powers, directions = torch.linalg.eigh(value.T @ value)
                mean = powers.sum() / max(1, int(heads.sum()) * width)
                # Directions that hardly pass are left as they are: they would need enormous rows.
                gains = torch.where(powers > 0, (powers.clamp(min=0) + _RIDGE * mean).rsqrt(), 0)
                size = sizes[block] * (hidden_size / max(1, int(heads.sum()) * width)) ** 0.5
                basis = directions * gains * size * heads.repeat_interleave(width)[:, None]
                known[key] = basis.nan_to_num(0, 0, 0).float()
            blocks.append(known[key])
        found.append(torch.block_diag(*blocks))
    return torch.stack(found)


def _hidden_sizes(memory: PatchableMemory, wording: Wording) -> dict[int, float]:
    """Measure the root mean square of the hidden states that each layer is given."""
    found: dict[int, float] = {}
    hooks = []
    for block, layer in memory.layers.items():

        def look(module: object, args: tuple[Tensor, ...], block: int = block) -> None:
            # The first position is left out: models put very large numbers there.
            found[block] = float(args[0][:, 1:].float().square().mean().sqrt())

        hooks.append(layer.register_forward_pre_hook(look))
    try:
        with evaluating(memory.model):
            memory.logits(wording.tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def _shifted(
    memory: PatchableMemory, rows: Sequence[Mapping[int, FactRows]], shift: Tensor, owner: Tensor, each: int
) -> Iterator[None]:
    """Let the layers read the rows of each text's fact with its shift added, inside a ``with`` block."""
    before = {block: layer.table for block, layer in memory.layers.items()}
    own = shift[owner]
    try:
        for place, (block, layer) in enumerate(memory.layers.items()):
            table = before[block]
            assert table is not None
            heads = own[:, place * each : (place + 1) * each]
            layer.table = _ShiftedTable(table, [fact[block] for fact in rows], heads)
        yield
    finally:
        for block, layer in memory.layers.items():
            layer.table = before[block]


class _ShiftedTable(Table):
    """A table that adds, in each text of a batch, a share of the text's own shift to some rows."""

    def __init__(self, table: Table, rows: Sequence[FactRows], shift: Tensor) -> None:
        """Take the rows of each of B texts, and their shifts ``[B, H, E]``."""
        self.table, self.shift = table, shift
        self.num_rows, self.width = table.num_rows, table.width
        most = max(len(one.rows) for one in rows)
        # Filled up with a number that no row has, at the end, where it keeps the order.
        self.rows = torch.full((len(rows), most), torch.iinfo(torch.int64).max)
        self.shares = torch.zeros(len(rows), most)
        for place, one in enumerate(rows):
            self.rows[place, : len(one.rows)] = one.rows
            self.shares[place, : len(one.rows)] = one.shares

    @property
    def dtype(self) -> torch.dtype:
        """See `Table.dtype`."""
        return self.table.dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Read rows ``[B, L, H]`` of a batch of texts, with gradients of the shifts. See `Table.gather`."""
        with torch.no_grad():
            found = self.table.gather(rows)
        numbers = rows.cpu().flatten(1)
        place = torch.searchsorted(self.rows, numbers).clamp(max=self.rows.shape[1] - 1)
        share = torch.where(self.rows.gather(1, place) == numbers, self.shares.gather(1, place), 0).view(rows.shape)
        added = share.unsqueeze(-1) * self.shift.unsqueeze(1)
        result = found + added.to(found)
        return result if out is None else out.copy_(result)
