"""One call that opens a table wherever it is."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from engram_lm.errors import ConfigError
from engram_lm.tables.available_memory import available_bytes, is_on_network
from engram_lm.tables.choose import Tier, check_tier, choose_tier, spare_bytes
from engram_lm.tables.files.byte_source import is_address
from engram_lm.tables.files.sources import choose_layout, find_tables
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.http import HttpTable, RemoteFolder
from engram_lm.tables.tiers.http_ranges import HttpOptions

__all__ = ["open_table", "table_layouts"]


def table_layouts(source: str | os.PathLike[str], **options: Any) -> dict[int | str, RowLayout]:
    """Find the tables of a checkpoint or a packed file, here or on a server; see `find_tables`.

    Args:
        source: What `find_tables` takes, or the http(s) address of a checkpoint folder, of a ``.safetensors`` file or
            of a packed file.
        options: Fields of `HttpOptions`, for addresses.

    Returns:
        Block number (from 0), or the table's name where it is none → where the rows lie, in ascending order.

    Raises:
        CheckpointError: As `find_tables`.
        ConfigError: Options without an address.
        RemoteError: Nobody answers at the address, or not with ranges.
    """
    if is_address(source):
        folder = RemoteFolder(str(source), **options)
        try:
            return {key: folder.place(layout) for key, layout in find_tables(folder, folder.file).items()}
        finally:
            folder.close()
    if options:
        raise ConfigError(f"the options {', '.join(sorted(options))} are for addresses, {source} is none")
    return find_tables(source)


def open_table(
    source: RowLayout | str | os.PathLike[str],
    *,
    layer: int | str | None = None,
    tier: Tier = "auto",
    dtype: torch.dtype | None = None,
    cache_bytes: int = 0,
    **options: Any,
) -> Table:
    """Open a table to read rows from. Every tier returns the same bits.

    Args:
        source: A folder or file that `table_layouts` knows, the http(s) address of one, ``mooncake://…``, or a layout.
        layer: Which of the source's tables: a block number or name; may be left out where there is one.
        tier: Where rows are kept and read:

            - ``"device"``: decoded, in the memory of an accelerator (option ``device``; the CPU where there is none).
            - ``"host"``: in this process's memory, as stored.
            - ``"mmap"``: in their files, mapped; the fastest where the page cache holds them. All processes of a
              machine share that one copy.
            - ``"file"``: in their files, by positional reads; survives files that are cut, and network disks.
            - ``"http"`` (or ``"remote"``): on the server.
            - ``"auto"``: chosen by `choose_tier`: on the host where it fits into 90 % of the available memory, else
              where it lies. Never on a device. ``stats()["tier_reason"]`` says why.
        dtype: Type of the rows that `Table.gather` returns; the stored one where None, bfloat16 for 8-bit rows.
        cache_bytes: Memory for rows that were read before; 0 keeps none.
        options: Of the tier's class: `FileTable`, `HostTable`, `MappedTable`, `HttpOptions`, …

    Returns:
        The open table; close it when done.

    Raises:
        CheckpointError: The source holds no table, or is malformed, incomplete or truncated.
        ConfigError: An impossible tier, layer, option or ``dtype``, or a table that does not fit.
        RemoteError: Nobody answers at the address, or not with ranges.
    """
    tier = check_tier(tier)
    if type(cache_bytes) is not int or cache_bytes < 0:
        raise ConfigError(f"cache_bytes is a number of bytes, 0 or more, not {cache_bytes!r}")
    if cache_bytes and tier == "device":
        raise ConfigError("a table on a device needs no cache of rows; use cache_bytes=0")
    table, reason = _open(source, layer, tier, dtype, options)
    try:
        if cache_bytes:
            from engram_lm.tables.around.cache import CachedTable
            from engram_lm.tables.tiers.record_table import RecordTable

            assert isinstance(table, RecordTable)  # only the device's is not
            table = CachedTable(table, cache_bytes)
    except BaseException:
        table.close()
        raise
    table.tier_reason = reason
    return table


def _open(
    source: RowLayout | str | os.PathLike[str],
    layer: int | str | None,
    tier: Tier,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> tuple[Table, str]:
    """Open a table without a cache, and say why on this tier."""
    if isinstance(source, str) and source.startswith("mooncake://"):
        if tier not in ("auto", "remote"):
            raise ConfigError(f"{source} is read with tier='remote', not {tier!r}")
        from engram_lm.tables.tiers.mooncake import MooncakeTable

        place, _, name = source.removeprefix("mooncake://").partition("/")
        if not name or layer is not None:
            raise ConfigError(
                f"{source}: expected mooncake://HOST:PORT/NAME with the name that publish_to_mooncake returned, and no "
                "layer, since a name is one table"
            )
        table = _made(MooncakeTable, "remote", f"mooncake://{place}", dtype, options, name)
        return table, "asked for" if tier == "remote" else "a store on other machines"
    remote = is_address(source)
    if isinstance(source, RowLayout):
        layout, remote = source, any(map(is_address, source.files))
        if layer is not None:
            raise ConfigError(f"a layout is one table; layer={layer!r} chooses nothing")
    else:
        layout = choose_layout(table_layouts(source, **(_http_options(options) if remote else {})), layer, str(source))
    reason = "asked for"
    if tier == "auto":
        tier, reason = _choose(layout, remote)
    if remote and tier == "remote":
        tier = "http"
    if tier in ("http", "remote") and not remote:
        raise ConfigError(
            f"tier={tier!r} reads addresses; {source if not isinstance(source, RowLayout) else 'it'} is none"
        )
    if not remote:
        return _OPENERS[tier](layout, dtype, options), reason
    if tier in ("mmap", "file"):
        raise ConfigError(
            f"tier={tier!r} reads local files and the source is an address; use 'http', 'host' or 'device'"
        )
    asking = _http_options(options)
    rest = {name: value for name, value in options.items() if name not in asking}
    if tier == "http":
        return HttpTable(layout, dtype, **asking, **rest), reason
    served = HttpTable(layout, dtype, **asking)
    try:
        return _OPENERS[tier](served, dtype, rest), reason
    finally:
        served.close()


def _http_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that say how a server is asked."""
    known = {field.name for field in dataclasses.fields(HttpOptions)}
    return {name: value for name, value in options.items() if name in known}


