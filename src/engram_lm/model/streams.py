"""Several residual streams: how a sublayer reads from them, mixes them and writes to them (mHC)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

# Dimension key: B batch, L length, S streams, D hidden, T = B * L tokens.

_DYNAMIC_SCALE = 0.01  # first weight of what depends on the token; mHC paper, appendix (alpha)
_FOCUS = 0.25  # how far a sublayer prefers its own stream, to read from and to write to: 0 not at all, 1 alone
_OFF_DIAGONAL = -8.0  # logit beside 0 on the diagonal: each stream keeps 0.999 of itself


class StreamMixer(DeepseekV4HyperConnection):
    """The manifold-constrained hyper-connection around one sublayer.

    For every token three maps are computed from its streams: what the sublayer reads (``pre``), where its output is
    written (``post``) and how the streams are mixed meanwhile (``comb``, doubly stochastic).

    Parameters and result are those of ``DeepseekV4HyperConnection``, which is the plain twin of this class. What
    differs is the order of the work (tokens innermost in the Sinkhorn iteration, scales taken out of the projection),
    that autocast never lowers its precision, and the initialization.

    Args:
        config: Gives ``num_streams``, ``num_sinkhorn_iterations``, ``stream_eps``, ``rms_norm_eps``, ``hidden_size``.
        site: Number of this sublayer, counted through all blocks; decides which stream is its own.

    Source: mHC, arXiv 2512.24880; transformers ``models/deepseek_v4/modeling_deepseek_v4.py``.
    """

    def __init__(self, config: object, site: int) -> None:
        super().__init__(config)
        self.site = site

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Start close to a plain residual network, with streams that are not alike.

        On average over the streams, a sublayer reads their mean and adds its output once, as in a plain network. Its
        own stream, another one at each site, counts for more in both, so streams part from the first block on; and the
        mixing matrix is almost the identity, because an even mix (all logits equal, as in DeepSeek-V4's code) would
        average the streams into one again.
        """
        num_streams = self.hc_mult
        others = max(num_streams - 1, 1)
        base = torch.zeros(2 * num_streams + num_streams**2)
        pre, post, mix = base.split([num_streams, num_streams, num_streams**2])
        own = self.site % num_streams
        pre.fill_(_logit((1 - _FOCUS) / num_streams))
        pre[own] = _logit((1 + _FOCUS * others) / num_streams)
        post.fill_(_logit((1 - _FOCUS / others) / 2))
        post[own] = _logit((1 + _FOCUS) / 2)
        mix.view(num_streams, num_streams).fill_(_OFF_DIAGONAL).fill_diagonal_(0)
        nn.init.normal_(self.fn, std=std)
        nn.init.constant_(self.scale, _DYNAMIC_SCALE)
        if not getattr(self.base, "_is_hf_initialized", False):
            self.base.copy_(base)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the maps of streams ``[B, L, S, D]`` and read from them.

        Returns:
            ``post``, float32 ``[B, L, S]``; ``comb``, float32 ``[B, L, S, S]``, from stream (second to last) to stream
            (last); what the sublayer reads, ``[B, L, D]``, in the streams' type.
        """
        num_streams = self.hc_mult
        sizes = [num_streams, num_streams, num_streams**2]
        with torch.autocast(streams.device.type, enabled=False):
            wide = streams.flatten(-2).float()
            scale = torch.rsqrt(torch.linalg.vecdot(wide, wide) / wide.shape[-1] + self.input_norm.eps)
            mapped = F.linear(wide, self.fn.float()) * scale.unsqueeze(-1)
            pre, post, comb = mapped.split(sizes, dim=-1)
            pre_base, post_base, comb_base = self.base.float().split(sizes)
            pre_scale, post_scale, comb_scale = self.scale.float().unbind()
            pre = torch.sigmoid(pre * pre_scale + pre_base) + self.hc_eps
            post = 2 * torch.sigmoid(post * post_scale + post_base)
            logits = (comb * comb_scale + comb_base).unflatten(-1, (num_streams, num_streams))
            comb = sinkhorn(logits, iterations=self.hc_sinkhorn_iters, eps=self.hc_eps)
            tokens = pre.shape[0] * pre.shape[1]
            read = torch.bmm(pre.reshape(tokens, 1, num_streams), wide.view(tokens, num_streams, -1))
        return post, comb, read.view(*streams.shape[:2], -1).to(streams.dtype)

    def write(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Mix the streams ``[B, L, S, D]`` and add the sublayer's output ``[B, L, D]`` to each.

        ``post`` and ``comb`` are those that `forward` computed from these streams. The result has their shape and type.
        """
        # One product with the output as one more source: out[n] = sum over m of comb[m, n] streams[m] + post[n] output.
        with torch.autocast(streams.device.type, enabled=False):
            weights = torch.cat([comb, post.unsqueeze(-2)], dim=-2).to(streams.dtype).flatten(0, 1)
            sources = torch.cat([streams, output.unsqueeze(-2).to(streams.dtype)], dim=-2).flatten(0, 1)
            return torch.bmm(weights.transpose(1, 2), sources).view_as(streams)


class StreamHead(DeepseekV4HyperHead):
    """The weighted sum of the streams that the output head reads, ``[B, L, S, D]`` to ``[B, L, D]``.

    The mHC paper does not say how streams are brought together at the end; this is DeepSeek-V4's way.

    Source: transformers ``models/deepseek_v4/modeling_deepseek_v4.py``.
    """

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Start as the mean of the streams."""
        nn.init.normal_(self.hc_fn, std=std)
        nn.init.constant_(self.hc_base, _logit(1 / self.hc_mult))
        nn.init.constant_(self.hc_scale, _DYNAMIC_SCALE)

    def forward(self, streams: Tensor) -> Tensor:
        """Collapse the streams, never below float32."""
        with torch.autocast(streams.device.type, enabled=False):
            return super().forward(streams)


def sinkhorn(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """Turn logits into matrices whose rows and columns sum to one.

    Columns do exactly; rows nearly, the better the smaller the logits.

    Args:
        logits: float32 ``[B, L, S, S]``.
        iterations: Normalizations of the columns; between two of them the rows are normalized.
        eps: Added to every entry at first, and to every sum.

    Source: mHC, arXiv 2512.24880, section 4; the order of the steps as in transformers' ``DeepseekV4HyperConnection``.
    """
    # Tokens innermost: sums over four neighbours would leave most of a vector unit idle.
    matrices = logits.permute(2, 3, 0, 1).contiguous()
    matrices = torch.softmax(matrices, dim=1) + eps
    matrices = matrices / (matrices.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrices = matrices / (matrices.sum(1, keepdim=True) + eps)
        matrices = matrices / (matrices.sum(0, keepdim=True) + eps)
    return matrices.permute(2, 3, 0, 1)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
