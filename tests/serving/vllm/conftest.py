"""These tests run where vLLM is installed (``make test-vllm``); elsewhere they are not collected."""

import importlib.util
import os
import warnings
from pathlib import Path

import pytest

# Read when vLLM is imported: a small cache, engines inside the process of the tests, no binding to cores.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]
else:
    with warnings.catch_warnings():
        # What vLLM and what it imports warn of is not ours to mend.
        warnings.simplefilter("ignore")
        from vllm import LLM  # noqa: F401 - imports nearly everything


def pytest_collection_modifyitems(items):
    """Warnings of vLLM count as little while it runs, and an engine takes its time to start on a busy machine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a checkpoint by its name in `models.CHECKPOINTS`, and what transformers generates from it."""
    from tests.serving.vllm.models import expect, prompts, save_checkpoint
    from transformers import AutoModelForCausalLM

    import engram_lm  # noqa: F401 - registers the model

    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_checkpoint(name, folder)
            made[name] = folder, expect(AutoModelForCausalLM.from_pretrained(folder).eval(), prompts())
        return made[name]

    return get
