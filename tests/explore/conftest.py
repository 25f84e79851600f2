"""Small models with memory, without, and with several memories, as the page looks at them."""

import numpy as np
import pytest
import torch
from tests.small_model import BACKBONE, MEMORY, TEXT, VARIANTS
from tests.training.test_loop import TOKENIZER
from transformers import LlamaConfig, LlamaForCausalLM

import engram_lm
from engram_lm.explore.explorer import Explorer


def make_model(variant="streams", memory=True, **geometry):
    torch.manual_seed(0)
    backbone, changes = VARIANTS[variant]
    config = engram_lm.EngramConfig(**{**MEMORY, **changes, **geometry}) if memory else None
    shape = {**BACKBONE, **(backbone if memory else {})}
    model = engram_lm.EngramForCausalLM(engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, config, **shape))
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, so that memory would add nothing
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def make_llama(num_memories=0, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **{**shape, **changes})).eval()
    for number in range(num_memories):
        adapter = engram_lm.attach(
            model,
            TOKENIZER,
            layers=(1,),
            num_heads=2 + number,
            memory_dim=24,
            rows_per_head=97,
            seed=number,
            name=f"m{number}",
        )
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def explorer_of(model, **options):
    reference = np.array(TOKENIZER(TEXT).input_ids)
    return Explorer(
        name="small", tokenizer=TOKENIZER, model=model, reference=lambda: reference, reference_name="a text", **options
    )


@pytest.fixture(scope="session")
def explorer():
    return explorer_of(make_model())
