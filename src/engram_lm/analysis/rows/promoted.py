"""What a row or an N-gram says by itself: the tokens that its value makes more likely."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.lens.lens import LogitLens
from engram_lm.analysis.protocol import NotApplicable
from engram_lm.analysis.reading import read_text
from engram_lm.analysis.subject import Subject
from engram_lm.analysis.token_text import spelled
from engram_lm.memory.layer import EngramLayer

__all__ = ["Promoted", "promoted_tokens"]

# Dimension key: N vectors, C channels of the memory vector, M memory width, S streams, D hidden, V vocabulary.


class Promoted(NamedTuple):
    """A token that a value raises."""

    token: int
    """Its id."""
    text: str
    """What it spells."""
    logit: float
    """Difference to the logit that an empty hidden state gives it."""


@torch.no_grad()
def promoted_tokens(
    subject: Subject, layer: EngramLayer, vectors: Tensor, channels: slice, number: int
) -> tuple[tuple[Promoted, ...], ...]:
    """Send parts of the memory vector through the value projection and on to the model's head.

    This is only the direct path to the output. It leaves out the gate (which scales the value), the convolution, the
    projection's bias and all later layers, so it shows what a row adds and not what the model makes of it. The final
    norm brings values of any size to one.

    The ``vectors``, floating ``[N, C]``, are the values of some ``channels`` of the layer's memory vector; the others
    are zero. For each vector the ``number`` tokens that it raises most are named; none if its value is zero or not
    finite, or if it is not known how the model predicts (see `Subject.predict`).

    Source: direct logit attribution, Elhage et al., “A Mathematical Framework for Transformer Circuits”, 2021.
    """
    nothing: tuple[tuple[Promoted, ...], ...] = ((),) * len(vectors)
    few = np.arange(min(4, len(subject.tokenizer), subject.vocab_size))
    if number < 1 or isinstance(
        read_text([subject], few, {"lens": LogitLens()}, length=len(few))["lens"], NotApplicable
    ):
        return nothing
    values = _values(layer, vectors, channels, subject.device)
    # All streams hold the value, as they do behind the memory, except for their gates.
    states = values.to(subject.dtype).unsqueeze(-2).expand(-1, subject.num_streams, -1)
    num_tokens = min(len(subject.tokenizer), subject.vocab_size)
    logits = subject.predict(torch.cat([states, torch.zeros_like(states[:1])]))[..., :num_tokens].float().cpu()
    raised = logits[:-1] - logits[-1:]
    says = (values.abs().amax(-1) > 0).cpu() & raised.isfinite().all(-1)
    best = raised.topk(min(number, num_tokens))
    return tuple(
        tuple(
            Promoted(token, spelled(subject.tokenizer, [token]), logit)
            for token, logit in zip(tokens, found, strict=True)
        )
        if speaks
        else ()
        for tokens, found, speaks in zip(best.indices.tolist(), best.values.tolist(), says.tolist(), strict=True)
    )


def _values(layer: EngramLayer, vectors: Tensor, channels: slice, device: torch.device) -> Tensor:
    """Apply the value projection without its bias, [N, D]. Quantized and offloaded ones must be called as modules."""
    weight = layer.key_value.weight
    memory = torch.zeros(len(vectors) + 1, layer.config.memory_dim)
    memory[:-1, channels] = vectors
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    projected = layer.key_value(memory.to(device if weight.is_meta else weight.device, dtype))
    values = projected[..., -layer.config.hidden_size :].float()
    return (values[:-1] - values[-1:]).to(device)
