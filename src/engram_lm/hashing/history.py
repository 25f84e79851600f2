"""What decoding has to remember of the tokens so far, so that rows come out as if the whole sequence were given."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_lm.errors import HistoryError
from engram_lm.hashing.token_map import is_torch
from engram_lm.hashing.window import Counts, RollingWindow

if TYPE_CHECKING:
    from engram_lm.hashing.spec import HashSpec

__all__ = ["TokenHistory"]


class TokenHistory:
    """The codes of the last tokens of each sequence of a batch, changed in place.

    Decode with ``rows = spec.rows(tokens, layer, history)`` for every layer, then ``history.advance(tokens)``.

    Args:
        spec: The hash; it must be able to encode.
        batch_size: Number of sequences.
        device: Where the codes are kept.
        max_rollback: How many tokens `rollback` can take back; None for all since the start.
    """

    def __init__(
        self, spec: "HashSpec", batch_size: int, *, device: torch.device | str = "cpu", max_rollback: int | None = 0
    ):
        self.spec = spec
        self._window = RollingWindow(
            batch_size, spec.context, fill=-1, dtype=torch.int64, device=device, max_rollback=max_rollback
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._window.batch_size

    @property
    def codes(self) -> Tensor:
        """Codes of the last positions, oldest first, int64 [batch, spec.context]; -1 before the start."""
        return self._window.values

    def advance(
        self,
        tokens: Any,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
    ) -> "TokenHistory":
        """Append tokens, in place.

        Args:
            tokens: Raw ids [batch, length], NumPy (or lists) or torch.
            lengths: How many of them count, per sequence, for chunks padded on the right.
            attention_mask: As for `HashSpec.encode`.
            position_ids: As for `HashSpec.encode`.

        Returns:
            The history itself.

        Raises:
            HistoryError: The batch has another size, or a length is impossible.
            TokenError: A token is outside the vocabulary.
        """
        return self.advance_codes(self.spec.encode(tokens, attention_mask, position_ids), lengths)

    def advance_codes(self, codes: Any, lengths: Sequence[int] | Tensor | None = None) -> "TokenHistory":
        """Append what `HashSpec.encode` returned, in place. As `advance`."""
        codes = codes if is_torch(codes) else torch.from_numpy(codes)
        if codes.ndim != 2 or codes.shape[0] != self.batch_size:
            raise HistoryError(
                f"this history holds {self.batch_size} sequences, got codes of shape {list(codes.shape)}; "
                "use fork, reorder or select to follow the batch"
            )
        self._window.advance(codes, lengths)
        return self

    def rollback(self, n: Counts) -> "TokenHistory":
        """Take the last tokens back, in place: ``n`` of all sequences, or one number per sequence.

        Raises:
            HistoryError: Fewer tokens are held. Nothing has changed then.
        """
        self._window.rollback(n)
        return self

    def reorder(self, indices: Sequence[int] | Tensor) -> "TokenHistory":
        """Replace every sequence by the one at its index, in place (beam search)."""
        self._window.reorder(indices)
        return self

    def select(self, indices: Sequence[int] | Tensor) -> "TokenHistory":
        """Keep the sequences at the indices, in place; the batch size becomes their number."""
        self._window.select(indices)
        return self

    def fork(self, repeats: int = 1) -> "TokenHistory":
        """Return an independent copy in which every sequence stands ``repeats`` times in a row."""
        copy = TokenHistory.__new__(TokenHistory)
        copy.spec, copy._window = self.spec, self._window.fork(repeats)
        return copy

    def record(self) -> "TokenHistory":
        """Keep everything from here on, in place, so that any number of tokens can be taken back."""
        self._window.record()
        return self

    def trim(self) -> "TokenHistory":
        """Give up what only `rollback` would need, in place, where everything is kept."""
        self._window.trim()
        return self

    def reset(self) -> "TokenHistory":
        """Forget everything, in place."""
        self._window.reset()
        return self

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state: tensors, integers and the spec's digest."""
        return {"digest": self.spec.digest, **self._window.snapshot()}

    def restore(self, snapshot: Mapping[str, Any]) -> "TokenHistory":
        """Return, in place, to what `snapshot` saw.

        Raises:
            HistoryError: The snapshot is of another hash, batch size or kind of history.
        """
        if snapshot.get("digest") != self.spec.digest:
            raise HistoryError(
                f"the snapshot belongs to the hash {snapshot.get('digest')}, this history to {self.spec.digest}"
            )
        self._window.restore(snapshot)
        return self
