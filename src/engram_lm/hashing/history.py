"""What decoding has to remember of the tokens so far, so that rows come out as if the whole sequence were given."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from engram_lm.errors import HistoryError
from engram_lm.hashing.token_map import is_torch
from engram_lm.hashing.window import RollingWindow


class _Hash(Protocol):
    """What a history needs of a `HashSpec`."""

    @property
    def context(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode(self, tokens: Any, attention_mask: Any = None, position_ids: Any = None) -> Any: ...


class TokenHistory(RollingWindow):
    """The codes of the last tokens of each sequence of a batch, changed in place.

    Decode with ``rows = spec.rows(tokens, layer, history)`` for every layer, then ``history.advance(tokens)``. All
    other operations are those of `RollingWindow`: rollback, reorder, select, fork, record, trim, reset.

    Args:
        spec: The hash, a `HashSpec`; it must be able to encode.
        batch_size: Number of sequences.
        device: Where the codes are kept.
        max_rollback: How many tokens `rollback` can take back; None for all since the start.
    """

    def __init__(
        self, spec: _Hash, batch_size: int, *, device: torch.device | str = "cpu", max_rollback: int | None = 0
    ):
        super().__init__(batch_size, spec.context, fill=-1, dtype=torch.int64, device=device, max_rollback=max_rollback)
        self.spec = spec

    @property
    def codes(self) -> Tensor:
        """Codes of the last positions, oldest first, int64 [batch, spec.context]; -1 before the start."""
        return self.values

    def advance(  # type: ignore[override]
        self,
        tokens: Any,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
    ) -> Self:
        """Append tokens, in place.

        Args:
            tokens: Raw ids [batch, length], NumPy (or lists) or torch.
            lengths: How many of them count, per sequence, for chunks padded on the right.
            attention_mask: As for `HashSpec.encode`.
            position_ids: As for `HashSpec.encode`.

        Raises:
            HistoryError: The batch has another size, or a length is impossible.
            TokenError: A token is outside the vocabulary.
        """
        return self.advance_codes(self.spec.encode(tokens, attention_mask, position_ids), lengths)

    def advance_codes(self, codes: Any, lengths: Sequence[int] | Tensor | None = None) -> Self:
        """Append what `HashSpec.encode` returned, in place. As `advance`."""
        codes = codes if is_torch(codes) else torch.from_numpy(codes)
        if codes.ndim != 2 or codes.shape[0] != self.batch_size:
            raise HistoryError(
                f"this history holds {self.batch_size} sequences, got codes of shape {list(codes.shape)}; "
                "use fork, reorder or select to follow the batch"
            )
        return super().advance(codes, lengths)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state: tensors, integers and the spec's digest."""
        return {"digest": self.spec.digest, **super().snapshot()}

    def restore(self, snapshot: Mapping[str, Any]) -> Self:
        """Return, in place, to what `snapshot` saw.

        Raises:
            HistoryError: The snapshot is of another hash, batch size or kind of history.
        """
        if snapshot.get("digest") != self.spec.digest:
            raise HistoryError(
                f"the snapshot belongs to the hash {snapshot.get('digest')}, this history to {self.spec.digest}"
            )
        return super().restore(snapshot)
