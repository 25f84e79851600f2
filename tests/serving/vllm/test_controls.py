"""What must not give the right tokens: if it did, the tests of exactness would show nothing."""

import json
import subprocess
import sys

import torch
from tests.serving.vllm.engines import count, engine, generate, num_equal
from tests.serving.vllm.models import prompts

from engram_lm.serving.vllm.state import MemoryState


def test_tokens_differ_where_the_convolution_sees_nothing(checkpoints, monkeypatch):
    folder, expected = checkpoints("dense")
    read = MemoryState.read
    monkeypatch.setattr(MemoryState, "read", lambda self, slots: tuple(map(torch.zeros_like, read(self, slots))))
    with engine(folder) as llm:
        assert num_equal(generate(llm, prompts())[0], expected) <= 1


def test_tokens_differ_where_the_history_is_another_one(checkpoints, monkeypatch):
    folder, expected = checkpoints("dense")
    read = MemoryState.read_codes
    monkeypatch.setattr(MemoryState, "read_codes", lambda self, slots: read(self, slots).roll(1, 0))
    with engine(folder) as llm:
        assert num_equal(generate(llm, prompts())[0], expected) <= 1


def test_tokens_differ_where_a_shared_prefix_brings_no_history(checkpoints, monkeypatch):
    folder, expected = checkpoints("dense")
    with engine(folder, enable_prefix_caching=True, block_size=32) as llm:
        assert num_equal(generate(llm, prompts())[0], expected) == len(expected)
        for state in _states(llm):
            state.kv_cache.zero_()  # a cache of keys and values alone
        tokens = generate(llm, prompts())[0]
        assert count(llm, "prefix_cache_hits") > 0
        hit = [index for index, prompt in enumerate(prompts()) if len(prompt) > 64]
        assert not any(tokens[index] == expected[index].tokens for index in hit if len(prompts()[index]) % 32 < 9)


RAW = """
import json, sys
from tests.serving.vllm.engines import engine, generate
from tests.serving.vllm.models import prompts
from vllm import ModelRegistry

ModelRegistry.register_model("RawEngram", "vllm.model_executor.models.transformers:TransformersForCausalLM")
with engine(sys.argv[1], hf_overrides={"architectures": ["RawEngram"]}, enforce_eager=True) as llm:
    print(json.dumps(generate(llm, prompts())[0]))
"""


def test_the_transformers_backend_of_vllm_is_no_way_to_serve_memory(checkpoints):
    folder, expected = checkpoints("quickstart")
    # In a process of its own, because it changes the classes of the model.
    done = subprocess.run([sys.executable, "-c", RAW, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert num_equal(json.loads(done.stdout.splitlines()[-1]), expected) == 0


def _states(llm):
    """The memory states of an engine in this process."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, MemoryState)]
