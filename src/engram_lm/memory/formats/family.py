"""The interface of a published format: how its reader finds the weights, and how its writer lays them out."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.block_float8 import quantize
from engram_lm.tables.files.safetensors_file import TensorFolder
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.files.sources import PublishedKind
from engram_lm.tables.stored_tensor import StoredTensor
from engram_lm.tables.table import Table

FLOATS = ("BF16", "F16", "F32")
"""Types of weights that are not rounded to 8 bits, as safetensors calls them."""

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names, types and shapes of the tensors of a file, in the order in which they are written."""

# Rows copied at a time. Memory stays at a few times this, whatever the table's size.
_PIECE_BYTES = 2**24


class Family(abc.ABC):
    """One family of published checkpoints that hold memory."""

    variant: ClassVar[PublishedKind]
    """What `HashSpec.variant` calls it."""
    prefix: ClassVar[str]
    """What its writer puts before ``layers.BLOCK.``; its reader takes any prefix."""
    names: ClassVar[dict[str, str]]
    """What we call a tensor → what the checkpoints call it, behind ``PREFIXlayers.BLOCK.``."""
    held: ClassVar[dict[str, tuple[Any, str]]] = {
        "bias": (False, "its projections have no bias"),
        "signs": ("none", "it adds rows without signs"),
        "gate": ("signed_sqrt", "its gate always takes the signed square root"),
        "tables": ("per_layer", "each of its layers has its own table"),
    }
    """Option → the only value that the format has, and why."""
    splits_tables: ClassVar[bool] = False
    """Whether a table may be divided into several tensors."""

    @abc.abstractmethod
    def read_config(self, keys: Mapping[str, Any], spec: HashSpec) -> EngramConfig:
        """Read geometry and options from a ``config.json``; raises ConfigError where a key is missing or impossible."""

    @abc.abstractmethod
    def locate(
        self, tensors: TensorFolder, stem: str, config: EngramConfig, spec: HashSpec, index: int
    ) -> dict[str, StoredTensor]:
        """Find the weights of a layer besides its table, and compare types, shapes and constants with the config.

        ``stem`` stands before the names of the layer's tensors; ``index`` is its place among the layers of the hash.
        """

    @abc.abstractmethod
    def load(
        self, stored: Mapping[str, StoredTensor], config: EngramConfig, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Load what `locate` found, as the state dict of an `EngramLayer`."""

    def check_options(self, config: EngramConfig) -> None:
        """Refuse options that the format has no place for, by a ConfigError with the reason."""
        for name, (held, why) in self.held.items():
            if getattr(config, name) != held:
                raise ConfigError(f"{self.variant} cannot hold {name}={getattr(config, name)!r}, only {held!r}: {why}")
        if not isinstance(config.rows_per_head, int):
            raise ConfigError(
                f"{self.variant} cannot hold rows_per_head={config.rows_per_head}: all orders have one number"
            )
        if config.orders != tuple(range(2, config.orders[-1] + 1)):
            raise ConfigError(
                f"{self.variant} cannot hold orders={config.orders}: it has all orders from 2 to the highest"
            )

    @abc.abstractmethod
    def write_config(self, config: EngramConfig, spec: HashSpec, num_shards: int) -> dict[str, Any]:
        """Return a ``config.json`` that `read_config` and `HashSpec.from_config` read back."""

    @abc.abstractmethod
    def weights(self, layer: EngramLayer, names: Mapping[str, str], spec: HashSpec, index: int) -> dict[str, Tensor]:
        """Return everything of a layer but its table, by our names; messages call tensors by their full ``names``."""

    @abc.abstractmethod
    def plan_table(self, table: Table, names: Mapping[str, str], num_shards: int) -> Plan:
        """Say which tensors a table becomes, by their full ``names``; ``num_shards`` is for formats that split it."""

    @abc.abstractmethod
    def write_table(self, writer: TensorWriter, table: Table, names: Mapping[str, str], num_shards: int) -> None:
        """Write what `plan_table` promised, a few rows at a time."""


def lookup(keys: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Look a key up under ``text_config``, then at the top; without a default it must be there."""
    text = keys.get("text_config")
    for place in (text if isinstance(text, Mapping) else {}, keys):
        for name in names:
            if place.get(name) is not None:
                return place[name]
    if default is None:
        raise ConfigError(f"config.json: the key {' or '.join(map(repr, names))} is missing")
    return default


def expect(tensor: StoredTensor, shape: tuple[int, ...], types: tuple[str, ...]) -> StoredTensor:
    """Refuse a tensor of another shape or type than the config asks for."""
    if tensor.shape != shape or tensor.dtype not in types:
        raise CheckpointError(
            f"{tensor}: expected {' or '.join(types)} {list(shape)} from config.json; the folder holds weights of "
            "another geometry"
        )
    return tensor


def rounded(values: Tensor, name: str, *, square: bool = False) -> tuple[Tensor, Tensor]:
    """Round to 8 bits as `quantize` does, and name the tensor that cannot be."""
    try:
        return quantize(values, square=square)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def pieces(table: Table, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a run of rows into runs that are copied at a time: the first row and the end of each."""
    size = max(1, _PIECE_BYTES // table.row_bytes)
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


@torch.no_grad()
def gather(table: Table, start: int, stop: int) -> Tensor:
    """Read a run of rows, ``[stop - start, width]`` on the CPU."""
    # A trainable table reads where its parameter is.
    weight = getattr(table, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else None
    return table.gather(torch.arange(start, stop, device=device)).cpu()
