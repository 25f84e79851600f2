"""``engram generate`` and ``engram eval`` work on any saved model, and refuse what is none."""

import json

import numpy as np
import pytest
import torch
from tests.small_model import BACKBONE, TEXT
from tests.training.test_loop import TOKENIZER, model

from engram.cli import main
from engram.evaluation.loss import held_out_loss
from engram.model import EngramForCausalLM, EngramLMConfig
from engram.serving.generate import continue_text
from engram.serving.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def test_continuations_are_the_model_s_own_and_repeat(folder, capsys):
    one, tokenizer = load_model(folder)
    tokens = tokenizer("the cat", return_tensors="pt").input_ids
    expected = one.generate(tokens, do_sample=False, max_new_tokens=9, pad_token_id=1)[0, tokens.shape[1] :]
    call = ["generate", str(folder), "--prompt", "the cat", "--max-new-tokens", "9"]
    assert main([*call, "--temperature", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"prompt": "the cat", "continuations": [tokenizer.decode(expected, skip_special_tokens=True)]}
    assert main([*call, "--num-samples", "2"]) == main([*call, "--num-samples", "2"]) == 0
    first, second = capsys.readouterr().out.split("the cat")[1:3]
    assert first != second


def test_sampling_leaves_the_global_random_state_alone(folder):
    one, tokenizer = load_model(folder)
    before = torch.random.get_rng_state()
    texts = {continue_text(one, tokenizer, "the", max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)}
    assert torch.equal(torch.random.get_rng_state(), before) and len(texts) == 2
    assert continue_text(one, tokenizer, "", max_new_tokens=3)


def test_eval_prints_the_held_out_loss_of_files(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "binary").write_bytes(b"\0")
    assert main(["eval", str(folder), "--data", str(tmp_path), "--sequence-length", "32", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    tokens = np.array([*TOKENIZER(TEXT).input_ids, TOKENIZER.eos_token_id])
    expected = held_out_loss(model(), tokens, length=32, num_bytes=len(TEXT))
    assert printed["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert printed["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert (printed["files"], printed["skipped"]) == (1, {"binary": 1})
    assert main(["eval", str(folder), "--data", str(tmp_path), "--max-tokens", "50"]) == 0
    assert "nats per token" in capsys.readouterr().out


def test_a_model_without_memory_works_the_same(tmp_path, capsys):
    torch.manual_seed(0)
    EngramForCausalLM(EngramLMConfig.for_tokenizer(TOKENIZER, None, **BACKBONE)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a", "--max-new-tokens", "2"]) == 0


def test_wrong_folders_and_values_end_with_a_message(folder, tmp_path, other_tokenizer, capsys):
    assert main(["generate", str(tmp_path / "none"), "--prompt", "a"]) == 1
    assert "no config.json" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "0"]) == 2
    assert main(["eval", str(folder), "--data", str(tmp_path / "missing")]) == 1
    assert "neither a file nor a folder" in capsys.readouterr().err
    assert main(["eval", str(folder)]) == 2
    (tmp_path / "config.json").write_text("{")
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 1
    model().save_pretrained(tmp_path / "mixed")
    other_tokenizer.save_pretrained(tmp_path / "mixed")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "mixed"), "--prompt", "a"]) == 1
    assert "vocabulary" in capsys.readouterr().err
    (tmp_path / "mixed" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0broken")
    assert main(["generate", str(tmp_path / "mixed"), "--prompt", "a"]) == 1
