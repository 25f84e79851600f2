"""The reference language model around the memory, as a Hugging Face model.

Reading order: ``config.py`` and ``presets.py`` (what a model is), ``streams.py`` and ``experts.py`` (what transformers'
modules leave to us of the backbone), ``block.py`` (one block), ``modeling.py`` (the model), ``cache.py`` (what decoding
keeps), ``row_recorder.py`` (which rows are read), ``pretrained.py`` (loading and saving) and ``table_place.py``
(where its tables are).
"""

import importlib
from typing import TYPE_CHECKING, Any

from engram_lm.versions import warn_if_untested

if TYPE_CHECKING:
    from engram_lm.model.config import EngramLMConfig
    from engram_lm.model.experts import balance_experts, expert_load
    from engram_lm.model.modeling import EngramForCausalLM, EngramModel
    from engram_lm.model.row_recorder import record_rows

__all__ = [
    "EngramForCausalLM",
    "EngramLMConfig",
    "EngramModel",
    "balance_experts",
    "expert_load",
    "record_rows",
    "register_auto_classes",
]

_MODULES = {
    "EngramForCausalLM": "engram_lm.model.modeling",
    "EngramLMConfig": "engram_lm.model.config",
    "EngramModel": "engram_lm.model.modeling",
    "balance_experts": "engram_lm.model.experts",
    "expert_load": "engram_lm.model.experts",
    "record_rows": "engram_lm.model.row_recorder",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that pricing a configuration does not wait for the modeling code of transformers.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_auto_classes()
    return getattr(importlib.import_module(_MODULES[name]), name)


def register_auto_classes() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know this model. Safe to call again."""
    # Before anything of transformers is taken, because another version may lack it.
    warn_if_untested("torch", "transformers")
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from engram_lm.model.config import EngramLMConfig
    from engram_lm.model.modeling import EngramForCausalLM, EngramModel

    AutoConfig.register(EngramLMConfig.model_type, EngramLMConfig, exist_ok=True)
    AutoModel.register(EngramLMConfig, EngramModel, exist_ok=True)
    AutoModelForCausalLM.register(EngramLMConfig, EngramForCausalLM, exist_ok=True)
