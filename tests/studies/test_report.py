"""The page of a quickstart: honest, whole, offline, and safe with any text."""

import re

import pytest
from tests.page_reading import HOSTILE, Page, hostile

from engram_lm.page.number_text import count_text
from engram_lm.studies.curves import curve_figure, smooth
from engram_lm.studies.quickstart.report import render_report
from engram_lm.studies.quickstart.summary import COLUMNS, arm_rows, headline, run_rows, terminal_table

WORDS = ["def", " close", "(", "self", ")", ":\n   ", "", "é", " return"]


def test_page_says_what_was_found_and_everything_behind_it(make_result, make_trace):
    page = Page(render_report(make_result(), [make_trace(WORDS), make_trace(WORDS[::-1])]))
    for said in (
        "Memory lowers the held-out loss by 0.250 nats per token",
        "Perplexity 15.6 with memory, 20.1 without",
        "One seed",
        "with memory (2.84 M active FLOPs per token) against its memory-less twin (2.84 M)",
        "34,567 tokens",
        "skipped: not UTF-8 3",
        "engram-lm quickstart --minutes 1",
        "two cores",
        "torch 2.13.0".replace(" ", ""),
        "2026-01-02 03:04 UTC",
        "Text 2 of 2",
        "said by memory",
        "said by twin",
    ):
        assert said.replace(" ", "") in page.text.replace(" ", "")
    assert page.tags.count("figure") == 2
    assert page.open == []


def test_page_asks_nothing_of_the_network(make_result, make_trace):
    source = render_report(make_result(), [make_trace(WORDS)])
    page = Page(source)
    addresses = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "action", "srcset"}]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", source))
    assert not re.search(r"https?:|//\w|@import", source)
    assert "default-src 'none'" in source


def test_hostile_text_stays_text_everywhere(make_result, make_trace):
    result = hostile(make_result())
    result["data"]["skipped"] = {HOSTILE: 1}
    result["settings"][HOSTILE] = [HOSTILE]
    result["versions"][HOSTILE] = {HOSTILE: HOSTILE}
    result["arms"][HOSTILE] = result["arms"]["memory"]
    result["samples"][0]["continuations"][HOSTILE] = HOSTILE
    source = render_report(result, [make_trace([*WORDS, HOSTILE])])
    page = Page(source)
    clean = Page(render_report(make_result(), [make_trace([*WORDS, "a"])]))
    assert page.tags.count("script") == clean.tags.count("script") == 2
    assert "img" not in page.tags
    assert "textarea" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    assert page.text.count("<img src=x onerror=") > 20
    assert page.data["traces"][0]["tokens"][-1] == HOSTILE
    source.encode()


def test_missing_arms_numbers_and_traces_leave_a_shorter_page(make_result):
    empty = make_result(arms=(), samples=[], settings={}, machine={}, versions={}, data={})
    page = Page(render_report(empty, []))
    assert "No comparison yet" in page.text
    assert not {"figure", "table"} & set(page.tags)

    alone = make_result(arms=("memory",), interrupted=True)
    alone["arms"]["memory"]["runs"][0].update(dict.fromkeys(("loss", "perplexity", "seconds", "tokens_per_second")))
    alone["arms"]["memory"]["runs"][0].update(train_curve=[], held_out_curve=[[0, None], [0, float("nan")]])
    alone["arms"]["memory"]["loss"] = {"mean": None, "std": None}
    page = Page(render_report(alone, []))
    assert "interrupted" in page.text
    assert "figure" not in page.tags
    assert [cell for cell in arm_rows(alone)[0][1] if cell == "–"] == ["–"] * 5


