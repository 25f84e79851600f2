"""A model of others and its adapters as one folder: what is linked, what is copied, what is refused."""

import json

import pytest
import transformers
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm
from engram_lm.cli import main


@pytest.fixture
def parts(tmp_path):
    """A base model in several files, and an adapter of it."""
    model = small_model("qwen3")
    model.save_pretrained(tmp_path / "base", max_shard_size="40kB")
    TOKENIZER.save_pretrained(tmp_path / "base")
    options = {"memory_dim": 24, "rows_per_head": 13, "num_heads": 2, "orders": (2, 3)}
    engram_lm.attach(model, TOKENIZER, layers=(1,), **options).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_files_are_links_unless_they_are_copied(parts, capsys):
    command = ["join", str(parts / "base"), str(parts / "joined"), "--adapter", str(parts / "adapter"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "EngramQwen3ForCausalLM"
    joined = parts / "joined"
    own = {"config.json", "README.md"}
    assert {path.name for path in joined.rglob("*") if path.is_file() and not path.is_symlink()} == own
    config = json.loads((joined / "config.json").read_text())
    assert config == {
        **json.loads((parts / "base/config.json").read_text()),
        "architectures": ["EngramQwen3ForCausalLM"],
    }
    weights = sorted(path.name for path in (parts / "base").glob("*.safetensors"))
    assert len(weights) > 1
    assert sorted(path.name for path in joined.glob("*.safetensors")) == [f"base-{name}" for name in weights]
    engram_lm.MemoryAdapter.from_pretrained(small_model("qwen3"), joined / "engram_adapters/00", tokenizer=TOKENIZER)

    command[2] = str(parts / "copied")
    assert main([*command, "--copy"]) == 0
    copied = [path for path in (parts / "copied").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in copied)
    assert {path.relative_to(parts / "copied") for path in copied} == {
        path.relative_to(joined) for path in joined.rglob("*") if path.is_file()
    }


def test_transformers_does_not_take_the_folder_for_the_model_without_memory(parts):
    assert main(["join", str(parts / "base"), str(parts / "joined"), "--adapter", str(parts / "adapter")]) == 0
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(parts / "joined")


def test_what_is_no_model_with_safetensors_is_refused_and_nothing_is_left(parts, capsys):
    for path in (parts / "base").glob("*.safetensors"):
        path.unlink()
    command = ["join", str(parts / "base"), str(parts / "joined"), "--adapter", str(parts / "adapter")]
    assert main(command) == 1
    assert "vLLM reads the weights of a model from safetensors" in capsys.readouterr().err
    command[1] = str(parts / "adapter")
    assert main(command) == 1
    assert "expected the name of one architecture, found None" in capsys.readouterr().err
    assert not list(parts.glob("*joined*"))


def test_a_folder_that_was_joined_is_not_joined_again(parts, capsys):
    command = ["join", str(parts / "base"), str(parts / "joined"), "--adapter", str(parts / "adapter")]
    assert main(command) == 0
    assert main([command[0], command[2], str(parts / "twice"), *command[3:]]) == 1
    assert "EngramQwen3ForCausalLM, which has memory already" in capsys.readouterr().err


def test_an_adapter_of_another_tokenizer_is_refused(parts, other_tokenizer, capsys):
    other_tokenizer.save_pretrained(parts / "base")
    assert main(["join", str(parts / "base"), str(parts / "joined"), "--adapter", str(parts / "adapter")]) == 1
    assert "hashes with the token map" in capsys.readouterr().err
    assert not list(parts.glob("*joined*"))
