"""The reference language model around the memory, as a Hugging Face model.

Reading order: ``config.py``, ``modeling.py`` (the blocks and the model), ``cache.py`` (what decoding keeps),
``sizes.py`` (parameters and FLOPs without building anything).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from engram.model.config import EngramLMConfig
from engram.model.modeling import EngramForCausalLM, EngramModel

__all__ = ["EngramForCausalLM", "EngramLMConfig", "EngramModel", "register_auto_classes"]


def register_auto_classes() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know this model. Safe to call again."""
    AutoConfig.register(EngramLMConfig.model_type, EngramLMConfig, exist_ok=True)
    AutoModel.register(EngramLMConfig, EngramModel, exist_ok=True)
    AutoModelForCausalLM.register(EngramLMConfig, EngramForCausalLM, exist_ok=True)


register_auto_classes()
