"""Where a model's tables are: found, checked, loaded or left on another tier, and kept apart from its modules."""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.files import parse_json, user_path
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.tables import (
    CachedTable,
    HostTable,
    MooncakeTable,
    ParameterTable,
    RecordTable,
    RowLayout,
    StoredTensor,
    Table,
    most_frequent,
    open_table,
    table_layouts,
    tensor_layout,
)
from engram_lm.tables.around.cache import Policy
from engram_lm.tables.around.overlay import OverlayTable
from engram_lm.tables.around.read_ahead import ReadAheadTable
from engram_lm.tables.around.row_trace import read_trace
from engram_lm.tables.choose import check_tier
from engram_lm.tables.files.byte_source import is_address
from engram_lm.tables.files.sources import choose_layout
from engram_lm.tables.occupancy import FirstRows
from engram_lm.tables.tiers.remote_files import RemoteFolder

TABLES = "memory_tables"
"""Name of the model's module that holds the tables."""

TableSource = str | os.PathLike[str] | RowLayout | Mapping[Any, str | os.PathLike[str] | RowLayout]
"""What ``table_source`` takes: one source for all tables, or table name → source."""

Located = RowLayout | str
"""One table, found and not opened: where its rows lie, or its ``mooncake://`` address."""

_SHARED = "shared"
_NAME = "{table}"
_MOONCAKE = "mooncake://"
# Rows copied at a time while a whole table is loaded.
_PIECE_BYTES = 16 << 20
# Reads of a block that are looked at in a trace, 2 GiB of row numbers; a longer trace adds nothing to what is frequent.
_MOST_READS = 1 << 28


