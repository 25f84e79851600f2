"""A memory that says something: attached, and every weight away from where it starts."""

import pytest
import torch
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm
from engram_lm import EngramConfig

MEMORY = {"hidden_size": 32, "layers": (0, 2), "num_heads": 2, "memory_dim": 24, "rows_per_head": 97}


@pytest.fixture
def config():
    def make(**changes):
        return EngramConfig(**{**MEMORY, **changes})

    return make


@pytest.fixture
def adapted(config):
    """Build a model with an adapter that changes what it says."""

    def build(name="llama", seed=1, **changes):
        model = small_model(name)
        adapter = engram_lm.attach(model, TOKENIZER, config(**changes))
        speak(adapter, seed)
        return model, adapter

    return build


@torch.no_grad()
def speak(adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.layers.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
