"""A stage that goes on with longer sequences: its positions are YaRN's, and it is a run like any other."""

import json
import math

import pytest
import torch
from rich.console import Console
from tests.small_model import TEXT
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engram_lm.cli import main
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.dry_run import dry_run
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.run import Run
from engram_lm.training.stage import StageOptions

SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "kv_lora_rank": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "intermediate_size": 48, "first_k_dense_replace": 2,
    "num_streams": 1, "max_position_embeddings": 32, "initializer_range": 0.1,
}  # fmt: skip


def train(out, sections, **options):
    progress = RunProgress(Console(stderr=True), silent=True)
    return Run(Recipe.from_dict(sections), out, progress=progress, **options).execute()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"Text {number}. " + TEXT[number * 37 :], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def first(text, tmp_path_factory):
    """A run on sequences of 32 tokens."""
    out = tmp_path_factory.mktemp("runs") / "first"
    train(
        out,
        {
            "model": {"preset": "engram-nano", "backbone": SHAPE, "memory": {"memory_dim": 16, "rows_per_head": 61}},
            "tokenizer": {"vocab_size": 280},
            **sections(text, out, 32),
        },
    )
    return out


def sections(text, out, length):
    return {
        "data": {"sources": [str(text)], "cache": str(out / "cache"), "sequence_length": length, "held_out": 0.2},
        "train": {"num_steps": 8, "batch_size": 4, "dtype": "float32", "device": "cpu"},
        "optimizer": {"lr": 3e-3},
        "evaluation": {"every": 0, "max_tokens": 200},
        "checkpoint": {"every": 3},
        "log": {"details_every": 0, "tensorboard": "no", "wandb": "no"},
    }


def stage(text, first, **options):
    return {
        "model": {"weights": str(first / "model")},
        "stage": {"factor": 4.0, **options},
        **sections(text, first, 96),
    }


def test_a_stage_goes_on_with_the_weights_at_stretched_positions(first, text, tmp_path):
    whole = train(tmp_path / "whole", stage(text, first))
    assert whole["held_out"]["loss"] > 0
    config = EngramLMConfig.from_pretrained(tmp_path / "whole" / "model")
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32)
    assert (config.max_position_embeddings, rope["mscale"]) == (96, 0.707)
    # It began with the first run's weights, not with new ones.
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    begun = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert begun < lines[0]["loss"] - 0.5

    # A stop changes nothing.
    train(tmp_path / "stopped", stage(text, first), stop_after=4)
    train(tmp_path / "stopped", stage(text, first), resume=True)
    one, other = (EngramForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "stopped"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert other.config.rope_parameters == rope
    with pytest.raises(MismatchError, match=r"stage\.factor is 8\.0, was 4\.0"):
        train(tmp_path / "stopped", stage(text, first, factor=8.0), resume=True)

    # An export of a checkpoint carries the positions, and decoding token by token is the whole forward pass.
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "exported")]) == 0
    model = EngramForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert model.config.rope_parameters == rope
    tokens = torch.randint(5, 280, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache, steps = model(tokens).logits, None, []
        for place in range(90):
            out = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-4, atol=1e-5)
    # Without the stage the same weights say something else.
    plain = EngramForCausalLM.from_pretrained(
        tmp_path / "exported", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    with torch.no_grad():
        assert (plain.eval()(tokens).logits - logits).abs().max() > 1e-3


def yarn(dim, theta, factor, length, fast, slow):
    """Frequencies of the paper, one at a time."""

    def turns_at(number):
        return dim * math.log(length / (2 * math.pi * number)) / (2 * math.log(theta))

    low, high = max(math.floor(turns_at(fast)), 0), min(math.ceil(turns_at(slow)), dim - 1)
    found = []
    for pair in range(dim // 2):
        plain = theta ** (-2 * pair / dim)
        share = min(max((pair - low) / (high - low), 0.0), 1.0)
        found.append(plain / factor * share + plain * (1 - share))
    return (low, high), found


@pytest.mark.parametrize(("dim", "factor", "length"), [(64, 10.0, 4096), (16, 8.0, 512)])
def test_positions_are_those_of_yarn(dim, factor, length):
    config = EngramLMConfig.preset("engram-nano", qk_rope_head_dim=dim, max_position_embeddings=length)
    StageOptions(factor=factor).apply(config, sequence_length=8 * length)
    model = EngramForCausalLM(config)
    bounds, expected = yarn(dim, 1e4, factor, length, 32, 1)
    if dim == 64:
        assert bounds == (10, 23)  # the published ones
    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ROPE_INIT_FUNCTIONS["yarn"](config)[0], rotary.inv_freq)
    # Scores are sharper by the square of 0.0707 ln s + 1, in all dimensions alike.
    sharper = 0.1 * 0.707 * math.log(factor) + 1
    attention = model.model.layers[0].self_attn
    assert rotary.attention_scaling == 1.0
    assert attention.scaling == pytest.approx(sharper**2 * attention.qk_head_dim**-0.5)


def test_a_second_stage_keeps_the_original_length():
    config = EngramLMConfig.preset("engram-nano", max_position_embeddings=512)
    StageOptions(factor=4).apply(config, sequence_length=2048)
    StageOptions(factor=16).apply(config, sequence_length=8192)
    assert config.rope_parameters["original_max_position_embeddings"] == 512
    assert config.max_position_embeddings == 8192


def test_a_stage_that_cannot_be_is_refused_in_words(first, text, tmp_path):
    for options, words in (
        ({"factor": 1.0}, r"\[stage\] factor is a finite number above 1, not 1\.0"),
        ({"factor": 2.0}, "96 is more than stage.factor 2 times the 32 tokens .* a factor of 3 or more"),
        ({"factor": 4.0, "beta_slow": 40.0}, "beta_slow is above 0 and below beta_fast"),
        ({"factor": 4.0, "mscale": 0.0}, "mscale is a finite number above 0"),
        ({"factr": 4.0}, "unknown key stage.factr; did you mean"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(tmp_path / "run", stage(text, first, **options))
    table = stage(text, first)
    with pytest.raises(ConfigError, match=r"96 is more than .* 32; shorten it, or set stage\.factor"):
        train(tmp_path / "run", {**table, "stage": {}})
    with pytest.raises(ConfigError, match="set factor, or the rest"):
        train(tmp_path / "run", {**table, "stage": {"mscale": 1.0}})
    with pytest.raises(ConfigError, match=r"name its folder as model\.weights"):
        train(tmp_path / "run", {**table, "model": {"preset": "engram-nano"}})


def test_a_dry_run_prices_the_longer_sequences(first, text):
    found = dry_run(Recipe.from_dict(stage(text, first)), 1)
    assert found["num_tokens"] == 8 * 4 * 96
