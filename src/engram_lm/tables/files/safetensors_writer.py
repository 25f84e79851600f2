"""Writing a safetensors file piece by piece, so that a tensor may be larger than memory.

The format's own library takes all tensors of a file at once, in memory.
"""

import json
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError
from engram_lm.tables.stored_tensor import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    aligned: str | None = None,
    alignment: int = 8,
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay tensors out in a file: name → type and shape, and texts for the header.

    The tensor ``aligned`` (the first one where None) begins at a multiple of ``alignment``, a power of two from 8.
    Returns what stands before the tensors, and the first byte of each tensor in the file and one past its last, in the
    order of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    # Wide types come first: behind a header of a multiple of 8 bytes every tensor is then aligned to its own type.
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        places[name], position = (position, end), end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format allows spaces behind the header.
    text += b" " * (-(8 + len(text) + (places[aligned][0] if aligned else 0)) % alignment)
    start = 8 + len(text)
    shifted = {name: (start + first, start + last) for name, (first, last) in places.items()}
    return len(text).to_bytes(8, "little") + text, shifted


class TensorWriter:
    """A safetensors file whose header is written first and whose tensors then grow, in any order and any pieces.

    Use it in a ``with`` block, on a file that is put in its place afterwards (see `engram_lm.files`). At the end of the
    block a tensor that was not written to its end raises a `CheckpointError`. Beside ``metadata`` the header says that
    ``format`` is ``pt``.

    Source: huggingface/safetensors ``README.md``, “Format”.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        header, places = encode_header(tensors, {"format": "pt", **(metadata or {})})
        self._next = {name: start for name, (start, _) in places.items()}
        self._end = {name: end for name, (_, end) in places.items()}
        self.num_bytes = sum(end - start for start, end in places.values())
        """Bytes of all tensors."""
        self._file = open(path, "wb")  # noqa: SIM115, closed at the end of the block
        self._file.write(header)

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next numbers of a tensor, in row-major order: a piece of any shape, of the type promised."""
        if piece.dtype != self._dtypes[name]:
            raise CheckpointError(f"{name} was promised as {self._dtypes[name]}, got a piece of {piece.dtype}")
        data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if self._next[name] + data.size > self._end[name]:
            raise CheckpointError(f"{name} got more numbers than its shape holds")
        self._file.seek(self._next[name])
        self._file.write(data.data)
        self._next[name] += data.size

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, and complain about what is missing from it."""
        self._file.close()
        if kind is None:
            for name, position in self._next.items():
                if position != self._end[name]:
                    raise CheckpointError(
                        f"{name} was not written to its end: {self._end[name] - position} bytes are missing"
                    )
