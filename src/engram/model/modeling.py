"""The reference language model: DeepSeek-V3 blocks, some of which begin by reading memory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3MoE,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from engram.errors import CheckpointError, ConfigError, MismatchError, TokenMapError
from engram.hashing import HashSpec, TokenMap
from engram.memory.layer import EngramLayer
from engram.memory.state import ConvolutionState
from engram.model.cache import memory_layer
from engram.model.checkpoint import (
    TABLES,
    check_files,
    check_index,
    check_missing,
    map_tensor,
    split_device_map,
    table_device,
)
from engram.model.config import EngramLMConfig
from engram.model.experts import Experts, Router, sequence_balance_loss
from engram.model.streams import StreamHead, StreamMixer
from engram.tables import MappedTable, ParameterTable, StoredTensor, Table

__all__ = ["EngramBlock", "EngramCausalLMOutput", "EngramForCausalLM", "EngramModel", "EngramModelOutput"]

# Dimension key: B batch, L length, D hidden, H heads of all orders, S streams, V vocabulary,
# E routed experts, K of them chosen per token.

_SHARED = "shared"


@dataclasses.dataclass
class EngramModelOutput(BaseModelOutputWithPast):
    """Output of `EngramModel`."""

    gates: tuple[Tensor, ...] | None = None
    """With ``output_gates=True``: one float32 ``[B, L, S]`` per block with memory, in order of depth."""
    router_logits: tuple[Tensor, ...] | None = None
    """With ``output_router_logits=True``: one float32 ``[B * L, E]`` per mixture of experts."""
    chosen_experts: tuple[Tensor, ...] | None = None
    """With ``output_chosen_experts=True``: one int64 ``[B * L, K]`` per mixture of experts."""


@dataclasses.dataclass
class EngramCausalLMOutput(CausalLMOutputWithPast):
    """Output of `EngramForCausalLM`."""

    gates: tuple[Tensor, ...] | None = None
    """With ``output_gates=True``: one float32 ``[B, L, S]`` per block with memory, in order of depth."""
    router_logits: tuple[Tensor, ...] | None = None
    """With ``output_router_logits=True``: one float32 ``[B * L, E]`` per mixture of experts."""
    chosen_experts: tuple[Tensor, ...] | None = None
    """With ``output_chosen_experts=True``: one int64 ``[B * L, K]`` per mixture of experts."""
    balance_loss: Tensor | None = None
    """The sequence-wise balance loss that ``loss`` contains, times its weight; None where the weight is 0."""


class EngramBlock(DeepseekV3DecoderLayer):
    """One block: memory (where the configuration says so), then attention, then feed-forward.

    With several streams each of the two sublayers reads from them and writes to them through a `StreamMixer`.
    """

    def __init__(self, config: EngramLMConfig, layer_idx: int, table: Table | None = None) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        if isinstance(self.mlp, DeepseekV3MoE):
            self.mlp.gate, self.mlp.experts = Router(config), Experts(config)
        memory = config.memory_config
        self.memory = EngramLayer(memory, table) if memory is not None and layer_idx in memory.layers else None
        self.single_fusion = config.memory_fusion == "single"
        if config.num_streams > 1:
            self.attention_streams = StreamMixer(config, site=2 * layer_idx)
            self.feed_forward_streams = StreamMixer(config, site=2 * layer_idx + 1)
        self.num_streams = config.num_streams

    def forward(
        self,
        hidden_states: Tensor,
        memory_rows: Tensor | None = None,
        memory_active: Tensor | None = None,
        memory_state: ConvolutionState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Update the hidden states: ``[B, L, D]``, or ``[B, L, S, D]`` with several streams.

        Args:
            hidden_states: Output of the block before.
            memory_rows: Row numbers, int64 ``[B, L, H]``.
            memory_active: Bool ``[B, L]``, False where memory adds nothing.
            memory_state: The convolution's window.
            **kwargs: What attention takes.
        """
        memory = {"state": memory_state, "active": memory_active, "return_gates": True}
        if self.memory is not None and not (self.single_fusion and self.num_streams > 1):
            update, _ = self.memory(hidden_states, memory_rows, **memory)
            hidden_states = hidden_states + update
        if self.num_streams == 1:
            return super().forward(hidden_states, **kwargs)

        post, comb, read = self.attention_streams(hidden_states)
        update = None
        if self.memory is not None and self.single_fusion:
            update, _ = self.memory(read, memory_rows, **memory)
            read = read + update
        output, _ = self.self_attn(hidden_states=self.input_layernorm(read), **kwargs)
        if update is not None:
            # With one stream this is the ordinary residual: x + update + attention(norm(x + update)).
            output = output + update
        hidden_states = self.attention_streams.write(hidden_states, output, post, comb)

        post, comb, read = self.feed_forward_streams(hidden_states)
        output = self.mlp(self.post_attention_layernorm(read))
        return self.feed_forward_streams.write(hidden_states, output, post, comb)


