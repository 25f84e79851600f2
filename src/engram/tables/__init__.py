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

from engram.tables.cache import CachedTable, most_frequent
from engram.tables.codec import RowCodec
from engram.tables.file import FileTable
from engram.tables.host import HostTable
from engram.tables.http import HttpTable, http_layout
from engram.tables.layout import RowLayout, tensor_layout
from engram.tables.mapped import MappedTable
from engram.tables.mooncake import MooncakeTable, publish_to_mooncake
from engram.tables.open import open_table
from engram.tables.packed import packed_layout
from engram.tables.packed_writer import write_packed
from engram.tables.read_ahead import ReadAheadTable
from engram.tables.record_table import RecordTable
from engram.tables.resident import ParameterTable, ResidentTable
from engram.tables.safetensors_file import StoredTensor, TensorFolder
from engram.tables.shared import SharedTable
from engram.tables.sources import table_layouts
from engram.tables.staged import StagedTable
from engram.tables.table import Table, Ticket
from engram.tables.verify import inspect_packed, verify_packed

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
    "http_layout",
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
