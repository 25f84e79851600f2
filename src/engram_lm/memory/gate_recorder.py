"""Gates of memory layers, recorded at every forward pass: the one place that hooks layers for them."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from engram_lm.memory.interface import MemoryLayer


class _Asked:
    """Stands for ``return_gates=True`` where a recorder asked for the gates and the caller of the layer did not."""


@contextlib.contextmanager
def record_gates(layers: Mapping[int, MemoryLayer], on_gates: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Watch the gates of memory layers while the context is open.

    What the layers return to their callers does not change: whoever did not ask for gates receives the update alone.
    Recorders may be nested, and other threads may call the layers; their gates are then reported too.

    Args:
        layers: The layers, each under the number of its block.
        on_gates: Called after every forward pass of a layer with its block and its gates, float32 ``[B, L, S]``,
            detached.

    Example:
        >>> with record_gates({1: layer}, lambda block, gates: print(gates.mean())):  # doctest: +SKIP
        ...     layer(hidden_states, rows)
    """
    with contextlib.ExitStack() as hooks:
        for block, layer in layers.items():
            asked = _Asked()
            before, after = functools.partial(_before, asked), functools.partial(_after, asked, block, on_gates)
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            # In front of the hooks that are there: a recorder opened later asked later, so it sees the result earlier,
            # and every other hook sees what the layer's caller will see.
            hooks.callback(layer.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
        yield


def _before(asked: _Asked, layer: MemoryLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return None if kwargs.get("return_gates") else (args, {**kwargs, "return_gates": asked})


def _after(
    asked: _Asked,
    block: int,
    on_gates: Callable[[int, Tensor], None],
    layer: MemoryLayer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    on_gates(block, output.gates.detach())
    return output.update if kwargs["return_gates"] is asked else output
