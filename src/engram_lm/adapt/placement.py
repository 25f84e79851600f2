"""Where in a model memory is read, said in words that depend on the model's depth."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from engram_lm.errors import ConfigError, suggestion

Placement = Literal["early", "middle", "late"]
"""A place in a model: the second decoder layer, the one just before the middle, or the one after three quarters."""


def resolve_layers(layers: Any, num_layers: int) -> tuple[int, ...]:
    """Turn places into numbers of decoder layers.

    Of 30 layers, ``"early"`` is layer 1 and ``"middle"`` layer 14, which are those of the paper, and ``"late"`` is
    layer 22. In a model with a single layer all of them are layer 0.

    Args:
        layers: Numbers from 0, words, or both; one word alone needs no list.
        num_layers: Decoder layers of the model, at least 1.

    Returns:
        The numbers, in the order in which they were given.

    Raises:
        ConfigError: A word is unknown, the model has no layer of a number, or a layer is named twice.

    Source: paper, Table 5 (layers 2 and 15 of 30, counted from 1).
    """
    if not isinstance(layers, str | Iterable):
        raise ConfigError(f"layers is a sequence of whole numbers or places such as 'early', not {layers!r}")
    given: Sequence[Any] = (layers,) if isinstance(layers, str) else tuple(layers)
    numbers = {
        "early": min(1, num_layers - 1),
        "middle": (num_layers - 1) // 2,
        "late": num_layers * 3 // 4,
    }
    found = []
    for layer in given:
        if isinstance(layer, str) and layer not in numbers:
            raise ConfigError(
                f"a place of memory is a layer's number or one of {', '.join(get_args(Placement))}, not {layer!r}; "
                f"{suggestion(layer, numbers)}"
            )
        number = numbers[layer] if isinstance(layer, str) else layer
        if type(number) is not int or not 0 <= number < num_layers:
            raise ConfigError(f"layers {list(given)}: the base has {num_layers} decoder layers, from 0")
        found.append(number)
    if len(set(found)) < len(found):
        raise ConfigError(
            f"layers {list(given)} of {num_layers} are the layers {found}, and each can be named once; choose others"
        )
    return tuple(found)
