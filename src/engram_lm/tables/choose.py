"""Which tier suits a table: the one rule, for ``open_table(tier="auto")`` and ``engram-lm plan --placement`` alike."""

import dataclasses
from typing import Literal, get_args

from engram_lm.errors import ConfigError

Tier = Literal["auto", "device", "host", "mmap", "file", "remote"]
"""Where rows are kept and read, see `engram_lm.tables.open_table`."""

Place = Literal["disk", "network", "address"]
"""Where the files of a table lie: on a disk of this machine, of another one, or at an address."""

TIERS: tuple[Tier, ...] = get_args(Tier)
"""All tiers by name, ``"auto"`` first."""

MEMORY_SHARE = 0.9
"""Share of free memory that tables may take; the rest is for activations, allocators and the rest of the system."""

_REMOVED = {
    "shared": "use 'mmap': the page cache holds one copy of a mapped file for all processes of the machine; its "
    "options populate=True and lock=True bring the rows into memory and keep them there",
    "http": "use 'remote', which reads http, https and every other address that fsspec opens",
}


@dataclasses.dataclass(frozen=True)
class TierChoice:
    """A tier and why it was chosen."""

    tier: Tier
    """The tier; never ``"auto"``."""
    reason: str
    """Why, in words."""


def check_tier(tier: str, called: str = "tier") -> Tier:
    """Return the tier of this name; a `ConfigError`, which calls the option ``called``, where there is none."""
    for known in TIERS:
        if tier == known:
            return known
    if tier in _REMOVED:
        raise ConfigError(f"{called} {tier!r} is no longer there; {_REMOVED[tier]}")
    raise ConfigError(f"{called} is one of {', '.join(TIERS)}, not {tier!r}")


def spare_bytes(available_bytes: int, beside_bytes: int = 0) -> int:
    """Memory that tables may take: `MEMORY_SHARE` of what is left beside what other things will still take of it."""
    return max(0, int(MEMORY_SHARE * (available_bytes - beside_bytes)))


def choose_tier(
    table_bytes: int,
    memory_bytes: int | None,
    *,
    device_bytes: int = 0,
    lies: Place = "disk",
) -> TierChoice:
    """Choose a tier for tables by their size, the memory that is left for them, and where their files lie.

    Tables go to the first place that has room for all of them: an accelerator, then the memory of the host (None where
    the system does not say, see `spare_bytes`). Otherwise their rows are read where they lie: mapped from a disk of
    this machine, by positional reads from a disk of another one, where a mapped file may vanish, and by requests from
    an address.
    """
    size = _gigabytes(table_bytes)
    if lies == "address":
        return TierChoice("remote", "the source is an address")
    if table_bytes <= device_bytes:
        return TierChoice("device", f"the tables' {size} fit into the {_gigabytes(device_bytes)} left on the device")
    if memory_bytes is not None and table_bytes <= memory_bytes:
        return TierChoice("host", f"the tables' {size} fit in the {_gigabytes(memory_bytes)} of memory left for them")
    room = "memory of unknown size" if memory_bytes is None else f"the {_gigabytes(memory_bytes)} of memory left"
    if lies == "network":
        why = "they lie on a network file system, where a mapped file may vanish"
        return TierChoice("file", f"the tables' {size} do not fit in {room}, and {why}")
    return TierChoice("mmap", f"the tables' {size} do not fit in {room}, and they lie on a disk of this machine")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
