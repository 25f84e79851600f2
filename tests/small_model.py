"""The geometry of a model small enough for tests, and a text its tokenizer is trained on."""

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
