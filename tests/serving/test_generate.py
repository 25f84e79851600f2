"""``engram-lm generate`` and ``engram-lm eval`` work on any saved model, and refuse what is none."""

import copy
import json

import numpy as np
import pytest
import torch
from tests.adapt import small_models
from tests.adapt.hub_client import adapter_of
from tests.beginnings import with_template
from tests.small_model import BACKBONE, TEXT
from tests.training.test_loop import TOKENIZER, model
from transformers import AutoModelForCausalLM

from engram_lm.cli import main
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.serving.generate import continue_text
from engram_lm.serving.load import load_model
from engram_lm.training.held_out import held_out_loss


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


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Somebody else's model, memory for it, and what it says with that memory."""
    base, memory = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    one, adapter = adapter_of()
    adapter.save_pretrained(memory)
    small_models.small_model().save_pretrained(base)
    small_models.TOKENIZER.save_pretrained(base)
    return base, memory, one


def test_memory_is_added_to_somebody_else_s_model(adapted, tmp_path, capsys):
    base, memory, one = adapted
    call = ["generate", str(base), "--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0"]
    assert main(call) == 0
    without = capsys.readouterr().out
    expected = "the cat" + continue_text(one, small_models.TOKENIZER, "the cat", max_new_tokens=12) + "\n"
    assert expected != without
    for flags in ([], ["--table-tier", "file", "--table-cache-mib", "1"], ["--table-source", str(memory)]):
        assert main([*call, "--adapter", str(memory), *flags]) == 0
        assert capsys.readouterr().out == expected
    (tmp_path / "text.txt").write_text(TEXT)
    call = ["eval", str(base), "--data", str(tmp_path), "--sequence-length", "32", "--json", "--adapter", str(memory)]
    assert main(call) == 0
    printed = json.loads(capsys.readouterr().out)
    tokens = np.array([*small_models.TOKENIZER(TEXT).input_ids, small_models.TOKENIZER.eos_token_id])
    assert printed["loss"] == pytest.approx(held_out_loss(one, tokens, length=32).loss, rel=1e-5)
    assert printed["adapter"] == str(memory)


def test_an_adapter_that_does_not_fit_ends_with_a_message(adapted, folder, tmp_path, capsys):
    base, memory, _ = adapted
    for base_model, adapter, message in (
        (base, tmp_path, "config.json"),
        (folder, memory, "the tokenizer the model was trained with"),
        (base, base, "does not describe a memory adapter"),
    ):
        assert main(["generate", str(base_model), "--prompt", "a", "--adapter", str(adapter)]) == 1
        assert message in capsys.readouterr().err
    assert main(["generate", str(base), "--prompt", "a", "--table-tier", "file"]) == 1
    assert "--adapter" in capsys.readouterr().err


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
    assert "the tokenizer the model was trained with" in capsys.readouterr().err
    (tmp_path / "mixed" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0broken")
    assert main(["generate", str(tmp_path / "mixed"), "--prompt", "a"]) == 1


def test_a_prompt_begins_as_the_model_s_tokenizer_begins_it(tmp_path, capsys):
    one, tokenizer = small_models.small_model(), with_template(small_models.TOKENIZER, "<s> $A")
    one.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = tokenizer("the cat", return_tensors="pt")
    assert prompt.input_ids[0, 0] == tokenizer.bos_token_id
    expected = one.generate(**prompt, do_sample=False, max_new_tokens=12, pad_token_id=1)[
        0, prompt.input_ids.shape[1] :
    ]
    assert main(["generate", str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "the cat" + tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    without = continue_text(one, small_models.TOKENIZER, "the cat", max_new_tokens=12)
    assert without != tokenizer.decode(expected, skip_special_tokens=True)


def test_eval_begins_every_sequence_as_the_model_s_tokenizer_begins_texts(tmp_path, capsys):
    one, tokenizer = small_models.small_model(), with_template(small_models.TOKENIZER, "<s> $A")
    one.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    call = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--sequence-length", "32", "--json"]
    assert main(call) == 0
    tokens = [*small_models.TOKENIZER(TEXT).input_ids, tokenizer.eos_token_id]
    parts = [
        torch.tensor([[tokenizer.bos_token_id, *tokens[start : start + 32]]]) for start in range(0, len(tokens), 32)
    ]
    total = sum(float(one(input_ids=part, labels=part).loss.detach()) * (part.numel() - 1) for part in parts)
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(total / len(tokens), rel=1e-5)


def test_tokens_that_were_added_after_training_are_generated_from_and_named(adapted, tmp_path, capsys, caplog):
    base, memory, _ = adapted
    tokenizer = copy.deepcopy(small_models.TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path)
    one = AutoModelForCausalLM.from_pretrained(base)
    one.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    one.save_pretrained(tmp_path)
    call = ["generate", str(tmp_path), "--prompt", "the cat<|user|>", "--max-new-tokens", "3", "--adapter", str(memory)]
    assert main(call) == 0
    assert "1 more tokens than this memory was made with ('<|user|>')" in caplog.text
    # A model that does not embed the new token refuses it only where it occurs.
    one.resize_token_embeddings(len(tokenizer) - 1, mean_resizing=False)
    one.save_pretrained(tmp_path)
    for options in (call, call[:-2]):
        capsys.readouterr()
        assert main(options) == 1
        assert f"token id {len(tokenizer) - 1} is outside the vocabulary" in capsys.readouterr().err
        assert main([*options[:3], "the cat", *options[4:]]) == 0
