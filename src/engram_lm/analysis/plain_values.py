"""Results as plain values, for JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

__all__ = ["PlainResult", "plain"]


class PlainResult:
    """Gives a frozen dataclass a `to_dict` for JSON."""

    also: ClassVar[tuple[str, ...]] = ()
    """Properties and class attributes that belong to the plain values besides the fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes None."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: plain(getattr(self, name)) for name in (*names, *self.also)}


def plain(value: Any) -> Any:
    """Turn arrays, tuples, mappings and results into lists, dictionaries and numbers, and NaN or infinity into None."""
    if isinstance(value, PlainResult):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
