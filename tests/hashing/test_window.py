"""The rolling window against a list of everything that was ever appended."""

import random

import pytest
import torch

from engram_lm.errors import ConfigError, HistoryError
from engram_lm.hashing import RollingWindow


def expected(streams, width, fill, item_shape=()):
    """What a window shows after these streams of items."""
    blank = torch.full(item_shape, fill)
    rows = [
        [blank] * max(0, width - len(stream)) + stream[len(stream) - min(width, len(stream)) :] for stream in streams
    ]
    flat = [torch.stack(row) if row else torch.zeros(0, *item_shape) for row in rows]
    return torch.stack(flat) if flat else torch.zeros(0, width, *item_shape)


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("max_rollback", [0, 2, 40, None])
@pytest.mark.parametrize("item_shape", [(), (2, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_operations_shows_what_a_plain_list_shows(width, max_rollback, item_shape, seed):
    draw = random.Random(f"{width} {max_rollback} {item_shape} {seed}")
    generator = torch.Generator().manual_seed(seed)
    window = RollingWindow(3, width, item_shape=item_shape, fill=-1.0, dtype=torch.float32, max_rollback=max_rollback)
    streams, held = [[], [], []], [0, 0, 0]
    saved = None
    for _ in range(60):
        batch = len(streams)
        action = draw.choice(
            ["advance", "advance", "ragged", "rollback", "reorder", "select", "fork", "save", "restore"]
        )
        if action in ("advance", "ragged"):
            length = draw.choice([0, 1, 1, 2, 5])
            items = torch.rand(batch, length, *item_shape, generator=generator)
            lengths = [draw.randint(0, length) for _ in range(batch)] if action == "ragged" else [length] * batch
            given = draw.choice([lengths, torch.tensor(lengths)]) if action == "ragged" else None
            assert window.advance(items, given) is window
            for b, count in enumerate(lengths):
                streams[b] = streams[b] + list(items[b, :count])
                held[b] = held[b] + count if max_rollback is None else min(held[b] + count, max_rollback)
        elif action == "rollback":
            counts = [draw.randint(0, available) for available in held]
            if draw.random() < 0.3:
                counts = [min(counts)] * batch
                window.rollback(counts[0])
            else:
                window.rollback(draw.choice([counts, torch.tensor(counts)]))
            streams = [stream[: len(stream) - count] for stream, count in zip(streams, counts, strict=True)]
            held = [available - count for available, count in zip(held, counts, strict=True)]
        elif action == "reorder":
            index = [draw.randrange(batch) for _ in range(batch)]
            window.reorder(draw.choice([index, torch.tensor(index)]))
            streams, held = [streams[i] for i in index], [held[i] for i in index]
        elif action == "select":
            index = [draw.randrange(batch) for _ in range(draw.randint(1, 4))]
            window.select(index)
            streams, held, saved = [streams[i] for i in index], [held[i] for i in index], None
        elif action == "fork" and batch < 5:
            repeats = draw.choice([1, 2])
            original, window = window, window.fork(repeats)
            original.advance(torch.ones(batch, 1, *item_shape))
            streams = [stream for stream in streams for _ in range(repeats)]
            held = [available for available in held for _ in range(repeats)]
            saved = saved if repeats == 1 else None
        elif action == "save":
            saved = (window.snapshot(), list(streams), list(held))
        elif action == "restore" and saved is not None:
            window.restore(saved[0])
            streams, held = list(saved[1]), list(saved[2])
        assert window.batch_size == len(streams)
        assert torch.equal(window.values, expected(streams, width, -1.0, item_shape))
    for b, available in enumerate(held):
        with pytest.raises(HistoryError, match=rf"of sequence {b}: {available} are held"):
            window.rollback([available + 1 if i == b else 0 for i in range(len(held))])
    assert torch.equal(window.values, expected(streams, width, -1.0, item_shape))
    window.reset()
    assert torch.equal(window.values, expected([[]] * len(streams), width, -1.0, item_shape))


def test_fixed_storage_keeps_its_address_and_the_values_are_a_view_of_it():
    window = RollingWindow(2, 3, fill=0, dtype=torch.int64, max_rollback=2)
    address = window.values.data_ptr()
    snapshot = window.advance(torch.arange(8).view(2, 4)).snapshot()
    window.advance(torch.ones(2, 1), [0, 1]).rollback(1).reorder([1, 0]).restore(snapshot).reset()
    assert window.values.data_ptr() == address


def test_everything_is_kept_when_rollback_has_no_limit():
    window = RollingWindow(1, 2, fill=-1, dtype=torch.int64, max_rollback=None)
    for item in range(1000):
        window.advance(torch.tensor([[item]]))
    assert window.rollback(999).values.tolist() == [[-1, 0]]
    assert window.rollback(1).values.tolist() == [[-1, -1]]


def test_the_window_stays_out_of_autograd():
    window = RollingWindow(1, 2, item_shape=(3,), fill=0.0, dtype=torch.float32)
    window.advance(torch.ones(1, 4, 3, requires_grad=True) * 2)
    assert not window.values.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_advance_compiles_to_one_graph():
    torch._dynamo.reset()
    window = RollingWindow(2, 3, fill=-1, dtype=torch.int64, max_rollback=2)

    def step(items):
        window.advance(items)
        return window.values.clone()

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for start in range(4):
        values = compiled(torch.tensor([[start], [start + 10]]))
    assert values.tolist() == [[1, 2, 3], [11, 12, 13]]
    assert window.rollback(2).values.tolist() == [[-1, 0, 1], [-1, 10, 11]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.advance(torch.zeros(3, 1)), r"holds 2 sequences of items \[\], got a chunk of shape \[3, 1\]"),
        (lambda w: w.advance(torch.zeros(2, 1, 1)), r"\[2, 1, 1\]"),
        (lambda w: w.advance(torch.zeros(2, 1), [0, 2]), r"lengths lie in 0\.\.1.*\[0, 2\]"),
        (lambda w: w.advance(torch.zeros(2, 1), [1]), "lengths has 1 numbers, the window 2 sequences"),
        (lambda w: w.rollback(-1), "got -1"),
        (lambda w: w.rollback([0, 0, 0]), "n has 3 numbers"),
        (lambda w: w.rollback(1), r"0 are held \(max_rollback=4\)"),
        (lambda w: w.reorder([0]), r"one index per sequence \(2\), got 1"),
        (lambda w: w.reorder([0, 2]), "sequence 2 is not in this batch of 2"),
        (lambda w: w.select([-1]), "sequence -1 is not"),
        (lambda w: w.fork(0), "repeats from 1, got 0"),
        (lambda w: w.restore({}), "no snapshot"),
        (lambda w: w.restore(RollingWindow(2, 9, fill=0, dtype=torch.int64).snapshot()), "this window"),
        (lambda w: w.restore(w.fork(2).snapshot()), "holds 4 sequences, this window 2"),
    ],
)
def test_impossible_requests_are_refused_and_change_nothing(call, message):
    window = RollingWindow(2, 3, fill=5, dtype=torch.int64, max_rollback=4)
    with pytest.raises(HistoryError, match=message):
        call(window)
    assert window.values.tolist() == [[5, 5, 5]] * 2


@pytest.mark.parametrize("sizes", [{"batch_size": -1, "width": 1}, {"batch_size": 1, "width": -1}])
def test_negative_sizes_are_refused(sizes):
    with pytest.raises(ConfigError, match="from 0, got -1"):
        RollingWindow(**sizes, fill=0, dtype=torch.int64)


@pytest.mark.parametrize("max_rollback", [0, 2, None])
def test_a_window_that_was_reset_is_as_new_whatever_it_kept(max_rollback):
    window = RollingWindow(1, 2, fill=-1, dtype=torch.int64, max_rollback=max_rollback)
    window.advance(torch.tensor([[5, 6]]))
    if max_rollback == 0:
        window.record()
    window.reset()
    assert window.values.tolist() == [[-1, -1]]
    window.advance(torch.tensor([[7]]))
    assert window.values.tolist() == [[-1, 7]]
