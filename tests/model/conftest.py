"""A small model with memory in two blocks and every weight away from its initial value."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engram.memory import EngramConfig
from engram.model import EngramForCausalLM, EngramLMConfig
from engram.training.tokenizer import train_tokenizer

BACKBONE = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MEMORY = {"hidden_size": 32, "layers": (0, 2), "num_heads": 2, "memory_dim": 24, "rows_per_head": 97}
TEXT = "the cat sat on the mat. The Cat saw a rat; the rat ran to the mat. " * 30


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["quite another text, 1234567890 " * 40], 300)


@pytest.fixture
def build(tokenizer):
    def build_model(seed=0, backbone=None, memory=None, **kwargs):
        config = EngramConfig(**{**MEMORY, **(memory or {})}) if memory is not False else None
        torch.manual_seed(seed)
        model_config = EngramLMConfig.for_tokenizer(tokenizer, config, **{**BACKBONE, **(backbone or {})}, **kwargs)
        model = EngramForCausalLM(model_config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "memory" in name or parameter.dim() == 2:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        # The pad and end tokens must not be what an untrained model happens to say.
        model.generation_config.eos_token_id = None
        return model

    return build_model


@pytest.fixture
def model(build) -> EngramForCausalLM:
    return build()
