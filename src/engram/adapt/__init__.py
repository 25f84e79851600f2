"""Memory for a pretrained model somebody else trained.

Reading order: ``decoder.py`` (where its layers are), ``padding.py`` (which positions are text), ``decode_state.py``
(what its cache keeps for us), ``adapter.py`` (the memory and its hooks), ``folder.py`` (what is saved and loaded),
``attachment.py`` (one call for all of it).
"""

from engram.adapt.adapter import MemoryAdapter, attached_adapters
from engram.adapt.attachment import attach

__all__ = ["MemoryAdapter", "attach", "attached_adapters"]
