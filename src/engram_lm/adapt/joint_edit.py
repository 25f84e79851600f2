"""The rows that give many facts their changes at once, in closed form.

Every head of every block has a segment of the memory vector to itself. For the segment of one head let A[p, j] be 1 if
expression p reads row j there, and let B hold, for each expression, the change that its fact wants. The change U of the
rows is the minimum of ‖A U − B‖² + Σ_j Λ_j ‖U_j‖², which is U = (AᵀA + Λ)⁻¹ AᵀB. An expression reads one row with one
head, so AᵀA is diagonal: it counts the expressions that read a row. A row gets the sum of the changes that are wanted
of it, divided by their number plus Λ, and an edit of thousands of facts is solved in milliseconds.

Λ_j = λ + λ_reuse · w(order, count): rows of short N-grams, and rows that a reference text reads often, change less, and
the others, whose changes are fitted knowing that, take over.

Later facts respect earlier ones because all of them stay in the sums: nothing is stored but the changes that facts want
and the rows that they use, so a fact is taken out by solving again without it.

Source: EngramEdit (closed form, reuse penalty). There rows of all heads are added up, so that AᵀA couples them; here
they lie side by side, and what couples them is the fit of the changes (``shifts.py``).
"""

# Dimension key: F facts, P expressions, K heads of all orders and all blocks, E row width, N rows.

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engram_lm.adapt.fact_edit import FactEdit, check_distinct
from engram_lm.adapt.row_change import RowChange
from engram_lm.errors import ConfigError, MismatchError


