"""This machine as placement sees it: memory, accelerator, and a disk that is timed for a second."""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_lm.errors import ConfigError
from engram_lm.tables.available_memory import available_bytes, is_on_network, read_meminfo
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.layout import Extent, Part, RowLayout
from engram_lm.tables.tiers.file import FileTable
from engram_lm.tables.tiers.page_cache import drop_from_memory

PAGE_BYTES = 4096
"""Bytes of one random read."""
DISK_THREADS = 16
"""Reads under way at the same time while the disk is measured."""
LEAST_ROW_SECONDS = 1e-7
"""Seconds that a row takes at least. A row of a table of gigabytes misses every cache, that of addresses too, which a
sample of 64 MiB does not show: 6,144 rows of 256 bytes took 0.7 to 1.0 ms (measured)."""

_GIB = 1 << 30
_SAMPLE_SECONDS = 0.4
_SMALLEST_FILE_BYTES = 16 << 20
_FILES_LOOKED_AT = 10_000


@dataclasses.dataclass(frozen=True)
class DiskRate:
    """How many random reads of 4096 bytes a disk does in a second."""

    serial_reads_per_second: float
    """Reads made one after another, as a gather of one row makes them."""
    parallel_reads_per_second: float
    """Reads made many at a time, as the mmap and file tiers make them for several rows."""
    method: str
    """How the rates were found."""
    is_on_network: bool = False
    """Whether another machine serves the disk: a file may vanish there, which ends a process that has it mapped."""

    @classmethod
    def told(cls, reads_per_second: float) -> "DiskRate":
        """Make a disk of a known rate of parallel reads; a tenth of that is assumed for reads one by one."""
        return cls(reads_per_second / 10, reads_per_second, "told; one by one a tenth is assumed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThisMachine:
    """What matters of a machine for tables. Sizes in bytes."""

    ram_total_bytes: int
    """Memory of the machine."""
    ram_available_bytes: int
    """Memory that can be taken without swapping, on the machine."""
    ram_allowed_bytes: int
    """The same within this process's container; less where a limit is set."""
    swap_bytes: int = 0
    """Swap space."""
    device_bytes: int = 0
    """Free memory of the accelerator, 0 without one."""
    device_is_integrated: bool = False
    """Whether the accelerator's memory is the machine's."""
    bytes_per_second: float = 10e9
    """Bytes of weights that the computing device reads in a second."""
    flops_per_second: float = 50e9
    """Operations that it does in a second."""
    row_seconds: float = 2e-7
    """Seconds to read one row of many from the machine's memory."""
    disk: DiskRate | None = None
    """The disk that holds the tables, where its rate is known."""


def read_machine(
    *, ram_gib: float | None = None, device_gib: float | None = None, disk: DiskRate | None = None, row_bytes: int = 256
) -> ThisMachine:
    """Look at this machine. Sizes in GiB that are given replace what is found, and container limits then do not count.

    Rows of ``row_bytes`` are read to time the memory; a ``device_gib`` of 0 stands for no accelerator.

    Raises:
        ConfigError: The system does not say how much memory it has, and ``ram_gib`` does not either.
    """
    memory = read_meminfo(Path("/proc/meminfo"))
    total = memory.get("MemTotal", 0)
    available = memory.get("MemAvailable", total)
    allowed = available_bytes()
    allowed = available if allowed is None else min(allowed, available)
    if ram_gib is not None:
        available = allowed = round(ram_gib * _GIB)
    elif not total:
        raise ConfigError("this system does not say how much memory it has: give --ram-gib")
    device = _device()
    if device_gib is not None:
        device["device_bytes"] = round(device_gib * _GIB)
    bandwidth, flops, row_seconds = _sample_memory(row_bytes)
    return ThisMachine(
        ram_total_bytes=max(total, available),
        ram_available_bytes=available,
        ram_allowed_bytes=allowed,
        swap_bytes=memory.get("SwapTotal", 0),
        disk=disk,
        row_seconds=row_seconds,
        **{"bytes_per_second": bandwidth, "flops_per_second": flops, **device},
    )


def _device() -> dict[str, Any]:
    """What torch says of the accelerator; nothing where it has none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "device_bytes": torch.cuda.mem_get_info(0)[0],
        "device_is_integrated": bool(getattr(properties, "is_integrated", False)),
    }
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if clock and width:
        # Kilohertz and bits, two transfers a clock; 70 % of the peak is what reading weights reaches.
        found["bytes_per_second"] = 0.7 * 2 * clock * 1e3 * width / 8
        # A rough guess, so that large batches are not free; decoding is bound by memory long before.
        found["flops_per_second"] = properties.multi_processor_count * 1e12
    return found


def _sample_memory(row_bytes: int) -> tuple[float, float, float]:
    """Bytes a second of copying, FLOPs a second of a product, seconds of a row among many; about 50 ms in all."""
    source = np.zeros(64 << 20, np.uint8)
    target = np.empty_like(source)
    copied = min(_timed(lambda: np.copyto(target, source)) for _ in range(3))
    rows = source[: len(source) // row_bytes * row_bytes].reshape(-1, row_bytes)
    some_rows = np.random.default_rng(0).integers(0, len(rows), (3, 8192))
    # Other rows each time, because those of the time before are in the processor's cache.
    taken = min(_timed(functools.partial(np.take, rows, numbers, axis=0)) for numbers in some_rows)
    left = torch.ones(512, 512)
    multiplied = min(_timed(lambda: left @ left) for _ in range(3))
    return 2 * len(source) / copied, 2 * 512**3 / multiplied, max(taken / 8192, LEAST_ROW_SECONDS)


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)


def measure_disk(folder: Path, *, seconds: float = 2 * _SAMPLE_SECONDS) -> DiskRate:
    """Time random reads of the largest file below a folder (or of a file), past the page cache.

    Raises:
        ConfigError: There is no file of at least 16 MiB, or it can be read neither with ``O_DIRECT`` nor from dropped
            pages.
    """
    path, size = _largest_file(folder)
    part = Part(PAGE_BYTES, (Extent(str(path), 0, size // PAGE_BYTES, PAGE_BYTES),))
    layout, method = RowLayout(RowCodec(PAGE_BYTES // 4, torch.float32), (part,)), "O_DIRECT"
    try:
        table = FileTable(layout, direct=True, num_threads=DISK_THREADS)
    except ConfigError:
        table = FileTable(layout, read_ahead=False, num_threads=DISK_THREADS)
        method, left = "after posix_fadvise(POSIX_FADV_DONTNEED)", drop_from_memory(path)
        if left is None or left > 0.1:
            raise ConfigError(
                f"{path} lies on a file system that neither reads past its cache nor drops it, so its disk cannot be "
                "measured; say its rate with --disk-iops"
            ) from None
    serial, parallel = (_reads_per_second(table, count, seconds / 2) for count in (1, 64 * DISK_THREADS))
    table.close()
    said = f"{method}, {seconds:.1f} s of reads from {path} ({size:,} bytes), 1 and {DISK_THREADS} threads"
    return DiskRate(serial, max(serial, parallel), said, is_on_network(path))


def _reads_per_second(table: FileTable, count: int, seconds: float) -> float:
    """Random pages that are read in a second, ``count`` at a time."""
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() < started + seconds:
        table.read_records(torch.randint(table.num_rows, (count,)))
        done += count
    return done / (time.perf_counter() - started)


def _largest_file(folder: Path) -> tuple[Path, int]:
    files: Any = [folder]
    if folder.is_dir():
        files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in sorted(names))
    largest, size = None, _SMALLEST_FILE_BYTES - 1
    for _, path in zip(range(_FILES_LOOKED_AT), files, strict=False):
        # Holes of a file are not read from the disk, so a file that is mostly holes does not count.
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            if status.st_size > size and getattr(status, "st_blocks", status.st_size) * 512 >= status.st_size // 2:
                largest, size = path, status.st_size
    if largest is None:
        raise ConfigError(
            f"{folder} holds no file of {_SMALLEST_FILE_BYTES >> 20} MiB or more to time reads with; name the folder "
            "of the tables, or say the disk's rate with --disk-iops"
        )
    return largest, size
