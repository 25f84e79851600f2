"""Row numbers → rows. Knows nothing of tokens or N-grams.

Reading order: ``table.py`` (the interface of every table); ``codec.py``, ``block_float8.py`` and
``block_integers.py`` (what the bytes of a stored row mean), ``layout.py`` (where they lie); ``tiers/`` (where rows are
kept and read, one file each), ``around/`` (tables around tables: records kept, rows read early or replaced, rows
brought to a GPU), ``files/`` (what lies on disk); ``choose.py`` and ``open.py`` (which tier, and one call for all).
"""

from engram_lm.tables.around.cache import CachedTable, most_frequent
from engram_lm.tables.around.overlay import OverlayTable
from engram_lm.tables.around.read_ahead import ReadAheadTable
from engram_lm.tables.around.staged import StagedTable
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import packed_layout
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.safetensors_file import TensorFolder
from engram_lm.tables.files.verify import verify_packed
from engram_lm.tables.layout import RowLayout, tensor_layout
from engram_lm.tables.open import open_table, table_layouts
from engram_lm.tables.stored_tensor import StoredTensor
from engram_lm.tables.table import Table, Ticket
from engram_lm.tables.tiers.device import ParameterTable, ResidentTable
from engram_lm.tables.tiers.file import FileTable
from engram_lm.tables.tiers.host import HostTable
from engram_lm.tables.tiers.mapped import MappedTable
from engram_lm.tables.tiers.mooncake import MooncakeTable
from engram_lm.tables.tiers.mooncake_store import publish_to_mooncake
from engram_lm.tables.tiers.record_table import RecordTable
from engram_lm.tables.tiers.remote import RemoteTable

__all__ = [
    "CachedTable",
    "FileTable",
    "HostTable",
    "MappedTable",
    "MooncakeTable",
    "OverlayTable",
    "ParameterTable",
    "ReadAheadTable",
    "RecordTable",
    "RemoteTable",
    "ResidentTable",
    "RowCodec",
    "RowLayout",
    "StagedTable",
    "StoredTensor",
    "Table",
    "TensorFolder",
    "Ticket",
    "most_frequent",
    "open_table",
    "packed_layout",
    "publish_to_mooncake",
    "table_layouts",
    "tensor_layout",
    "verify_packed",
    "write_packed",
]
