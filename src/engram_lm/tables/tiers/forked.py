"""What a forked process begins anew: locks that other threads may have held, and pools of threads it does not have.

Only the thread that forks lives on in the new process. A lock that another one held is never given back there, and work
handed to another one is never done: a table that was being read while its process forked would wait for ever.
"""

import contextlib
import functools
import os
import weakref
from typing import Protocol

__all__ = ["renew_when_forked"]


class _Renewed(Protocol):
    def _renew(self) -> None: ...


def renew_when_forked(owner: _Renewed) -> None:
    """Have ``owner._renew()`` called in every process that is forked while it lives, before anything else runs there.

    The owner is kept by a weak reference. While ``_renew`` runs the process has no other thread.
    """
    if hasattr(os, "register_at_fork"):
        _owners().add(owner)


@functools.cache
def _owners() -> "weakref.WeakSet[_Renewed]":
    owners: weakref.WeakSet[_Renewed] = weakref.WeakSet()

    def renew() -> None:
        for owner in list(owners):
            with contextlib.suppress(AttributeError):  # another thread was just making it, and nobody can have it
                owner._renew()

    os.register_at_fork(after_in_child=renew)
    return owners
