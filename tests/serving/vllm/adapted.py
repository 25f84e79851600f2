"""Models of others with a memory adapter that decides, and what transformers generates from them."""

import json

import torch
import transformers
from safetensors.torch import save_file
from tests.beginnings import with_template
from tests.serving.vllm.models import SIZE, expect, perturb, prompts
from tests.small_model import TEXT
from transformers import AutoModelForCausalLM

import engram_lm
from engram_lm.training.data.tokenizer import train_tokenizer

SHAPE = {
    "vocab_size": SIZE + 20,  # more than the tokenizer has, as published models do
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FEW = 24
MEMORY = {"memory_dim": 48, "rows_per_head": 97, "num_heads": 2, "orders": (2, 3)}

# Name of a base to its configuration, the layers that read memory, and how large the values are that it reads.
BASES = {
    "qwen3": (lambda: transformers.Qwen3Config(**SHAPE, tie_word_embeddings=True), (0, 2), 1),
    "llama": (lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False), (1,), 1),
    "mistral": (lambda: transformers.MistralConfig(**SHAPE, sliding_window=24), (0, 1), 1),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeConfig(
            **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        ),
        (1, 2),
        1,
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(
            **SHAPE,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=32,
        ),
        (1,),
        20,
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=SIZE + 20, n_embd=64, n_layer=3, n_head=2, n_positions=256, bos_token_id=None, eos_token_id=0
        ),
        (1,),
        3,
    ),
}


def save_base(name, folder):
    """Save a base model and its tokenizer."""
    config = BASES[name][0]
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config()).eval()
    perturb(model)
    if name in ("qwen3", "llama"):
        # Few tokens are ever generated, so that some of what is generated was there before and a draft may guess it.
        with torch.no_grad():
            model.get_output_embeddings().weight[FEW:] *= 0.2
    model.save_pretrained(folder)
    tokenizer = train_tokenizer([TEXT], SIZE)
    if name == "llama":
        tokenizer = with_template(tokenizer, "<s> $A")
    tokenizer.save_pretrained(folder)


def save_adapter(name, base, folder, seed=5, **more):
    """Save an adapter of a base model that decides nearly every token, and return the model with it."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    options = {**MEMORY, "layers": BASES[name][1], **more}
    adapter = engram_lm.attach(model, tokenizer, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight, parameter in adapter.named_parameters():
            if "norm" in weight:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=BASES[name][2] if "key_value" in weight else 1)
    adapter.save_pretrained(folder)
    tokens = torch.randint(5, SIZE - 20, (4, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        changed = model(tokens).logits.argmax(-1)
        with adapter.disabled():
            changed = changed != model(tokens).logits.argmax(-1)
    share = float(changed.float().mean())
    assert share > 0.9, f"memory decides {share:.0%} of the next tokens only"
    return model


@torch.no_grad()
def save_lora(model, folder):
    """Save random low-rank matrices for the queries of a model as peft does, and add them to the model itself."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            outputs, inputs = module.weight.shape
            down, up = (torch.randn(shape, generator=generator) for shape in ((4, inputs), (outputs, 4)))
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight.add_(up @ down)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def save_adapted(name, folder):
    """Save a base and an adapter into ``base`` and ``adapter``; return what transformers generates with both."""
    save_base(name, folder / "base")
    return expect(save_adapter(name, folder / "base", folder / "adapter"), prompts())