@dataclasses.dataclass(frozen=True)
class WantedTable:
    """A table as the model's configuration describes it, to be compared with the one that is found."""

    name: str
    """A block number as text, or ``shared``."""
    blocks: tuple[int, ...]
    """The blocks that read it."""
    num_rows: int
    """Rows that the HashSpec addresses."""
    width: int
    """Numbers in a row."""
    spec_digest: str
    """Digest of the HashSpec."""

    def new(
        self, memory: EngramConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ParameterTable:
        """Make a table of this size with the rows that the configuration of the memory begins with."""
        return ParameterTable(
            self.num_rows,
            self.width,
            gradient=memory.table_gradient,
            std=memory.table_std,
            device=device,
            dtype=dtype,
            first_rows=self.first_rows(memory),
        )

    def first_rows(self, memory: EngramConfig) -> FirstRows | None:
        """What unwritten rows of this table hold in training; None without occupancy."""
        name = f"seed {memory.seed}, table {self.name}"
        return FirstRows(name, memory.table_std) if memory.occupancy != "none" else None

    def check(self, where: str, shape: tuple[int, ...], spec_digest: str | None = None) -> None:
        """Refuse, by a MismatchError that names ``where``, a table of another size or of another hash."""
        if shape != (self.num_rows, self.width):
            raise MismatchError(
                f"{where}: found {list(shape)}, expected {[self.num_rows, self.width]} for the table {self.name}, as "
                f"the configuration gives (HashSpec {self.spec_digest}); one of them belongs to another model: take "
                "both from the same"
            )
        if spec_digest not in (None, self.spec_digest):
            raise MismatchError(
                f"{where} was made for HashSpec {spec_digest}, the model reads its table {self.name} with HashSpec "
                f"{self.spec_digest}: the same row means another N-gram there; name the table that was made of this "
                "model's checkpoint"
            )


def table_name(spec: HashSpec, block: int) -> str:
    """Name of the table that a block reads: its number as text, or ``shared``."""
    return _SHARED if spec.shared_table else str(block)


def wanted_tables(spec: HashSpec, width: int) -> dict[str, WantedTable]:
    """Describe the tables that a hash addresses, by name; their rows are ``width`` numbers wide."""
    wanted = {}
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        name = table_name(spec, block)
        blocks = spec.blocks if spec.shared_table else (block,)
        wanted[name] = WantedTable(name, blocks, spec.num_rows(layer), width, spec.digest)
    return wanted


@dataclasses.dataclass(frozen=True, eq=False)
class TablePlace:
    """A tier that a model reads its tables from, without training them; or a source that they are loaded from."""

    tier: str
    """A tier by name, see `open_table`. ``"device"`` makes parameters of the rows of ``source``."""
    cache_bytes: int = 0
    """What a cache of records before each table may take; 0 for none."""
    read_ahead: bool = False
    """Whether rows are read in the background from when the tokens are known; never from the tier ``"host"``."""
    cache_policy: Policy = "clock"
    """Which record of a full cache gives way, see `CachedTable`."""
    pinned: str | os.PathLike[str] | None = None
    """A trace as `RowTrace.save` writes it: the rows it reads most fill the cache and stay there."""
    source: TableSource | None = None
    """Where tables lie, see `locate`; in the checkpoint where None."""
    device: str | int | torch.device = "cpu"
    """Where tables of the tier ``"device"`` are put."""

    def __post_init__(self) -> None:
        check_tier(self.tier, "table_tier")
        if self.cache_bytes < 0:
            raise ConfigError(f"table_cache_bytes is at least 0, not {self.cache_bytes}")
        if self.cache_policy not in get_args(Policy):
            raise ConfigError(f"table_cache_policy is one of {', '.join(get_args(Policy))}, not {self.cache_policy!r}")
        if self.tier == "device" and self.cache_bytes:
            raise ConfigError(
                "table_cache_bytes is for tables on another tier than the model; pass table_tier, such as 'file'"
            )
        if not self.cache_bytes and (self.pinned is not None or self.cache_policy != "clock"):
            raise ConfigError(
                "table_pinned and table_cache_policy say what a cache keeps; give it room with table_cache_bytes"
            )
        if self.tier == "remote" and self.source is None:
            raise ConfigError(
                "table_tier='remote' reads from an address; name it with table_source, as "
                "'https://HOST/FOLDER', 's3://BUCKET/FOLDER' or 'mooncake://HOST:PORT/NAME'"
            )

    @property
    def device_map_name(self) -> Any:
        """What a device map calls it: a device, the host, or a disk."""
        if self.tier == "device":
            return self.device
        return "cpu" if self.tier == "host" else "disk"

    def locate(self, wanted: Mapping[str, WantedTable]) -> dict[str, Located]:
        """Find the model's tables in ``source``, and check what can be known before they are opened.

        A mapping names a source for each table that does not come from the checkpoint. One source for all is a folder
        or address that holds a table of each name, or a text with ``{table}`` in it, which the names replace. What
        holds a single table may call it what it likes, where it is clear whose it is. The result maps the names of
        tables to where they are, and is empty without a source.

        Raises:
            CheckpointError: A source is missing, malformed or holds no table.
            ConfigError: A name that the model or the source does not have, or one address for several tables.
            MismatchError: Rows, width or HashSpec of a table are not the model's.
            RemoteError: A server does not answer.
        """
        if self.source is None:
            return {}
        held: dict[str, dict[int | str, RowLayout]] = {}
        result: dict[str, Located] = {}
        for name, source in _by_name(self.source, wanted).items():
            if isinstance(source, RowLayout):
                layout = source
            else:
                template = os.fspath(source)
                where = template.replace(_NAME, name)
                if where.startswith(_MOONCAKE):
                    if where in result.values():
                        raise ConfigError(
                            f"{where} is one table, the model has {', '.join(wanted)}; write {_NAME} where their names "
                            "differ, or pass a mapping from table to address"
                        )
                    result[name] = where
                    continue
                if where not in held:
                    held[where] = table_layouts(where)
                clear = len(wanted) == 1 or where != template or isinstance(self.source, Mapping)
                layout = choose_layout(held[where], None if clear and len(held[where]) == 1 else name, where)
                if layout.spec_digest is None:
                    layout = dataclasses.replace(layout, spec_digest=_digest_beside(where))
            wanted[name].check(", ".join(layout.files), (layout.num_rows, layout.codec.width), layout.spec_digest)
            result[name] = layout
        return result

    def open(self, located: Located | StoredTensor, wanted: WantedTable, dtype: torch.dtype | None) -> Table:
        """Open a table where it lies: a tensor ``[rows, width]`` of the checkpoint, or what `locate` found.

        Rows are given as ``dtype``. Where a trace is named, what it reads of the table most stays in the cache.

        Raises:
            ConfigError: The tier has no room for it, or the cache none for a row.
            DataError: The trace cannot be read, or lacks a block.
            EngramError: What `open_table` raises.
        """
        tier: Any = self.tier
        source = tensor_layout([located]) if isinstance(located, StoredTensor) else located
        options: dict[str, Any] = {"device": self.device} if tier == "device" else {}
        table = open_table(source, tier=tier, dtype=dtype, **options)
        try:
            _check_opened(table, wanted)
            if self.cache_bytes:
                assert isinstance(table, RecordTable)  # only the device's is not
                pinned = None
                if self.pinned is not None:
                    trace = read_trace(Path(self.pinned), list(wanted.blocks), _MOST_READS)
                    pinned = most_frequent(
                        [rows for _, rows, _, _ in trace], self.cache_bytes, table.codec.record_bytes
                    )
                table = CachedTable(table, self.cache_bytes, policy=self.cache_policy, pinned_rows=pinned)
            # Rows that this process has in its memory are there: finding them twice costs more than reading them once.
            is_read_ahead = self.read_ahead and not isinstance(table, HostTable)
            return ReadAheadTable(table) if is_read_ahead else table
        except BaseException:
            table.close()
            raise

    def load(self, located: Located, wanted: WantedTable, dtype: torch.dtype) -> Tensor:
        """Load a whole table as numbers, ``[rows, width]`` on `device`. Raises what `open` raises."""
        remote = isinstance(located, str) or any(map(is_address, located.files))
        table = open_table(located, tier="remote" if remote else "file", dtype=dtype)
        try:
            _check_opened(table, wanted)
            weight = torch.empty(table.num_rows, table.width, dtype=dtype, device=self.device)
            step = max(1, _PIECE_BYTES // table.row_bytes)
            for start in range(0, table.num_rows, step):
                stop = min(start + step, table.num_rows)
                weight[start:stop] = table.gather(torch.arange(start, stop))
            return weight
        finally:
            table.close()


def _by_name(source: TableSource, wanted: Mapping[str, WantedTable]) -> dict[str, Any]:
    """Table name to its source."""
    if not wanted:
        raise ConfigError("table_source is for models with memory, this one has no tables")
    if isinstance(source, Mapping):
        result = {str(name): where for name, where in source.items()}
        if not result or len(result) != len(source) or not result.keys() <= wanted.keys():
            raise ConfigError(
                f"table_source names the tables {', '.join(map(repr, source)) or 'of none'}; the model has "
                f"{', '.join(wanted)}, each once at most"
            )
    elif isinstance(source, RowLayout) and len(wanted) > 1:
        raise ConfigError(f"a layout is one table, the model has {', '.join(wanted)}; pass a mapping from table to it")
    else:
        result = dict.fromkeys(wanted, source)
    for name, where in result.items():
        if not isinstance(where, str | os.PathLike | RowLayout):
            raise ConfigError(f"the source of table {name} is a path, an address or a RowLayout, not {where!r:.200}")
    return result


def _check_opened(table: Table, wanted: WantedTable) -> None:
    """Check a table of a store, which says what it is only when it is opened."""
    if isinstance(table, MooncakeTable):
        wanted.check(f"the table {table.name}", (table.num_rows, table.width), table.manifest.spec_digest)


def _digest_beside(where: str) -> str | None:
    """Digest of the HashSpec in the ``config.json`` beside tables, where it is one of ours."""
    if is_address(where):
        config, text = f"{where}: config.json", RemoteFolder(where).read("config.json")
    else:
        path = user_path(where)
        path = (path if path.is_dir() else path.parent) / "config.json"
        config, text = str(path), path.read_bytes() if path.is_file() else None
    if text is None:
        return None
    values = parse_json(text, config)
    return HashSpec.from_config(values).digest if isinstance(values.get("hash_spec"), dict) else None


class TablesApart:
    """The tables of one model that are neither moved, counted nor given hooks with its modules.

    ``places`` says where they go, by name as in a device map: devices and `TablePlace`. It is None where the model
    loads its tables with the rest.
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

        Tables come from the tensors ``stored`` in the checkpoint, or from ``elsewhere``, which `locate` gave. Their
        names are struck out of the ``unexpected`` ones. Returned are the names of tables that were found nowhere; they
        have new random rows.
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
                    table.take(place.load(elsewhere[name], wanted[name], dtype))
                else:
                    self.tables[name] = place.open(elsewhere[name], wanted[name], dtype)
            elif source is not None:
                unexpected.discard(source.name)
                wanted[name].check(str(source), source.shape)
                if resident:
                    table.take(source.load().to(device=device, dtype=dtype))
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
        """Give each table's name, the table, and what a device map calls its place; parameters leave for the model."""
        for name, table in list(self.tables.items()):
            place = self._place(name, prefix)
            if isinstance(table, ParameterTable):
                # Its rows are the model's own now, and are saved with it.
                del self.tables[name]
                self.elsewhere.pop(name, None)
            yield name, table, place.device_map_name if isinstance(place, TablePlace) else place

    def mapped(self) -> dict[str, Tensor]:
        """Map the tables that are read from the checkpoint, by name, without reading them.

        Rows that an overlay replaces are replaced in memory alone.
        """
        tables = {}
        for name, stored in self.stored.items():
            # Copy on write, because torch warns of memory it must not write to; nothing is written.
            data: np.ndarray = np.memmap(
                stored.file, np.uint8, mode="c", offset=stored.start_bytes, shape=(stored.num_bytes,)
            )
            tables[name] = torch.from_numpy(data).view(stored.torch_dtype).view(stored.shape)
            if isinstance(table := self.tables.get(name), OverlayTable):
                tables[name][table.rows] = table.gather(table.rows).to(stored.torch_dtype)
        return tables

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
        """Look up what the device map gives a table, or the innermost module around it: a device or a `TablePlace`."""
        places = self.places or {}
        parts = f"{prefix}{TABLES}.{name}.weight".split(".")
        around = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        place = next((places[module] for module in around if module in places), "cpu")
        return TablePlace("mmap") if place == "disk" else place


def stored_table(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """Find a table among the tensors of a checkpoint, of a whole model or of its base; None where it is not there."""
    return next((stored[full] for full in _names_of(name) if full in stored), None)


def _names_of(table: str) -> tuple[str, str]:
    """What a checkpoint of a whole model, and one of its base, call a table."""
    return f"model.{TABLES}.{table}.weight", f"{TABLES}.{table}.weight"


def warn_of_patches(source: Any) -> None:
    """Warn that the row patches of a model's folder are not applied by whoever loads the model itself."""
    if Path(str(source), "patches").is_dir():
        warnings.warn(
            f"the row patches in {source}/patches are not applied here: load them with RowPatch.load(file).apply"
            f"(model), in the order of their names, or write them into the tables: engram-lm patch merge {source} "
            "--fold",
            stacklevel=3,
        )
