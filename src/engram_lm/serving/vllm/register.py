"""What vLLM calls in each of its processes, often more than once: it says where our model is, without importing it."""

ARCHITECTURE = "EngramForCausalLM"
"""What ``config.json`` calls our model under ``architectures``."""


def register() -> None:
    """Tell vLLM of our model and of others with a memory adapter; models without memory are not touched."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import config as model_configs

    import engram_lm  # noqa: F401 - lets transformers know our config.json
    from engram_lm.serving.vllm.adapted_config import register_adapted
    from engram_lm.serving.vllm.config_check import EngramConfigCheck

    ModelRegistry.register_model(ARCHITECTURE, "engram_lm.serving.vllm.model:EngramForCausalLM")
    model_configs.MODELS_CONFIG_MAP[ARCHITECTURE] = EngramConfigCheck
    register_adapted()
