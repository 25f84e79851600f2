"""The logit lens says what the model's own head makes of each layer, position by position."""

import json

import numpy as np
import pytest
import torch
import transformers
from tests.adapt.small_models import CONFIGS, TEXT, TOKENIZER, small_model
from tests.analysis.looking import logit_lens
from tests.small_model import BACKBONE, MEMORY, VARIANTS

import engram_lm
from engram_lm.analysis import find_subject, read_text
from engram_lm.analysis.lens import LensCurve, LogitLens
from engram_lm.analysis.positions import thinned
from engram_lm.analysis.protocol import NotApplicable
from engram_lm.analysis.subject import find_subjects, group_by_tokenizer
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.tokenizing import text_tokens

TOKENS = text_tokens(TOKENIZER, TEXT)[:70]
LENGTH = 16


def own_model(variant="plain"):
    torch.manual_seed(0)
    backbone, changes = VARIANTS[variant]
    model = engram_lm.EngramForCausalLM(
        engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, engram_lm.EngramConfig(**{**MEMORY, **changes}), **{
            **BACKBONE, **backbone
        })
    ).eval()  # fmt: skip
    return loud(model)


def loud(model):
    """Weights so large that the layers predict different things."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def attached_model():
    model = small_model()
    loud(engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY)).layers)
    return model


def soft_capped_model():
    shape = {**CONFIGS["gemma3"]().to_dict(), "final_logit_softcapping": 0.7}
    shape.pop("model_type")
    torch.manual_seed(0)
    return loud(transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape)).eval())


MODELS = {
    "llama": small_model,
    "gemma 3, soft-capped": soft_capped_model,
    "one stream": own_model,
    "four streams": lambda: own_model("streams"),
    "attached": attached_model,
}


def predictions(model, tokens):
    """Logits of the embedding and every layer, [E, L, V], by the parts of the model itself."""
    inner, found = model.model, []
    with torch.no_grad():
        said = model(torch.from_numpy(tokens[None]), output_hidden_states=True)
        streams = getattr(inner, "stream_head", None)
        states = list(said.hidden_states[:-1])  # the last one is normed already
        if streams is None:  # transformers sees the first one with an attached memory added to it
            states[0] = inner.embed_tokens(torch.from_numpy(tokens[None]))
        for hidden in states:
            hidden = hidden if streams is None else streams(hidden)
            logits = model.lm_head(inner.norm(hidden.reshape(1, len(tokens), -1)))
            cap = getattr(model.config, "final_logit_softcapping", None)
            found.append(logits if cap is None else cap * torch.tanh(logits / cap))
    return torch.cat([*found, said.logits]).double()


def one_by_one(model, tokens=TOKENS, one_in=1):
    """Divergence, entropy, agreement [E, P], depth [P] and window [P] of the positions, in plain loops."""
    rows, depths, windows = [], [], []
    taken = thinned(np.arange(len(tokens)), one_in)
    for start in range(0, len(tokens), LENGTH):
        logits = predictions(model, tokens[start : start + LENGTH])
        for place in range(logits.shape[1]):
            if not taken[start + place]:
                continue
            shares = [torch.log_softmax(layer[place], -1) for layer in logits]
            final = shares[-1]
            values = []
            for layer in shares:
                divergence = float((final.exp() * (final - layer)).sum())
                entropy = -float((layer.exp() * layer).sum())
                values.append((divergence, entropy, float(layer.argmax() == final.argmax())))
            right = [value[2] for value in values]
            depths.append(min(depth for depth in range(len(right)) if all(right[depth:])))
            rows.append(values)
            windows.append(start // LENGTH)
    return np.array(rows).transpose(2, 1, 0), np.array(depths), np.array(windows)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_compared_with_the_model_s_own_prediction(name):
    model = MODELS[name]()
    curve = logit_lens(model, TOKENIZER, TOKENS, length=LENGTH).models[type(model).__name__]
    (kl, entropy, agreement), depth, _ = one_by_one(model)
    assert kl.shape == (curve.num_layers + 1, len(TOKENS)) == (4, 70)
    np.testing.assert_allclose(curve.kl, kl.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curve.entropy, entropy.mean(1), rtol=1e-5)
    np.testing.assert_allclose(curve.agreement, agreement.mean(1))
    assert curve.prediction_depth == pytest.approx(depth.mean())
    assert curve.kl[-1] == 0 and min(curve.kl[:-1]) > 1e-3
    assert 0 < curve.prediction_depth <= 3
    assert (curve.num_positions, curve.num_windows, curve.num_not_finite) == (70, 5, 0)
    assert curve.relative_depth.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curve.memory_blocks == (() if name.startswith(("llama", "gemma")) else (0, 2))


def test_the_direction_is_final_to_layer():
    kl = logit_lens(small_model(), TOKENIZER, TOKENS[:5], length=5).models["LlamaForCausalLM"].kl[0]
    logs = torch.log_softmax(predictions(small_model(), TOKENS[:5]), -1)

    def divergence(p, q):
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl == pytest.approx(divergence(logs[-1], logs[0]), rel=1e-4)
    assert abs(kl - divergence(logs[0], logs[-1])) > 0.01 * kl


def test_the_standard_error_is_that_of_a_ratio_of_sums_over_windows():
    model = small_model()
    curve = logit_lens(model, TOKENIZER, TOKENS, length=LENGTH, one_in=3).models["LlamaForCausalLM"]
    (kl, _, _), _, windows = one_by_one(model, one_in=3)
    sums = np.stack([kl[:, windows == window].sum(1) for window in range(5)])
    counts = np.bincount(windows)
    residuals = sums - counts[:, None] * kl.mean(1)
    expected = np.sqrt((residuals**2).sum(0) * 5 / 4) / len(windows)
    np.testing.assert_allclose(curve.kl_error, expected, rtol=1e-4, atol=1e-9)
    assert curve.num_positions == len(windows)
    alone = logit_lens(model, TOKENIZER, TOKENS[:LENGTH], length=LENGTH).models["LlamaForCausalLM"]
    assert np.isnan(alone.kl_error).all() and alone.to_dict()["kl_error"] == [None] * 4


def test_results_do_not_depend_on_the_budget_nor_on_what_is_computed_together(monkeypatch):
    subject = find_subject(small_model(), TOKENIZER)

    def read(batch_size):
        analyses = {"lens": LogitLens(one_in=3)}
        return read_text([subject], TOKENS, analyses, length=LENGTH, max_batch_size=batch_size)["lens"]

    together = read(16).to_dict()["models"]["LlamaForCausalLM"]
    chunks = []
    predict = type(subject).predict
    monkeypatch.setattr("engram_lm.analysis.lens._CHUNK_BYTES", 0)
    monkeypatch.setattr(
        type(subject), "predict", lambda self, hidden: chunks.append(len(hidden)) or predict(self, hidden)
    )
    alone = read(1).to_dict()["models"]["LlamaForCausalLM"]
    assert max(chunks) <= 32
    for name, value in together.items():
        assert alone[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_the_scratch_stays_within_what_is_stated():
    subject = find_subject(small_model(), TOKENIZER)
    peaks = []

    class Weighed(LogitLens):
        def update(self, readings):
            with torch.profiler.profile(profile_memory=True) as profile:
                super().update(readings)
            changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            sizes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
            peaks.append(np.cumsum(sizes).max())

    # 16,000 positions at a time, of which 3,276 are looked at together.
    read_text([subject], np.tile(TOKENS, 400), {"lens": Weighed()}, length=64, max_batch_size=250)
    stated = LogitLens().held_bytes([subject]) + 16_000 * LogitLens().scratch_bytes_per_token([subject])
    assert stated / 2 < max(peaks) < stated


def test_several_models_stand_side_by_side_also_when_their_vocabularies_differ(other_tokenizer):
    models = {"memory": attached_model(), "plain": small_model(), "other": small_model("qwen3")}
    tokenizers = {"memory": TOKENIZER, "plain": TOKENIZER, "other": other_tokenizer}
    text = TEXT[:200]
    groups = group_by_tokenizer(find_subjects(models, tokenizers))
    together = [read_text(group, text, {"it": LogitLens()}, length=LENGTH)["it"] for group in groups]
    assert [list(found.models) for found in together] == [["memory", "plain"], ["other"]]
    curves = {name: curve for found in together for name, curve in found.models.items()}
    for name, model in models.items():
        alone = logit_lens({"it": model}, tokenizers[name], text, length=LENGTH).models["it"]
        np.testing.assert_allclose(curves[name].kl, alone.kl)
    assert json.loads(json.dumps(together[0].to_dict()))["models"]["plain"]["num_layers"] == 3
    with pytest.raises(MismatchError, match="analyze them one after the other"):
        logit_lens(models, tokenizers, TOKENS, length=LENGTH)
    with pytest.raises(ConfigError, match="no tokenizer was given for other"):
        logit_lens(models, {"memory": TOKENIZER, "plain": TOKENIZER}, text)


def curve_of(*kl):
    return LensCurve(
        num_layers=len(kl) - 1, memory_blocks=(), kl=np.array(kl), kl_error=np.zeros(0), entropy=np.zeros(0),
        agreement=np.zeros(0), prediction_depth=0.0, num_positions=1, num_windows=1, num_not_finite=0,
    )  # fmt: skip


def test_the_depth_at_which_the_divergence_has_halved_lies_between_layers():
    assert curve_of(8.0, 7.0, 3.0, 5.0, 0.0).kl_depth() == pytest.approx(1.75)  # the first time, not the last
    assert curve_of(8.0, 7.0, 3.0, 5.0, 0.0).kl_depth(0.25) == pytest.approx(3.6)
    assert curve_of(8.0, 4.0, 0.0).kl_depth(0.5) == 1
    assert curve_of(8.0, 9.0, 0.0).kl_depth(1.0) == 0
    assert np.isnan(curve_of(np.nan, np.nan).kl_depth())
    with pytest.raises(ConfigError, match="above 0 and at most 1, not 0"):
        curve_of(1.0, 0.0).kl_depth(0)


def test_positions_that_are_not_finite_are_left_out_and_counted():
    def spoil(module, args, output):
        if output.dim() == 3:  # the model's own prediction
            output[:, 3] = torch.nan
        elif len(output) == 60:  # the lens: a layer's prediction overflows where the model's own does not
            output[20] = torch.inf

    model = small_model()
    model.lm_head.register_forward_hook(spoil)
    found = logit_lens(model, TOKENIZER, TOKENS, length=LENGTH).models["LlamaForCausalLM"]
    (kl, _, _), _, _ = one_by_one(small_model())
    # The 20th of those that are left of four windows of 16.
    left_out = [3, 19, 35, 51, 67, 22]
    assert (found.num_not_finite, found.num_positions) == (6, 64)
    np.testing.assert_allclose(found.kl, np.delete(kl, left_out, axis=1).mean(1), rtol=1e-4, atol=1e-6)
    model.lm_head.register_forward_hook(lambda module, args, output: output.fill_(torch.inf))
    (nothing,) = logit_lens(model, TOKENIZER, TOKENS, length=LENGTH).models.values()
    assert (nothing.num_not_finite, nothing.num_positions) == (70, 0) and np.isnan(nothing.kl).all()


def test_a_model_whose_head_is_not_understood_is_reported_and_impossible_requests_refused():
    model = small_model()
    model.register_forward_hook(lambda module, args, output: output.__class__(logits=output.logits * 1.5))
    with pytest.raises(MismatchError, match="LogitLens does not apply to LlamaForCausalLM: the last layer of"):
        logit_lens(model, TOKENIZER, TOKENS, length=LENGTH)
    found = read_text([find_subject(model, TOKENIZER)], TOKENS, {"lens": LogitLens()}, length=LENGTH)["lens"]
    assert isinstance(found, NotApplicable)
    for one_in in (0, 1.5):
        with pytest.raises(ConfigError, match="one_in is a whole number from 1"):
            LogitLens(one_in=one_in)
    with pytest.raises(ConfigError, match="at least one"):
        logit_lens({}, TOKENIZER, TOKENS)
    with pytest.raises(DataError, match="at least one token"):
        logit_lens(small_model(), TOKENIZER, "")
