"""Latent attention (MLA) with its keys and values written out per head, as vLLM's ordinary attention takes them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.deepseek_v2 import yarn_get_mscale
from vllm.platforms import current_platform

from engram_lm.errors import ConfigError
from engram_lm.model.config import EngramLMConfig

# Dimension key: T tokens of all requests side by side, D hidden, N heads of this rank, E numbers in a head.


class LatentAttention(nn.Module):
    """DeepSeek-V3's attention. Its latent keys and values are expanded before they go into the cache.

    vLLM's kernels for latent attention take the sizes of DeepSeek's own models only, and on CPUs allow neither prompts
    in chunks nor shared prefixes. What a kernel takes no heads of is filled up with zeros, which change nothing.

    Source: transformers ``models/deepseek_v3/modeling_deepseek_v3.py``; vLLM ``models/deepseek_v2.py``.
    """

    def __init__(self, vllm_config: VllmConfig, config: EngramLMConfig, prefix: str) -> None:
        super().__init__()
        heads, ranks = config.num_attention_heads, get_tensor_model_parallel_world_size()
        if heads % ranks:
            raise ConfigError(f"{heads} attention heads cannot be shared by --tensor-parallel-size {ranks}")
        self.num_heads = heads // ranks
        self.plain_dim, self.rotary_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.key_dim, self.value_dim = self.plain_dim + self.rotary_dim, config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        quantization = vllm_config.quant_config
        hidden, bias = config.hidden_size, config.attention_bias

        def columns(name: str, inner: int, outer: int) -> nn.Module:
            layer: nn.Module = ColumnParallelLinear(
                inner, outer, bias=False, quant_config=quantization, prefix=f"{prefix}.{name}", return_bias=False
            )
            return layer

        def replicated(name: str, outer: int) -> nn.Module:
            layer: nn.Module = ReplicatedLinear(
                hidden, outer, bias=bias, quant_config=quantization, prefix=f"{prefix}.{name}", return_bias=False
            )
            return layer

        self.query_rank = config.q_lora_rank
        if self.query_rank is None:
            self.q_proj = columns("q_proj", hidden, heads * self.key_dim)
        else:
            self.q_a_proj = replicated("q_a_proj", self.query_rank)
            self.q_a_layernorm = RMSNorm(self.query_rank, eps=config.rms_norm_eps)
            self.q_b_proj = columns("q_b_proj", self.query_rank, heads * self.key_dim)
        self.kv_a_proj_with_mqa = replicated("kv_a_proj_with_mqa", self.latent_dim + self.rotary_dim)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps=config.rms_norm_eps)
        self.kv_b_proj = columns("kv_b_proj", self.latent_dim, heads * (self.plain_dim + self.value_dim))
        self.o_proj = RowParallelLinear(
            heads * self.value_dim,
            hidden,
            bias=bias,
            quant_config=quantization,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        scaling: float = self.key_dim**-0.5
        if rope["rope_type"] == "yarn":
            rope["rope_type"] = "deepseek_yarn"
            scaling *= yarn_get_mscale(rope["factor"], float(rope.get("mscale_all_dim") or 0)) ** 2
        self.rotary = get_rope(
            self.rotary_dim, max_position=config.max_position_embeddings, rope_parameters=rope, is_neox_style=False
        )
        # vLLM's kernel for CPUs misreads [T, heads, numbers], and YaRN's has no other form.
        self.rotate = self.rotary.forward_native if current_platform.is_cpu() else self.rotary
        self.head_dim = kernel_head_dim(max(self.key_dim, self.value_dim))
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            scaling,
            num_kv_heads=self.num_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend: ``[T, D]`` to ``[T, D]``."""
        if self.query_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query_TNE = query.unflatten(-1, (self.num_heads, self.key_dim))
        latent, rotary_key = self.kv_a_proj_with_mqa(hidden_states).split([self.latent_dim, self.rotary_dim], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent.contiguous()))
        key_TNE, value_TNE = expanded.unflatten(-1, (self.num_heads, -1)).split(
            [self.plain_dim, self.value_dim], dim=-1
        )
        plain_TNE, rotary_TNE = query_TNE.split([self.plain_dim, self.rotary_dim], dim=-1)
        turned_TNE, turned_key = self.rotate(positions, rotary_TNE.contiguous(), rotary_key.unsqueeze(1).contiguous())
        query_TNE = _side_by_side(plain_TNE, turned_TNE, self.head_dim)
        key_TNE = _side_by_side(key_TNE, turned_key.expand(-1, self.num_heads, -1), self.head_dim)
        value_TNE = F.pad(value_TNE, (0, self.head_dim - self.value_dim))
        output = self.attn(query_TNE.flatten(1), key_TNE.flatten(1), value_TNE.flatten(1))
        output = output.unflatten(-1, (self.num_heads, self.head_dim))[..., : self.value_dim]
        result: Tensor = self.o_proj(output.flatten(1))
        return result


def kernel_head_dim(head_dim: int) -> int:
    """The smallest head, of at least this size, that the kernel takes."""
    if not current_platform.is_cpu():
        return head_dim
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    fitting = [size for size in sizes if size >= head_dim]
    if not fitting:
        raise ConfigError(f"heads have {head_dim} numbers, vLLM's attention on CPUs takes at most {max(sizes)}")
    return int(min(fitting))


def _side_by_side(plain: Tensor, rotary: Tensor, head_dim: int) -> Tensor:
    """Join the two parts of heads ``[T, N, ...]`` and fill them up with zeros to ``head_dim`` numbers."""
    joined = torch.cat([plain, rotary], dim=-1)
    return F.pad(joined, (0, head_dim - joined.shape[-1]))
