"""Configuration of the reference language model."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec, Segments, TokenMap
from engram_lm.hashing.token_map import read_vocabulary
from engram_lm.memory.config import EngramConfig, check_tokenizer_kind
from engram_lm.model.presets import CANONICAL_DEEPSEEK, preset_fields

MEMORY_LAYER_TYPE = "engram_memory"
"""What ``layer_types`` calls the block whose cache layer carries the state of all memory; see ``cache.py``."""

# What the fields were parsed to. A slot is not compared, saved and printed with the fields, but it is copied with them.
_BESIDE_THE_FIELDS = ("_parsed",)
_MOST_BLOCKS = 10_000
_MOST_TOKENS = 2**24


@strict
class EngramLMConfig(DeepseekV3Config):
    """A DeepSeek-V3 backbone (MLA, dense or MoE feed-forward) whose chosen blocks begin by reading memory.

    All fields of ``transformers.DeepseekV3Config`` keep their meaning, YaRN in ``rope_parameters`` included; experts
    are not chosen in groups unless ``n_group`` says so. ``memory`` and ``hash_spec`` are plain dictionaries, so that
    ``config.json`` holds everything that decides row numbers; `memory_config` and `spec` give them as objects.

    Example:
        >>> EngramLMConfig.preset("engram-27b").n_routed_experts
        55
        >>> config = EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(hidden_size=128, memory_dim=128),
        ...                                       num_hidden_layers=4)  # doctest: +SKIP
    """

    __slots__ = _BESIDE_THE_FIELDS

    model_type = "engram_lm"
    # No code of a repository is used. TRL looks for this in every configuration that is not transformers' own.
    auto_map: ClassVar[dict[str, str]] = {}
    # What transformers' hyper-connection calls the fields of the streams.
    attribute_map = {
        **DeepseekV3Config.attribute_map,
        "hc_mult": "num_streams",
        "hc_sinkhorn_iters": "num_sinkhorn_iterations",
        "hc_eps": "stream_eps",
    }

    memory: dict[str, Any] | None = None
    """Fields of `engram_lm.EngramConfig`; None is a model without memory."""
    hash_spec: dict[str, Any] | None = None
    """What `engram_lm.HashSpec.to_dict` gives: how tokens become row numbers."""
    layer_types: list[str] | None = None
    """Derived: ``engram_memory`` for the first block of a model with memory, ``full_attention`` for the others."""
    first_k_dense_replace: int | None = 1_000_000
    """Blocks before the first mixture of experts; by default none has one."""
    num_key_value_heads: int | None = None
    """As many as ``num_attention_heads``: latent attention has a key and a value for each."""
    n_group: int | None = 1
    """Groups that experts are chosen in; 1 is no grouping, as in the paper."""
    topk_group: int | None = 1
    """Groups of experts a token may choose from."""
    router_bias_speed: float = 1e-3
    """How far `engram_lm.model.balance_experts` moves the selection bias of an expert in one step; 0 means no
    balancing."""
    sequence_balance: float = 0.0
    """Weight of the sequence-wise balance loss, which is added to the loss in training mode. DeepSeek-V3 has 1e-4."""
    num_streams: int = 1
    """Residual streams S (mHC; also called ``hc_mult``); 1 is an ordinary residual network."""
    num_sinkhorn_iterations: int = 20
    """Normalizations that make the mixing of streams doubly stochastic (also called ``hc_sinkhorn_iters``)."""
    stream_eps: float = 1e-6
    """Added to the sums of those normalizations (also called ``hc_eps``)."""
    memory_fusion: str = "every_stream"
    """``"every_stream"``: the update of memory is added to every stream, each with its own gate, before attention.
    ``"single"``: one update for what attention reads from the streams, written back together with attention's output
    (the ablation of the paper's section 6.2); ``memory.num_streams`` is 1 then."""
    num_mtp_layers: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None and "rope_theta" not in kwargs:  # type: ignore[has-type]
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if not 1 <= self.num_hidden_layers <= _MOST_BLOCKS:
            raise ConfigError(f"num_hidden_layers must be from 1 to {_MOST_BLOCKS}, not {self.num_hidden_layers}")
        if self.first_k_dense_replace is None:
            self.first_k_dense_replace = self.num_hidden_layers
        if self.memory is not None:
            self.memory = EngramConfig.from_dict(self.memory).to_dict()
        first = "full_attention" if self.memory is None else MEMORY_LAYER_TYPE
        self.layer_types = [first, *["full_attention"] * (self.num_hidden_layers - 1)]
        super().__post_init__(**kwargs)
        self._check_backbone()
        if self.memory is not None:
            self._check_memory()

    @classmethod
    def preset(
        cls, name: str, tokenizer: Any = None, *, memory: Mapping[str, Any] | None = None, **backbone: Any
    ) -> "EngramLMConfig":
        """Configure a model by name.

        ``{dense,moe,engram}-{nano,tiny,small}`` are for a CPU, a small and a large GPU, and
        ``-{micro-100k,micro-500k,micro-2m}`` for studies on a CPU; the three of a size have equal active parameters (so
        equal FLOPs), ``moe`` and ``engram`` equal totals too. ``dense-4b``, ``moe-27b``,
        ``engram-27b`` and ``engram-40b`` are the paper's.

        Args:
            name: One of `engram_lm.model.presets.NAMES`.
            tokenizer: The tokenizer the model is for: it decides the vocabulary, the special tokens and the canonical
                tokens. Without one, ``micro``, ``nano`` and ``tiny`` hash raw tokens, and the larger ones are
                DeepSeek-V3's (129,280 tokens, 99,092 of them canonical), whose map is bound later with
                ``model.bind_tokenizer``; with a smaller ``vocab_size`` they hash raw tokens too.
            memory: Fields of `engram_lm.EngramConfig` to change.
            **backbone: Fields of this class to change.

        Raises:
            ConfigError: No such preset (the nearest name is given), or a change that contradicts the rest.

        Source: the paper, Table 5; where it is silent: ``docs/paper.md``, “Presets”.
        """
        fields, memory_fields = preset_fields(name)
        canonical = fields["vocab_size"] == CANONICAL_DEEPSEEK.num_tokens
        fields.update(backbone)
        if memory is not None and not isinstance(memory, Mapping):
            raise ConfigError(f"memory is a dictionary of fields to change, not {type(memory).__name__}")
        if memory is not None and memory_fields is None:
            raise ConfigError(f"preset {name!r} has no memory whose fields could be changed")
        config = None
        if memory_fields is not None:
            streams = fields["num_streams"] if fields.get("memory_fusion") != "single" else 1
            shape = {"hidden_size": fields["hidden_size"], "num_streams": streams}
            config = EngramConfig.from_dict({**memory_fields, **shape, **(memory or {})})
        if tokenizer is not None:
            for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
                if key not in backbone:
                    fields.pop(key)
            return cls.for_tokenizer(tokenizer, config, **fields)
        if config is None:
            return cls(**fields)
        special = fields["vocab_size"], fields["pad_token_id"], fields["eos_token_id"]
        if any(type(number) is not int for number in special):
            raise ConfigError(
                f"the hash needs vocab_size, pad_token_id and eos_token_id as whole numbers, not {special}; give them, "
                "or the tokenizer"
            )
        size, pad, end = special
        canonical = canonical and size >= CANONICAL_DEEPSEEK.num_tokens
        raw = TokenMap.identity(CANONICAL_DEEPSEEK.num_canonical if canonical else size)
        spec = config.hash_spec(raw, pad_token_id=pad, segments=Segments(end_tokens=(end,)))
        if canonical:
            # Everything but the map itself, which takes the tokenizer: its size and digest decide all else.
            tokens, _, digest = CANONICAL_DEEPSEEK
            spec = dataclasses.replace(spec, num_tokens=tokens, token_map_digest=digest, token_map=None)
        return cls(memory=config.to_dict(), hash_spec=spec.to_dict(), **fields)

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
        check_tokenizer_kind(tokenizer)
        backbone.setdefault("vocab_size", len(read_vocabulary(tokenizer)))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            backbone.setdefault(name, getattr(tokenizer, name))
        if memory is None:
            return cls(**backbone)
        spec = memory.hash_spec_for(tokenizer, token_map=token_map, segments=segments)
        config = cls(memory=memory.to_dict(), hash_spec=spec.to_dict(), **backbone)
        config._keep("hash_spec", spec)
        return config

    @property
    def memory_config(self) -> EngramConfig | None:
        """`memory` as an `EngramConfig`, or None for a model without memory."""
        config: EngramConfig | None = self._parsed_field("memory", EngramConfig.from_dict)
        return config

    @property
    def spec(self) -> HashSpec | None:
        """`hash_spec` as a `HashSpec`, or None for a model without memory; with its token map where that is known."""
        spec: HashSpec | None = self._parsed_field("hash_spec", HashSpec.from_dict)
        return spec

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Let a model that is built from this configuration know its token map from the start.

        Args:
            tokenizer: The tokenizer, or its `TokenMap`.

        Raises:
            MismatchError: Its canonical tokens are not those the configuration was made for.
        """
        if (spec := self.spec) is not None:
            self._keep("hash_spec", spec.bind(tokenizer))

    def _parsed_field(self, name: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
        """Parse a field once, and again only after it was changed."""
        fields = getattr(self, name)
        if fields is None:
            return None
        kept = getattr(self, "_parsed", {}).get(name)
        if kept is None or kept[0] != fields:
            self._keep(name, parse(fields))
        return self._parsed[name][1]

    def _keep(self, name: str, parsed: EngramConfig | HashSpec) -> None:
        self._parsed = {**getattr(self, "_parsed", {}), name: (copy.deepcopy(getattr(self, name)), parsed)}

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Blocks that read memory, counted from 0, in order of depth."""
        return () if self.memory is None else tuple(sorted(self.memory["layers"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``; the token map itself travels with the weights.

        ``layer_types`` is derived and stays out: who reads the file as a plain ``PreTrainedConfig``, as ``Trainer``
        does on resuming, would refuse a name that transformers does not know.
        """
        values: dict[str, Any] = super().to_dict()
        values.pop("layer_types", None)
        return values

    def validate_layer_type(self) -> None:
        """Check ``layer_types`` (transformers refuses names it does not know, so its check is replaced)."""
        allowed = {MEMORY_LAYER_TYPE, "full_attention"}
        if self.layer_types is not None and not set(self.layer_types) <= allowed:
            raise ConfigError(f"layer_types may hold {sorted(allowed)}, not {sorted(set(self.layer_types) - allowed)}")

    def _check_backbone(self) -> None:
        sizes = ["hidden_size", "vocab_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"]
        sizes += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        sizes += ["num_streams", "num_sinkhorn_iterations"]
        for name in sizes if self.q_lora_rank is None else [*sizes, "q_lora_rank"]:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        if self.vocab_size > _MOST_TOKENS:
            raise ConfigError(f"vocab_size must be at most {_MOST_TOKENS}, not {self.vocab_size}")
        for name in ("rms_norm_eps", "stream_eps", "routed_scaling_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number above 0, not {getattr(self, name)}")
        for name in ("router_bias_speed", "sequence_balance", "first_k_dense_replace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number, 0 or above, not {getattr(self, name)}")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"latent attention makes a key and a value for every head: num_key_value_heads must be "
                f"{self.num_attention_heads} or left out, not {self.num_key_value_heads}"
            )
        if self.num_mtp_layers:
            raise ConfigError(f"num_mtp_layers must be 0, not {self.num_mtp_layers}: no such modules are built")
        if self.memory_fusion not in ("every_stream", "single"):
            raise ConfigError(f"memory_fusion must be 'every_stream' or 'single', not {self.memory_fusion!r}")
        if self.has_experts:
            self._check_experts()

    @property
    def has_experts(self) -> bool:
        """Whether any block has a mixture of experts."""
        return self.num_dense_layers < self.num_hidden_layers

    @property
    def num_dense_layers(self) -> int:
        """Leading blocks whose feed-forward network is dense."""
        return min(self.first_k_dense_replace or 0, self.num_hidden_layers)

    def _check_experts(self) -> None:
        sizes: dict[str, int] = {}
        for name in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number, at least 1, not {value!r}")
            sizes[name] = value
        experts, chosen, groups, allowed, _ = sizes.values()
        if self.n_shared_experts < 1:
            raise ConfigError(f"n_shared_experts must be at least 1, not {self.n_shared_experts}")
        if experts % groups:
            near = max(1, round(experts / groups)) * groups
            raise ConfigError(
                f"n_routed_experts {experts} does not divide into n_group {groups}; the nearest that does is {near}"
            )
        if allowed > groups:
            raise ConfigError(f"topk_group {allowed} is more than n_group {groups}")
        if experts // groups < 2:
            raise ConfigError(f"a group needs 2 experts to be scored, n_routed_experts {experts} / n_group {groups}")
        if chosen > allowed * (experts // groups):
            raise ConfigError(
                f"num_experts_per_tok {chosen} is more than the {allowed * (experts // groups)} experts that a token "
                f"may choose from (n_routed_experts {experts}, n_group {groups}, topk_group {allowed})"
            )

    def check_memory(self, memory: EngramConfig) -> None:
        """Refuse a memory that this backbone cannot carry.

        Raises:
            ConfigError: It reads blocks that there are not, has another width or number of streams, or its updates do
                not fit what they are added to.
        """
        if max(memory.layers) >= self.num_hidden_layers:
            raise ConfigError(f"memory.layers {memory.layers} reach past the model's {self.num_hidden_layers} blocks")
        streams = self.num_streams if self.memory_fusion == "every_stream" else 1
        if (memory.num_streams, memory.hidden_size) != (streams, self.hidden_size):
            raise ConfigError(
                f"memory is configured for num_streams={memory.num_streams} of hidden_size={memory.hidden_size}; with "
                f"memory_fusion={self.memory_fusion!r} this model needs {streams} of {self.hidden_size}"
            )
        values = self.num_attention_heads * self.v_head_dim
        if memory.entry.writes == "values" and (streams, values) != (1, self.hidden_size):
            raise ConfigError(
                f"the memory layer {memory.layer!r} adds one update of {self.hidden_size} numbers to the values of "
                f"attention, of which there are {self.num_attention_heads} heads of {self.v_head_dim}, and this memory "
                f"has {streams} streams; choose num_attention_heads x v_head_dim = hidden_size, and num_streams=1 or "
                "memory_fusion='single'"
            )

    def _check_memory(self) -> None:
        memory, spec = self.memory_config, self.spec
        assert memory is not None
        if spec is None:
            raise ConfigError(
                "a model with memory needs its hash_spec; build the configuration with "
                "EngramLMConfig.for_tokenizer(...)"
            )
        self.check_memory(memory)
        rows = [sum(primes) for primes in spec.primes[: 1 if spec.shared_table else None]]
        pairs: dict[str, tuple[Any, Any]] = {
            "layers": (spec.blocks, memory.layers),
            "orders": (spec.orders, memory.orders),
            "num_heads": (spec.num_heads, memory.num_heads),
            "tables": ("shared" if spec.shared_table else "per_layer", memory.tables),
            "seed": (spec.seed, memory.seed),
            "rows": (rows, list(memory.num_table_rows()) if memory.entry.has_table else rows),
        }
        for name, (hashed, read) in pairs.items():
            if hashed != read:
                raise ConfigError(
                    f"hash_spec and memory contradict each other in {name}: {hashed} are hashed, {read} are read; make "
                    "both together, with EngramConfig.hash_spec or EngramLMConfig.for_tokenizer"
                )
        if spec.num_tokens > self.vocab_size:
            raise ConfigError(f"hash_spec maps {spec.num_tokens} tokens, the vocabulary has {self.vocab_size}")