@dataclasses.dataclass(frozen=True, eq=False)
class JointEdit:
    """What facts want of the rows that they use. All tensors are on the host.

    Raises:
        ConfigError: Shapes or types that do not fit each other, or numbers that are not finite.
    """

    facts: tuple[FactEdit, ...]
    """The facts, in the order in which they came."""
    tables: tuple[str, ...]
    """The table of each block's heads: a block number for each block, or ``shared`` as often."""
    fact: Tensor
    """Number of the fact of each expression, int64 ``[P]``."""
    rows: Tensor
    """Rows that each expression uses, int64 ``[P, K]``; -1 where it leaves a head alone."""
    penalty: Tensor
    """Λ of each of these rows, float32 ``[P, K]``, from 0."""
    shifts: Tensor
    """The change that each fact wants, float32 ``[F, K, E]``."""

    def __post_init__(self) -> None:
        shape = tuple(self.rows.shape)
        good = (
            len(shape) == 2
            and len(self.facts) > 0
            and self.rows.numel() > 0
            and self.fact.shape == shape[:1]
            and self.penalty.shape == shape
            and self.shifts.dim() == 3
            and self.shifts.shape[:2] == (len(self.facts), shape[1])
            and self.tables
            and shape[1] % len(self.tables) == 0
            and (self.fact.dtype, self.rows.dtype) == (torch.int64, torch.int64)
            and (self.penalty.dtype, self.shifts.dtype) == (torch.float32, torch.float32)
        )
        if not good:
            raise ConfigError(
                f"{len(self.facts)} facts, {list(self.fact.shape)} expressions, rows {list(shape)} of "
                f"{self.rows.dtype}, penalties {list(self.penalty.shape)} and shifts {list(self.shifts.shape)} do not "
                "belong together"
            )
        check_distinct(self.facts)
        if not (bool(self.penalty.isfinite().all()) and bool((self.penalty >= 0).all())):
            raise ConfigError("the penalties of rows are finite numbers from 0")
        if not bool(self.shifts.isfinite().all()):
            raise ConfigError("the changes that facts want are not finite")
        if sorted(set(self.fact.tolist())) != list(range(len(self.facts))) or int(self.rows.min()) < -1:
            raise ConfigError("every fact has at least one expression, of rows from 0")

    def heads_of(self, table: str) -> Tensor:
        """Tell which heads read a table, bool ``[K]``."""
        each = self.rows.shape[1] // len(self.tables)
        return torch.tensor([name == table for name in self.tables]).repeat_interleave(each)

    def uses(self, table: str) -> tuple[Tensor, Tensor, Tensor]:
        """List each use of a row of a table: the expression ``[n]``, the head ``[n]``, the row ``[n]``, all int64."""
        used = (self.rows >= 0) & self.heads_of(table)
        expression, head = used.nonzero(as_tuple=True)
        return expression, head, self.rows[expression, head]

    def solve(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Solve for the changes of all rows: table to rows, ascending, int64 ``[N]``, and changes ``[N, E]``, float64.

        Cost: proportional to the uses of rows.
        """
        solved = {}
        for table in dict.fromkeys(self.tables):
            expression, head, used = self.uses(table)
            if not len(used):
                continue
            rows, place = used.unique(return_inverse=True)
            wanted = self.shifts[self.fact[expression], head].double()
            total = wanted.new_zeros(len(rows), wanted.shape[1]).index_add_(0, place, wanted)
            solved[table] = rows, total / self._weights(expression, head, place, len(rows)).unsqueeze(1)
        return solved

    def shares(self) -> Tensor:
        """Say how much of what a fact wants of a row it gets, if nobody else wants anything: float32 ``[P, K]``.

        It is the number of the fact's expressions that read the row over the number of all plus Λ; 0 where no row is
        used.
        """
        result = torch.zeros(self.rows.shape)
        for table in dict.fromkeys(self.tables):
            expression, head, used = self.uses(table)
            rows, place = used.unique(return_inverse=True)
            own = place * len(self.facts) + self.fact[expression]
            _, which, count = own.unique(return_inverse=True, return_counts=True)
            weight = self._weights(expression, head, place, len(rows))[place]
            result[expression, head] = (count[which] / weight).float()
        return result

    def without(self, prompts: Sequence[str]) -> "JointEdit | None":
        """Leave out the facts of these prompts; None if nothing is left.

        Raises:
            ConfigError: There is no such fact.
        """
        known = [fact.prompt for fact in self.facts]
        if missing := [prompt for prompt in prompts if prompt not in known]:
            raise ConfigError(f"the patch has no fact with the prompt {missing[0]!r:.200}")
        stays = torch.tensor([prompt not in prompts for prompt in known])
        if not bool(stays.any()):
            return None
        kept = stays[self.fact]
        return dataclasses.replace(
            self,
            facts=tuple(fact for fact, keep in zip(self.facts, stays.tolist(), strict=True) if keep),
            fact=(stays.cumsum(0) - 1)[self.fact[kept]],
            rows=self.rows[kept],
            penalty=self.penalty[kept],
            shifts=self.shifts[stays],
        )

    def joined(self, later: "JointEdit") -> "JointEdit":
        """Put the facts of a later edit of the same memory behind these.

        Raises:
            ConfigError: Both have a fact of one prompt.
            MismatchError: They belong to memories of different blocks, heads or widths.
        """
        ours, theirs = (self.tables, self.shifts.shape[1:]), (later.tables, later.shifts.shape[1:])
        if ours != theirs:
            raise MismatchError(f"edits of tables, heads and widths {ours} and {theirs} cannot be joined")
        return JointEdit(
            facts=self.facts + later.facts,
            tables=self.tables,
            fact=torch.cat([self.fact, later.fact + len(self.facts)]),
            rows=torch.cat([self.rows, later.rows]),
            penalty=torch.cat([self.penalty, later.penalty]),
            shifts=torch.cat([self.shifts, later.shifts]),
        )

    def _weights(self, expression: Tensor, head: Tensor, place: Tensor, num_rows: int) -> Tensor:
        """AᵀA + Λ: the uses of each row, plus its penalty; float64 ``[N]``."""
        count = torch.bincount(place, minlength=num_rows).double()
        # Edits that were fitted with different reference texts may disagree; the largest penalty is taken.
        penalty = count.new_zeros(num_rows)
        return count + penalty.scatter_reduce_(0, place, self.penalty[expression, head].double(), "amax")


def row_penalties(
    orders: Tensor, counts: Tensor, *, penalty: float, reuse_penalty: float, highest_order: int
) -> Tensor:
    """Λ of rows: ``penalty + reuse_penalty · w``, where w grows with how often other text reads a row.

    Args:
        orders: Order of the N-grams that read each row, any shape.
        counts: Positions of a reference text that read it, of that shape; 0 where there is no reference.
        penalty: λ, what every row costs.
        reuse_penalty: λ_reuse, what w is multiplied by.
        highest_order: The highest order of the memory, whose N-grams are the rarest.

    Returns:
        float32; w is ``highest_order / order · (1 + log(1 + count)) − 1``, so 0 for the highest order and no reader.
    """
    weight = highest_order / orders * (1 + counts.double().log1p()) - 1
    return (penalty + reuse_penalty * weight).float()


def changed_rows(solved: Mapping[str, tuple[Tensor, Tensor]], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add solved changes to rows ``[N, E]`` before, and round to their type."""
    return {name: (before[name].double() + change).to(before[name].dtype) for name, (_, change) in solved.items()}


def tables_without(tables: Mapping[str, RowChange], edit: JointEdit, rest: JointEdit | None) -> dict[str, RowChange]:
    """Change a patch's rows to what remains of its facts; rows that no fact explains stay as they are.

    Args:
        tables: The patch's rows by table.
        edit: All of its facts.
        rest: Those that remain; None where none does.
    """
    own, solved = edit.solve(), {} if rest is None else rest.solve()
    result = {}
    for name, change in tables.items():
        is_loose = torch.ones(change.num_rows, dtype=torch.bool)
        if name in own:
            is_loose = ~torch.isin(change.rows, own[name][0])
        rows, before, after = change.rows[is_loose], change.before[is_loose], change.after[is_loose]
        if name in solved:
            used = solved[name][0]
            was = change.before[torch.searchsorted(change.rows, used)]
            now = changed_rows({name: solved[name]}, {name: was})[name]
            rows, before, after = torch.cat([rows, used]), torch.cat([before, was]), torch.cat([after, now])
        if len(rows):
            order = rows.argsort()
            result[name] = RowChange(rows[order], before[order], after[order])
    return result
