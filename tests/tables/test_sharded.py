"""Tables divided over ranks: the same rows and gradients as one table, whoever asks; errors reach everybody."""

import gc
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from engram_lm.errors import ConfigError, EngramError, MismatchError, RowRangeError
from engram_lm.tables import ParameterTable
from engram_lm.tables.occupancy import FirstRows
from engram_lm.tables.tiers.row_exchange import in_order
from engram_lm.tables.tiers.sharded import ShardedTable, block_of, draw_rows

WIDTH = 5


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, rank_pools):
    return rank_pools(request.param)


def whole(num_rows, dtype=torch.float32):
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows)).to(dtype)


def asked(rank, num_rows):
    """Rows of a rank: repeats, several dimensions; the second rank asks for nothing."""
    if rank == 1:
        return torch.empty(0, 3, dtype=torch.int64)
    return torch.randint(0, num_rows, (4, 6), generator=torch.Generator().manual_seed(rank))


def weighted(rank, rows):
    """What a rank's loss multiplies its rows by."""
    return torch.randn(*rows.shape, WIDTH, generator=torch.Generator().manual_seed(rank + 10))


def sharded(num_rows, dtype=torch.float32, **options):
    table = ShardedTable(num_rows, WIDTH, dtype=dtype, **options)
    table.load_state_dict({"weight": whole(num_rows, dtype)})
    return table


def read(rank, num_rows, dtype, deduplicate, ahead):
    table = sharded(num_rows, dtype, deduplicate=deduplicate)
    rows = asked(rank, num_rows)
    if ahead:
        assert table.prefetch(rows).num_rows == (len(rows.unique()) if deduplicate else rows.numel())
    result = table.gather(rows)
    asking = table.stats()
    (result * weighted(rank, rows)).sum().backward()
    return result.detach(), table.weight.grad, asking, table.stats()


@pytest.mark.parametrize("ahead", [False, True], ids=["gathered", "asked_ahead"])
@pytest.mark.parametrize("deduplicate", [True, False], ids=["distinct", "repeated"])
@pytest.mark.parametrize("num_rows", [50, 2], ids=["uneven", "fewer_rows_than_ranks"])
def test_rows_and_gradients_are_those_of_one_table(processes, num_rows, deduplicate, ahead):
    world_size = processes.world_size
    found = processes.run(read, num_rows, torch.float32, deduplicate, ahead)
    table = whole(num_rows).requires_grad_()
    # The contract of scale: the gradient of the mean of the ranks' losses, as DDP has it.
    losses = [
        (F.embedding(asked(r, num_rows), table) * weighted(r, asked(r, num_rows))).sum() for r in range(world_size)
    ]
    (sum(losses) / world_size).backward()
    for rank, (result, gradient, *_) in enumerate(found):
        assert torch.equal(result, table.detach()[asked(rank, num_rows)])
        first, count = block_of(num_rows, rank, world_size)
        assert gradient.is_sparse and gradient.shape == (count, WIDTH)
        torch.testing.assert_close(gradient.to_dense(), table.grad[first : first + count])


def test_only_distinct_rows_travel_and_backward_asks_for_nothing(processes):
    distinct = processes.run(read, 50, torch.float32, True, False)
    repeated = processes.run(read, 50, torch.float32, False, False)
    for rank, (_, _, asking, after) in enumerate(distinct):
        first, count = block_of(50, rank, processes.world_size)
        remote = [row for row in asked(rank, 50).unique().tolist() if not first <= row < first + count]
        assert asking["requested_rows"] == asked(rank, 50).numel()
        assert asking["remote_rows"] == len(remote)
        assert asking["place_bytes_sent"] == 4 * len(remote)
        assert asking["row_bytes_received"] == after["gradient_bytes_sent"] == 4 * WIDTH * len(remote)
        assert asking["row_bytes_sent"] == after["gradient_bytes_received"]
        assert {name: value for name, value in after.items() if "gradient" not in name} == {
            name: value for name, value in asking.items() if "gradient" not in name
        }
        others = [row for row in asked(rank, 50).flatten().tolist() if not first <= row < first + count]
        assert repeated[rank][2]["row_bytes_received"] == 4 * WIDTH * len(others)
    assert distinct[0][2]["row_bytes_received"] < repeated[0][2]["row_bytes_received"]


def test_rows_of_a_lower_type_arrive_to_the_bit_and_frequent_rows_add_up_in_float32(processes):
    found = processes.run(read_bfloat16)
    for result, _ in found:
        assert torch.equal(result, whole(4, torch.bfloat16)[torch.zeros(600, dtype=torch.int64)])
    # In bfloat16 a sum of ones stays at 256.
    assert found[0][1].to_dense()[0].tolist() == [600.0] * WIDTH


def read_bfloat16(rank):
    table = sharded(4, torch.bfloat16)
    result = table.gather(torch.zeros(600, dtype=torch.int64))
    result.sum().backward()
    return result.detach(), table.weight.grad


