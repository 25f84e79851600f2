"""Evaluation mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside a ``with`` block, and every part of it back into its own afterwards.

    Layers of bitsandbytes with 4 bits stay in training mode: in the other one they pack their weights for the
    processor, and then have no gradients any more. What they compute does not depend on the mode otherwise.
    """
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    for part, _ in before:
        if type(part).__name__ == "Linear4bit":
            part.training = True
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
