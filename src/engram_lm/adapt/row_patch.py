"""Row patches: changes to single rows that are fitted, saved to a file, applied to a model and reverted.

Reading order: ``row_change.py`` (what a patch holds), ``patchable.py`` (the memory it is for), ``row_patch_fit.py``
(single facts), ``edits/`` (many facts together), ``row_patch_file.py``, this file (apply, revert, list),
``row_patch_proof.py`` (what a patch touches and what not), ``row_patch_merge.py`` (several patches as one).
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from engram_lm.adapt.edits.fit import JointFitOptions, JointFitProgress, fit_joint
from engram_lm.adapt.fact_edit import FactEdit
from engram_lm.adapt.joint_edit import JointEdit, tables_without
from engram_lm.adapt.patchable import AppliedPatch, PatchableMemory, patchable_memory
from engram_lm.adapt.row_change import Fact, RowChange, bits, same_bits
from engram_lm.adapt.row_patch_file import read_patch, write_patch
from engram_lm.adapt.row_patch_fit import FitOptions, addressed_rows, fit_rows, read_facts, reference_tokens
from engram_lm.adapt.row_patch_proof import RowPatchProof, prove
from engram_lm.errors import ConfigError, MismatchError

# Dimension key: N rows, E row width.


@dataclasses.dataclass(frozen=True, eq=False)
class RowPatch:
    """New numbers for single rows of a memory, with the old ones.

    A patch is made for one hash and for rows that hold certain numbers; both are checked when it is applied. It is for
    a model with a memory adapter (pass the adapter, or the model where it has one) and for an `EngramForCausalLM`,
    whose tables are parameters in memory. A key-value cache that was filled before a patch is applied or reverted still
    holds the old values, so start with an empty one.

    Example:
        >>> patch = RowPatch.fit(model, tokenizer, [("The capital of Elbonia is", " Mudville")])  # doctest: +SKIP
        >>> patch.save("elbonia.safetensors")  # doctest: +SKIP
        >>> RowPatch.load("elbonia.safetensors").apply(model)  # doctest: +SKIP
        >>> print(patch.proof(model, reference_tokens))  # doctest: +SKIP
        >>> patch.revert(model)  # doctest: +SKIP
    """

    spec_digest: str
    """Digest of the hash that the rows belong to."""
    tables: Mapping[str, RowChange]
    """Changes by table: its block number as text, or ``shared``."""
    title: str = ""
    """The name that its maker gave it."""
    facts: tuple[Fact, ...] = ()
    """What the rows were fitted to; empty for rows written by hand."""
    edit: JointEdit | None = None
    """What the facts of a joint edit want of the rows (`fit_facts`), so that single facts can be taken out."""

    @classmethod
    def fit(
        cls,
        target: Any,
        tokenizer: Any,
        facts: Sequence[tuple[str, str]],
        options: FitOptions | None = None,
        *,
        reference: Any = None,
        title: str = "",
        on_step: Callable[[int, float], None] = lambda step, loss: None,
    ) -> Self:
        """Fit rows to facts, so that the model continues each prompt with its target.

        Only rows that N-grams of the facts address are changed: by default those of the highest order that end where a
        target token is predicted. A text that has none of these N-grams, and none that collides with them, gets the
        same answer as before, bit for bit. The model is left as it was; `apply` changes it. The same call gives the
        same patch on the same machine.

        Args:
            target: A `MemoryAdapter`, a model with one, or an `EngramForCausalLM`. Its memory must have been trained,
                because rows have no effect while the value projections are zero.
            tokenizer: The model's tokenizer.
            facts: Pairs (prompt, target) of texts. A target begins with the space that follows the prompt, if any.
            options: Which positions and orders, how many steps, when to stop.
            reference: A text, or raw tokens ``[num_tokens]``, in which ``FitOptions.max_collisions`` counts other
                N-grams.
            title: The patch's name.
            on_step: Called with the step, from 0, and the mean loss before it, in nats per target token.

        Returns:
            The patch. Its ``facts`` say whether each target became the greedy continuation (`is_learned`).

        Raises:
            ConfigError: There are no facts, an option is impossible, a table is not a parameter, the memory's rows have
                no effect, no rows are left, or the facts hold already.
            MismatchError: The tokenizer is not the model's.
        """
        options = FitOptions() if options is None else options
        memory = patchable_memory(target)
        memory.spec.bind(tokenizer)
        known = read_facts(tokenizer, facts)
        text = None if reference is None else reference_tokens(reference, tokenizer)
        rows = addressed_rows(memory, known, options, text)
        tables, fitted = fit_rows(memory, known, rows, options, on_step)
        return cls(memory.spec.digest, tables, title, fitted)

    @classmethod
    def fit_facts(
        cls,
        target: Any,
        tokenizer: Any,
        facts: Sequence[FactEdit],
        options: JointFitOptions | None = None,
        *,
        reference: Any = None,
        earlier: "RowPatch | None" = None,
        title: str = "",
        on_progress: Callable[[JointFitProgress], None] = lambda progress: None,
    ) -> Self:
        """Fit many facts together, each in several wordings, so that other wordings and longer texts give them too.

        Rows of the N-grams at the end of each fact's subject are changed: see `engram_lm.adapt.edits`. The model is
        left as it was; `apply` changes it.

        Args:
            target: As for `fit`; its tables may lie on any tier.
            tokenizer: The model's tokenizer.
            facts: The facts.
            options: Steps, margins, penalties.
            reference: A text, or raw tokens ``[num_tokens]``: rows that it reads often change less, and pieces of it
                stand before the wordings that are fitted.
            earlier: A patch of `fit_facts`, applied or not, whose facts stay; the result is applied in its place.
            title: The patch's name.
            on_progress: Called after each group of facts.

        Returns:
            The patch. Its ``facts`` say how each prompt is answered (`is_learned`).

        Raises:
            ConfigError: Two facts have one prompt, rows have no effect, or ``earlier`` is no joint edit alone.
            MismatchError: The tokenizer is not the model's, or rows are not as ``earlier`` expects.
        """
        options = JointFitOptions() if options is None else options
        memory = patchable_memory(target)
        memory.spec.bind(tokenizer)
        if not facts:
            raise ConfigError("there are no facts to fit; pass at least one")
        if earlier is not None:
            if earlier.edit is None or earlier.num_rows != sum(len(rows) for rows, _ in earlier.edit.solve().values()):
                raise ConfigError(f"{earlier._name} has rows that no facts explain; only facts can be added to facts")
            if not all(same_bits(now, earlier.tables[name].after) for name, now in earlier._held(memory).items()):
                earlier._check_held(earlier._held(memory), "before", "the model it was made against, in the same state")
        edit, tables, fitted = fit_joint(
            memory,
            tokenizer,
            tuple(facts),
            options,
            reference=None if reference is None else reference_tokens(reference, tokenizer),
            earlier=None if earlier is None else earlier.edit,
            held={} if earlier is None else earlier.tables,
            known_facts=() if earlier is None else earlier.facts,
            on_progress=on_progress,
        )
        return cls(memory.spec.digest, tables, title, fitted, edit)

    def without(self, prompts: Sequence[str]) -> "RowPatch | None":
        """Take facts out of a joint edit: solve again without them. The model is not needed, and nothing is applied.

        Args:
            prompts: The prompts of the facts.

        Returns:
            The patch of what remains, for the same model as it was before this patch; None if nothing remains.

        Raises:
            ConfigError: The patch is no joint edit, or has no such fact.
        """
        if self.edit is None:
            raise ConfigError(f"{self._name} is no joint edit of facts; it can only be reverted as a whole")
        edit = self.edit.without(prompts)
        tables = tables_without(self.tables, self.edit, edit)
        if not tables:
            return None
        facts = tuple(fact for fact in self.facts if fact.prompt not in prompts)
        return type(self)(self.spec_digest, tables, self.title, facts, edit)

    @classmethod
    def from_rows(cls, target: Any, values: Mapping[str, tuple[Any, Tensor]], *, title: str = "") -> Self:
        """Make a patch that gives rows these numbers, such as those of another training run. Nothing is applied.

        Args:
            target: As for `fit`; the rows it holds now are the patch's rows before.
            values: Table to row numbers ``[N]``, different, in any order, and their numbers ``[N, E]``; the latter are
                rounded to the table's type.
            title: The patch's name.

        Raises:
            ConfigError: There are no rows, a row repeats, or the numbers have another shape or are not finite.
            MismatchError: There is no such table.
            RowRangeError: A row is outside its table.
        """
        memory = patchable_memory(target)
        tables = {}
        for name, (rows, numbers) in values.items():
            found = torch.as_tensor(rows).reshape(-1).cpu()
            if len(found) and (found.is_floating_point() or found.dtype == torch.bool):
                raise ConfigError(f"row numbers of table {name} are integers, got {found.dtype}")
            order = found.to(torch.int64).sort()
            memory.check_rows(name, order.values)
            width = memory.tables[name].width
            if tuple(numbers.shape) != (len(order.values), width):
                raise ConfigError(
                    f"{len(order.values)} rows of table {name} take numbers [{len(order.values)}, {width}], got "
                    f"{list(numbers.shape)}"
                )
            after = numbers.detach().cpu()[order.indices].to(memory.tables[name].dtype)
            tables[name] = RowChange(order.values, memory.read(name, order.values), after)
        if not tables:
            raise ConfigError("a patch changes at least one row; values is empty")
        return cls(memory.spec.digest, tables, title)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: The file is missing, malformed, truncated, or not a row patch.
        """
        return cls(**read_patch(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch as one safetensors file of a few kilobytes, atomically; `apply` needs nothing else.

        Raises:
            OSError: The file cannot be written.
        """
        write_patch(
            path, spec_digest=self.spec_digest, tables=self.tables, title=self.title, facts=self.facts, edit=self.edit
        )

    @property
    def num_rows(self) -> int:
        """Number of rows that are changed, over all tables."""
        return sum(change.num_rows for change in self.tables.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of row numbers and rows; a saved file has a header of about a kilobyte more."""
        return sum(change.num_bytes for change in self.tables.values())

    @property
    def is_as_asked(self) -> tuple[bool, ...]:
        """Whether each fact is as asked: its target was greedy after the fit or, if it is to be forgotten, was not."""
        forgotten = {fact.prompt for fact in (() if self.edit is None else self.edit.facts) if fact.forget}
        return tuple(fact.is_greedy != (fact.prompt in forgotten) for fact in self.facts)

    @property
    def is_learned(self) -> bool:
        """Whether every fact is as asked (`is_as_asked`)."""
        return all(self.is_as_asked)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the hash and the changes; title and facts are left out."""
        found = hashlib.sha256(self.spec_digest.encode())
        for name, change in sorted(self.tables.items()):
            found.update(f"{name} {change.num_rows} {change.before.dtype} {list(change.before.shape)}".encode())
            for tensor in (change.rows, change.before, change.after):
                found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def apply(self, target: Any, *, force: bool = False) -> None:
        """Write the rows into a model's tables. All rows are written, or none.

        Args:
            target: As for `fit`.
            force: Also write rows that do not hold the numbers the patch was made for. What they hold is remembered,
                so that `revert` still restores it.

        Raises:
            ConfigError: As for `fit`, of tables.
            MismatchError: The memory has another hash, width or type, the patch is applied already, or (without
                ``force``) a row is not as the patch expects.
            RowRangeError: A row is outside its table.
        """
        memory = patchable_memory(target)
        held = self._held(memory)
        record = memory.record
        if any(entry.patch.digest == self.digest for entry in record):
            raise MismatchError(f"{self._name} is applied to this model already; revert it first")
        if not force:
            self._check_held(held, "before", "the model it was made against, in the same state (or pass force=True)")
        for name, change in self.tables.items():
            memory.write(name, change.rows, change.after, num_patches=1)
        record.append(AppliedPatch(self, held))

    def revert(self, target: Any, *, force: bool = False) -> None:
        """Put back the rows that were there before, bit for bit. All rows are put back, or none.

        Patches that share no row can be reverted in any order; of those that share one, the last applied goes first. A
        model that was saved with the patch and loaded again has no list of patches; its rows show that the patch is in
        them.

        Args:
            target: As for `fit`.
            force: Also put back rows that have changed since, for instance by training.

        Raises:
            ConfigError: As for `fit`, of tables.
            MismatchError: The memory has another hash, a patch applied later shares a row, or (without ``force``) a row
                does not hold the patch's numbers.
            RowRangeError: A row is outside its table.
        """
        memory = patchable_memory(target)
        held = self._held(memory)
        record = memory.record
        replaced = {name: change.before for name, change in self.tables.items()}
        place = next((place for place, entry in enumerate(record) if entry.patch.digest == self.digest), None)
        if place is not None:
            replaced = record[place].replaced
            if later := [entry.patch._name for entry in record[place + 1 :] if entry.patch.overlaps(self)]:
                raise MismatchError(
                    f"{self._name} shares rows with {', '.join(later)}, applied after it; patches that share rows are "
                    "reverted in reverse order: revert the last applied first"
                )
        if not force:
            self._check_held(held, "after", "a model that has the patch (or pass force=True)")
        for name, values in replaced.items():
            memory.write(name, self.tables[name].rows, values, num_patches=-1)
        if place is not None:
            del record[place]

    def overlaps(self, other: "RowPatch") -> bool:
        """Tell whether both patches change the same row of a table."""
        shared = self.tables.keys() & other.tables.keys()
        return any(bool(torch.isin(self.tables[name].rows, other.tables[name].rows).any()) for name in shared)

    def proof(
        self,
        target: Any,
        reference: Any,
        *,
        tokenizer: Any = None,
        window_tokens: int = 64,
        max_windows: int = 64,
    ) -> RowPatchProof:
        """Show on a text what the patch touches and what it leaves alone: see `RowPatchProof`.

        The model computes with and without the patch, whether the patch is applied or not; afterwards its tables hold
        the same bits as before.

        Args:
            target: As for `fit`; the patch is applied to it, or can be.
            reference: A text, or raw tokens ``[num_tokens]``, whose outputs must not change.
            tokenizer: Needed if the reference is a text.
            window_tokens: Length of the windows that the text is computed in, each by itself; at least 2.
            max_windows: The most windows to compute of those that address a patched row, and of those that do not;
                they are spread evenly over the text.

        Raises:
            ConfigError: As for `fit`, of tables; or a size is impossible.
            DataError: The reference has fewer than two tokens.
            MismatchError: A row holds neither the patch's number nor the one before it.
            TokenError: The reference has a token outside the vocabulary.
        """
        memory = patchable_memory(target)
        held = self._held(memory)
        applied = all(same_bits(held[name], change.after) for name, change in self.tables.items())
        if not applied:
            self._check_held(held, "before", "a model that has the patch or can take it")
        if tokenizer is not None:
            memory.spec.bind(tokenizer)
        tokens = reference_tokens(reference, tokenizer)
        try:
            return prove(
                memory,
                self.tables,
                tokens,
                title=self.title,
                facts=self.facts,
                window_tokens=window_tokens,
                max_windows=max_windows,
            )
        finally:
            for name, change in self.tables.items():
                memory.write(name, change.rows, held[name])

    def __str__(self) -> str:
        """Return title, rows and facts, a line each."""
        lines = [f"{self._name}: {self.num_rows} rows, {self.num_bytes} bytes"]
        for name, change in self.tables.items():
            some = ", ".join(map(str, change.rows[:6].tolist())) + (", …" if change.num_rows > 6 else "")
            lines.append(f"  table {name}: {change.num_rows} rows of {change.before.shape[1]} numbers ({some})")
        for fact, done in zip(self.facts, self.is_as_asked, strict=True):
            answer = ("" if done else "not ") + ("learned" if fact.is_greedy == done else "forgotten")
            losses = f"{fact.loss_before:.3f} to {fact.loss_after:.3f} nats per token"
            lines.append(f"  {fact.prompt!r} → {fact.target!r}: {answer}, {losses}")
        return "\n".join(lines)

    @property
    def _name(self) -> str:
        return f"the patch {self.title!r}" if self.title else f"the patch {self.digest[:12]}"

    def _held(self, memory: PatchableMemory) -> dict[str, Tensor]:
        """Check that the patch is for this memory, and read the rows that it holds now."""
        if memory.spec.digest != self.spec_digest:
            raise MismatchError(
                f"{self._name} was made for the hash {self.spec_digest}, this memory has {memory.spec.digest}; its row "
                "numbers mean nothing here. Apply it to the memory it was made for, or fit the facts again"
            )
        held = {}
        for name, change in self.tables.items():
            memory.check_rows(name, change.rows)
            table = memory.tables[name]
            if (table.dtype, table.width) != (change.before.dtype, change.before.shape[1]):
                raise MismatchError(
                    f"{self._name} holds rows of {change.before.shape[1]} {change.before.dtype} numbers, table {name} "
                    f"has rows of {table.width} {table.dtype} numbers; load the memory in that type"
                )
            held[name] = memory.read(name, change.rows)
        return held

    def _check_held(self, held: Mapping[str, Tensor], what: str, fix: str) -> None:
        for name, change in self.tables.items():
            expected = getattr(change, what)
            if same_bits(held[name], expected):
                continue
            differs = (bits(held[name]) != bits(expected)).any(-1)
            known = {"before": "without", "after": "with"}
            opposite = "after" if what == "before" else "before"
            is_opposite = same_bits(held[name], getattr(change, opposite))
            hint = f"; they hold the numbers {known[opposite]} the patch" if is_opposite else ""
            raise MismatchError(
                f"{int(differs.sum())} of {change.num_rows} rows of table {name} (first: row "
                f"{int(change.rows[differs][0])}) do not hold the numbers that {self._name} expects {known[what]} it"
                f"{hint}; take {fix}"
            )


def applied_patches(target: Any) -> tuple[RowPatch, ...]:
    """List the patches that were applied to a model's memory and not reverted, in the order of their application.

    The list lives as long as the model object. Saving the model saves the rows, but not the list.

    Args:
        target: As for `RowPatch.apply`.

    Raises:
        ConfigError: As for `RowPatch.apply`.
    """
    return tuple(entry.patch for entry in patchable_memory(target).record)