def read_modes(rank):
    table, rows = sharded(50), torch.arange(50).roll(rank)
    with torch.no_grad():
        table.prefetch(rows)
        plain = table.gather(rows)
    with torch.inference_mode():
        inside = torch.arange(50).roll(rank)
        table.prefetch(inside)
        inference = table.gather(inside).clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = table.gather(rows, out=torch.empty(50, WIDTH))
    table.weight.requires_grad_(False)
    frozen = table.gather(rows)
    assert not any(result.requires_grad for result in (plain, inference, frozen)) and lower.requires_grad
    assert table._pending == {}
    return [result.detach() for result in (plain, inference, lower, frozen)]


def test_rows_are_read_without_gradients_under_autocast_and_of_a_frozen_table(processes):
    for rank, results in enumerate(processes.run(read_modes)):
        assert all(torch.equal(result, whole(50).roll(rank, 0)) for result in results)


def read_badly(rank, bad, culprit, ahead):
    table = sharded(50)
    rows = bad if rank == culprit else asked(0, 50)
    try:
        if ahead:
            table.prefetch(rows)
        ahead = "asked"
        table.gather(rows)
    except EngramError as error:
        words = f"{ahead} {type(error).__name__}: {error}"
    # Nobody is left behind in an exchange.
    return words, table.gather(asked(rank, 50)).detach()


@pytest.mark.parametrize("ahead", [False, True], ids=["gathered", "asked_ahead"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([3, 50, 7]), "row 50 is outside the table, which has rows 0 to 49"),
        (torch.tensor([3, -1, 49]), "row -1 is outside the table"),
        (torch.tensor([3], dtype=torch.int32), "must be int64, these are torch.int32"),
        (torch.tensor([3.0]), "must be int64, these are no integers"),
    ],
    ids=["above", "below", "int32", "float"],
)
def test_bad_rows_of_one_rank_are_refused_by_all_with_the_same_words(processes, bad, message, ahead):
    culprit = processes.world_size - 1
    found = processes.run(read_badly, bad, culprit, ahead)
    words = {one for one, _ in found}
    assert len(words) == 1
    assert next(iter(words)).startswith(f"asked RowRangeError: rank {culprit}: ") and message in next(iter(words))
    assert all(torch.equal(rows, whole(50)[asked(rank, 50)]) for rank, (_, rows) in enumerate(found))


def read_another(rank):
    tables = [sharded(50), sharded(51)]
    with pytest.raises(MismatchError) as error:
        tables[rank == 1].gather(asked(0, 50))
    return str(error.value)


def test_ranks_that_read_different_tables_are_told_so(processes):
    words = processes.run(read_another)
    assert len(set(words)) == 1 and "[50, 51" in words[0]


