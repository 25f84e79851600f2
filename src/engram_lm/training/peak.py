"""The best speed of a device, against which its use is measured."""

import re
import time

import torch

__all__ = ["peak_flops"]

# Dense matrix products without sparsity, 10^12 operations a second (float32 with TF32, bfloat16); vendors' data sheets.
_ACCELERATORS = {
    "V100": (15.7, 15.7),
    "A100": (156, 312),
    "A10": (62.5, 125),
    "L4": (60, 121),
    "L40": (90.5, 181),
    "4090": (82.6, 165),
    "H20": (74, 148),
    "H100": (494, 989),
    "H800": (494, 989),
    "H200": (494, 989),
    "B200": (1100, 2250),
    "MI300": (653, 1307),
}
_SIZE, _REPEATS = 1024, 5


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Find the best speed of a device in matrix products of a type, in operations per second.

    On a CPU it is measured, in a tenth of a second; an accelerator is looked up by its name.

    Returns:
        None for an unknown accelerator.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # The longest name first: an H200 is not an H20.
        for known in sorted(_ACCELERATORS, key=len, reverse=True):
            if re.search(rf"\b{known}", name) and not re.search(rf"{known}\d", name):
                return _ACCELERATORS[known][dtype == "bfloat16"] * 1e12
        return None
    if device.type != "cpu":
        return None
    matrix = torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best
