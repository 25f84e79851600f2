"""A small model with memory in two blocks and every weight away from its initial value."""

import pytest
import torch
from tests.small_model import BACKBONE, MEMORY, TEXT
from transformers import PreTrainedTokenizerFast

from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], 300)


@pytest.fixture
def build(tokenizer):
    def build_model(seed=0, backbone=None, memory=None, **kwargs):
        config = EngramConfig(**{**MEMORY, **(memory or {})}) if memory is not False else None
        torch.manual_seed(seed)
        model_config = EngramLMConfig.for_tokenizer(tokenizer, config, **{**BACKBONE, **(backbone or {})}, **kwargs)
        model = EngramForCausalLM(model_config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "memory" in name or parameter.dim() >= 2:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        # The pad and end tokens must not be what an untrained model happens to say.
        model.generation_config.eos_token_id = None
        return model

    return build_model


@pytest.fixture
def model(build) -> EngramForCausalLM:
    return build()
