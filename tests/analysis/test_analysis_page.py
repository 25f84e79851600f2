"""The page of an analysis in a real browser: loads alone, recolors, sorts, answers the keyboard, holds any text."""

import json
import re

import pytest
from tests.analysis.conftest import LENGTH
from tests.page_reading import HOSTILE, Page, contrast

from engram_lm.analysis import gate_trace
from engram_lm.analysis.report import render_report
from engram_lm.serving.load import load_model

TYPED = "The cat sat on zebras"


@pytest.fixture(scope="module")
def source(analyzed):
    return (analyzed.out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trace(analyzed, source):
    """The first passage, seen through the model's gates once more."""
    model, tokenizer = load_model(analyzed.memory)
    tokens = tokenizer(analyzed.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids[:LENGTH]
    return gate_trace(model, tokenizer, tokens)


@pytest.fixture
def page(browser, analyzed):
    """The report, open; afterwards, the proof that it neither complained nor asked for anything."""
    address = (analyzed.out / "report.html").as_uri()
    page = browser.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def tokens(page):
    return page.locator("#passage-text .t")


def line(page, name="passage"):
    names, values = page.locator(f"#{name}-line dt"), page.locator(f"#{name}-line dd")
    return dict(zip(names.all_inner_texts(), values.all_inner_texts(), strict=True))


def alpha(locator):
    """How strong the color behind a token is."""
    color = locator.evaluate("element => getComputedStyle(element).backgroundColor")
    parts = re.findall(r"[\d.]+", color)
    return float(parts[3]) if len(parts) > 3 else 1.0


def press(page, group, name):
    page.locator(f"#{group} button", has_text=re.compile(f"^{name}$")).click()


def column(page, number):
    return page.locator(f"#ngram-rows td:nth-child({number})").all_inner_texts()


def test_page_is_whole_and_asks_nothing_of_the_network(source):
    page = Page(source)
    for said in ("Where the memory fires", "N-grams", "What each layer would predict", "Which layers are alike",
                 "Without the memory", "How the rows are used", "How it was made"):  # fmt: skip
        assert said in page.text
    addresses = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "action", "srcset"}]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert not re.search(r"https?:|//\w|@import", re.sub(r"// [^\n]*", "", source))
    assert "default-src 'none'" in source
    assert len(source) < 3_000_000


def test_hostile_text_stays_text_everywhere(analyzed, source):
    clean = Page(source)
    result = json.loads(json.dumps(analyzed.result).replace('"memory"', json.dumps("x" + HOSTILE)))
    page = Page(render_report(result, {}))
    for found in (clean, page):
        assert "img" not in found.tags
        assert "textarea" not in page.tags
        assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert page.tags.count("script") == clean.tags.count("script") == 2
    assert page.text.count("<img src=x onerror=") > 5
    texts = ["".join(passage["tokens"]) for passage in json.loads(clean.scripts[1])[0]["passages"]]
    assert "</script></style><img src=x onerror=" in texts[0]


def test_tokens_are_colored_by_their_gates_and_say_them(page, trace):
    assert "".join(tokens(page).all_text_contents()) == "".join(trace.texts).replace("\x1b", "␛").replace(
        "\x85", "\ufffd"
    )
    mean = trace.gates.mean((0, 2))
    for place in (1, 9, 30):
        tokens(page).nth(place).hover()
        assert float(line(page)["gate"].split()[0]) == pytest.approx(mean[place], abs=1.1e-3)
        assert alpha(tokens(page).nth(place)) == pytest.approx(mean[place], abs=5e-3)
        assert line(page)["block 2"].split("; ")[1].startswith(f"{trace.fired(2, place).order}-gram")
    page.locator("h1").hover()
    assert "Point at a token" in page.locator("#passage-line").inner_text()


def test_blocks_are_toggled_and_streams_chosen(page, trace):
    token = tokens(page).nth(9)
    press(page, "blocks", "0")
    assert alpha(token) == pytest.approx(trace.gates[1, 9].mean(), abs=5e-3)
    press(page, "streams", "3")
    assert alpha(token) == pytest.approx(trace.gates[1, 9, 3], abs=5e-3)
    press(page, "blocks", "2")  # the last one stays on
    assert page.locator("#blocks button[aria-pressed=true]").all_inner_texts() == ["2"]
    press(page, "blocks", "0")
    assert alpha(token) == pytest.approx(trace.gates[:, 9, 3].mean(), abs=5e-3)
    press(page, "streams", "mean")
    assert alpha(token) == pytest.approx(trace.gates[:, 9].mean(), abs=5e-3)
    page.locator("#numbers").click()
    shown = token.evaluate("element => getComputedStyle(element, '::after').content")
    assert float(shown.strip('"')) == pytest.approx(trace.gates[:, 9].mean(), abs=6e-3)


