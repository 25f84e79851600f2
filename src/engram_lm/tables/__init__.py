"""Row numbers → rows. Knows nothing of tokens or N-grams.

Reading order: ``table.py`` (the interface every tier keeps), ``resident.py`` (the tables that live in memory: a plain
one to read from and a trainable one), ``sharded.py`` (the trainable one divided over processes); ``codec.py`` and
``block_float8.py`` (what the bytes of a stored row mean), ``layout.py`` (where they lie), ``safetensors_file.py`` and
``safetensors_writer.py`` (one kind of file they lie in), ``record_table.py`` (what all tables of stored rows share),
``mapped.py``, ``file.py``, ``host.py`` and ``http.py`` (its tiers on one machine and on a file server), with
``scattered_copy.py``, ``page_cache.py``, ``async_reads.py`` and ``http_ranges.py`` (how they read); ``sources.py``
(which tables a checkpoint holds) and ``open.py`` (one call for all of it); ``cache.py``, ``read_ahead.py`` and
``staged.py`` (tables around tables: records kept, rows read early, rows brought to a GPU); ``shared.py`` (one copy for
many processes), ``mooncake.py`` with its client (a remote store); ``packed.py``, ``packed_writer.py``, ``build.py``,
``convert.py`` and ``verify.py`` (our own file format); ``row_trace.py``, ``reuse.py`` and ``residency.py`` (a recorded
trace of rows, and what it would cost).
"""

from engram_lm.tables.around.cache import CachedTable, most_frequent
from engram_lm.tables.around.read_ahead import ReadAheadTable
from engram_lm.tables.around.staged import StagedTable
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import packed_layout
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.safetensors_file import StoredTensor, TensorFolder
from engram_lm.tables.files.verify import inspect_packed, verify_packed
from engram_lm.tables.layout import RowLayout, tensor_layout
from engram_lm.tables.open import open_table, table_layouts
from engram_lm.tables.table import Table, Ticket
from engram_lm.tables.tiers.file import FileTable
from engram_lm.tables.tiers.host import HostTable
from engram_lm.tables.tiers.http import HttpTable
from engram_lm.tables.tiers.mapped import MappedTable
from engram_lm.tables.tiers.mooncake import MooncakeTable, publish_to_mooncake
from engram_lm.tables.tiers.record_table import RecordTable
from engram_lm.tables.tiers.resident import ParameterTable, ResidentTable
from engram_lm.tables.tiers.shared import SharedTable

__all__ = [
    "CachedTable",
    "FileTable",
    "HostTable",
    "HttpTable",
    "MappedTable",
    "MooncakeTable",
    "ParameterTable",
    "ReadAheadTable",
    "RecordTable",
    "ResidentTable",
    "RowCodec",
    "RowLayout",
    "SharedTable",
    "StagedTable",
    "StoredTensor",
    "Table",
    "TensorFolder",
    "Ticket",
    "inspect_packed",
    "most_frequent",
    "open_table",
    "packed_layout",
    "publish_to_mooncake",
    "table_layouts",
    "tensor_layout",
    "verify_packed",
    "write_packed",
]
