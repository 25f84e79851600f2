"""Models of others that vLLM has itself, with one of our memory adapters: known to vLLM without being imported.

Each text model of vLLM gets a second name, as ``EngramQwen3ForCausalLM`` for ``Qwen3ForCausalLM``, under which it is
run with memory. A folder whose ``config.json`` names it is served so; so is a model whose user names an adapter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm import ModelRegistry
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import config as model_configs

from engram_lm.errors import ConfigError
from engram_lm.files import user_path
from engram_lm.serving.vllm.adapted_names import ADAPTED, OPTION
from engram_lm.serving.vllm.config_check import check_engine, check_source, check_tokenizer, choose_eager


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """What vLLM's registry has of a model with memory: the entry of the model, whose class is adapted when loaded."""

    native: Any
    """The entry of the model that vLLM has."""

    def inspect_model_cls(self) -> Any:
        """Return what vLLM knows of the model without importing it; memory changes nothing of it."""
        return self.native.inspect_model_cls()

    def load_model_cls(self) -> Any:
        """Return the class of the model with memory."""
        from engram_lm.serving.vllm.adapted import adapted_class

        return adapted_class(self.native.load_model_cls())


@dataclasses.dataclass(frozen=True)
class AdaptedConfigCheck:
    """What vLLM calls for one architecture with memory, in the place of the check that the architecture has."""

    native: Any
    """The check that vLLM itself has for the architecture; None without one."""

    def verify_and_update_model_config(self, model_config: ModelConfig) -> None:
        """Do what the architecture needs; choose eager execution, and refuse, by a ConfigError, all but generation."""
        if self.native is not None:
            self.native.verify_and_update_model_config(model_config)
        _prepare(model_config)

    def verify_and_update_config(self, vllm_config: VllmConfig) -> None:
        """Do what the architecture needs, and refuse what memory is not computed rightly with.

        Raises:
            ConfigError: An option that memory does not go with, or an adapter with other memory than vLLM serves.
            EngramError: What `read_adapters` raises.
        """
        from engram_lm.serving.vllm.adapters import read_adapters

        if self.native is not None:
            self.native.verify_and_update_config(vllm_config)
        check_engine(vllm_config)
        for stored in read_adapters(vllm_config):
            check_tokenizer(vllm_config.model_config, stored.spec)
            check_source(vllm_config, stored.spec, stored.config.head_dim)


def register_adapted() -> None:
    """Tell vLLM of every text model with memory, and have it look for adapters when it is configured."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    for name in _TEXT_GENERATION_MODELS:
        if name in ModelRegistry.models:
            ModelRegistry.models[ADAPTED + name] = AdaptedModel(ModelRegistry.models[name])
            native = model_configs.MODELS_CONFIG_MAP.get(name)
            check: Any = AdaptedConfigCheck(native)
            model_configs.MODELS_CONFIG_MAP[ADAPTED + name] = check
    verify = VllmConfig.try_verify_and_update_config
    if hasattr(verify, "without_memory"):
        return

    def try_verify_and_update_config(self: VllmConfig) -> None:
        choose_adapted(self)
        verify(self)

    # vLLM chooses a model by its config.json alone. Without this, an adapter that the user names would be ignored
    # without a word wherever the name of the architecture is not given, too.
    try_verify_and_update_config.without_memory = verify  # type: ignore[attr-defined]
    VllmConfig.try_verify_and_update_config = try_verify_and_update_config


def choose_adapted(vllm_config: VllmConfig) -> None:
    """Have a model run with memory if its user names an adapter, or its folder holds some as a trainer's does.

    Raises:
        ConfigError: Memory cannot be added to this model in vLLM.
    """
    from engram_lm.adapt.adapter import CONTAINER

    model, more = vllm_config.model_config, vllm_config.additional_config
    if model is None or getattr(model, "config_updated", False) or model.runner_type == "draft":
        return
    named = isinstance(more, Mapping) and more.get(OPTION) is not None
    if not named and not (user_path(model.model) / CONTAINER).is_dir():
        return
    if isinstance(ModelRegistry.models.get(model.architecture), AdaptedModel):
        return
    name = ADAPTED + model.architecture
    if name not in ModelRegistry.models:
        raise ConfigError(
            f"vLLM runs {model.model} as {model.architecture}, and memory is added to text models that vLLM itself has "
            "(Qwen3ForCausalLM, LlamaForCausalLM and others); generate with transformers instead"
        )
    _prepare(model)
    model.hf_config.architectures = model.model_arch_config.architectures = [name]
    model._architecture = name


def _prepare(model_config: ModelConfig) -> None:
    if model_config.runner_type != "generate":
        raise ConfigError(
            f"vLLM runs a model with a memory adapter for generating alone, not as --runner {model_config.runner_type}"
        )
    choose_eager(model_config)
