"""The page in a real browser: loads alone, answers pointer and keyboard, recolors."""

import pytest
from tests.page_reading import contrast

from engram_lm.studies.quickstart.report import render_report

WORDS = ["def", " close", "(", "self", ")", ":\n    ", "", "é", " return", " 1", "\n"] * 6


@pytest.fixture
def page(browser, tmp_path, make_result, make_trace):
    """The report, open; afterwards, the proof that it neither complained nor asked for anything."""
    path = tmp_path / "report.html"
    traces = [make_trace(WORDS), make_trace(WORDS[1:], seed=1)]
    path.write_text(render_report(make_result(gains=(0.1, 0.3)), traces), encoding="utf-8")
    page = browser.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]


def tokens(page, text=0):
    return page.locator("#gates .text").nth(text).locator(".t")


def facts(page):
    """What the panel says, by name."""
    names, values = page.locator("#panel dt").all_inner_texts(), page.locator("#panel dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def background(locator):
    return locator.evaluate("element => getComputedStyle(element).backgroundColor")


def test_pointer_opens_the_panel_and_leaving_closes_it(page, make_trace):
    trace = make_trace(WORDS)
    panel = page.locator("#panel")
    assert not panel.is_visible()
    tokens(page).nth(8).hover()
    assert panel.is_visible()
    said = facts(page)
    fired = trace.fired(1, 8, stream=0)
    assert said["gate"] == f"{trace.gates[0, 8, 0]:.2f}"
    assert said["block"] == "1, stream 0"
    assert said["order"].startswith(f"{fired.order}-gram")
    assert page.locator("#panel dd").nth(3).locator(".chips span").count() == len(fired.tokens)
    page.locator("h1").hover()
    assert not panel.is_visible()


def test_dead_token_says_that_nothing_is_read(page):
    tokens(page).nth(2).hover()
    assert facts(page)["fired"].startswith("nothing")


def test_ngram_is_cut_where_its_segment_starts(page):
    tokens(page).nth(3).hover()
    assert "cut at the start of the segment" in facts(page)["order"]
    assert page.locator("#gates .seen").count() == 0


def test_keyboard_walks_over_the_tokens_from_one_tab_stop(page):
    assert page.locator('#gates .text .t[tabindex="0"]').count() == 2  # one for each text
    tokens(page).nth(0).focus()
    assert facts(page)["token"] == "def"
    page.keyboard.press("ArrowRight")
    assert facts(page)["token"] == "␣close"
    page.keyboard.press("End")
    assert facts(page)["token"] == "↵"
    page.keyboard.press("ArrowRight")
    assert facts(page)["token"] == "↵"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    down = page.evaluate("Number(document.activeElement.dataset.i)")
    assert 3 < down < 12
    page.keyboard.press("ArrowUp")
    assert page.evaluate("Number(document.activeElement.dataset.i)") < down
    page.keyboard.press("Escape")
    assert not page.locator("#panel").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.text') === document.querySelectorAll('.text')[1]")
    assert page.locator('#gates .text .t[tabindex="0"]').count() == 2


def test_buttons_choose_block_and_stream_and_recolor(page, make_trace):
    trace = make_trace(WORDS)
    token = tokens(page).nth(9)
    for block in (1, 0):
        for stream in (1, 0):
            page.locator("button[data-choice=block]").nth(block).click()
            page.locator("button[data-choice=stream]").nth(stream).click()
            gate = float(trace.gates[block, 9, stream])
            alpha = float(background(token).rsplit(",", 1)[1].strip(" )"))
            assert alpha == pytest.approx(gate, abs=0.01)
            token.hover()
            assert facts(page)["block"] == f"{trace.blocks[block]}, stream {stream}"
            assert facts(page)["gate"] == f"{gate:.2f}"
    assert page.locator("button[aria-pressed=true]").all_inner_texts() == ["1", "0"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_strongest_color(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ink = page.evaluate("getComputedStyle(document.body).color")
    gate = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--gate')")
    assert contrast(ink, gate) >= 4.5


def test_page_fits_a_phone_and_panels_stay_inside(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for index in (1, 4, 7):
        tokens(page).nth(index).hover()
        box = page.locator("#panel").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
