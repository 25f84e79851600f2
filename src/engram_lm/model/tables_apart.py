"""Tables that are not among a model's modules: all of them while it is loaded, later those that are read elsewhere."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.model.checkpoint import TABLES
from engram_lm.model.table_place import Located, TablePlace, WantedTable
from engram_lm.tables import ParameterTable, RowLayout, StoredTensor, Table

__all__ = ["TablesApart", "one_device", "split_device_map"]

_CHOSEN_BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers fills in by what fits."""


class TablesApart:
    """The tables of one model that are neither moved, counted nor given hooks with its modules.

    Args:
        places: Where they go, by name as in a device map: devices and `TablePlace`. None where the model loads its
            tables with the rest.
    """

    def __init__(self, places: Mapping[str, Any] | None = None) -> None:
        self.places = places
        self.tables: dict[str, Table] = {}
        """The tables by name."""
        self.stored: dict[str, StoredTensor] = {}
        """Those that are read from the checkpoint: where they lie in it."""
        self.elsewhere: dict[str, Located] = {}
        """Those of another source: where they lie there."""

    def locate(self, wanted: Mapping[str, WantedTable]) -> dict[str, Located]:
        """Find the tables that do not come from the checkpoint, by name; see `TablePlace.locate`."""
        place = (self.places or {}).get("")
        return place.locate(wanted) if isinstance(place, TablePlace) else {}

    def load(
        self,
        wanted: Mapping[str, WantedTable],
        stored: Mapping[str, StoredTensor],
        elsewhere: Mapping[str, Located],
        unexpected: set[str],
        dtype: torch.dtype,
        prefix: str,
    ) -> set[str]:
        """Load the tables, or open them where they lie.

        Args:
            wanted: The tables that the configuration describes.
            stored: The tensors of the checkpoint.
            elsewhere: What `locate` found.
            unexpected: Names in the checkpoint that the rest of the model did not want; those of tables are struck out.
            dtype: Type of their numbers.
            prefix: What the names of the base model begin with.

        Returns:
            Names of tables that were found nowhere; they have new random rows.
        """
        if not stored and self.tables.keys() - elsewhere.keys():
            raise CheckpointError(
                "tables are put on another device or tier than the rest, or left on disk, out of safetensors files "
                "only; load the model without a device_map or table_tier and save it once"
            )
        missing = set()
        for name, table in self.tables.items():
            assert isinstance(table, ParameterTable)
            place = self._place(name, prefix)
            # "device" makes parameters, as a device in a device map does.
            device = place.device if isinstance(place, TablePlace) else place
            resident = not isinstance(place, TablePlace) or place.tier == "device"
            source = stored_table(stored, name)
            if name in elsewhere:
                # The checkpoint may have the table too; it is not what was asked for.
                unexpected.difference_update(_names_of(name))
                self.elsewhere[name] = elsewhere[name]
                if resident:
                    table.weight = nn.Parameter(place.load(elsewhere[name], wanted[name], dtype))
                else:
                    self.tables[name] = place.open(elsewhere[name], wanted[name], dtype)
            elif source is not None:
                unexpected.discard(source.name)
                wanted[name].check(str(source), source.shape)
                if resident:
                    table.weight = nn.Parameter(source.load().to(device=device, dtype=dtype))
                else:
                    self.tables[name] = place.open(source, wanted[name], dtype)
                    self.stored[name] = source
            elif resident:
                missing.add(f"{prefix}{TABLES}.{name}.weight")
                table.to_empty(device=device)
                table.reset_parameters()
            else:
                raise CheckpointError(
                    f"{TABLES}.{name}.weight is to be read from disk, and the checkpoint does not have it; say with "
                    "table_source= where it lies, or download the checkpoint again"
                )
        return missing

    def adopted(self, prefix: str) -> Iterator[tuple[str, Table, Any]]:
        """Give name, table and what a device map calls its place, now that nothing will move it; parameters leave."""
        for name, table in list(self.tables.items()):
            place = self._place(name, prefix)
            if isinstance(table, ParameterTable):
                # Its rows are the model's own now, and are saved with it.
                del self.tables[name]
                self.elsewhere.pop(name, None)
            yield name, table, place.device_map_name if isinstance(place, TablePlace) else place

    def mapped(self) -> dict[str, Tensor]:
        """Map the tables that are read from the checkpoint, by name, without reading them."""
        return {name: _map(stored) for name, stored in self.stored.items()}

    def check_folder(self, folder: Path) -> None:
        """Refuse a folder whose files tables are being read from."""
        read = {Path(stored.file) for stored in self.stored.values()}
        for located in self.elsewhere.values():
            read |= {Path(file) for file in located.files} if isinstance(located, RowLayout) else set()
        for written in folder.glob("*.safetensors"):
            if any(path.exists() and path.samefile(written) for path in read):
                raise ConfigError(
                    f"{written} is being read by this model and cannot be written over; save it into another folder"
                )

    def close(self) -> None:
        """Close what was opened for a model that could not be loaded: threads, connections, processes."""
        for table in self.tables.values():
            if not isinstance(table, ParameterTable):
                table.close()

    def _place(self, name: str, prefix: str) -> Any:
        """A device that holds a table as a parameter, or the `TablePlace` that it is read from.

        It is what the device map says of the table or of the innermost module around it; else the host. ``"disk"``
        means the mapped files.
        """
        places = self.places or {}
        parts = f"{prefix}{TABLES}.{name}.weight".split(".")
        around = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        place = next((places[module] for module in around if module in places), "cpu")
        return TablePlace("mmap") if place == "disk" else place


def stored_table(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """Find a table among the tensors of a checkpoint, of a whole model or of its base; None where it is not there."""
    return next((stored[full] for full in _names_of(name) if full in stored), None)


def split_device_map(device_map: Any) -> tuple[Any, dict[str, Any] | None]:
    """Divide a device map into the backbone's part and the tables' part, so that nothing moves the tables later.

    The tables' part is None where everything is on one device and tables are loaded with the rest.
    """
    if isinstance(device_map, str) and device_map in _CHOSEN_BY_SIZE:
        # A table is read a few rows at a time: it never deserves an accelerator's memory before the backbone.
        return device_map, {"": "cpu"}
    if not isinstance(device_map, Mapping):
        return device_map, None
    devices = {str(device) for device in device_map.values()}
    if len(devices) == 1 and "disk" not in devices:
        return device_map, None
    rest = {name: device for name, device in device_map.items() if TABLES not in name.split(".")}
    return rest or None, dict(device_map)


def one_device(device_map: Any) -> str | int | torch.device:
    """The device that a device map puts everything on; the CPU where it puts things on several, or says nothing."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1 or (device := devices.pop()) is None or device in ("disk", *_CHOSEN_BY_SIZE):
        return "cpu"
    return device


def _names_of(table: str) -> tuple[str, str]:
    """What a checkpoint of a whole model, and one of its base, call a table."""
    return f"model.{TABLES}.{table}.weight", f"{TABLES}.{table}.weight"


def _map(stored: StoredTensor) -> Tensor:
    # Copy on write, because torch warns of memory it must not write to; nothing is written.
    data: np.ndarray = np.memmap(stored.file, np.uint8, mode="c", offset=stored.start_bytes, shape=(stored.num_bytes,))
    return torch.from_numpy(data).view(stored.torch_dtype).view(stored.shape)
