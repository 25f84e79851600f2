"""Tables in a process that was forked while other threads were reading: it has none of them, and waits for none."""

import contextlib
import dataclasses
import multiprocessing
import os

import pytest
import torch
from tests.tables.tiers import serving, written

from engram_lm.tables import FileTable, MappedTable, RemoteTable
from engram_lm.tables.around.cache import CachedTable
from engram_lm.tables.around.read_ahead import ReadAheadTable


@contextlib.contextmanager
def remote(layout, folder):
    with serving(folder) as server:
        extents = [
            [dataclasses.replace(extent, file=f"{server.address}/{os.path.basename(extent.file)}") for extent in part]
            for part in (part.extents for part in layout.parts)
        ]
        parts = tuple(
            dataclasses.replace(part, extents=tuple(some)) for part, some in zip(layout.parts, extents, strict=True)
        )
        there = dataclasses.replace(layout, parts=parts, tensors=())
        with contextlib.closing(RemoteTable(there)) as table:
            yield table


KINDS = {
    "mmap": lambda layout, folder: contextlib.closing(MappedTable(layout)),
    "threads": lambda layout, folder: contextlib.closing(FileTable(layout, read_ahead=False, num_threads=2)),
    "cached": lambda layout, folder: contextlib.closing(CachedTable(MappedTable(layout), 1 << 20)),
    "read ahead": lambda layout, folder: contextlib.closing(ReadAheadTable(MappedTable(layout))),
    "remote": remote,
}


def held(table):
    """The locks of a table, and of those below it."""
    owners = [table, getattr(table, "table", None), getattr(table, "_pool", None)]
    return [lock for owner in owners for name in ("_lock", "_count_lock") if (lock := getattr(owner, name, None))]


def _gather(table, rows):
    ahead = table.prefetch(torch.arange(7)) and table.gather(torch.arange(7))
    right = torch.equal(table.gather(torch.arange(101)), rows) and torch.equal(ahead, rows[:7])
    table.close()
    os._exit(0 if right else 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_forked_while_others_read_waits_for_none_of_them(tmp_path, kind):
    layout, rows = written(tmp_path, "F32")
    with KINDS[kind](layout, tmp_path) as table:
        assert torch.equal(table.gather(torch.arange(101)), rows), "threads and connections are there"
        if kind == "cached":
            whole = table._records.copy()
        with contextlib.ExitStack() as locks:
            for lock in held(table):
                locks.enter_context(lock)
            if kind == "cached":
                table._records[:] = 255  # half-way: the numbers of rows are there, their records are not yet
            child = multiprocessing.get_context("fork").Process(target=_gather, args=(table, rows))
            child.start()
            if kind == "cached":
                table._records[:] = whole
        child.join(10)
        waits = child.is_alive()
        child.kill()
        assert (waits, child.exitcode) == (False, 0)
        assert torch.equal(table.gather(torch.arange(101)), rows), "and the other process notices nothing"