def _choose(layout: RowLayout, remote: bool) -> tuple[Tier, str]:
    """Choose a tier by where the table is and whether it fits."""
    if remote:
        return "http", "the source is an address"
    available = available_bytes()
    spare = None if available is None else spare_bytes(available)
    on_network = any(map(is_on_network, layout.files))
    choice = choose_tier(layout.stored_bytes, spare, lies="network" if on_network else "disk")
    return choice.tier, choice.reason


def _on_device(source: Any, dtype: torch.dtype | None, options: dict[str, Any]) -> Table:
    from engram_lm.tables.tiers.host import load_in_pieces
    from engram_lm.tables.tiers.resident import ResidentTable

    options = dict(options)
    device = torch.device(options.pop("device", "cuda" if torch.cuda.is_available() else "cpu"))
    _refuse(options, "device")
    codec = source.codec
    returned = codec.checked_dtype(dtype)
    try:
        weight = torch.empty(source.num_rows, codec.width, dtype=returned, device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"{device} has no room for {source.num_rows} rows of {codec.width} numbers of {returned}; use tier='host'"
        ) from error

    def store(rows: slice, records: torch.Tensor) -> None:
        weight[rows] = codec.decode(records, returned).to(device)

    load_in_pieces(source, store)
    return ResidentTable(weight)


def _in_host(source: Any, dtype: torch.dtype | None, options: dict[str, Any]) -> Table:
    from engram_lm.tables.tiers.host import HostTable

    return _made(HostTable, "host", source, dtype, options)


def _mapped(layout: RowLayout, dtype: torch.dtype | None, options: dict[str, Any]) -> Table:
    from engram_lm.tables.tiers.mapped import MappedTable

    return _made(MappedTable, "mmap", layout, dtype, options)


def _in_file(layout: RowLayout, dtype: torch.dtype | None, options: dict[str, Any]) -> Table:
    from engram_lm.tables.tiers.file import FileTable

    return _made(FileTable, "file", layout, dtype, options)


def _made(kind: Any, tier: str, source: Any, dtype: torch.dtype | None, options: dict[str, Any], *place: str) -> Table:
    """Make a table of a class, options it does not have refused by name."""
    parameters = inspect.signature(kind).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    _refuse({name: value for name, value in options.items() if name not in known}, tier, known)
    return kind(source, *place, dtype, **options)


def _refuse(options: dict[str, Any], tier: str, known: "set[str] | frozenset[str]" = frozenset()) -> None:
    if options:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none of this name"
        raise ConfigError(f"tier={tier!r} has no option {', '.join(sorted(options))}; {has}")


_OPENERS: dict[str, Callable[[Any, torch.dtype | None, dict[str, Any]], Table]] = {
    "device": _on_device,
    "host": _in_host,
    "mmap": _mapped,
    "file": _in_file,
}