class EngramPreTrainedModel(DeepseekV3PreTrainedModel):
    """What transformers needs to know of this family."""

    config: EngramLMConfig
    config_class = EngramLMConfig
    _no_split_modules = ["EngramBlock"]
    _can_record_outputs = {
        "hidden_states": EngramBlock,
        "attentions": DeepseekV3Attention,
        "gates": OutputRecorder(EngramLayer, index=1),
        "router_logits": OutputRecorder(Router, index=0),
        "chosen_experts": OutputRecorder(Router, index=2),
    }
    # As DeepSeek-V4 has it for its hyper-connections: small, and decisive for every sublayer.
    _keep_in_fp32_modules_strict = [
        "e_score_correction_bias",
        "attention_streams",
        "feed_forward_streams",
        "stream_head",
    ]
    # The one tensor of the model itself: device maps that divide it by modules do not name it, and must not have to.
    _no_placement_params = ["token_map"]
    _keys_to_ignore_on_load_unexpected = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EngramLayer | ParameterTable):
            module.reset_parameters()
        elif isinstance(module, StreamMixer | StreamHead):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, Router):
            nn.init.zeros_(module.expert_counts)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in this file's text; the decorated class is the one we import.
        return True

    @property
    def tables(self) -> dict[str, Table]:
        """The memory tables by the block that reads them, or one called ``shared``.

        Each is a `ParameterTable`, or a `MappedTable` where ``from_pretrained`` left it on disk.
        """
        base = self.base_model
        return {**base._modules[TABLES], **base.__dict__["_tables_apart"]}

    @property
    def hash_spec(self) -> HashSpec:
        """How this model turns tokens into row numbers, bound to its token map.

        Raises:
            TokenMapError: The model has no memory, or has not been given its token map.
            MismatchError: The token map in the checkpoint is not the one its configuration was made with.
        """
        return self.base_model._bound_spec()

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Give the model the token map of its tokenizer, where it was built from a configuration file alone.

        Args:
            tokenizer: A Hugging Face fast tokenizer, or a `TokenMap`.

        Raises:
            MismatchError: Its canonical tokens are not those the model was configured for; both digests are named.
        """
        base = self.base_model
        if base.config.spec is None:
            return
        spec = base.config.spec.bind(tokenizer)
        base.token_map.copy_(torch.from_numpy(spec.token_map.canonical.copy()))
        base.__dict__["_spec"] = spec

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer other than the one the model's memory was trained with.

        Raises:
            MismatchError: With both digests.
        """
        if self.config.spec is not None:
            self.config.spec.bind(tokenizer)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, tokenizer: Any = None, **kwargs: Any
    ) -> Any:
        """Load a model as ``transformers`` does, and check that the checkpoint is whole and fits its hash.

        With ``device_map="auto"`` (and its kin) the tables stay on the host: rows are read there, and only rows read
        travel. A map of several devices places them by the name ``model.memory_tables``; ``"disk"`` leaves them in the
        checkpoint's safetensors files, where rows are read in place and not trained.

        Args:
            pretrained_model_name_or_path: A folder or a repository.
            *args: As in ``PreTrainedModel.from_pretrained``.
            tokenizer: The tokenizer that will be used with the model.
            **kwargs: As in ``PreTrainedModel.from_pretrained``.

        Raises:
            CheckpointError: A file is missing, truncated or malformed, or tensors of the model are missing. The latter
                is allowed with ``ignore_mismatched_sizes=True``, and for a head on the checkpoint of a base model.
            MismatchError: The checkpoint's token map, its tables, or the tokenizer do not fit its HashSpec.
        """
        source = pretrained_model_name_or_path
        if source is not None:
            check_index(Path(source) / (kwargs.get("subfolder") or ""))
        kwargs["device_map"], places = split_device_map(kwargs.get("device_map"))
        # What stands behind the source reaches `__init__`.
        more = () if places is None else (places,)
        try:
            result = super().from_pretrained(source, *args, *more, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read the weights of {source}: {error}; download them again") from error
        except RuntimeError as error:
            if "mismatched_sizes" not in str(error):
                raise
            raise MismatchError(
                f"weights of this checkpoint do not have the sizes that its configuration gives"
                f"{_digest_of(source)}; the report above names them. The configuration belongs to another model, "
                "or was edited"
            ) from error
        model = result[0] if isinstance(result, tuple) else result
        if places is not None:
            model._adopt_tables(kwargs["device_map"])
        if model.config.memory is not None and not model.base_model.token_map.is_meta:
            _ = model.hash_spec
            if tokenizer is not None:
                model.check_tokenizer(tokenizer)
        return result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as ``transformers`` does; tables that were left on disk are copied from there.

        Args:
            save_directory: The folder.
            *args: As in ``PreTrainedModel.save_pretrained``.
            **kwargs: As in ``PreTrainedModel.save_pretrained``.

        Raises:
            ConfigError: The folder holds the very files that tables are being read from.
        """
        mapped = {name: table.shards[0] for name, table in self.tables.items() if isinstance(table, MappedTable)}
        if mapped and len(args) < 2 and kwargs.get("state_dict") is None:
            for stored in mapped.values():
                if any(path.samefile(stored.path) for path in Path(save_directory).glob("*.safetensors")):
                    raise ConfigError(
                        f"{stored.path} is being read by this model and cannot be written over; save it into another "
                        "folder"
                    )
            tables = {f"{self._base_prefix}{TABLES}.{name}.weight": map_tensor(s) for name, s in mapped.items()}
            kwargs["state_dict"] = {**self.state_dict(), **tables}
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the size of the vocabulary, as ``transformers`` does; never below the tokens that memory hashes.

        Memory knows the tokens of its HashSpec only: rows beyond them may fill a vocabulary up to a round number, but
        reading such a token is refused.

        Args:
            new_num_tokens: The new size.
            pad_to_multiple_of: What to round it up to.
            mean_resizing: Whether new rows resemble the old.

        Raises:
            MismatchError: The new size is less than the number of tokens that memory hashes.
        """
        spec = self.config.spec
        if spec is not None and new_num_tokens is not None and new_num_tokens < spec.num_tokens:
            raise MismatchError(
                f"memory hashes {spec.num_tokens} tokens, so the vocabulary cannot shrink to {new_num_tokens}"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Check the files, let transformers load what is in the module tree, then load the tables that are not."""
        if expected_keys is not None:  # an adapter for this model, not the model
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        stored = check_files(checkpoint_files, load_config.sharded_metadata)
        info, offloaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config)
        missing = info.missing_keys | model._load_tables(stored, info.unexpected_keys, load_config.dtype)
        if not load_config.ignore_mismatched_sizes:
            check_missing(missing, model.all_tied_weights_keys, model._base_prefix, stored or state_dict or ())
        return info, offloaded

    def _load_tables(self, stored: Mapping[str, StoredTensor], unexpected: set[str], dtype: torch.dtype) -> set[str]:
        """Load the tables that stand apart, strike their names from the unexpected ones and return those missing."""
        base, spec, missing = self.base_model, self.config.spec, set()
        apart = base.__dict__["_tables_apart"]
        if apart and not stored:
            raise CheckpointError(
                "tables are put on another device than the rest, or left on disk, out of safetensors files only; load "
                "the model without a device_map and save it once"
            )
        for name, table in apart.items():
            assert spec is not None
            own = f"{TABLES}.{name}.weight"
            place = table_device(base.__dict__["_places"], f"{self._base_prefix}{own}")
            source = stored.get(f"{self.base_model_prefix}.{own}") or stored.get(own)
            if source is None:
                if place == "disk":
                    raise CheckpointError(f"{own} is to be read from disk, and the checkpoint does not have it")
                missing.add(f"{self._base_prefix}{own}")
                table.to_empty(device=place).reset_parameters()
                continue
            unexpected.discard(source.name)
            if source.shape != (table.num_rows, table.width):
                raise MismatchError(
                    f"{source}: expected {[table.num_rows, table.width]}, as the configuration gives "
                    f"(HashSpec {spec.digest})"
                )
            if place == "disk":
                apart[name] = MappedTable([source], dtype=dtype)
            else:
                table.weight = nn.Parameter(source.load().to(device=place, dtype=dtype))
        return missing

    def _adopt_tables(self, device_map: Any) -> None:
        """Give the tables that were loaded apart to the model, now that nothing will move them any more."""
        base = self.base_model
        apart, places = base.__dict__["_tables_apart"], base.__dict__["_places"]
        # What other tools ask when they want to know whether a model may be moved or compiled.
        if not hasattr(self, "hf_device_map"):
            self.hf_device_map = dict(device_map) if isinstance(device_map, Mapping) else {"": str(self.device)}
        for name, table in list(apart.items()):
            self.hf_device_map[f"{self._base_prefix}{TABLES}.{name}"] = table_device(
                places, f"{self._base_prefix}{TABLES}.{name}.weight"
            )
            for layer in base.layers:
                if layer.memory is not None and base._table_name(layer.layer_idx) == name:
                    layer.memory.table = table
            if isinstance(table, ParameterTable):
                base._modules[TABLES][name] = apart.pop(name).train(self.training)

    @property
    def _base_prefix(self) -> str:
        """What the names of the base model begin with."""
        return "" if self.base_model is self else f"{self.base_model_prefix}."


class EngramModel(EngramPreTrainedModel):
    """The decoder without its head: token embedding, blocks, final norm, memory tables and token map.

    Args:
        config: Backbone and memory. A configuration made by `EngramLMConfig.for_tokenizer` brings its token map; one
            read from a file does not, and needs `bind_tokenizer` or a checkpoint.
        places: Where `from_pretrained` puts the tables by itself, by name as in a device map; None where they are
            loaded with the rest.
    """

    def __init__(self, config: EngramLMConfig, places: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        memory, spec = config.memory_config, config.spec
        self.__dict__["_memory_config"] = memory
        # A table that stands apart is neither moved, counted nor given hooks with the modules.
        self.__dict__["_tables_apart"], self.__dict__["_places"] = {}, places
        self.memory_tables = nn.ModuleDict()
        tables = self.memory_tables if places is None else self.__dict__["_tables_apart"]
        if memory is not None and spec is not None:
            for block, layer in zip(spec.blocks, spec.layers, strict=True):
                name = _SHARED if spec.shared_table else str(block)
                if name not in tables:
                    tables[name] = ParameterTable(
                        spec.num_rows(layer), memory.head_dim, gradient=memory.table_gradient, std=memory.table_std
                    )
            # A buffer, so that the map travels in the checkpoint; -1 until it is known.
            self.register_buffer("token_map", torch.full((spec.num_tokens,), -1, dtype=torch.int64))
        self.layers = nn.ModuleList(
            [
                EngramBlock(config, block, self.tables.get(self._table_name(block)))
                for block in range(config.num_hidden_layers)
            ]
        )
        if config.num_streams > 1:
            self.stream_head = StreamHead(config)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.__dict__["_spec"] = None
        self.register_load_state_dict_post_hook(_forget_spec)
        self.post_init()
        token_map = getattr(config, "_token_map", None)
        if token_map is None and spec is not None:
            raw = TokenMap.identity(spec.num_tokens)
            token_map = raw if raw.digest == spec.token_map_digest else None  # raw tokens need no tokenizer
        if token_map is not None and not self.token_map.is_meta:
            self.bind_tokenizer(token_map)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> EngramModelOutput:
        """Run the decoder.

        Args:
            input_ids: Tokens ``[B, L]``. Memory is addressed by them, so a model with memory needs them even where
                ``inputs_embeds`` are passed too.
            attention_mask: ``[B, past + L]``, 0 at padding: N-grams do not reach across a masked position, and the
                convolution reads zeros there, so padding changes nothing.
            position_ids: ``[B, L]``.
            past_key_values: Keys, values, token history and convolution windows of the tokens before.
            inputs_embeds: ``[B, L, D]``, used instead of the token embedding.
            use_cache: Whether to return a cache.
            **kwargs: ``output_hidden_states`` (of blocks ``[B, L, S, D]`` with several streams, the last one always
                ``[B, L, D]``), ``output_attentions``, ``output_gates``, ``output_router_logits``,
                ``output_chosen_experts``, and what attention takes.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("pass input_ids, or inputs_embeds (and input_ids beside them where the model has memory)")
        if input_ids is None and self.config.memory is not None:
            raise ValueError("memory is addressed by tokens: pass input_ids beside inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(given.shape[1], device=given.device) + past_length)[None]
        # Before the embedding, so that a token outside the vocabulary is refused in words.
        memory = self._memory_inputs(input_ids, attention_mask, position_ids, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        num_streams = self.config.num_streams
        if num_streams > 1:
            hidden_states = hidden_states.unsqueeze(2).expand(-1, -1, num_streams, -1).contiguous()
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        for block, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                **memory.get(block, {}),
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if num_streams > 1:
            hidden_states = self.stream_head(hidden_states)
        return EngramModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _memory_inputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
    ) -> dict[int, dict[str, Any]]:
        """Hash the tokens once for all blocks and collect each block's decode state."""
        if self.config.memory is None or input_ids is None:
            return {}
        spec, config = self._bound_spec(), self.__dict__["_memory_config"]
        batch_size, length = input_ids.shape
        if attention_mask is not None and attention_mask.dim() != 2:
            # Which positions are padding cannot be told from a mask of pairs, and memory must know.
            raise MismatchError(
                f"attention_mask is {tuple(attention_mask.shape)}; a model with memory needs [batch, past + length], "
                "0 at padding"
            )
        mask = None if attention_mask is None else attention_mask[:, -length:]
        if self.training and self.gradient_checkpointing:
            # Blocks run twice then, and would move their state twice; transformers drops their cache as well.
            cache = None
        codes = spec.encode(input_ids, attention_mask=mask, position_ids=position_ids.expand(batch_size, length))
        blocks = self.config.memory_layers
        history = None
        if cache is not None:
            states = {block: memory_layer(cache, block, self.config) for block in blocks}
            history = states[blocks[0]].token_history(spec, batch_size, input_ids.device)
        rows = spec.rows_for_layers(codes, history)
        active = codes >= 0
        inputs: dict[int, dict[str, Any]] = {}
        for block, layer in zip(spec.blocks, spec.layers, strict=True):
            inputs[block] = {"memory_rows": rows[layer], "memory_active": active}
            if cache is not None and config.conv_context:
                weight = self.get_parameter(f"layers.{block}.memory.key_value.weight")
                device = _device_of(self.layers[block], weight)
                dtype = _product_dtype(weight, device)
                inputs[block]["memory_state"] = states[block].convolution_state(config, batch_size, device, dtype)
        if history is not None:
            history.advance_codes(codes)
        return inputs

    def _bound_spec(self) -> HashSpec:
        spec = self.__dict__["_spec"]
        if spec is not None:
            return spec
        unbound = self.config.spec
        if unbound is None:
            raise TokenMapError("this model has no memory, so it has no HashSpec")
        canonical = self.token_map.cpu().numpy()
        if canonical.size and canonical.min() < 0:
            raise TokenMapError(
                "the model was built from a configuration alone and does not know its token map; "
                "call model.bind_tokenizer(tokenizer), or load a checkpoint with from_pretrained"
            )
        spec = unbound.bind(TokenMap(canonical, vocabulary_digest=unbound.vocabulary_digest))
        self.__dict__["_spec"] = spec
        return spec

    def _table_name(self, block: int) -> str:
        return _SHARED if _SHARED in self.tables else str(block)


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """The reference language model: decoder and head.

    Args:
        config: Backbone and memory.
        places: As in `EngramModel`.

    Example:
        >>> model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory))  # doctest: +SKIP
        >>> model.generate(**tokenizer("def main", return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EngramLMConfig, places: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        self.model = EngramModel(config, places)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> EngramCausalLMOutput:
        """Run the model; see `EngramModel.forward`.

        Args:
            input_ids: Tokens ``[B, L]``.
            attention_mask: ``[B, past + L]``.
            position_ids: ``[B, L]``.
            past_key_values: State of the tokens before.
            inputs_embeds: ``[B, L, D]``.
            labels: Tokens ``[B, L]``, shifted by the loss itself; -100 is not counted.
            use_cache: Whether to return a cache.
            logits_to_keep: Positions from the end to compute logits for; 0 is all.
            **kwargs: As in `EngramModel.forward`.
        """
        balance = (
            self.config.sequence_balance if labels is not None and self.training and self.config.has_experts else 0.0
        )
        wanted = {
            name: kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_router_logits", "output_chosen_experts")
        }
        if balance:
            kwargs.update(dict.fromkeys(wanted, True))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = balance_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if balance:
                mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
                balance_loss = balance * sequence_balance_loss(
                    outputs.router_logits, outputs.chosen_experts, labels.shape[0], mask
                ).to(loss.device)
                items = kwargs.get("num_items_in_batch")
                if items is not None:
                    # Losses of an accumulated batch are added up, so each brings its share only.
                    balance_loss = balance_loss * ((labels[:, 1:] != -100).sum() / items).to(loss.device)
                loss = loss + balance_loss
        return EngramCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gates=outputs.gates,
            router_logits=outputs.router_logits if wanted["output_router_logits"] or not balance else None,
            chosen_experts=outputs.chosen_experts if wanted["output_chosen_experts"] or not balance else None,
            balance_loss=balance_loss,
        )


def _forget_spec(module: nn.Module, incompatible_keys: Any) -> None:
    # The token map may have been replaced by the loaded one.
    module.__dict__["_spec"] = None


def _product_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """Type that a product with this weight has: autocast's where it is on, and so the convolution window's."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else weight.dtype


def _device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module runs: offloaded weights are on the meta device, and accelerate's hook knows better."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return weight.device if device is None else torch.device(device)


def _digest_of(source: Any) -> str:
    """The HashSpec digest of a checkpoint's configuration, for a message."""
    try:
        spec = EngramLMConfig.from_pretrained(source).spec
    except (OSError, ValueError):
        return ""
    return "" if spec is None else f" (HashSpec {spec.digest})"
