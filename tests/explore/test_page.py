"""The page in a real browser: asks nothing outside, answers keyboard and pointer, and keeps visitors apart."""

import functools
import json
import re
import subprocess
import sys
import urllib.request

import pytest
from tests.explore.conftest import explorer_of, make_llama, make_model
from tests.page_reading import contrast
from tests.small_model import TEXT
from tests.training.test_loop import TOKENIZER

from engram_lm.adapt import RowPatch
from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.explore import build_app
from engram_lm.explore.app import _add, _listed, _take_back, read_fact
from engram_lm.explore.command import Explore, free_port

gradio = pytest.importorskip("gradio", reason="pip install 'engram-lm[explore]'")
# Gradio's queue uses what pandas 3 has deprecated; as an error it would leave the queue stuck.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
SENTENCE = "The cat saw the rat"
PIECES = TOKENIZER.tokenize(SENTENCE)


def served(explorer):
    app = build_app(explorer, text=SENTENCE)
    _, address, _ = app.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True)
    return app, address


@pytest.fixture(scope="module")
def address():
    app, address = served(explorer_of(make_model(rows_per_head=5_003)))
    yield address
    app.close(verbose=False)


@pytest.fixture
def open_page(browser):
    """Open a tab; afterwards, the proof that nothing was asked of another machine, and that nothing went wrong."""
    pages, requests, complaints, left = [], [], [], set()

    def opened(address):
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complain(page, message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complain(page, str(error)))
        page.goto(address)
        page.locator(".engram-panel").first.wait_for(timeout=60_000)
        pages.append(page)
        return page

    def complain(page, text):
        if page not in left:  # what is under way when a page is left is broken off, and Gradio complains of that
            complaints.append(text)

    def leave(page):
        left.add(page)
        page.goto("about:blank")

    opened.leave = leave
    yield opened
    for page in pages:
        page.close()
    assert complaints == []
    assert [url for url in requests if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:|about:)", url)] == []


def heading(page):
    return page.locator("#engram-token h3").inner_text()


def wait_for(page, selector, text):
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text],
        timeout=60_000,
    )  # fmt: skip


