"""The named models: the paper's four, and six sizes of dense, MoE and memory models to train on smaller machines."""

from typing import Any, NamedTuple

from engram_lm.errors import ConfigError, suggestion


class CanonicalVocabulary(NamedTuple):
    """What is known of a tokenizer's canonical tokens without the tokenizer."""

    num_tokens: int
    num_canonical: int
    digest: str


CANONICAL_DEEPSEEK = CanonicalVocabulary(
    129_280, 99_092, "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
)
"""Those of DeepSeek-V3's tokenizer; source: deepseek-ai/DeepSeek-V4.1-Flash ``config.json`` and ``tokenizer.json``."""

# What all have in common: special tokens of DeepSeek-V3, one leading dense block, 2 shared and 6 chosen experts, full
# queries, four streams.
_COMMON: dict[str, Any] = {
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "num_streams": 4,
}

# Multi-head latent attention as in DeepSeek-V3, and in the mHC paper's three sizes.
_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

# What the three sizes for studies on a CPU have in common; they are named by their active parameters. They have one
# stream, and one mixture of experts, in the last block, which chooses 2: more of either makes a CPU far slower.
_MICRO: dict[str, Any] = {
    "vocab_size": 4096,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "num_experts_per_tok": 2,
    "num_streams": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    # The usual 0.02 is for wider models. At these widths attention then forms late, at a step that depends on the seed.
    "initializer_range": 0.06,
}

_BACKBONES: dict[str, dict[str, Any]] = {
    "micro-100k": {
        **_MICRO,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "kv_lora_rank": 32,
        "moe_intermediate_size": 32,
        "n_shared_experts": 3,
        "first_k_dense_replace": 1,
    },
    "micro-500k": {
        **_MICRO,
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 2,
    },
    "micro-2m": {
        **_MICRO,
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "kv_lora_rank": 128,
        "moe_intermediate_size": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
    },
    "nano": {
        "vocab_size": 8192,
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "moe_intermediate_size": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 32_768,
        "num_hidden_layers": 12,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "kv_lora_rank": 192,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "moe_intermediate_size": 192,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    # The mHC paper's 3B column: blocks, widths, heads, experts.
    "small": {
        "vocab_size": CANONICAL_DEEPSEEK.num_tokens,
        "num_hidden_layers": 12,
        "hidden_size": 1280,
        "num_attention_heads": 16,
        "moe_intermediate_size": 896,
        "rms_norm_eps": 1e-20,
        **_LATENT,
    },
    # Table 5; expert width and latent attention from the mHC paper's 27B column, which is the same backbone.
    "paper": {
        "vocab_size": CANONICAL_DEEPSEEK.num_tokens,
        "num_hidden_layers": 30,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "moe_intermediate_size": 1536,
        "rms_norm_eps": 1e-20,
        **_LATENT,
    },
}

# Memory where Table 5 has it: the second block, and the middle of the network where there is a second one.
_MEMORIES: dict[str, dict[str, Any]] = {
    "micro-100k": {"layers": (1,), "memory_dim": 64, "num_heads": 4, "table_std": 0.02, "value_init": "zero"},
    "micro-500k": {"layers": (1,), "memory_dim": 128, "num_heads": 4, "table_std": 0.02, "value_init": "zero"},
    "micro-2m": {"layers": (1,), "memory_dim": 256, "table_std": 0.02, "value_init": "zero"},
    "nano": {"layers": (1,), "memory_dim": 64, "num_heads": 4},
    "tiny": {"layers": (1, 5), "memory_dim": 192},
    "small": {"layers": (1, 5), "memory_dim": 640, "norm_eps": 1e-20},
    "paper": {"layers": (1, 14), "memory_dim": 1280, "norm_eps": 1e-20},
}

# Whole numbers that `engram_lm.planning.budget.allocate` finds at a ratio of 0.75, and the dense width of equal FLOPs.
_ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "dense-micro-100k": ("micro-100k", {"intermediate_size": 178}, None),
    "moe-micro-100k": ("micro-100k", {"intermediate_size": 176, "n_routed_experts": 64}, None),
    "engram-micro-100k": ("micro-100k", {"intermediate_size": 136, "n_routed_experts": 49}, {"rows_per_head": 1414}),
    "dense-micro-500k": ("micro-500k", {"intermediate_size": 290}, None),
    "moe-micro-500k": ("micro-500k", {"intermediate_size": 296, "n_routed_experts": 64}, None),
    "engram-micro-500k": ("micro-500k", {"intermediate_size": 256, "n_routed_experts": 49}, {"rows_per_head": 2837}),
    "dense-micro-2m": ("micro-2m", {"intermediate_size": 390}, None),
    "moe-micro-2m": ("micro-2m", {"intermediate_size": 384, "n_routed_experts": 64}, None),
    "engram-micro-2m": ("micro-2m", {"intermediate_size": 328, "n_routed_experts": 49}, {"rows_per_head": 5691}),
    "dense-nano": ("nano", {"intermediate_size": 656}, None),
    "moe-nano": ("nano", {"intermediate_size": 1024, "n_routed_experts": 64}, None),
    "engram-nano": ("nano", {"intermediate_size": 920, "n_routed_experts": 50}, {"rows_per_head": 16_090}),
    "dense-tiny": ("tiny", {"intermediate_size": 1600}, None),
    "moe-tiny": ("tiny", {"intermediate_size": 2048, "n_routed_experts": 64}, None),
    "engram-tiny": ("tiny", {"intermediate_size": 1440, "n_routed_experts": 50}, {"rows_per_head": 88_498}),
    "dense-small": ("small", {"intermediate_size": 7184}, None),
    "moe-small": ("small", {"intermediate_size": 7168, "n_routed_experts": 64}, None),
    "engram-small": ("small", {"intermediate_size": 5064, "n_routed_experts": 50}, {"rows_per_head": 413_739}),
    # Table 5: only experts and rows differ.
    "dense-4b": ("paper", {"intermediate_size": 12_288}, None),
    "moe-27b": ("paper", {"intermediate_size": 10_240, "n_routed_experts": 72}, None),
    "engram-27b": ("paper", {"intermediate_size": 10_240, "n_routed_experts": 55}, {"rows_per_head": 2_262_400}),
    "engram-40b": ("paper", {"intermediate_size": 10_240, "n_routed_experts": 55}, {"rows_per_head": 7_239_680}),
}

NAMES = tuple(_ARMS)
"""All presets, smallest first."""


def preset_fields(name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Look a preset up.

    Returns:
        Fields of ``EngramLMConfig`` without memory and hash, and fields of ``EngramConfig`` (None without memory).

    Raises:
        ConfigError: There is no such preset.
    """
    if not isinstance(name, str):
        raise ConfigError(f"a preset is named by a string, as {NAMES[-1]!r}, not {type(name).__name__}")
    if name not in _ARMS:
        raise ConfigError(f"there is no preset {name!r}; {suggestion(name, NAMES)}")
    size, arm, rows = _ARMS[name]
    fields = {**_COMMON, **_BACKBONES[size], **arm}
    if name.startswith("dense"):
        fields["first_k_dense_replace"] = fields["num_hidden_layers"]
    return fields, None if rows is None else {**_MEMORIES[size], **rows}
