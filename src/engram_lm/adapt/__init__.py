"""Memory for a pretrained model somebody else trained.

Reading order: ``decoder.py`` and ``placement.py`` (where its layers are), ``forward_pass.py`` (what its hooks do),
``trainers.py`` (what is said of trainers that know nothing of memory), ``adapter.py`` (the memory), ``folder.py`` and
``model_card.py`` (what is saved and loaded), ``hub.py`` (from and to the Hugging Face Hub), ``attachment.py`` (one call
for all of it); then ``row_patch.py`` (facts written into rows and taken back: one by one, or many together by
``edits/``), ``patch_folder.py`` (patches that belong to a folder) and ``transfer.py`` (rows that start from what the
model already knows).
"""

from engram_lm.adapt.adapter import MemoryAdapter, attached_adapters, set_adapters
from engram_lm.adapt.attachment import attach
from engram_lm.adapt.edits.fit import JointFitOptions
from engram_lm.adapt.fact_edit import FactEdit, read_fact_edits
from engram_lm.adapt.row_patch import RowPatch, applied_patches
from engram_lm.adapt.row_patch_fit import FitOptions
from engram_lm.adapt.row_patch_merge import merge_patches
from engram_lm.adapt.transfer import TransferReport, transfer_rows

__all__ = [
    "FactEdit",
    "FitOptions",
    "JointFitOptions",
    "MemoryAdapter",
    "RowPatch",
    "TransferReport",
    "applied_patches",
    "attach",
    "attached_adapters",
    "merge_patches",
    "read_fact_edits",
    "set_adapters",
    "transfer_rows",
]
