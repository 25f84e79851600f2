"""Engines in the process of the tests, and the comparison of what they generate with what transformers generates."""

import contextlib
import gc
from unittest import mock

import torch
from tests.serving.vllm.models import NEW_TOKENS
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms.cpu import CpuPlatform

# vLLM puts another function in its place once an engine runs.
set_num_threads = torch.set_num_threads
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False)

CACHE_BYTES = 1 << 30
"""What VLLM_CPU_KVCACHE_SPACE says in these tests."""


@contextlib.contextmanager
def engine(folder, **options):
    """An engine of vLLM in this process, in float32, that counts what it does."""
    usual = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
    }
    # Nine times in the life of an engine vLLM looks through all objects for garbage; once is enough here.
    with mock.patch.object(gc, "collect"):
        llm = LLM(str(folder), **{**usual, **options})
    try:
        yield llm
    finally:
        with mock.patch.object(gc, "collect"):
            # vLLM replaces kernels at each start, and cannot do so again once speculation has been imported.
            CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)
            llm.llm_engine.engine_core.shutdown()
            set_num_threads(1)  # speculation asks for more, which wait for each other on a busy machine
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()


def generate(llm, prompts):
    """The tokens generated from each prompt, and the logarithms of their probabilities."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    logprobs = [[step[token].logprob for token, step in zip(a.token_ids, a.logprobs)] for a in answers]
    return [list(a.token_ids) for a in answers], logprobs


def count(llm, name):
    """A counter of vLLM by its name without ``vllm:``."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def num_equal(tokens, expected):
    """How many prompts were answered as transformers answers them."""
    return sum(ours == theirs.tokens for ours, theirs in zip(tokens, expected))


def assert_equal(answers, expected, tolerance=1e-4):
    """All tokens are those of transformers, and their probabilities too."""
    tokens, logprobs = answers
    assert tokens == [each.tokens for each in expected]
    for ours, theirs in zip(logprobs, expected):
        worst = max(abs(a - b) for a, b in zip(ours, theirs.logprobs))
        assert worst < tolerance, worst