def test_several_seeds_are_means_with_their_spread(make_result):
    result = make_result(arms=("memory", "twin", "wide"), gains=(0.1, 0.3))
    assert headline(result)[0] == "Memory lowers the held-out loss by 0.200 nats per token"
    assert "+0.200 ± 0.141 nats per token (mean ± standard deviation over 2 seeds)" in headline(result)[1]
    cells = {title: dict(zip(COLUMNS, row, strict=True)) for title, row in arm_rows(result)}
    assert cells["With memory"]["Held-out loss"] == "2.800 ± 0.141"
    assert cells["With memory"]["Gain over twin"] == "+0.200 ± 0.141"
    assert cells["Twin"]["Gain over twin"] == "–"
    assert cells["Wide"]["Gain over twin"] == "+0.000 ± 0.000"
    assert cells["With memory"]["Memory tables"] == "2.13 M"
    assert cells["Twin"]["Memory tables"] == "0"
    assert cells["Twin"]["Minutes"] == "1.50"
    assert [row[:2] for row in run_rows(result)][:3] == [["With memory", "0"], ["With memory", "1"], ["Twin", "0"]]
    page = render_report(result, [])
    Page(page)
    assert page.count("stroke: var(--arm-2)") >= 2


@pytest.mark.parametrize(
    ("gains", "title"),
    [
        ((-0.05,), "Memory did not help: it raises the held-out loss by 0.050 nats per token"),
        ((0.0002,), "Memory made no difference to the held-out loss"),
        ((0.3, -0.1, 0.2), "The seeds disagree: memory wins 2 of 3"),
        ((-0.3, -0.1), "Memory did not help: it raises the held-out loss by 0.200 nats per token"),
    ],
)
def test_headline_is_honest_where_memory_is_not_better(make_result, gains, title):
    assert headline(make_result(gains=gains))[0] == title


def test_terminal_table_holds_the_cells_of_the_page_in_80_columns(make_result, capsys):
    import rich.console

    result = make_result(arms=("memory", "twin", "wide"), gains=(0.1, 0.3))
    result["arms"]["wide"]["title"] = "[red]Wide[/red]"
    rich.console.Console(width=80, color_system=None).print(terminal_table(result))
    shown = capsys.readouterr().out
    assert "[red]Wide[/red]" in shown
    assert all(name in shown for name in COLUMNS)
    assert all(cell in shown for _, cells in arm_rows(result) for cell in cells)
    assert max(map(len, shown.splitlines())) <= 80


def test_same_result_gives_the_same_bytes(make_result, make_trace):
    first, second = (render_report(make_result(), [make_trace(WORDS)]) for _ in range(2))
    assert first == second


def test_curves_take_their_colors_from_the_page():
    svg = curve_figure("Loss", {"a": [[(1, 2.0), (2, 1.0)]], "b": [[]]}, {"a": "A"}, name="x", markers=True)
    svg = svg.removeprefix("<figure><h3>Loss</h3>")
    assert "var(--arm-0)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#0102", svg)
    assert set(re.findall(r'id="(..)', svg)) == {"x-"}
    assert svg.startswith("<svg viewBox=")


def test_smoothing_keeps_the_mean_and_the_places():
    curve = [[step, float(step % 2)] for step in range(500)]
    smoothed = smooth(curve)
    assert [tokens for tokens, _ in smoothed] == list(range(500))
    assert all(0.4 < loss < 0.6 for _, loss in smoothed[20:-20])
    assert smooth(curve[:10]) == [(step, loss) for step, loss in curve[:10]]
    assert smooth([[1, None], [2, float("nan")], [3, 1.0]]) == [(3, 1.0)]
    assert smooth([]) == []


def test_ngrams_seen_once_are_left_out_of_long_texts(make_result, make_trace):
    long = make_trace(["a", "b"] * 300, num_streams=1)
    assert "fired more than once" in Page(render_report(make_result(), [long])).text
    assert "fired at least once" in Page(render_report(make_result(), [make_trace(WORDS)])).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (999, "999"), (999.7, "1.00 k"), (9996, "10.0 k"), (99_960, "100 k"), (999_600, "1.00 M")],
)
def test_counts_have_three_digits(value, text):
    assert count_text(value) == text
