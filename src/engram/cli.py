"""The command line: verb → function, imported only when chosen."""

import sys

__all__ = ["main"]


def main() -> int:
    """Say which verbs exist; none does yet."""
    print("engram: no verb is built yet", file=sys.stderr)
    return 2
