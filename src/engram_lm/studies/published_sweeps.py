"""Points of the paper's Figures 3 and 5, read from the coordinates of the drawings: single runs, losses within 0.0001.

The paper prints few of them as numbers. Source: arXiv 2601.07372.
"""

from collections.abc import Mapping

ALLOCATION: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "paper: 5.7 B, 568 M active": (
        (0.40, 0.51, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.00),
        (1.8275, 1.8227, 1.8190, 1.8172, 1.8177, 1.8170, 1.8155, 1.8172, 1.8201, 1.8292),
    ),
    "paper: 9.9 B, 993 M active": (
        (0.397, 0.505, 0.602, 0.698, 0.752, 0.795, 0.849, 0.903, 0.946, 1.00),
        (1.7247, 1.7196, 1.7136, 1.7122, 1.7126, 1.7109, 1.7095, 1.7125, 1.7130, 1.7248),
    ),
}
"""The experts' share of the sparse budget and the validation loss, for the two budgets of section 3.1."""

ALLOCATION_EXPERTS: Mapping[str, int] = {"paper: 5.7 B, 568 M active": 106, "paper: 9.9 B, 993 M active": 99}
"""Routed experts at a share of 1; a token visits 6 of them."""

_SLOTS = 129_280  # all numbers of slots are multiples of the vocabulary's size

SCALING: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "Engram": (
        tuple(_SLOTS * times for times in (2, 5, 10, 15, 20, 30, 50, 80)),
        (1.7883, 1.7760, 1.7678, 1.7654, 1.7603, 1.7527, 1.7481, 1.7432),
    ),
    "OverEncoding": (
        tuple(_SLOTS * times for times in (10, 20, 40, 100)),
        (1.7820, 1.7711, 1.7670, 1.7505),
    ),
}
"""Slots of 1,280 numbers and the validation loss, section 3.2."""

SCALING_WITHOUT = 1.8082
"""The loss of the same mixture of experts without memory."""

ABLATIONS: Mapping[str, float] = {
    "layers-0": 1.7730 - 1.7705,
    "layers-two": 1.7678 - 1.7705,
    "streams-single": 1.7743 - 1.7678,
    "gate-none": 1.7724 - 1.7678,
    "token_map-raw": 1.7735 - 1.7678,
    "convolution-none": 1.7683 - 1.7678,
    "orders-2-3-4": 1.7695 - 1.7678,
}
"""What a change of the reference costs in validation loss, section 6.2 and Figure 5. The names are those of the arms of
``engram-lm study ablations``. Places of layers are compared with one module in layer 2, the rest with two layers."""
