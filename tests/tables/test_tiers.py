"""Every tier returns the bits of the plain twin, refuses what the twin refuses, and ends well however it is used."""

import copy
import os
import pickle
import threading

import pytest
import torch
from tests.tables.tiers import KINDS, READS_FILES, TIERS, written

from engram_lm.errors import CheckpointError, ConfigError, EngramError, RowRangeError, TableClosedError
from engram_lm.tables import ResidentTable

pytestmark = pytest.mark.parametrize("tier", TIERS)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def requests(num_rows):
    """Rows of many shapes: none, one, edges, duplicates, more than fit a system call or a task, sorted and not."""
    generator = torch.Generator().manual_seed(7)
    yield torch.empty(0, 2, dtype=torch.long)
    yield torch.tensor(num_rows - 1)
    yield torch.tensor([0, num_rows - 1, 0, 0, num_rows // 2, num_rows // 2 - 1, num_rows // 2 + 1])
    yield torch.full((3, 5), 4)
    yield torch.arange(num_rows)
    yield torch.randint(num_rows, (2, 3, 37), generator=generator)
    yield torch.randint(num_rows, (2500,), generator=generator)[::2]


def test_the_rows_are_those_of_the_plain_twin(tier, kind, tmp_path):
    layout, rows = written(tmp_path, kind)
    twin = ResidentTable(rows)
    with TIERS[tier](layout, None) as table:
        assert (table.num_rows, table.width, table.dtype) == (twin.num_rows, twin.width, twin.dtype)
        for numbers in requests(table.num_rows):
            expected, found = twin.gather(numbers), table.gather(numbers)
            assert found.shape == expected.shape and torch.equal(found, expected)
            out = torch.full_like(expected, 7)
            assert table.gather(numbers, out=out) is out
            assert torch.equal(out, expected)


@pytest.mark.parametrize("width", [1, 31, 1030, 5000])
def test_rows_of_any_width_lie_on_as_many_pages_as_they_like(tier, width, tmp_path):
    layout, rows = written(tmp_path, "F32" if width > 31 else "FP8 with block scales", num_rows=40, width=width)
    numbers = torch.randint(40, (60,), generator=torch.Generator().manual_seed(1))
    with TIERS[tier](layout, None) as table:
        assert torch.equal(table.gather(numbers), rows[numbers])


def test_another_type_is_converted_when_rows_are_read(tier, tmp_path):
    layout, rows = written(tmp_path, "BF16")
    with TIERS[tier](layout, torch.float32) as table:
        assert table.dtype == torch.float32
        assert torch.equal(table.gather(torch.arange(101)), rows.float())


@pytest.mark.parametrize("bad", [-1, 101, 2**40])
def test_a_row_outside_the_table_is_refused_and_nothing_is_written(tier, bad, tmp_path):
    layout, _ = written(tmp_path, "F32")
    out = torch.full((2, 70), 3.0)
    with TIERS[tier](layout, None) as table:
        with pytest.raises(RowRangeError, match=rf"{bad}.*0 to 100"):
            table.gather(torch.tensor([3, bad]), out=out)
        with pytest.raises(RowRangeError, match="int64"):
            table.gather(torch.tensor([1.0]))
        assert (out == 3).all()


def test_an_out_of_another_shape_or_type_is_refused(tier, tmp_path):
    layout, _ = written(tmp_path, "F32")
    with TIERS[tier](layout, None) as table:
        if isinstance(table, ResidentTable):
            pytest.skip("the twin lets torch broadcast and convert")
        for out in (torch.empty(70), torch.empty(2, 70, dtype=torch.bfloat16)):
            with pytest.raises(ConfigError, match="expected"):
                table.gather(torch.tensor([1, 2]), out=out)


def test_a_closed_table_refuses_and_may_be_closed_twice(tier, tmp_path):
    layout, _ = written(tmp_path, "F32")
    with TIERS[tier](layout, None) as table:
        table.gather(torch.arange(3))
        table.close()
        table.close()
        with pytest.raises(TableClosedError):
            table.gather(torch.tensor([0]))


def test_several_threads_read_the_same_bytes(tier, tmp_path):
    layout, rows = written(tmp_path, "FP8 with block scales")
    wrong = []
    with TIERS[tier](layout, None) as table:

        def read(seed):
            numbers = torch.randint(101, (300,), generator=torch.Generator().manual_seed(seed))
            try:
                wrong.extend(seed for _ in range(5) if not torch.equal(table.gather(numbers), rows[numbers]))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closing_while_others_read_gives_whole_rows_or_the_error(tier, tmp_path):
    layout, rows = written(tmp_path, "F32")
    numbers, started, found = torch.arange(101).repeat(3), threading.Barrier(4), []
    with TIERS[tier](layout, None) as table:

        def read():
            started.wait()
            try:
                for _ in range(200):
                    assert torch.equal(table.gather(numbers), rows[numbers])
            except Exception as error:
                found.append(type(error))

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        table.gather(numbers)
        table.close()
        for thread in threads:
            thread.join()
    assert set(found) <= {TableClosedError}


def test_a_file_that_is_cut_is_refused_at_open_and_while_open(tier, tmp_path):
    layout, _ = written(tmp_path, "F32", num_rows=400)
    cut, size = layout.files[0], os.path.getsize(layout.files[0])
    with TIERS[tier](layout, None) as table:
        table.gather(torch.arange(400))
        if tier in READS_FILES:
            # On the last page, in the middle, and all of it; rows that are gone and rows that are not.
            for left in (size - 3, size // 2, 0):
                os.truncate(cut, left)
                for numbers in (torch.tensor([399]), torch.arange(400)):
                    with pytest.raises(EngramError, match=rf"{os.path.basename(cut)}.*(expected|asked)") as caught:
                        table.gather(numbers)
                    assert str(size) in str(caught.value) and (tier == "remote" or str(left) in str(caught.value))
    os.truncate(cut, size - 3)
    with pytest.raises(EngramError, match=os.path.basename(cut)), TIERS[tier](layout, None):
        pass


def test_copies_and_pickles_read_the_same_rows(tier, tmp_path):
    layout, rows = written(tmp_path, "BF16")
    with TIERS[tier](layout, torch.float32) as table:
        others = [copy.deepcopy(table), pickle.loads(pickle.dumps(table))]
        table.close()
        for other in others:
            assert torch.equal(other.gather(torch.arange(101)), rows.float())
            other.close()


def test_stats_are_plain_numbers_that_count_what_was_read(tier, tmp_path):
    layout, _ = written(tmp_path, "FP8 with block scales")
    with TIERS[tier](layout, None) as table:
        table.gather(torch.arange(10))
        table.gather(torch.tensor([[1, 1]]))
        stats = table.stats()
        assert (stats["num_rows"], stats["width"], stats["table_bytes"]) == (101, 70, 101 * 70 * 2)
        if not isinstance(table, ResidentTable):
            assert (stats["num_gathers"], stats["gathered_rows"], stats["record_bytes"]) == (2, 12, 73)
            assert stats["stored_bytes"] == 101 * 73


def test_runs_of_records_are_copied_as_they_lie(tier, tmp_path):
    layout, _ = written(tmp_path, "FP8 with block scales")
    with TIERS[tier](layout, None) as table:
        if isinstance(table, ResidentTable):
            pytest.skip("rows on a device are decoded already")
        assert torch.equal(table.load_records(30, 77), layout.load_records(30, 77))
        with pytest.raises(RowRangeError):
            table.load_records(90, 102)


def test_a_missing_file_is_refused_by_name(tier, tmp_path):
    layout, _ = written(tmp_path, "F32")
    os.remove(layout.files[1])
    with pytest.raises(EngramError, match=r"b\.safetensors") as caught, TIERS[tier](layout, None):
        pass
    if tier in ("mmap", "file"):
        assert isinstance(caught.value, CheckpointError)
