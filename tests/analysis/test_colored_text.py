"""Gates as colors: white at 0, red at 1, and the text between them cannot do anything."""

import io

import numpy as np
import pytest
from rich.console import Console

from engram_lm.analysis import GateTrace, colored_gates, colored_html
from engram_lm.analysis.gates.trace import gates_to_show
from engram_lm.errors import ConfigError
from engram_lm.evaluation.token_text import visible_text


def trace_of(texts, gates):
    """A trace of two blocks of two streams, made by hand; gates are [block][position][stream]."""
    gates = np.array(gates, np.float32)
    return GateTrace(
        tokens=np.arange(len(texts)),
        texts=tuple(texts),
        blocks=(1, 4),
        orders=(2,),
        gates=gates,
        order_scores=gates[:, :, None],
        bias_scores=np.zeros_like(gates),
        visible=np.ones(len(texts), np.int64),
    )


TRACE = trace_of(["the ", "horse"], [[[0, 0], [1, 1]], [[0, 0.5], [1, 0]]])


def test_one_gate_is_chosen_by_block_and_stream_or_their_mean_is_taken():
    assert gates_to_show(TRACE, 4, 1).tolist() == [0.5, 0]
    assert gates_to_show(TRACE, 4).tolist() == [0.25, 0.5]
    assert gates_to_show(TRACE).tolist() == [0.125, 0.75]
    assert gates_to_show(TRACE, stream=0).tolist() == [0, 1]
    with pytest.raises(ConfigError, match="block 2 reads no memory"):
        gates_to_show(TRACE, 2)
    with pytest.raises(ConfigError, match="no stream 2; the memory has 2"):
        gates_to_show(TRACE, stream=2)


def test_terminal_text_is_white_at_zero_and_red_at_one_and_black_on_both():
    text = colored_gates(TRACE, block=1)
    assert text.plain == "the horse"
    assert [str(span.style) for span in text.spans] == ["black on #ffffff", "black on #e31a1c"]
    out = io.StringIO()
    Console(file=out, color_system="truecolor", force_terminal=True).print(text)
    assert "48;2;227;26;28mhorse" in out.getvalue()
    plain = io.StringIO()
    Console(file=plain).print(text)
    assert plain.getvalue() == "the horse\n"


def test_html_has_a_span_for_each_token_with_its_gate():
    page = colored_html(TRACE, block=1)
    assert '<span style="background:rgb(255,255,255)" title="0.000">the </span>' in page
    assert '<span style="background:rgb(227,26,28)" title="1.000">horse</span>' in page
    assert page.startswith("<div style=") and page.endswith("</div>")


def test_text_is_escaped_and_cannot_steer_terminal_or_page():
    texts = ['<script>"&', "\x1b[31m", "\x7f\x9b\u202e", "a\n\tb"]
    gates = np.zeros((2, 4, 2))
    page = colored_html(trace_of(texts, gates))
    assert "&lt;script&gt;&quot;&amp;" in page and "<script" not in page
    assert colored_gates(trace_of(texts, gates)).plain == '<script>"&' + "␛[31m" + "␡\ufffd\ufffd" + "a\n\tb"
    assert visible_text("👩\u200d🌾 naïve") == "👩\u200d🌾 naïve"  # a joiner inside one character does no harm


def test_gates_outside_their_range_or_not_finite_still_have_a_color():
    trace = trace_of(["a", "b", "c"], [[[np.nan] * 2, [2] * 2, [-1] * 2]] * 2)
    styles = [str(span.style) for span in colored_gates(trace).spans]
    assert styles == ["black on #ffffff", "black on #e31a1c", "black on #ffffff"]
