"""Memory for a pretrained model somebody else trained.

Reading order: ``decoder.py`` (where its layers are), ``forward_pass.py`` (what its hooks do), ``trainers.py`` (what is
said of trainers that know nothing of memory), ``adapter.py`` (the memory), ``folder.py`` and ``model_card.py`` (what is
saved and loaded), ``hub.py`` (from and to the Hugging Face Hub), ``attachment.py`` (one call for all of it); then
``row_patch.py`` (facts added to single rows and taken back) and ``transfer.py`` (rows that start from what the model
already knows).
"""

from engram_lm.adapt.adapter import MemoryAdapter, attached_adapters, set_adapters
from engram_lm.adapt.attachment import attach
from engram_lm.adapt.row_patch import RowPatch, applied_patches
from engram_lm.adapt.row_patch_fit import FitOptions
from engram_lm.adapt.transfer import TransferReport, transfer_rows

__all__ = [
    "FitOptions",
    "MemoryAdapter",
    "RowPatch",
    "TransferReport",
    "applied_patches",
    "attach",
    "attached_adapters",
    "set_adapters",
    "transfer_rows",
]
