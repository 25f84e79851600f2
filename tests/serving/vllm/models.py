"""Checkpoints with numbers that make memory decide, and what transformers generates from them."""

import dataclasses

import torch
from tests.small_model import BACKBONE, EXPERTS, MEMORY, TEXT, YARN

from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.data.tokenizer import train_tokenizer

NEW_TOKENS = 24
SIZE = 300

# Name of a checkpoint to what differs from the plain small model: (backbone, memory).
CHECKPOINTS = {
    # The shape of what `engram-lm quickstart` trains.
    "quickstart": (
        {
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
        },
        {"hidden_size": 128, "layers": (0, 1, 2), "num_heads": 8, "memory_dim": 128, "rows_per_head": 3000},
    ),
    "dense": ({}, {}),
    "experts_streams": ({**EXPERTS, "num_streams": 4}, {"num_streams": 4}),
    "shared_signed": ({}, {"tables": "shared", "signs": "hashed"}),
    # What else a configuration can choose, each at least once.
    "single_fusion": ({**EXPERTS, "num_streams": 4, "memory_fusion": "single"}, {"gate": "plain", "bias": True}),
    "yarn_query_rank": (
        {**YARN, "q_lora_rank": 24, "tie_word_embeddings": False},
        {"norm_weight": "zero_centered", "kernel_size": 3, "dilation": 2, "orders": (2, 3, 4)},
    ),
    "no_convolution": ({}, {"kernel_size": 0, "gate": "none", "layers": (1,)}),
    # What the study of layers found best.
    "unigrams": ({}, {"orders": (1, 2), "rows_per_head": (41, 151)}),
}


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers gives for one prompt."""

    tokens: list[int]
    """The tokens generated greedily."""
    logprobs: list[float]
    """The logarithm of the probability of each."""
    margins: list[float]
    """How far each is above the next most probable token, in nats."""


def save_checkpoint(name, folder, more_memory=None, **how):
    """Save a checkpoint and its tokenizer into a folder; ``more_memory`` changes the memory's configuration."""
    backbone, memory = CHECKPOINTS[name]
    tokenizer = train_tokenizer([TEXT], SIZE)
    config = EngramLMConfig.for_tokenizer(
        tokenizer, EngramConfig(**{**MEMORY, **memory, **(more_memory or {})}), **{**BACKBONE, **backbone}
    )
    torch.manual_seed(1)
    model = EngramForCausalLM(config).eval()
    perturb(model)
    share = share_decided_by_memory(model)
    assert share > 0.9, f"memory decides {share:.0%} of the next tokens only"
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def perturb(model):
    """Give every part of a model numbers large enough that leaving it out shows."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 2)[-1]
        if "memory_tables" in name:
            parameter.normal_()
        elif "streams" in name or "stream_head" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif last in ("query_norm", "key_norm", "conv_norm") or "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif last == "conv_weight" or "memory.key_value" in name:
            parameter.normal_()
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(std=0.8)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)


@torch.no_grad()
def share_decided_by_memory(model):
    """Share of positions whose most probable token is another without memory."""
    tokens = torch.randint(5, SIZE - 20, (4, 64), generator=torch.Generator().manual_seed(2))
    with_memory = model(tokens).logits.argmax(-1)
    handles = [
        layer.memory.register_forward_hook(lambda module, given, output: output._replace(update=0 * output.update))
        for layer in model.model.layers
        if layer.memory is not None
    ]
    without = model(tokens).logits.argmax(-1)
    for handle in handles:
        handle.remove()
    return float((with_memory != without).float().mean())


def prompts():
    """Sixteen prompts: one of one token, some with end-of-text inside, shared beginnings, repetitions."""
    generator = torch.Generator().manual_seed(3)

    def some(length):
        return torch.randint(5, SIZE - 20, (length,), generator=generator).tolist()

    beginning, phrase = some(70), some(7)
    return [
        some(1),
        some(2),
        some(3),
        some(5),
        some(17),
        some(33),
        some(150),
        beginning + some(3),
        beginning + some(20),
        beginning + some(41),
        [*some(6), 0, *some(4)],
        [*some(30), 0, 0, *some(50), 0],
        [0, *some(12)],
        phrase * 9,
        phrase * 4 + some(9) + phrase * 3,
        [some(1)[0]] * 40,
    ]


@torch.no_grad()
def expect(model, given):
    """Generate greedily with transformers from each prompt alone."""
    expected = []
    for prompt in given:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, len(prompt) :]
        logits = torch.cat(output.logits)
        first, second = logits.float().log_softmax(-1).topk(2).values.unbind(-1)
        expected.append(Expected(tokens.tolist(), first.tolist(), (first - second).tolist()))
    return expected
