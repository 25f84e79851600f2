"""One call that opens a table wherever it is."""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from engram_lm.errors import ConfigError
from engram_lm.tables.around.cache import CachedTable
from engram_lm.tables.available_memory import available_bytes, is_on_network
from engram_lm.tables.choose import Place, Tier, TierChoice, check_tier, choose_tier, spare_bytes
from engram_lm.tables.files.byte_source import is_address
from engram_lm.tables.files.sources import choose_layout, find_tables
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.device import load_resident
from engram_lm.tables.tiers.file import FileTable
from engram_lm.tables.tiers.host import HostTable
from engram_lm.tables.tiers.mapped import MappedTable
from engram_lm.tables.tiers.mooncake import MooncakeTable
from engram_lm.tables.tiers.record_table import RecordTable
from engram_lm.tables.tiers.remote import RemoteTable
from engram_lm.tables.tiers.remote_files import RemoteFolder, RemoteOptions

_OPENERS: dict[str, Callable[..., Table]] = {
    "device": load_resident,
    "host": HostTable,
    "mmap": MappedTable,
    "file": FileTable,
    "remote": RemoteTable,
}
"""The registry of tiers: what opens a layout on each. Called with a layout and a dtype, options by name."""


def table_layouts(source: str | os.PathLike[str], **options: Any) -> dict[int | str, RowLayout]:
    """Find the tables of a checkpoint or a packed file, here or on a server; see `find_tables`, also for its errors.

    Args:
        source: What `find_tables` takes, or the address (https, s3, gs, hf, … as fsspec opens them) of a checkpoint
            folder, of a ``.safetensors`` file or of a packed file.
        options: Fields of `RemoteOptions`, for addresses.

    Raises:
        ConfigError: Options without an address.
        RemoteError: Nobody answers at the address, or not with ranges.
        MissingExtraError: fsspec, or its package for this kind of address, is not installed.
    """
    if is_address(source):
        folder = RemoteFolder(str(source), **options)
        return {key: folder.place(layout) for key, layout in find_tables(folder, folder.file).items()}
    if options:
        raise ConfigError(f"the options {', '.join(sorted(options))} are for addresses, and {source} is not an address")
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
        source: A folder, file or address that `table_layouts` knows, ``mooncake://HOST:PORT/NAME``, or a layout.
        layer: Which of the source's tables: a block number or name; may be left out where there is one.
        tier: Where rows are kept and read:

            - ``"device"``: decoded, in the memory of an accelerator (option ``device``; without one, the CPU).
            - ``"host"``: in this process's memory, as stored.
            - ``"mmap"``: in their files, mapped; the fastest where the page cache holds them. All processes of a
              machine share that one copy.
            - ``"file"``: in their files, by positional reads; survives files that are cut, and network disks.
            - ``"remote"``: on the server.
            - ``"auto"``: chosen by `choose_tier`: on the host where it fits into 90 % of the available memory, else
              where it lies. Never on a device. ``stats()["tier_reason"]`` says why.
        dtype: Type of the rows that `Table.gather` returns. None: as stored, 8-bit floats as bfloat16, integers as
            float32.
        cache_bytes: Memory for rows that were read before; 0 keeps none.
        options: Of the tier's class: `FileTable`, `HostTable`, `MappedTable`, `RemoteOptions`, …

    Returns:
        The open table; close it when done.

    Raises:
        CheckpointError: The source holds no table, or is malformed, incomplete or truncated.
        ConfigError: An impossible tier, layer, option or ``dtype``, or a table that does not fit.
        RemoteError: Nobody answers at the address, or not with ranges.
        MissingExtraError: The packages for this kind of address are not installed.
    """
    tier = check_tier(tier)
    if type(cache_bytes) is not int or cache_bytes < 0:
        raise ConfigError(f"cache_bytes is a number of bytes, 0 or more, not {cache_bytes!r}")
    if cache_bytes and tier == "device":
        raise ConfigError("a table on a device needs no cache of rows; use cache_bytes=0")
    table, reason = _open(source, layer, tier, dtype, options)
    try:
        if cache_bytes:
            assert isinstance(table, RecordTable)  # every table but the device's is one
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
    """Open a table without a cache; returns it and why it is on this tier."""
    if isinstance(source, str) and source.startswith("mooncake://"):
        return _open_mooncake(source, layer, tier, dtype, options)
    asking = {field.name for field in dataclasses.fields(RemoteOptions)} & options.keys()
    remote_options = {name: options[name] for name in asking}
    if isinstance(source, RowLayout):
        if layer is not None:
            raise ConfigError(f"a layout is one table; layer={layer!r} chooses nothing")
        layout, is_remote = source, any(map(is_address, source.files))
    else:
        is_remote = is_address(source)
        layouts = table_layouts(source, **remote_options) if is_remote else table_layouts(source)
        layout = choose_layout(layouts, layer, str(source))
    choice = _choose(layout, is_remote) if tier == "auto" else TierChoice(tier, "asked for")
    if choice.tier == "remote" and not is_remote:
        where = "the layout" if isinstance(source, RowLayout) else source
        raise ConfigError(f"tier='remote' reads addresses, and {where} is not an address")
    if not is_remote or choice.tier == "remote":
        return _made(_OPENERS[choice.tier], choice.tier, options, layout, dtype), choice.reason
    if choice.tier in ("mmap", "file"):
        raise ConfigError(
            f"tier={choice.tier!r} reads local files and the source is an address; use 'remote', 'host' or 'device'"
        )
    rest = {name: value for name, value in options.items() if name not in asking}
    with contextlib.closing(RemoteTable(layout, dtype, **remote_options)) as served:
        return _made(_OPENERS[choice.tier], choice.tier, rest, served, dtype), choice.reason


def _open_mooncake(
    source: str, layer: int | str | None, tier: Tier, dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[Table, str]:
    if tier not in ("auto", "remote"):
        raise ConfigError(f"{source} is read with tier='remote', not {tier!r}")
    place, _, name = source.removeprefix("mooncake://").partition("/")
    if not name or layer is not None:
        raise ConfigError(
            f"{source}: expected mooncake://HOST:PORT/NAME with the name that publish_to_mooncake returned, and no "
            "layer, since a name is one table"
        )
    table = _made(MooncakeTable, "remote", options, f"mooncake://{place}", name, dtype)
    return table, "asked for" if tier == "remote" else "a store on other machines"


def _choose(layout: RowLayout, is_remote: bool) -> TierChoice:
    """Choose a tier by where the table is and whether it fits."""
    available = available_bytes()
    spare = None if available is None else spare_bytes(available)
    on_network = any(map(is_on_network, layout.files))
    lies: Place = "address" if is_remote else "network" if on_network else "disk"
    return choose_tier(layout.stored_bytes, spare, lies=lies)


def _made(opener: Callable[..., Table], tier: str, options: dict[str, Any], *arguments: Any) -> Table:
    """Open a table on a tier; options that the tier does not have are refused by name."""
    parameters = inspect.signature(opener).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = {field.name for field in dataclasses.fields(RemoteOptions)}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(f"tier={tier!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return opener(*arguments, **options)
