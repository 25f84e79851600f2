"""What vLLM was told, made fit for our model or refused in words before anything is loaded."""

import json
from typing import TYPE_CHECKING

import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.serving.vllm.version import check_version
from engram_lm.tables.available_memory import available_bytes

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, VllmConfig


class EngramConfigCheck(VerifyAndUpdateConfig):
    """vLLM calls these for our architecture alone."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Refuse another version of vLLM; choose eager execution."""
        choose_eager(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what memory is not computed rightly with, and check the tokenizer and the place of the tables."""
        check_engine(vllm_config)
        config = vllm_config.model_config.hf_config
        if config.spec is not None:
            check_tokenizer(vllm_config.model_config, config.spec)
            check_source(vllm_config, config.spec, config.memory_config.head_dim)


def choose_eager(model_config: "ModelConfig") -> None:
    """Have a model with memory run without captured graphs; refuse another version of vLLM by a ConfigError."""
    check_version(vllm.__version__)
    # Rows are read by the host, which has no place in a captured graph.
    model_config.enforce_eager = True


def check_engine(vllm_config: "VllmConfig") -> None:
    """Prepare an engine for memory; refuse, by a ConfigError, what memory does not go with, and impossible tables."""
    from engram_lm.serving.vllm.request_errors import name_errors
    from engram_lm.serving.vllm.tables import OPTION, table_place

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if vllm_config.engram_config is not None:
        raise ConfigError(
            "--engram-config is for the models that vLLM itself has; say where this model's tables are read from "
            f"with --additional-config '{json.dumps({OPTION: {'tier': 'mmap'}})}'"
        )
    for name, flag in _ONE:
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(
                f"{flag} must be 1 for a model with memory, not {getattr(parallel, name)}; "
                "--tensor-parallel-size and --data-parallel-size may be larger"
            )
    if parallel.use_ubatching:
        raise ConfigError("a model with memory is not split into microbatches; leave out --enable-dbo")
    if model.enable_prompt_embeds:
        raise ConfigError("memory is addressed by tokens; leave out --enable-prompt-embeds")
    table_place(vllm_config.additional_config)
    # Both together end a request whose rows cannot be read. Without them the engine ends, and one alone would do harm.
    name_errors()
    if parallel.worker_cls == "auto" and vllm_config.scheduler_config.scheduler_cls is None:
        parallel.worker_cls = "engram_lm.serving.vllm.worker.EngramWorker"
        vllm_config.scheduler_config.scheduler_cls = "engram_lm.serving.vllm.scheduler.make_scheduler"
    settle_cache(vllm_config.cache_config)


_ONE = (
    ("pipeline_parallel_size", "--pipeline-parallel-size"),
    ("decode_context_parallel_size", "--decode-context-parallel-size"),
    ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
)


_CACHE_SHARE, _MOST_CACHE_BYTES = 0.25, 16 << 30
"""What vLLM's cache takes of a machine's free memory, and at most, where it computes on CPUs and nobody says."""


def settle_cache(cache_config: "CacheConfig") -> None:
    """Choose the size of the cache on CPUs, where neither a flag nor ``VLLM_CPU_KVCACHE_SPACE`` does.

    vLLM asks for 92 % of the whole memory there, and does not start where other programs have some of it.
    """
    from vllm.platforms import current_platform

    usual = type(cache_config).gpu_memory_utilization
    is_open = cache_config.kv_cache_memory_bytes is None and cache_config.gpu_memory_utilization == usual
    free = available_bytes()
    if current_platform.is_cpu() and is_open and free:
        cache_config.kv_cache_memory_bytes = min(int(_CACHE_SHARE * free), _MOST_CACHE_BYTES)


def check_source(vllm_config: "VllmConfig", spec: HashSpec, width: int) -> None:
    """Look for the tables where they are said to be, other than in the checkpoint, before anything is loaded.

    The workers find them again; what is wrong with them would be said there, far above the last words of a log.
    """
    from engram_lm.model.table_place import wanted_tables
    from engram_lm.serving.vllm.tables import table_place

    table_place(vllm_config.additional_config).locate(wanted_tables(spec, width))


def check_tokenizer(model_config: "ModelConfig", spec: HashSpec) -> None:
    """Refuse a tokenizer other than the one that a memory was trained with.

    Raises:
        MismatchError: With both digests.
    """
    if model_config.skip_tokenizer_init:
        return
    from transformers import AutoTokenizer

    # As it is on disk: what vLLM wraps it in is nothing that a token map is read from.
    spec.bind(AutoTokenizer.from_pretrained(model_config.tokenizer, revision=model_config.tokenizer_revision))
