"""The geometry of a model small enough for tests, and a text its tokenizer is trained on."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

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

EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "beta_fast": 32,
        "beta_slow": 1,
    }
}
# Name to what differs from the plain small model: (backbone, memory).
VARIANTS = {
    "plain": ({}, {}),
    "experts": (EXPERTS, {}),
    "streams": ({"num_streams": 4}, {"num_streams": 4}),
    "single": ({"num_streams": 4, "memory_fusion": "single"}, {}),
    "values": ({}, {"layer": "values"}),
    "yarn": (YARN, {}),
    # What the study of layers found best: rows for single tokens, and others for bigrams.
    "unigrams": ({}, {"orders": (1, 2), "rows_per_head": (41, 151)}),
    "all": ({**EXPERTS, **YARN, "num_streams": 4}, {"num_streams": 4}),
}


@torch.no_grad()
def perturbed(model, size=0.2):
    """Move all numbers of a new model a little, so that none of its parts is without effect."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * size)
    return model


def threads_get_what_one_gets(model):
    """Generate from several prompts one after the other, then in threads that share the model."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(5, 280, (1, 12), generator=generator) for _ in range(6)]

    def answer(prompt):
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=1).tolist()

    expected = [answer(prompt) for prompt in prompts]
    assert len({str(tokens) for tokens in expected}) > 1
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads then take turns in the middle of a forward pass
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(answer, prompts)) == expected
    finally:
        sys.setswitchinterval(before)


def any_interleaving_equals_the_whole(model, cache, data, *, resets):
    """Step, crop, reorder, repeat, copy and perhaps reset a cache; each step gives what the whole forward gives."""
    seen, last = torch.empty(2, 0, dtype=torch.int64), 0
    operations = ["step", "step", "crop", "reorder", "repeat", "copy", *["reset"] * resets]
    for _ in range(data.draw(st.integers(2, 7))):
        operation = data.draw(st.sampled_from(operations))
        if operation == "step":
            generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
            new = torch.randint(2, 280, (seen.shape[0], data.draw(st.integers(1, 9))), generator=generator)
            seen, last = torch.cat([seen, new], dim=1), new.shape[1]
            with torch.no_grad():
                logits = model(new, past_key_values=cache, use_cache=True).logits
                expected = model(input_ids=seen, use_cache=False).logits[:, -last:]
            torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
        elif operation == "crop" and last:
            n = data.draw(st.integers(0, last))  # what was added since the last crop can be taken back
            cache.crop(-n)
            seen, last = seen[:, : seen.shape[1] - n], 0
        elif operation == "reorder" and seen.shape[1]:
            order = torch.tensor([data.draw(st.integers(0, seen.shape[0] - 1)) for _ in range(seen.shape[0])])
            cache.reorder_cache(order)
            seen = seen[order]
        elif operation == "repeat" and seen.shape[1] and seen.shape[0] < 5:
            cache.batch_repeat_interleave(2)
            seen = seen.repeat_interleave(2, dim=0)
            keep = torch.arange(0, seen.shape[0], 2)
            if data.draw(st.booleans()):
                cache.batch_select_indices(keep)
                seen = seen[keep]
        elif operation == "copy":
            cache = copy.deepcopy(cache)
        elif operation == "reset":
            cache.reset()
            seen, last = torch.empty(data.draw(st.integers(1, 3)), 0, dtype=torch.int64), 0


BEFORE_5_23 = not hasattr(PreTrainedModel, "activation_checkpointing_enable")
"""Whether this transformers is older than 5.23."""
needs_checkpointing_of_hooks = pytest.mark.skipif(
    BEFORE_5_23, reason="transformers before 5.23 runs hooks again in the backward pass, which attached memory refuses"
)


def checkpoint_activations(model, **options):
    """Switch activation checkpointing on under the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options or None)
