"""Other people's models, small and random: one of each kind of decoder that memory is attached to."""

import torch
import transformers

from engram_lm.training.data.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat. The Cat saw a rat; the rat ran to the mat. " * 30
TOKENIZER = train_tokenizer([TEXT], 300)

SHAPE = {
    "vocab_size": 320,  # more than the tokenizer has, as published models do
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def _config(kind, **more):
    return getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})


CONFIGS = {
    "llama": lambda: _config("Llama"),
    "qwen3": lambda: _config("Qwen3"),
    "gemma3": lambda: _config(
        "Gemma3Text", sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mistral": lambda: _config("Mistral", sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=3, n_head=2, n_positions=256, pad_token_id=1, bos_token_id=None,
        eos_token_id=None,
    ),
    "deepseek_v3": lambda: _config(
        "DeepseekV3", num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        head_dim=8, **_EXPERTS,
    ),
    "qwen3_moe": lambda: _config("Qwen3Moe", num_experts=4, **_EXPERTS),
}  # fmt: skip


def small_model(name="llama", **kwargs):
    """A random model in evaluation mode; the same for the same name."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def small_multimodal_model():
    """A model of images and text; its vision tower has more layers than its text model."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=_config("Llama"), image_token_index=310)
    return transformers.LlavaForConditionalGeneration(config).eval()
