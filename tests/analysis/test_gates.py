"""Gates of a text: they are the model's own, and each order's part of the score adds up to it."""

import dataclasses

import numpy as np
import pytest
import torch

import engram_lm
from engram_lm.analysis import GateTrace, gate_trace, strongest
from engram_lm.analysis.recording import score_parts
from engram_lm.errors import ConfigError, DataError, MismatchError, TokenError
from engram_lm.hashing import Segments
from engram_lm.memory.gate import signed_sqrt
from engram_lm.tables import ParameterTable
from engram_lm.training.data.tokenizer import train_tokenizer

TEXT = "def close(self):\n    self.file.close()\n    return self\n"
ODD_TEXT = "naïve 中国 → 🐎\r\n\tend \ufffd of text"
BACKBONE = {
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3], 300)


def build(tokenizer, *, memory=True, segments=None, **options):
    """A small model with every weight of its memory away from the initial value."""
    torch.manual_seed(1)
    options = {"layers": (0, 2), "num_heads": 2, "memory_dim": 24, "rows_per_head": 31, **options}
    config = engram_lm.EngramConfig(hidden_size=16, **options) if memory else None
    model = engram_lm.EngramForCausalLM(
        engram_lm.EngramLMConfig.for_tokenizer(tokenizer, config, segments=segments, **BACKBONE)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".memory." in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.7)
    return model


def gates_of(scores, squash="signed_sqrt"):
    scores = torch.from_numpy(scores)
    return torch.sigmoid(signed_sqrt(scores) if squash == "signed_sqrt" else scores).numpy()


