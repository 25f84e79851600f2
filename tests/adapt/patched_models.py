"""Models whose memory has learned a small text, so that rows matter; trained once and copied for each test."""

import copy
import functools

import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.small_model import BACKBONE

import engram_lm
from engram_lm import EngramConfig, EngramForCausalLM, EngramLMConfig

FACT = ("the cat sat on", " the rat")
OTHER_FACT = ("The rat saw", " a mat")


def memory_config(**changes):
    return EngramConfig(
        **{"hidden_size": 32, "layers": (0, 2), "num_heads": 2, "memory_dim": 24, "rows_per_head": 499,
           "table_gradient": "dense", **changes}
    )  # fmt: skip


def learn(model, parameters, num_steps=25):
    """Teach a model the text, through the parameters given."""
    tokens = torch.tensor(TOKENIZER(TEXT)["input_ids"])
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for step in range(num_steps):
        batch = tokens[step * 19 : step * 19 + 64][None]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


@functools.cache
def _trained(kind, **changes):
    torch.manual_seed(0)
    dtype = changes.pop("dtype", torch.float32)
    if kind == "reference":
        config = EngramLMConfig.for_tokenizer(TOKENIZER, memory_config(**changes), **BACKBONE)
        model = EngramForCausalLM(config).eval()
        learn(model, model.parameters())
        return model
    model = small_model()
    adapter = engram_lm.attach(model, TOKENIZER, memory_config(**changes))
    learn(model, adapter.parameters())
    adapter.memory_tables.to(dtype)
    return model


def trained_model(kind="adapter", **changes):
    """A model with a trained memory: with an adapter, or the reference model."""
    return copy.deepcopy(_trained(kind, **changes))


def bits(model):
    """A copy of every tensor of the state dict, as bytes."""
    return {name: tensor.flatten().clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def same_state(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def greedy(model, prompt, num_tokens):
    """What a model generates, by its own decoding with a cache."""
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    return TOKENIZER.decode(out[0, ids.shape[1] :])
