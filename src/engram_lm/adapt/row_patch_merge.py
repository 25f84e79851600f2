"""Several row patches as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram_lm.adapt.joint_edit import JointEdit, changed_rows
from engram_lm.adapt.row_change import RowChange, bits
from engram_lm.adapt.row_patch import RowPatch
from engram_lm.errors import ConfigError, MismatchError


def merge_patches(patches: Sequence[RowPatch], *, title: str = "") -> RowPatch:
    """Join patches that were each fitted to the same memory without the others.

    Facts of joint edits are solved together again, so they may share rows. Rows that no facts explain (`RowPatch.fit`,
    `RowPatch.from_rows`) may be in one patch only.

    Args:
        patches: The patches, at least one.
        title: The name of the result.

    Raises:
        ConfigError: There are no patches; two of them have a fact of one prompt, or change a row that facts alone do
            not explain.
        MismatchError: They are for different hashes, or for one memory in different states or types.
    """
    if not patches:
        raise ConfigError("there are no patches to merge; name at least one")
    first = patches[0]
    edit: JointEdit | None = None
    before: dict[str, dict[int, Tensor]] = {}
    after: dict[str, dict[int, Tensor]] = {}
    for patch in patches:
        if patch.spec_digest != first.spec_digest:
            raise MismatchError(
                f"the patches {first.title!r} and {patch.title!r} are for the hashes {first.spec_digest} and "
                f"{patch.spec_digest}; their rows have nothing to do with each other"
            )
        explained = {} if patch.edit is None else patch.edit.solve()
        if patch.edit is not None:
            edit = patch.edit if edit is None else edit.joined(patch.edit)
        for name, change in patch.tables.items():
            known, written = before.setdefault(name, {}), after.setdefault(name, {})
            free = ~torch.isin(change.rows, explained[name][0]) if name in explained else torch.ones(len(change.rows))
            for row, was, now, is_free in zip(change.rows.tolist(), change.before, change.after, free, strict=True):
                if row in known and not torch.equal(bits(known[row][None]), bits(was[None])):
                    raise MismatchError(
                        f"row {row} of table {name} holds other numbers before the patch {patch.title!r} than before "
                        "those named earlier; fit them to one state of the memory, or add facts to a patch with "
                        "earlier= (engram-lm patch fit --earlier)"
                    )
                if row in written or (bool(is_free) and row in known):
                    raise ConfigError(
                        f"row {row} of table {name} is changed by the patch {patch.title!r} and by one named earlier, "
                        "and no facts explain both; fit them together"
                    )
                known[row] = was
                if bool(is_free):
                    written[row] = now
    solved = {} if edit is None else edit.solve()
    tables = {}
    for name, rows in before.items():
        numbers = torch.tensor(sorted(rows))
        was = torch.stack([rows[row] for row in numbers.tolist()])
        now = torch.stack([after[name].get(row, rows[row]) for row in numbers.tolist()])
        if name in solved:
            place = torch.searchsorted(numbers, solved[name][0])
            now[place] = changed_rows({name: solved[name]}, {name: was[place]})[name]
        tables[name] = RowChange(numbers, was, now)
    return RowPatch(first.spec_digest, tables, title, tuple(fact for patch in patches for fact in patch.facts), edit)