def test_the_keyboard_walks_over_the_tokens_and_typing_reads_again(open_page, address):
    page = open_page(address)
    assert page.locator(".t").count() == len(PIECES)
    assert heading(page).startswith(f"Token {len(PIECES) - 1}")
    page.locator("#engram-text textarea").focus()
    for _ in range(6):
        if page.evaluate("document.activeElement.matches('.t')"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Home")
    wait_for(page, "#engram-token h3", "Token 0")
    page.keyboard.press("ArrowRight")
    wait_for(page, "#engram-token h3", "Token 1")
    assert page.locator(".t[aria-selected=true]").count() == page.locator('.t[tabindex="0"]').count() == 1
    names = page.locator("#engram-predictions h4").all_inner_texts()
    assert names == ["with memory", "without memory", "without the 2-gram", "without the 3-gram"]
    page.fill("#engram-text textarea", "a rat")
    page.wait_for_function("document.querySelectorAll('.t').length < 4", timeout=60_000)
    page.fill("#engram-text textarea", "")
    wait_for(page, "#engram-said", "there is no text to read; type a few words.")
    page.fill("#engram-text textarea", SENTENCE * 2000)
    wait_for(page, "#engram-said", f"The text has {2000 * len(SENTENCE):,} characters. The page reads the first 256")
    page.fill("#engram-text textarea", "<img src=x onerror=alert(1)> \x1b")
    page.wait_for_function("document.querySelectorAll('.t').length > 9", timeout=60_000)
    assert page.locator("#engram-tokens img").count() == 0


def test_the_pointer_rests_on_a_token_and_the_choices_recolor_the_text(open_page, address):
    page = open_page(address)
    page.locator(".t").nth(2).hover()
    wait_for(page, "#engram-token h3", "Token 2")
    values = json.loads(page.locator(".engram-strip").get_attribute("data-values"))
    color = "e => Number(e.style.getPropertyValue('--g'))"
    page.locator("select[data-choice=stream]").select_option("1")
    page.locator("select[data-choice=block]").select_option(label="block 2")
    assert page.locator(".t").nth(2).evaluate(color) == pytest.approx(values["gates"][1][1][2])
    wait_for(page, "#engram-token .lookup", "block 2")
    page.locator("select[data-choice=color]").select_option("changed")
    top = max(0.01, *values["changed"])
    assert page.locator(".t").nth(2).evaluate(color) == pytest.approx(values["changed"][2] / top)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_screen_and_its_words_stand_out(open_page, address, browser, width, scheme):
    page = open_page(address)
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.locator(".engram-panel").first.wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    style = "e => getComputedStyle(e).color"
    for selector in (".engram-header h1", ".engram-panel p", ".engram-panel .sub", "#engram-text .info-text"):
        assert contrast(page.locator(selector).first.evaluate(style), ground) >= 4.5, selector
    gate = page.evaluate("getComputedStyle(document.body).getPropertyValue('--engram-gate')")
    assert contrast(page.locator(".t").first.evaluate(style), gate) >= 4.5


def test_a_fact_is_written_for_one_tab_and_taken_back(open_page, address, tmp_path):
    mine, other = open_page(address), open_page(address)
    for label, text in (("Prompt", "the cat sat on"), ("Answer", "rat")):
        mine.get_by_label(label, exact=True).fill(text)
    mine.locator("#engram-add").click()
    wait_for(mine, "#engram-report", "rows changed")
    assert "written" in mine.locator("#engram-report td").last.inner_text()
    mine.fill("#engram-text textarea", "the cat sat on")
    wait_for(mine, "#engram-predictions", "before your edits")
    wait_for(mine, "#engram-predictions .memory li", "rat")
    assert mine.locator(".t.edited").count() >= 1
    other.fill("#engram-text textarea", "the cat sat on")
    page_length = len(TOKENIZER.tokenize("the cat sat on"))
    other.wait_for_function(f"document.querySelectorAll('.t').length === {page_length}", timeout=60_000)
    assert other.locator(".t.edited").count() == 0
    assert "before your edits" not in other.locator("#engram-predictions").inner_text()
    with mine.expect_download(timeout=60_000) as started:
        mine.locator("#engram-save").click()
    started.value.save_as(tmp_path / "facts.safetensors")
    assert RowPatch.load(tmp_path / "facts.safetensors").facts[0].prompt == "the cat sat on"
    mine.get_by_label("Prompt", exact=True).fill("the dog sat on")
    mine.locator("#engram-add").click()
    mine.wait_for_function("document.querySelectorAll('#engram-list input').length === 2", timeout=60_000)
    with mine.expect_download(timeout=60_000) as started:
        mine.locator("#engram-save").click()
    started.value.save_as(tmp_path / "both.safetensors")
    saved = RowPatch.load(tmp_path / "both.safetensors").facts
    assert {fact.prompt for fact in saved} == {"the cat sat on", "the dog sat on"}
    for listed in mine.locator("#engram-list input").all():
        listed.check()
    mine.locator("#engram-back").click()
    mine.wait_for_function("!document.querySelector('#engram-predictions').innerText.includes('before your edits')")
    assert mine.locator(".t.edited").count() == 0


def test_a_fact_that_cannot_be_is_refused_in_words(open_page, address):
    page = open_page(address)
    page.get_by_label("Prompt", exact=True).fill("the cat sat on")
    page.get_by_label("Answer", exact=True).fill("rat")
    page.get_by_label("Subject", exact=True).fill("dog")
    page.locator("#engram-add").click()
    wait_for(page, "#engram-refused", "the subject 'dog' is not in 'the cat sat on'; “Prompt” and every line of")
    page.get_by_label("Answer", exact=True).fill(" ")
    page.locator("#engram-add").click()
    wait_for(page, "#engram-refused", "“Answer” is empty")
    page.get_by_label("Answer", exact=True).fill("rat")
    page.get_by_label("Subject", exact=True).fill("")
    page.locator("#engram-add").click()
    wait_for(page, "#engram-report", "rows changed")
    assert page.locator("#engram-refused p").count() == 0


def test_nothing_is_proved_again_where_a_fact_is_refused(tmp_path, monkeypatch):
    explorer, proved = explorer_of(make_model()), []
    monkeypatch.setattr(type(explorer), "proof", lambda self, edits: proved.append(edits))
    listed, memory = functools.partial(_listed, explorer, tmp_path), explorer.memories[0]

    def add(session, subject):
        return _add(explorer, listed, memory, session, ("the cat sat on", "rat", subject, ""), lambda *args, **kw: None)

    session, said, *shown = add({}, "")
    assert len(proved) == 1 and said == "" and "the cat sat on" in shown[0]
    for again in (add(session, "dog"), add(session, ""), _take_back(explorer, listed, memory, session, [])):
        assert again[0] is session and "<p" in again[1]
        assert list(again[2:]) == [gradio.skip()] * len(shown)
    assert len(proved) == 1


def test_the_page_can_ask_nothing_of_another_machine(address, tmp_path, start_browser):
    """What Chromium itself logs of its network: names that it looked up, and machines that it connected to."""
    log = tmp_path / "net.json"
    context = start_browser(f"--log-net-log={log}", "--net-log-capture-mode=Everything")
    page = context.new_page()
    page.goto(address)
    page.locator(".engram-panel").first.wait_for(timeout=60_000)
    # Not even what is put into the page gets out.
    asked = page.evaluate("fetch('https://example.org/').then(() => 'answered', error => String(error))")
    assert "Failed to fetch" in asked
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://example.org/a.png'}))")
    page.wait_for_timeout(300)
    context.close()
    logged = json.loads(log.read_text())
    kinds = {number: name for name, number in logged["constants"]["logEventTypes"].items()}
    events = [(kinds[event["type"]], event.get("params", {})) for event in logged["events"]]
    assert any(kind == "TCP_CONNECT" for kind, _ in events)
    urls = {params["url"] for kind, params in events if kind == "URL_REQUEST_START_JOB" and "url" in params}
    assert address in urls
    assert "example.org" not in json.dumps([params for kind, params in events if kind.startswith(("URL_", "HOST_"))])


def test_models_without_memory_and_with_several_have_their_page(open_page):
    app, address = served(explorer_of(make_llama()))
    page = open_page(address)
    assert "no memory" in page.locator("#engram-token").inner_text()
    assert page.locator("#engram-facts").count() == 0
    open_page.leave(page)
    app.close(verbose=False)
    app, address = served(explorer_of(make_llama(2)))
    page = open_page(address)
    rows = page.locator(".rows").first.inner_text()
    wait_for(page, "#engram-head", "heads of an order\n2")
    page.locator("#engram-memory input").click()
    page.get_by_role("option", name="m1").click()
    page.wait_for_function("rows => document.querySelector('.rows')?.innerText !== rows", arg=rows, timeout=60_000)
    wait_for(page, "#engram-head", "heads of an order\n3")
    open_page.leave(page)
    app.close(verbose=False)


def test_the_space_before_an_answer_is_put_where_words_are_divided_by_spaces():
    assert read_fact(" The capital of Elbonia is ", "Mudville", "Elbonia", "Elbonia's capital is\n\n").to_dict() == {
        "prompt": "The capital of Elbonia is", "answer": " Mudville", "subject": "Elbonia",
        "paraphrases": ["Elbonia's capital is"],
    }  # fmt: skip
    assert read_fact("法国的首都是", "巴黎").answer == "巴黎"
    with pytest.raises(ConfigError, match="“Answer” is empty"):
        read_fact("The capital of Elbonia is", " ")
    with pytest.raises(ConfigError, match="“Other wordings” has 20,001 characters"):
        read_fact("The capital of Elbonia is", "Mudville", "", "x" * 20_001)


def test_the_command_serves_a_folder_on_this_machine_until_it_is_interrupted(tmp_path):
    make_model("plain").save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    call = [sys.executable, "-m", "engram_lm", "explore", "model", "--data", "text.txt", "--port", "0"]
    proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # nobody answers there
    import os

    proxy["TMPDIR"] = str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    with subprocess.Popen(
        call, cwd=tmp_path, env={**os.environ, **proxy}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
            open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
            with open_directly(address, timeout=20) as answer:
                assert b"gradio" in answer.read()
        finally:
            process.send_signal(2)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "temporary").glob("engram-explore-*")) == []


def test_impossible_flags_and_folders_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--port"):
        Explore(model=tmp_path, port=70_000)
    with pytest.raises(ConfigError, match="name it with --adapter"):
        Explore(model=tmp_path, more_adapters=("one",))
    assert main(["explore", str(tmp_path / "nothing")]) == 1
    assert "is no model folder" in capsys.readouterr().err