def read_ahead_of_time(rank):
    """Several requests under way, of which some are never gathered."""
    table = sharded(50)
    generator = torch.Generator().manual_seed(rank)
    first, second, third = (torch.randint(0, 50, (9,), generator=generator) for _ in range(3))
    for rows in (first, second, second, third):
        table.prefetch(rows)
    exchanges = [table.stats()["num_exchanges"]]
    results = [table.gather(rows) for rows in (second, first, second)]
    exchanges.append(table.stats()["num_exchanges"])
    # The same tensor with other numbers is another request; what was asked for is let go.
    third.copy_(first)
    results.append(table.gather(third))
    exchanges.append(table.stats()["num_exchanges"])
    left = table._pending.copy()
    table.prefetch(forgotten := first.clone())
    del forgotten
    gc.collect()
    table.prefetch(kept := second.clone())
    pending = len(table._pending)
    table.close()
    results.append(table.gather(kept))
    sum(result.sum() for result in results).backward()
    expected = [whole(50)[rows] for rows in (second, first, second, first, second)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    return exchanges, len(left), pending, len(table._pending), table.weight.grad.to_dense(), first, second


def test_requests_under_way_go_to_whom_they_were_asked_for_and_forgotten_ones_are_let_go(processes):
    found = processes.run(read_ahead_of_time)
    total = torch.zeros(50)
    for exchanges, left, pending, at_end, _, first, second in found:
        assert (exchanges, left, pending, at_end) == ([4, 4, 5], 0, 1, 0)
        total.index_add_(0, torch.cat([first, first, second, second, second]), torch.ones(45))
    gradient = torch.cat([one[4] for one in found])
    torch.testing.assert_close(gradient, (total / processes.world_size)[:, None].expand(-1, WIDTH))


def see_whole(rank):
    table = ShardedTable(10_000, 3, std=0.5, seed=(7, 1))
    moments = torch.full((len(table.weight),), float(rank))
    state = table.state_dict()
    assert isinstance(state["weight"], DTensor)
    assert state["weight"].to_local().data_ptr() == table.weight.data_ptr()
    other = ShardedTable(10_000, 3, seed=8)
    other.load_state_dict(state)
    slice_ = {"weight": table.weight.detach().clone()}
    with pytest.raises(RuntimeError, match="expected the whole table"):
        other.load_state_dict(slice_)
    with pytest.raises(MismatchError, match="10000 rows"):
        table.distributed(torch.zeros(3))
    return [one.full_tensor() for one in (state["weight"], table.distributed(moments), other.state_dict()["weight"])]


def test_first_values_do_not_depend_on_the_number_of_ranks_and_all_parts_are_seen_as_one(processes):
    expected = torch.empty(10_000, 3)
    draw_rows(expected, 0, seed=(7, 1), std=0.5)
    assert expected.std() == pytest.approx(0.5, rel=0.02)
    block = -(-10_000 // processes.world_size)
    for weight, moments, loaded in processes.run(see_whole):
        assert torch.equal(weight, expected) and torch.equal(loaded, expected)
        assert torch.equal(moments, (torch.arange(10_000) // block).float())


def test_a_part_is_drawn_as_in_the_whole_and_blocks_differ():
    everything = torch.empty(9000, 2)
    draw_rows(everything, 0, seed=3, std=1.0)
    for start, stop in [(0, 1), (4095, 4097), (5000, 9000), (8999, 9000), (4096, 4096)]:
        part = torch.empty(stop - start, 2, dtype=torch.float64)
        draw_rows(part, start, seed=3, std=1.0)
        assert torch.equal(part, everything[start:stop].double())
    assert len(everything.unique(dim=0)) == 9000


def test_one_process_without_a_group_has_a_plain_table():
    table, plain = ShardedTable(50, WIDTH), ParameterTable(50, WIDTH)
    plain.load_state_dict(table.state_dict())
    rows = asked(0, 50)
    for one in (table, plain):
        one.prefetch(rows)
        (one.gather(rows) * weighted(0, rows)).sum().backward()
    assert not table.reads_ahead and type(table.state_dict()["weight"]) is torch.Tensor
    assert torch.equal(table.gather(rows), plain.gather(rows))
    assert torch.equal(table.weight.grad.to_dense(), plain.weight.grad.to_dense())
    assert table.distributed(table.weight) is table.weight
    with pytest.raises(RowRangeError, match="row 50 is outside"):
        table.gather(torch.tensor([50]))
    with pytest.raises(ConfigError, match="to_empty"):
        ShardedTable(50, WIDTH, device="meta").gather(rows)
    assert ShardedTable(50, WIDTH, device="meta").gather(rows.to("meta")).shape == (4, 6, WIDTH)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_numbering_rows_without_the_host_equals_torch_unique(deduplicate):
    for size in (0, 1, 40):
        rows = torch.randint(-3, 20, (size,))
        ordered, number, inverse = in_order(rows, deduplicate)
        distinct = torch.empty_like(rows).scatter_(0, number, ordered)[: int(number.max()) + 1 if size else 0]
        assert torch.equal(distinct[inverse], rows)
        assert torch.equal(distinct, rows.unique() if deduplicate else rows.sort().values)


def test_blocks_are_those_of_dtensor():
    for num_rows, world_size in itertools.product((1, 2, 5, 10, 50), (1, 2, 3, 4, 7)):
        blocks = [block_of(num_rows, rank, world_size) for rank in range(world_size)]
        chunks = [len(chunk) for chunk in torch.arange(num_rows).chunk(world_size)]
        assert [count for _, count in blocks if count] == chunks
        assert [first for first, _ in blocks] == np.minimum(
            np.cumsum([0, *(c for _, c in blocks[:-1])]), num_rows
        ).tolist()


def read_sparsely(rank, num_rows):
    """Read a table with unwritten rows in evaluation mode and in training mode, and train one row of each rank's."""
    table = ShardedTable(num_rows, WIDTH, first_rows=FirstRows("test", 1.0))
    rows = torch.arange(num_rows)
    before = table.eval().gather(rows).detach()
    read = table.train().gather(rows)
    (read[rank] * torch.ones(WIDTH)).sum().backward()
    with torch.no_grad():
        table.weight.sub_(table.weight.grad.to_dense())
    after = table.eval().gather(rows).detach()
    held = table.state_dict()["weight"]
    held = held.full_tensor() if isinstance(held, DTensor) else held
    again = ShardedTable(num_rows, WIDTH, first_rows=FirstRows("test", 1.0))
    again.load_state_dict({"weight": held})
    return before, read.detach(), after, held, again.train().gather(rows).detach()


def test_unwritten_rows_of_all_ranks_are_silent_except_in_training(processes):
    num_rows = 50
    first = FirstRows("test", 1.0).numbers(torch.arange(num_rows), WIDTH, torch.float32)
    for before, read, after, held, again in processes.run(read_sparsely, num_rows):
        assert not before.any()
        assert torch.equal(read, first)
        written = torch.arange(num_rows) < processes.world_size
        assert torch.equal((after != 0).any(-1), written)
        assert torch.equal(held, after)
        assert torch.equal(again, torch.where(written[:, None], after, first))
