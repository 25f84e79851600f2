"""Progress is a bar on a terminal and plain lines elsewhere, and both say what Ctrl-C keeps."""

import io
import itertools

import pytest
from rich.console import Console

from engram_lm import progress
from engram_lm.planning.bars import print_bars


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def said(console):
    return [line.split(" ", 1)[1] for line in console.file.getvalue().splitlines()]


def test_a_pipe_gets_lines_with_the_time_left_that_come_ever_more_rarely(clock):
    console = Console(file=io.StringIO(), width=80)
    with progress.Progress(console).tasks("the rows so far") as tasks:
        for done in range(1, 1001):
            clock(1)
            tasks.show("reading", done, 1000, "of a file")
    lines = said(console)
    assert lines[0] == "Ctrl-C keeps the rows so far"
    assert lines[1] == "reading  20 of 1,000  of a file  16:20 left"
    assert len(lines) < 1000 / 20 / 1.5
    places = [int(line.split()[1].replace(",", "")) for line in lines[1:]]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert gaps[0] == 20 and gaps[-1] > 80


def test_short_work_says_nothing_in_a_pipe_unless_it_is_asked_to(clock):
    console = Console(file=io.StringIO(), width=80)
    with progress.Progress(console).tasks("nothing", unit="bytes") as tasks:
        tasks.advance("copying", 5_000_000, 9_000_000)
        clock(2)
        assert not console.file.getvalue()
        tasks.show("copying", 9_000_000, say=True)
    assert said(console) == ["Ctrl-C keeps nothing", "copying  9.0 of 9.0 MB  0:00 left"]


def test_what_was_done_before_does_not_count_as_done_in_this_time(clock):
    console = Console(file=io.StringIO(), width=80)
    with progress.Progress(console).tasks("nothing") as tasks:
        tasks.begin("training", 100, done=90)
        clock(30)
        tasks.advance("training", 1)
    assert said(console)[1] == "training  91 of 100  4:30 left"


def test_a_terminal_of_80_columns_shows_the_bar_and_what_is_kept_in_whole_lines():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with progress.Progress(console).tasks("a checkpoint of the last step; --resume goes on from it") as tasks:
        tasks.begin("training", 2000)
        tasks.show("training", 1200, detail="loss 5.586  held out 5.633  1,839 tokens/s")
        tasks._bars.refresh()
    shown = console.file.getvalue()
    assert "Ctrl-C keeps a checkpoint of the last step; --resume goes on from it" in shown
    assert "loss 5.586  held out 5.633  1,839 tokens/s" in shown and "1200/2000" in shown


def test_a_silent_process_shows_nothing():
    console = Console(file=io.StringIO(), width=80)
    silent = progress.Progress(console, silent=True)
    silent.note("words")
    with silent.tasks("nothing") as tasks:
        tasks.show("reading", 1, 1, say=True)
    assert not console.file.getvalue()


def test_bars_that_are_compared_keep_their_order_and_have_no_shares():
    console = Console(file=io.StringIO(), width=80)
    print_bars(console, "hits", {"1 MB": 0.25, "2 MB": 0.5, "4 MB": 1.0}, "{:.0%}".format, full=1)
    title, *lines = console.file.getvalue().splitlines()
    assert title == "hits" and [line.split()[:2] for line in lines] == [["1", "MB"], ["2", "MB"], ["4", "MB"]]
    assert [line.count("█") for line in lines] == [10, 20, 40]
