"""Which experts are chosen, how often, and what keeps them evenly loaded (DeepSeekMoE).

The experts themselves, shared and routed, are transformers' DeepSeek-V3 modules.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter

_FEW_NUMBERS = 1 << 19
"""Numbers of an expert's matrix below which a CPU multiplies it in the type of the weights. Every number of tokens is
another shape, for which oneDNN compiles another kernel in bfloat16 and not in float32; it takes about a millisecond."""

# Dimension key: B batch, L length, T = B * L tokens, D hidden, E routed experts, K of them chosen per token.


class Experts(DeepseekV3Experts):
    """DeepSeek-V3's routed experts, whose products follow autocast.

    Grouped matrix products are unknown to autocast (pytorch/pytorch#174763), so transformers computes them in the type
    of the weights: in float32, however low the rest of the model is. Small experts stay in it on a CPU, which is twice
    as fast.

    Source: transformers ``models/deepseek_v3/modeling_deepseek_v3.py``, and ``integrations/moe.py``, which chooses
    between grouped products and a loop.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up the outputs of the chosen experts, ``[T, D]``, in autocast's type where it is on and they are large.

        The hidden states are ``[T, D]``; the chosen experts, int64, and their weights, float32, are ``[T, K]``.
        """
        device = hidden_states.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        is_small = device == "cpu" and self.gate_up_proj[0].numel() < _FEW_NUMBERS
        dtype = self.gate_up_proj.dtype if is_small else torch.get_autocast_dtype(device)
        weights: dict[str, Any] = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        with torch.autocast(device, enabled=False):
            given = (hidden_states.to(dtype), top_k_index, top_k_weights)
            return torch.func.functional_call(self, weights, given)


class Router(DeepseekV3TopkRouter):
    """DeepSeek-V3's router, which also counts how often each expert is chosen while training.

    Every position counts, padding too: a router sees no mask. Packed sequences have none.

    Scores are sigmoids of float32 products, whatever autocast says. The selection bias
    (``e_score_correction_bias``) takes part in the choice and not in the weights; `balance_experts` moves it.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; transformers ``models/deepseek_v3/modeling_deepseek_v3.py``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bias_speed: float = config.router_bias_speed
        # No buffer: DistributedDataParallel would overwrite every rank's counts with those of the first. Whole numbers.
        self.expert_counts = torch.zeros(self.num_experts, dtype=torch.int64, device="cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        # The bias moves in steps of a thousandth, which a lower type loses: `model.to(torch.bfloat16)` leaves it alone.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias.dtype:
            self._buffers["e_score_correction_bias"] = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: ``[..., D]``.

        Returns:
            Logits, float32 ``[T, E]``; weights of the chosen, float32 ``[T, K]``; the chosen, int64 ``[T, K]``.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits, weights, chosen = super().forward(hidden_states)
        if self.training:
            with torch.no_grad():
                flat = chosen.flatten()
                if self.expert_counts.device != flat.device:
                    self.expert_counts = self.expert_counts.to(flat.device)
                self.expert_counts.index_add_(0, flat, torch.ones_like(flat))
        return logits, weights, chosen


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """How the choices since the last `balance_experts` were spread, as they were made in training mode.

    Returns:
        Name of each router to the share of choices that went to each expert, float32 ``[E]``, adding up to 1 (all 0
        where nothing was counted). An even load is ``1 / E``.
    """
    return {name: _share(router.expert_counts) for name, router in _routers(model)}


@torch.no_grad()
def balance_experts(
    model: nn.Module, speed: float | None = None, *, group: "dist.ProcessGroup | None" = None
) -> dict[str, Tensor]:
    """Move every selection bias one step towards an even load, and restart the counts; there is no auxiliary loss.

    Call it once per optimizer step. Under data parallelism the counts of all ranks are added first, so every rank must
    call it.

    Args:
        model: Any model with `Router` modules, wrapped or not; without one nothing happens.
        speed: Size of the step; the ``router_bias_speed`` of the routers' configuration where None. 0 leaves the bias
            alone.
        group: Ranks that hold different data; all of them where None.

    Returns:
        The load that was found, as from `expert_load`.

    Source: auxiliary-loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2. Taking the
    mean out of the update, which changes no choice, follows pytorch/torchtitan.
    """
    load = {}
    for name, router in _routers(model):
        counts = router.expert_counts = router.expert_counts.to(router.e_score_correction_bias.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=group)
        load[name] = _share(counts)
        # Against the sum, in whole numbers; where nothing was counted all signs are 0.
        update = torch.sign(counts.sum() - len(counts) * counts).float()
        router.e_score_correction_bias += (router.bias_speed if speed is None else speed) * (update - update.mean())
        counts.zero_()
    return load


def sequence_balance_loss(
    router_logits: tuple[Tensor, ...], chosen: tuple[Tensor, ...], batch_size: int, mask: Tensor | None = None
) -> Tensor:
    """Compute DeepSeek-V3's sequence-wise balance loss, averaged over sequences and summed over layers.

    It is 1 per layer for an even load, and larger the more of a sequence's tokens share their experts.

    Args:
        router_logits: Per layer, ``[T, E]``.
        chosen: Per layer, int64 ``[T, K]``.
        batch_size: B; sequences lie one after another in T.
        mask: ``[B, L]``, 0 at positions that do not count.

    Source: DeepSeek-V3, arXiv 2412.19437, Eq. 17 to 20, without its factor alpha.
    """
    total = router_logits[0].new_zeros(())
    for logits, experts in zip(router_logits, chosen, strict=True):
        num_experts, num_chosen = logits.shape[-1], experts.shape[-1]
        scores = logits.float().sigmoid()
        scores = (scores / scores.sum(-1, keepdim=True)).view(batch_size, -1, num_experts)
        picked = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, experts, 1.0).view_as(scores)
        weight = (
            scores.new_ones(scores.shape[:2]) if mask is None else mask[:, -scores.shape[1] :].to(scores.dtype)
        ).unsqueeze(-1)
        num_tokens = weight.sum(1).clamp_min(1)
        frequency = (picked * weight).sum(1) / num_tokens * (num_experts / num_chosen)
        mean_score = (scores * weight).sum(1) / num_tokens
        total = total + (frequency * mean_score).sum(-1).mean()
    return total


def _routers(model: nn.Module) -> list[tuple[str, Router]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]


def _share(counts: Tensor) -> Tensor:
    return counts / counts.sum().clamp_min(1)
