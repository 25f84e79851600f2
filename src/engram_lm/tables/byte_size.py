"""Bytes for people."""


def byte_size(num_bytes: float, digits: int = 2) -> str:
    """Write a number of bytes in the largest unit that fits: ``"512 B"``, ``"1.50 KiB"``, … ``"2.00 TiB"``."""
    for limit, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"
