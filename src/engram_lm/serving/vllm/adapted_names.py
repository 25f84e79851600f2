"""What a model with a memory adapter is called in vLLM's settings."""

ADAPTED = "Engram"
"""What stands before the name of an architecture with memory, as in ``EngramQwen3ForCausalLM``."""
OPTION = "engram_adapter"
"""Key in vLLM's ``additional_config`` whose value is the folder or repository of an adapter, or a list of them."""