def test_passages_are_chosen(page):
    first = tokens(page).all_text_contents()
    page.locator("#passage").select_option(index=2)
    assert tokens(page).all_text_contents() != first
    assert tokens(page).count() == LENGTH


def test_keyboard_walks_over_the_tokens_from_one_tab_stop(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#numbers").focus()
    page.keyboard.press("Tab")
    place = "Number(document.activeElement.dataset.i)"
    assert page.evaluate(place) == 0
    page.keyboard.press("ArrowRight")
    assert page.evaluate(place) == 1
    assert "gate" in line(page)
    outline = page.evaluate("getComputedStyle(document.activeElement).boxShadow")
    assert outline != "none"
    page.keyboard.press("ArrowDown")
    down = page.evaluate(place)
    assert down > 2
    page.keyboard.press("End")
    assert page.evaluate(place) == LENGTH - 1
    assert page.locator('#passage-text .t[tabindex="0"]').count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "typed"


def test_every_control_shows_that_it_has_the_focus(page):
    page.locator("#passage").focus()
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const one = document.activeElement, look = getComputedStyle(one);
                return [one.tagName + (one.id ? "#" + one.id : "." + one.className),
                        look.outlineStyle !== "none" || look.boxShadow !== "none"]; }"""
        )
        if found[0].startswith("BODY"):
            break
        assert found[1], f"{found[0]} has the focus and does not show it"
        seen.add(found[0].partition("#")[0].partition(".")[0])
    assert seen >= {"BUTTON", "SPAN", "TEXTAREA", "SELECT", "INPUT", "svg"}


def test_typed_words_get_the_values_of_ngrams_that_were_seen_and_others_none(page):
    assert page.locator("#typed-text").is_hidden()
    page.locator("#typed").fill(TYPED)
    pieces = page.locator("#typed-text .t")
    assert "".join(pieces.all_text_contents()) == TYPED
    data = json.loads(page.locator("#data").text_content())[0]
    by_text = {phrase[0].lower().strip(): phrase for phrase in reversed(data["phrases"])}
    colored = [place for place in range(pieces.count()) if alpha(pieces.nth(place)) > 0]
    assert colored
    known = 0
    for place in colored:
        pieces.nth(place).hover()
        said = line(page, "typed")
        if "N-gram" in said:
            known += 1
            # The chips show spaces as signs.
            text = page.locator("#typed-line .chips").inner_text().replace("␣", " ").lower().strip()
            gates = by_text[text][5]
            mean = sum(sum(streams) / len(streams) for streams in gates if None not in streams)
            mean /= sum(None not in streams for streams in gates)
            assert float(said["mean gate"].split()[0]) == pytest.approx(mean / 1000, abs=1.1e-3)
    assert known
    assert "zebras" in pieces.last.inner_text()
    assert "none" in pieces.last.get_attribute("class")
    assert "No model runs here" in page.locator("#typed-note").inner_text()


def test_ngrams_are_sorted_by_every_column_from_the_keyboard(page):
    def gates():
        return [float(text) for text in column(page, 2)]

    assert gates() == sorted(gates(), reverse=True)
    for number, key in ((3, "count"), (5, "order"), (2, "gate")):
        head = page.locator(f"#ngrams th[data-key={key}]")
        head.locator("button").focus()
        for direction in ("descending", "ascending"):
            page.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == direction
            values = [float(text.replace(",", "")) for text in column(page, number)]
            assert values == sorted(values, reverse=direction == "descending")
    assert page.locator("#ngrams th[aria-sort]").count() == 1
    page.locator("#find").fill("cat")
    assert column(page, 1)
    assert all("cat" in text.lower() for text in column(page, 1))
    page.locator("#least").select_option("10")
    assert all(int(text) >= 10 for text in column(page, 4))
    before = gates()
    press(page, "blocks", "0")
    assert gates() != before


def test_map_of_layers_is_walked_with_the_arrow_keys(page, analyzed):
    (found,) = analyzed.result["parts"]["cka"][0]["result"]["maps"]
    page.locator(".map svg").focus()
    said = page.locator(".map .line")
    top = len(found["similarity"]) - 1
    assert said.inner_text() == f"twin {top}, memory 0: {found['similarity'][top][0]:.2f}"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert said.inner_text() == f"twin {top - 1}, memory 1: {found['similarity'][top - 1][1]:.2f}"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is nothing further left
    assert said.inner_text().startswith(f"twin {top - 1}, memory 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_strongest_color(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ink = page.evaluate("getComputedStyle(document.body).color")
    gate = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--gate')")
    assert contrast(ink, gate) >= 4.5


def test_page_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#typed").fill("a-word-that-is-far-too-long-for-a-phone-" * 5)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for name in ("passage-text", "typed", "blocks"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
