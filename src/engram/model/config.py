"""Configuration of the reference language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config

from engram.errors import ConfigError
from engram.hashing import HashSpec, Segments, TokenMap
from engram.memory.config import EngramConfig

__all__ = ["MEMORY_LAYER_TYPE", "EngramLMConfig"]

MEMORY_LAYER_TYPE = "engram_memory"
"""Name of a block that reads memory in ``layer_types``; the cache keeps its state under this name."""


@strict
class EngramLMConfig(DeepseekV3Config):
    """A DeepSeek-V3 backbone (MLA, dense or MoE feed-forward) whose chosen blocks begin by reading memory.

    All fields of ``transformers.DeepseekV3Config`` keep their meaning. ``memory`` and ``hash_spec`` are plain
    dictionaries, so that ``config.json`` holds everything that decides row numbers; `memory_config` and `spec` give
    them as objects.

    Example:
        >>> config = EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(hidden_size=128, memory_dim=128),
        ...                                       num_hidden_layers=4)  # doctest: +SKIP
    """

    model_type = "engram_lm"

    memory: dict[str, Any] | None = None
    """Fields of `engram.EngramConfig`; None is a model without memory."""
    hash_spec: dict[str, Any] | None = None
    """What `engram.HashSpec.to_dict` gives: how tokens become row numbers."""
    layer_types: list[str] | None = None
    """Derived: ``engram_memory`` for blocks that read memory, ``full_attention`` for the others."""
    first_k_dense_replace: int | None = 1_000_000
    """Blocks before the first mixture of experts; by default none has one."""
    num_mtp_layers: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None and "rope_theta" not in kwargs:  # type: ignore[has-type]
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.memory is not None:
            self.memory = EngramConfig.from_dict(self.memory).to_dict()
        memory_layers = self.memory["layers"] if self.memory is not None else ()
        self.layer_types = [
            MEMORY_LAYER_TYPE if block in memory_layers else "full_attention" for block in range(self.num_hidden_layers)
        ]
        super().__post_init__(**kwargs)
        if self.memory is not None:
            self._check_memory()

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        memory: EngramConfig | None,
        *,
        token_map: TokenMap | None = None,
        segments: Segments | None = None,
        **backbone: Any,
    ) -> "EngramLMConfig":
        """Configure a model for a tokenizer: vocabulary, special tokens and, with memory, the hash.

        Args:
            tokenizer: A Hugging Face fast tokenizer.
            memory: Where and how memory is read; None builds the memory-less model.
            token_map: Canonical tokens; computed from the tokenizer by the published normalization where None.
            segments: Which look-backs are blocked; by default N-grams do not cross an end-of-text token.
            **backbone: Fields of ``DeepseekV3Config``.

        Returns:
            A configuration that carries the token map to the model built from it.
        """
        backbone.setdefault("vocab_size", len(tokenizer))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            backbone.setdefault(name, getattr(tokenizer, name))
        if memory is None:
            return cls(**backbone)
        token_map = TokenMap.from_tokenizer(tokenizer) if token_map is None else token_map
        end = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        if pad is None:
            raise ConfigError(
                "the tokenizer has neither a pad nor an end-of-text token, and one of them must stand for the "
                "positions before the start of a text; set tokenizer.pad_token first"
            )
        if segments is None:
            segments = Segments(end_tokens=() if end is None else (end,))
        spec = memory.hash_spec(token_map, pad_token_id=pad, segments=segments)
        config = cls(memory=memory.to_dict(), hash_spec=spec.to_dict(), **backbone)
        config._token_map = token_map
        return config

    @property
    def memory_config(self) -> EngramConfig | None:
        """`memory` as an `EngramConfig`, or None for a model without memory."""
        return None if self.memory is None else EngramConfig.from_dict(self.memory)

    @property
    def spec(self) -> HashSpec | None:
        """`hash_spec` as a `HashSpec` without its token map, or None for a model without memory."""
        return None if self.hash_spec is None else HashSpec.from_dict(self.hash_spec)

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Blocks that read memory, counted from 0, in order of depth."""
        return () if self.memory is None else tuple(sorted(self.memory["layers"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``; the token map itself travels with the weights."""
        values: dict[str, Any] = super().to_dict()
        values.pop("_token_map", None)
        return values

    def validate_layer_type(self) -> None:
        """Check ``layer_types`` (transformers refuses names it does not know, so its check is replaced)."""
        allowed = {MEMORY_LAYER_TYPE, "full_attention"}
        if self.layer_types is not None and not set(self.layer_types) <= allowed:
            raise ConfigError(f"layer_types may hold {sorted(allowed)}, not {sorted(set(self.layer_types) - allowed)}")

    def _check_memory(self) -> None:
        memory, spec = self.memory_config, self.spec
        assert memory is not None
        if spec is None:
            raise ConfigError(
                "a model with memory needs its hash_spec; build the configuration with "
                "EngramLMConfig.for_tokenizer(...)"
            )
        if max(memory.layers) >= self.num_hidden_layers:
            raise ConfigError(f"memory.layers {memory.layers} reach past the model's {self.num_hidden_layers} blocks")
        if memory.hidden_size != self.hidden_size or memory.num_streams != 1:
            raise ConfigError(
                f"memory is configured for {memory.num_streams} streams of {memory.hidden_size}, "
                f"this model has one of {self.hidden_size}"
            )
        if (spec.num_heads_total, spec.blocks) != (memory.num_heads_total, memory.layers):
            raise ConfigError(
                f"hash_spec addresses blocks {spec.blocks} with {spec.num_heads_total} heads, memory reads blocks "
                f"{memory.layers} with {memory.num_heads_total}"
            )
        if spec.num_tokens > self.vocab_size:
            raise ConfigError(f"hash_spec maps {spec.num_tokens} tokens, the vocabulary has {self.vocab_size}")
