"""What memory cannot be served with is refused in words, before anything is loaded; everything else is left alone."""

import json
import shutil
import subprocess
import sys

import pytest
from tests.serving.vllm.engines import GREEDY, assert_equal, engine, generate
from tests.serving.vllm.models import prompts, save_checkpoint
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from engram_lm.cli import main
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.serving.vllm.tables import OPTION
from engram_lm.serving.vllm.version import check_version

FOREIGN = """
import engram_lm, sys
assert "vllm" not in sys.modules and "torch" not in sys.modules
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
assert "engram_lm.serving.vllm.model" not in sys.modules
assert "engram_lm.model.modeling" not in sys.modules
from vllm import ModelRegistry
assert "EngramForCausalLM" in ModelRegistry.get_supported_archs()
assert "Qwen3ForCausalLM" in ModelRegistry.get_supported_archs()
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size must be 1 for a model with memory, not 2"),
        ({"engram_config": {"cpu_offload": True}}, "--engram-config is for the models that vLLM itself has"),
        ({"enable_prompt_embeds": True}, "memory is addressed by tokens"),
        ({"additional_config": {"engram_tables": {"teir": "mmap"}}}, "engram_tables has no field 'teir'"),
        ({"additional_config": {"engram_tables": {"tier": "remote"}}}, "reads from an address"),
        ({"additional_config": {"engram_tables": {"source": "nowhere"}}}, "nowhere does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_cannot_be_served_is_refused(options, words, checkpoints):
    folder, _ = checkpoints("dense")
    with pytest.raises(ValueError, match=words):
        LLM(str(folder), dtype="float32", max_model_len=64, **options)


def test_another_tokenizer_is_refused_with_both_digests(checkpoints, other_tokenizer, tmp_path):
    folder, _ = checkpoints("dense")
    other_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hashes with the token map .*, the given map is"):
        LLM(str(folder), tokenizer=str(tmp_path), dtype="float32", max_model_len=64)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"rows_per_head": 110}, "one of them belongs to another model"),
        ({"memory_dim": 48}, "one of them belongs to another model"),
        ({"seed": 7}, "was made for HashSpec .*, the model reads its table .* with HashSpec"),
    ],
    ids=["rows", "width", "hash"],
)
def test_tables_of_another_geometry_are_refused(other, words, checkpoints, tmp_path):
    folder, _ = checkpoints("dense")
    save_checkpoint("dense", tmp_path / "other", other)
    assert main(["table", "convert", str(tmp_path / "other"), str(tmp_path / "packed")]) == 0
    option = {OPTION: {"source": str(tmp_path / "packed")}}
    with pytest.raises(ValueError, match=words):
        EngineArgs(model=str(folder), additional_config=option).create_engine_config()


def test_tables_that_were_packed_of_the_model_are_taken(checkpoints, tmp_path):
    folder, expected = checkpoints("dense")
    assert main(["table", "convert", str(folder), str(tmp_path / "packed")]) == 0
    with engine(folder, additional_config={OPTION: {"source": str(tmp_path / "packed")}}) as llm:
        assert_equal(generate(llm, prompts()), expected)


def test_weights_of_another_geometry_are_refused(checkpoints, tmp_path):
    folder, _ = checkpoints("dense")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_checkpoint("dense", tmp_path / "other", {"rows_per_head": 110})
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(MismatchError, match="one of them belongs to another model"), engine(tmp_path):
        pass


def test_another_version_of_vllm_is_refused_by_name():
    check_version("0.32.4")
    for version in ("0.31.0", "0.33.0", "1.32.0"):
        with pytest.raises(ConfigError, match=f"serves through vLLM 0.32, this is {version}"):
            check_version(version)


def test_ids_outside_the_vocabulary_leave_the_engine_alive(checkpoints):
    folder, expected = checkpoints("dense")
    with engine(folder) as llm:
        for wrong in (100_000, 2**31):
            with pytest.raises(VLLMValidationError, match="out of vocabulary"):
                llm.generate([{"prompt_token_ids": [5, wrong, 6]}], GREEDY, use_tqdm=False)
        assert_equal(generate(llm, prompts()), expected)


def test_the_plugin_is_light_and_leaves_other_models_alone():
    done = subprocess.run([sys.executable, "-c", FOREIGN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
