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

__all__ = ["TensorWriter", "encode_header"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    aligned: str | None = None,
    alignment: int = 8,
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay tensors out in a file.

    Args:
        tensors: Name to type and shape.
        metadata: Texts for the header.
        aligned: The tensor that begins at a multiple of ``alignment``; the first one where None.
        alignment: A power of two in bytes, at least 8.

    Returns:
        What stands before the tensors, and for each tensor its first byte in the file and one past its last, in the
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

    Use it in a ``with`` block, on a file that is put in its place afterwards (see `engram_lm.files`).

    Args:
        path: The file to create.
        tensors: Name to type and shape of everything that will be written.
        metadata: Texts for the header, beside or instead of ``format``, which is ``pt``.

    Raises:
        CheckpointError: At the end of the block, if a tensor was not written to its end.
        OSError: The file cannot be written.

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
        """Write the next numbers of a tensor.

        Args:
            name: One of the tensors promised.
            piece: Any shape, of the type promised; its numbers in row-major order continue the tensor.

        Raises:
            CheckpointError: Another type than promised, or more numbers than promised.
        """
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
