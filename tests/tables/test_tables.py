"""Every table returns the same rows for the same numbers; the shared suite runs over all of them."""

import threading

import pytest
import torch

from engram_lm.errors import RowRangeError, TableClosedError
from engram_lm.tables import ParameterTable, ResidentTable, Table

NUM_ROWS, WIDTH = 101, 6


def weight() -> torch.Tensor:
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def resident() -> Table:
    return ResidentTable(weight())


def trainable(gradient="sparse") -> ParameterTable:
    table = ParameterTable(NUM_ROWS, WIDTH, gradient=gradient)
    with torch.no_grad():
        table.weight.copy_(weight())
    return table


@pytest.fixture(params=[resident, trainable], ids=["resident", "parameter"])
def table(request):
    return request.param()


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 3, 5), ()])
def test_gathered_rows_are_the_table_s_rows_in_the_order_asked(table, shape):
    rows = torch.randint(NUM_ROWS, shape)
    assert torch.equal(table.gather(rows), weight()[rows])
    assert table.gather(rows).shape == (*shape, WIDTH)


def test_first_last_and_repeated_rows_are_read(table):
    rows = torch.tensor([0, NUM_ROWS - 1, 0, 0, NUM_ROWS - 1])
    assert torch.equal(table.gather(rows), weight()[rows])


def test_rows_are_written_where_the_caller_says(table):
    out = torch.empty(2, WIDTH)
    with torch.no_grad():
        assert table.gather(torch.tensor([5, 6]), out=out) is out
    assert torch.equal(out, weight()[5:7])


@pytest.mark.parametrize("bad", [-1, NUM_ROWS, 2**40])
def test_a_row_outside_the_table_is_refused_by_number(table, bad):
    with pytest.raises(RowRangeError, match=rf"{bad}.*0 to {NUM_ROWS - 1}"):
        table.gather(torch.tensor([3, bad]))


def test_row_numbers_of_another_type_are_refused(table):
    with pytest.raises(RowRangeError, match="int64"):
        ResidentTable(weight()).gather(torch.tensor([1.0]))


def test_prefetch_counts_distinct_rows_and_changes_nothing(table):
    ticket = table.prefetch(torch.tensor([[4, 4], [9, 4]]))
    assert (ticket.num_rows, ticket.num_bytes) == (2, 2 * WIDTH * 4)
    assert table.stats()["table_bytes"] == NUM_ROWS * WIDTH * 4


def test_several_threads_read_the_same_bytes(table):
    wrong = []

    def read(seed):
        rows = torch.randint(NUM_ROWS, (500,), generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            wrong.extend([seed] * (not torch.equal(table.gather(rows), weight()[rows])))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_table_says_so():
    table = resident()
    table.close()
    table.close()
    with pytest.raises(TableClosedError, match="open it again"):
        table.gather(torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_keep_the_type_they_are_stored_in(dtype):
    table = ResidentTable(weight().to(dtype))
    assert table.gather(torch.tensor([1])).dtype == table.dtype == dtype


def test_sparse_and_dense_gradients_of_a_table_are_equal_and_only_touched_rows_have_one():
    rows = torch.tensor([[3, 3, 50], [7, 3, 100]])
    factor = torch.randn(2, 3, WIDTH)
    gradients = {}
    for kind in ("sparse", "dense"):
        table = trainable(kind)
        (table.gather(rows) * factor).sum().backward()
        gradients[kind] = table.weight.grad
    assert gradients["sparse"].is_sparse and not gradients["dense"].is_sparse
    torch.testing.assert_close(gradients["sparse"].to_dense(), gradients["dense"])
    assert set(gradients["sparse"].coalesce().indices()[0].tolist()) == {3, 7, 50, 100}


def test_a_trainable_table_starts_with_the_spread_asked_for():
    table = ParameterTable(1000, 8, std=0.5)
    assert abs(float(table.weight.detach().std()) - 0.5) < 0.02
