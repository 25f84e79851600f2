"""One tensor in a safetensors file: its type, its place, and its bytes."""

import dataclasses
import math

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's type names that can be read and written here. Tensors of other types may lie beside them."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file: where its bytes are, not the bytes."""

    name: str
    """Its name in the file."""
    file: str
    """Path or address of the file."""
    dtype: str
    """Its type as the format spells it, such as ``"BF16"``; a key of `DTYPES` where it can be read."""
    shape: tuple[int, ...]
    """Its shape."""
    start_bytes: int
    """Its first byte in the file."""
    num_bytes: int
    """Bytes of the tensor."""

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)}, in {self.file})"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its type in torch; a `CheckpointError` where the type is unknown here."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self} has a type that cannot be read; known are {', '.join(DTYPES)}")
        return DTYPES[self.dtype]

    def load(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the tensor, or a part of it along the first dimension, into memory.

        Args:
            start: First index along the first dimension.
            stop: One past the last; the end where None.

        Returns:
            Its own copy in `torch_dtype`, ``[stop - start, *shape[1:]]`` (a scalar stays a scalar).

        Raises:
            CheckpointError: The file is missing or has been cut since its header was read, or the type is unknown.
        """
        dtype, shape, skipped = self.torch_dtype, self.shape, 0
        if self.shape:
            stop = self.shape[0] if stop is None else stop
            if not 0 <= start <= stop <= self.shape[0]:
                raise IndexError(f"{self} has no part from {start} to {stop}")
            shape = (stop - start, *self.shape[1:])
            skipped = start * math.prod(self.shape[1:]) * dtype.itemsize
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        read_into(data.numpy().data, self.file, self.start_bytes + skipped, self.name)
        return data.view(dtype).reshape(shape)


def read_into(data: memoryview, file: str, start: int, what: str) -> None:
    """Fill ``data`` with the bytes of a file from byte ``start``; messages call them ``what``.

    Raises:
        CheckpointError: The file is missing, cannot be read, or ends before that.
    """
    try:
        with open(file, "rb") as opened:
            opened.seek(start)
            found = opened.readinto(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if found != data.nbytes:
        raise CheckpointError(
            f"{file} was cut after its header was read: expected {data.nbytes} bytes of {what} from byte "
            f"{start}, found {found}"
        )
