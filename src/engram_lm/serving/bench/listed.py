"""Flags that take several numbers, separated by commas."""

from typing import Any

from engram_lm.errors import ConfigError


def listed(text: str, flag: str, kind: type, low: int, high: int | None = None) -> list[Any]:
    """Read the numbers of a flag such as ``--rows``, from ``low`` to ``high``, each once and in the order given."""
    try:
        numbers = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or not all(low <= number <= (high or 2**62) for number in numbers):
        limits = f"from {low} up" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{flag} takes numbers {limits} separated by commas, not {text!r}")
    return list(dict.fromkeys(numbers))
