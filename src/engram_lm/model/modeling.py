"""The reference language model: the decoder, and the decoder with its head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3RotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from engram_lm.errors import ConfigError, MismatchError, TokenMapError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory.step import MemoryStep, begin_step, packed_row
from engram_lm.model.block import EngramBlock
from engram_lm.model.cache import CACHE_NAME, CONTINUOUS_BATCHING, MAX_ROLLBACK, find_cache, follow_cache, runs_twice
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.experts import sequence_balance_loss
from engram_lm.model.pretrained import EngramPreTrainedModel
from engram_lm.model.streams import StreamHead
from engram_lm.model.table_place import TablesApart, table_name, wanted_tables

# Dimension key: B batch, L length, D hidden, H heads of all orders, S streams, V vocabulary,
# E routed experts, K of them chosen per token.


@dataclasses.dataclass
class _Recorded:
    gates: tuple[Tensor, ...] | None = None
    """With ``output_gates=True``: one float32 ``[B, L, S]`` per block with memory, in order of depth."""
    router_logits: tuple[Tensor, ...] | None = None
    """With ``output_router_logits=True``: one float32 ``[B * L, E]`` per mixture of experts."""
    chosen_experts: tuple[Tensor, ...] | None = None
    """With ``output_chosen_experts=True``: one int64 ``[B * L, K]`` per mixture of experts."""


@dataclasses.dataclass
class EngramModelOutput(_Recorded, BaseModelOutputWithPast):
    """Output of `EngramModel`."""


@dataclasses.dataclass
class EngramCausalLMOutput(_Recorded, CausalLMOutputWithPast):
    """Output of `EngramForCausalLM`."""

    balance_loss: Tensor | None = None
    """The sequence-wise balance loss that ``loss`` contains, times its weight; None where the weight is 0."""


class EngramModel(EngramPreTrainedModel):
    """The decoder without its head: token embedding, blocks, final norm, memory tables and token map.

    Args:
        config: Backbone and memory. A configuration made by `EngramLMConfig.for_tokenizer` brings its token map; one
            read from a file does not, and needs `bind_tokenizer` or a checkpoint.
        places: Where `from_pretrained` puts the tables by itself, by name as in a device map; None where they are
            loaded with the rest.
        table_device: Device that the tables are made on, such as ``"meta"`` where they get their numbers later; the
            default device where None.
    """

    def __init__(
        self,
        config: EngramLMConfig,
        places: Mapping[str, Any] | None = None,
        *,
        table_device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        memory, spec = config.memory_config, config.spec
        self.tables_apart = TablesApart(places)
        self.memory_tables = nn.ModuleDict()
        tables: Any = self.memory_tables if places is None else self.tables_apart.tables
        if memory is not None and spec is not None:
            for name, wanted in (wanted_tables(spec, memory.head_dim) if memory.entry.has_table else {}).items():
                tables[name] = wanted.new(memory, table_device)
            # A buffer, so that the map travels in the checkpoint; -1 until it is known.
            self.register_buffer("token_map", torch.full((spec.num_tokens,), -1, dtype=torch.int64))
        self.layers = nn.ModuleList(
            [
                EngramBlock(config, block, None if spec is None else self.tables.get(table_name(spec, block)))
                for block in range(config.num_hidden_layers)
            ]
        )
        if config.num_streams > 1:
            self.stream_head = StreamHead(config)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.set_input_embeddings(self.embed_tokens)  # memory layers may look at it
        self.max_rollback = MAX_ROLLBACK
        """Tokens that ``crop`` of a new cache can take back without being told beforehand. Each memory layer keeps as
        many positions more, for each sequence."""
        self.bound_spec: HashSpec | None = None
        self.register_load_state_dict_post_hook(_forget_spec)
        self.post_init()
        if spec is not None and spec.token_map is not None and not self.token_map.is_meta:
            self.bind_tokenizer(spec.token_map)

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
        *,
        cache: Cache | None = None,
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
            cache: What transformers 5.24 and later call ``past_key_values``.
            **kwargs: ``output_hidden_states`` (of blocks ``[B, L, S, D]`` with several streams, the last one always
                ``[B, L, D]``), ``output_attentions``, ``output_gates``, ``output_router_logits``,
                ``output_chosen_experts``, and what attention takes. ``cu_seq_lens_q`` says where sequences that share a
                row end; memory then keeps them apart, and recorded gates have gaps between them.

        Raises:
            ConfigError: There are no tokens, or they are not ``[B, L]``.
            MismatchError: What earlier steps left is handed over under an unknown name, or is no `Cache`.
        """
        cache = find_cache({"past_key_values": past_key_values, "cache": cache, **kwargs}, ("past_key_values", "cache"))
        if input_ids is None and inputs_embeds is None:
            raise ConfigError("pass input_ids, or inputs_embeds (and input_ids beside them where the model has memory)")
        if input_ids is None and self.config.memory is not None:
            raise ConfigError(
                "memory is addressed by tokens, and this forward pass has inputs_embeds without input_ids; pass "
                "input_ids beside inputs_embeds. generate hands on the embeddings alone, so let it begin with input_ids"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        if given.dim() < 2 or not given.numel():
            raise ConfigError(f"pass at least one token, [batch, length]; the input is {list(given.shape)}")
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(given.shape[1], device=given.device) + past_length)[None]
        # Before the embedding, so that a token outside the vocabulary is refused in words.
        memory_step = self._begin_memory(input_ids, attention_mask, position_ids, cache, kwargs.get("cu_seq_lens_q"))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        hidden_states = inputs_embeds
        num_streams = self.config.num_streams
        if num_streams > 1:
            hidden_states = hidden_states.unsqueeze(2).expand(-1, -1, num_streams, -1).contiguous()
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        # Assisted decoding by early exit lowers this number while it drafts tokens.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                memory_step=memory_step,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        if num_streams > 1:
            hidden_states = self.stream_head(hidden_states)
        return EngramModelOutput(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _begin_memory(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        ends: Tensor | None,
    ) -> MemoryStep | None:
        """Hash the tokens once for all blocks, and find what the cache keeps for them."""
        if self.config.memory is None or input_ids is None:
            return None
        spec = self._bound_spec()
        batch_size, length = input_ids.shape
        if attention_mask is not None and attention_mask.dim() != 2:
            # Which positions are padding cannot be told from a mask of pairs, and memory must know.
            raise MismatchError(
                f"attention_mask is {tuple(attention_mask.shape)}; a model with memory needs [batch, past + length], "
                "0 at padding"
            )
        memory_config = self.config.memory_config
        assert memory_config is not None
        packed = packed_row(ends, input_ids, memory_config.look_back)
        state = None
        # With gradient checkpointing blocks run twice and would move their state twice; transformers drops the cache.
        # A packed row is never continued, so it needs no state.
        if cache is not None and packed is None and not runs_twice(self):
            state = follow_cache(cache, "model", input_ids, context=spec.context, max_rollback=self.max_rollback)
        return begin_step(
            spec,
            {block: self.get_submodule(f"layers.{block}.memory").table for block in spec.blocks},
            input_ids,
            attention_mask=None if attention_mask is None else attention_mask[:, -length:],
            position_ids=position_ids.expand(batch_size, length),
            state=state,
            packed=packed,
            reads=memory_config.entry.reads,
        )

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding, also where memory layers look at it."""
        super().set_input_embeddings(value)
        blocks: Any = self.layers
        for block in blocks:
            if block.memory is not None:
                block.memory.embedding = value

    def _bound_spec(self) -> HashSpec:
        if self.bound_spec is not None:
            return self.bound_spec
        unbound = self.config.spec
        if unbound is None:
            raise TokenMapError("this model has no memory, so it has no HashSpec")
        canonical = self.token_map.cpu().numpy()
        if canonical.size and canonical.max() < 0:
            raise TokenMapError(
                "the model was built from a configuration alone and does not know its token map; "
                "call model.bind_tokenizer(tokenizer), or load a checkpoint with from_pretrained"
            )
        spec = unbound.bind(TokenMap(canonical, vocabulary_digest=unbound.vocabulary_digest))
        spec = spec.covering(self.config.vocab_size)
        self.bound_spec = spec
        return spec


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """The reference language model: decoder and head.

    Args:
        config: Backbone and memory.
        *args: As in `EngramModel`.
        **kwargs: As in `EngramModel`.

    Example:
        >>> model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory))  # doctest: +SKIP
        >>> model.generate(**tokenizer("def main", return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EngramLMConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config)
        self.model = EngramModel(config, *args, **kwargs)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Begin to serve requests by continuous batching, where the model has no memory.

        Raises:
            MismatchError: The model has memory.
        """
        if self.config.memory is not None:
            raise MismatchError(CONTINUOUS_BATCHING)
        return super().init_continuous_batching(*args, **kwargs)

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
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> EngramCausalLMOutput:
        """Run the model; the arguments are those of `EngramModel.forward` and two more.

        ``labels`` are tokens ``[B, L]``, which the loss shifts itself; -100 is not counted. ``logits_to_keep`` says how
        many positions from the end get logits (0 means all), or which ones.
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
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_kept_positions(outputs.last_hidden_state, logits_to_keep))
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gates=outputs.gates,
            router_logits=outputs.router_logits if wanted["output_router_logits"] or not balance else None,
            chosen_experts=outputs.chosen_experts if wanted["output_chosen_experts"] or not balance else None,
            balance_loss=balance_loss,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


def _kept_positions(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Take the positions of ``[B, L, D]`` that get logits, as ``slice_logits_to_keep`` of transformers 5.21 does.

    Args:
        hidden: ``[B, L, D]``.
        keep: How many from the end (0 means all); int64 ``[P]``, the same positions of every row; int64 ``[B, P]``,
            positions of each row; or bool ``[B, L]``, whose True positions come back one after another, ``[N, D]``.
    """
    if isinstance(keep, int):
        return hidden[:, -keep:]
    if keep.dim() < 2:
        return hidden[:, keep]
    return hidden[keep] if keep.dtype == torch.bool else torch.take_along_dim(hidden, keep[..., None], dim=1)


def _forget_spec(module: Any, incompatible_keys: Any) -> None:
    # The token map may have been replaced by the loaded one.
    module.bound_spec = None
