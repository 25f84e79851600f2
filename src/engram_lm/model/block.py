"""One block of the reference model: DeepSeek-V3's, which may begin by reading memory and may have several streams."""

from typing import Any

from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3MoE

from engram_lm.memory.interface import build_layer
from engram_lm.memory.step import MemoryStep
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.experts import Experts, Router
from engram_lm.model.streams import StreamMixer
from engram_lm.model.value_attention import ValueAttention
from engram_lm.tables import Table

# Dimension key: B batch, L length, D hidden, S streams.


class EngramBlock(DeepseekV3DecoderLayer):
    """One block: memory (where the configuration says so), then attention, then feed-forward.

    With several streams each of the two sublayers reads from them and writes to them through a `StreamMixer`. Memory
    whose line in the registry says that it writes values changes those of attention, and not the hidden states.
    """

    def __init__(self, config: EngramLMConfig, layer_idx: int, table: Table | None = None) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        if isinstance(self.mlp, DeepseekV3MoE):
            self.mlp.gate, self.mlp.experts = Router(config), Experts(config)
        memory = config.memory_config
        self.memory = build_layer(memory, table) if memory is not None and layer_idx in memory.layers else None
        self.writes_values = self.memory is not None and self.memory.config.entry.writes == "values"
        if self.writes_values:
            self.self_attn = ValueAttention(config, layer_idx)
        fused = config.memory_fusion == "single" and config.num_streams > 1
        self.updates_first = self.memory is not None and not fused and not self.writes_values
        """Whether memory updates the hidden states before attention begins; otherwise `attend` reads it."""
        if config.num_streams > 1:
            self.attention_streams = StreamMixer(config, site=2 * layer_idx)
            self.feed_forward_streams = StreamMixer(config, site=2 * layer_idx + 1)
        self.num_streams = config.num_streams

    def forward(self, hidden_states: Tensor, memory_step: MemoryStep | None = None, **kwargs: Any) -> Tensor:
        """Update the hidden states: ``[B, L, D]``, or ``[B, L, S, D]`` with several streams.

        Only a block that reads memory needs ``memory_step``; attention takes the rest.
        """
        if self.updates_first:
            hidden_states = hidden_states + self._read_memory(hidden_states, memory_step)
        hidden_states = self.attend(hidden_states, None if self.updates_first else memory_step, **kwargs)
        return self.feed_forward(hidden_states)

    def attend(self, hidden_states: Tensor, memory_step: MemoryStep | None = None, **kwargs: Any) -> Tensor:
        """Do the first half of `forward`: attention, with memory beside it or in its values unless it came before."""
        reads = self.memory is not None and not self.updates_first
        if self.num_streams == 1:
            update = self._read_memory(hidden_states, memory_step) if reads else None
            return hidden_states + self._attention(hidden_states, update, **kwargs)
        post, comb, read = self.attention_streams(hidden_states)
        update = self._read_memory(read, memory_step) if reads else None
        if update is None or self.writes_values:
            output = self._attention(read, update, **kwargs)
        else:
            # With one stream this is the ordinary residual: x + update + attention(norm(x + update)).
            output = self._attention(read + update, None, **kwargs) + update
        return self.attention_streams.write(hidden_states, output, post, comb)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """Do the second half of `forward`: the feed-forward network, dense or of experts."""
        if self.num_streams == 1:
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        post, comb, read = self.feed_forward_streams(hidden_states)
        output = self.mlp(self.post_attention_layernorm(read))
        return self.feed_forward_streams.write(hidden_states, output, post, comb)

    def _attention(self, hidden_states: Tensor, values: Tensor | None, **kwargs: Any) -> Tensor:
        if values is not None:
            kwargs["values"] = values
        output: Tensor = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return output

    def _read_memory(self, hidden_states: Tensor, step: MemoryStep | None) -> Tensor:
        assert self.memory is not None and step is not None
        # Gates are always asked for: whoever records them hooks the layer.
        packed = step.packed
        update, _ = self.memory(
            hidden_states if packed is None else packed.spread(hidden_states),
            step.rows.get(self.layer_idx),
            step.window(self.layer_idx),
            active=step.active,
            return_gates=True,
        )
        return update if packed is None else packed.gather(update)