OPTIONS = [
    {},
    {"bias": True},
    {"gate": "plain", "norm_eps": 1e-2},
    {"signs": "hashed"},
    {"norm_weight": "zero_centered", "kernel_size": 0},
    {"orders": (2, 3, 4), "memory_dim": 36, "tables": "shared"},
    {"orders": (3,), "memory_dim": 8, "layers": (1,)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parts_of_the_score_add_up_to_the_gates_of_the_model(tokenizer, options):
    model = build(tokenizer, **options)
    trace = gate_trace(model, tokenizer, TEXT)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        expected = np.stack([gates[0].numpy() for gates in model(ids, output_gates=True).gates])
    np.testing.assert_array_equal(trace.gates, expected)
    np.testing.assert_allclose(gates_of(trace.scores, options.get("gate", "signed_sqrt")), trace.gates, atol=2e-4)
    assert trace.order_scores.shape == (*trace.gates.shape[:2], len(trace.orders), 1)
    assert (trace.gates.dtype, trace.order_scores.dtype) == (np.float32, np.float32)
    assert bool(trace.bias_scores.any()) == options.get("bias", False)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gate": "plain", "bias": True}], ids=str)
@pytest.mark.parametrize("num_streams", [1, 3])
def test_parts_of_the_score_add_up_for_every_stream(options, num_streams):
    config = engram_lm.EngramConfig(
        hidden_size=8, num_streams=num_streams, orders=(2, 3, 5), num_heads=2, memory_dim=18, **options
    )
    layer = engram_lm.EngramLayer(config, ParameterTable(53, config.head_dim))
    with torch.no_grad():
        for parameter in [*layer.parameters(), layer.table.weight]:
            parameter.copy_(torch.randn(parameter.shape))
        hidden, rows = torch.randn(2, 7, num_streams, 8), torch.randint(53, (2, 7, 6))
        active = torch.rand(2, 7) > 0.3
        gates = layer(hidden, rows, active=active, return_gates=True).gates
        by_order, from_bias = score_parts(layer, hidden, rows, active)
        from_vectors, _ = score_parts(layer, hidden, layer.read(rows), active)
    assert by_order.shape == (2, 7, 3, num_streams)
    recovered = gates_of((by_order.sum(2) + from_bias).numpy(), config.gate) * active[..., None].numpy()
    np.testing.assert_allclose(recovered, gates.numpy(), atol=2e-4)
    assert torch.equal(by_order, from_vectors)


def test_an_order_adds_nothing_where_its_rows_are_zero(tokenizer):
    model = build(tokenizer, layers=(1,))
    weight = model.model.layers[1].memory.key_value.weight
    with torch.no_grad():
        weight[:, weight.shape[1] // 2 :] = 0  # the second half of the memory vector is order 3
    trace = gate_trace(model, tokenizer, TEXT)
    assert trace.order_scores[:, :, 0].any()
    assert not trace.order_scores[:, :, 1].any()


def test_long_text_is_cut_into_windows_that_do_not_see_each_other(tokenizer):
    model = build(tokenizer)
    ids = tokenizer(TEXT).input_ids
    whole = gate_trace(model, tokenizer, ids, length=7)
    parts = [gate_trace(model, tokenizer, ids[start : start + 7]) for start in range(0, len(ids), 7)]
    np.testing.assert_allclose(whole.gates, np.concatenate([part.gates for part in parts], axis=1), atol=1e-6)
    assert whole.visible.tolist() == [count for part in parts for count in part.visible.tolist()]
    assert whole.fired(0, 7).tokens == (ids[7],)
    assert (
        gate_trace(model, tokenizer, TEXT, length=10_000).gates.tobytes()
        == gate_trace(model, tokenizer, torch.tensor(ids)).gates.tobytes()
    )


def test_fired_ngram_begins_at_the_start_of_its_segment(tokenizer):
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    model = build(tokenizer, orders=(4,), memory_dim=8, segments=Segments(end_tokens=(end,), dead_tokens=(pad,)))
    a, b, c = tokenizer("xyz").input_ids
    trace = gate_trace(model, tokenizer, [a, b, c, a, b, end, a, b, pad, c, a])
    fired = [trace.fired(0, position) for position in range(11)]
    assert [None if ngram is None else ngram.tokens for ngram in fired] == [
        (a,),
        (a, b),
        (a, b, c),
        (a, b, c, a),
        (b, c, a, b),
        (c, a, b, end),  # an end-of-text token belongs to the segment it ends
        (a,),
        (a, b),
        None,
        (c,),
        (c, a),
    ]
    assert {ngram.order for ngram in fired if ngram} == {4}
    assert fired[4].text == "yzxy"
    assert not trace.gates[:, 8].any()
    assert not trace.order_scores[:, 8].any()


def test_segments_by_position_start_where_a_window_starts(tokenizer):
    model = build(tokenizer, segments=Segments(positions=True))
    trace = gate_trace(model, tokenizer, TEXT, length=4)
    assert trace.visible[:6].tolist() == [1, 2, 3, 3, 1, 2]


def trace_of(scores, tokens=(5, 6, 7), **fields) -> GateTrace:
    """A trace made by hand; scores are [positions, orders, streams] of one block."""
    scores = np.array(scores, dtype=np.float32)[None]
    defaults = {
        "tokens": np.array(tokens),
        "texts": tuple("abcdefgh"[token] for token in tokens),
        "blocks": (4,),
        "orders": (2, 3),
        "gates": gates_of(scores.sum(2)),
        "order_scores": scores,
        "bias_scores": np.zeros_like(scores[:, :, 0]),
        "visible": np.array([1, 2, 3]),
    }
    return GateTrace(**{**defaults, **fields})


def test_fired_ngram_is_the_one_with_the_largest_contribution():
    trace = trace_of([[[1, 0], [-3, 0]], [[-2, 0], [-1, 0]], [[1, 0], [2, -5]]])
    assert [trace.fired(4, position, stream=0).order for position in range(3)] == [2, 3, 3]
    assert trace.fired(4, 2, stream=0) == (3, (5, 6, 7), "fgh", 2.0)
    assert trace.fired(4, 2) == (2, (6, 7), "gh", 1.0)
    assert trace.num_streams == 2
    with pytest.raises(ConfigError, match="block 3 reads no memory; those that do are 4"):
        trace.fired(3, 0)


def test_strongest_ranks_ngrams_by_mean_gate_and_counts_them():
    once = trace_of([[[1.0], [0.0]], [[9.0], [0.0]], [[0.0], [4.0]]])
    other = trace_of([[[3.0], [0.0]], [[0.0], [1.0]], [[0.0], [4.0]]])
    ranked = strongest([once, other], 4)
    assert [(item.text, item.order, item.num_positions) for item in ranked] == [
        ("fg", 2, 1),
        ("fgh", 3, 2),
        ("f", 2, 2),
        ("fg", 3, 1),
    ]
    assert ranked[2].mean_gate == pytest.approx(float(once.gates[0, 0, 0] + other.gates[0, 0, 0]) / 2)
    assert [item.text for item in strongest([once, other], 4, 1, min_count=2)] == ["fgh"]
    assert strongest(once, 4, 0) == []


def test_strongest_leaves_dead_positions_out():
    trace = trace_of([[[1.0], [0.0]]] * 3, visible=np.array([1, 0, 1]))
    assert [item.text for item in strongest(trace, 4)] == ["f", "h"]


def test_texts_of_the_tokens_join_to_the_text(tokenizer):
    model = build(tokenizer)
    trace = gate_trace(model, tokenizer, ODD_TEXT)
    assert "".join(trace.texts) == ODD_TEXT
    assert len(trace.texts) == len(trace.tokens)
    horse = trace.texts.index("🐎")
    assert trace.texts[horse - 3 : horse] == ("", "", "")  # four bytes, four tokens


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer):
    model = build(tokenizer)
    trace = gate_trace(model, tokenizer, tokenizer("a🐎").input_ids[:-1])
    assert trace.texts == ("a", "", "", "\ufffd")


def test_model_and_its_mode_stay_as_they_were(tokenizer):
    model = build(tokenizer).train()
    gate_trace(model, tokenizer, "self")
    assert model.training
    assert not any(module._forward_hooks for module in model.model.layers[0].memory.modules())


def test_model_without_memory_is_refused(tokenizer):
    with pytest.raises(MismatchError, match="does not apply to EngramForCausalLM: it has no memory"):
        gate_trace(build(tokenizer, memory=False), tokenizer, TEXT)
    with pytest.raises(ConfigError, match="Linear cannot be analyzed"):
        gate_trace(torch.nn.Linear(1, 1), tokenizer, TEXT)


def test_memory_without_a_gate_is_refused(tokenizer):
    with pytest.raises(MismatchError, match="not gated"):
        gate_trace(build(tokenizer, gate="none"), tokenizer, TEXT)


def test_another_tokenizer_is_refused(tokenizer):
    other = train_tokenizer(["quite other words, other words"], 280)
    with pytest.raises(MismatchError, match="the tokenizer the model was trained with"):
        gate_trace(build(tokenizer), other, TEXT)


def test_impossible_texts_are_refused(tokenizer):
    model = build(tokenizer)
    with pytest.raises(DataError, match="at least one token"):
        gate_trace(model, tokenizer, "")
    with pytest.raises(DataError, match=r"the shape \[1, 2\]"):
        gate_trace(model, tokenizer, [[1, 2]])
    with pytest.raises(TokenError):
        gate_trace(model, tokenizer, [len(tokenizer)])
    with pytest.raises(ConfigError, match="length is a whole number from 1, got 0"):
        gate_trace(model, tokenizer, TEXT, length=0)


def test_a_trace_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace_of([[[1.0], [0.0]]] * 3).blocks = ()
