"""Row numbers → rows. Knows nothing of tokens or N-grams.

Reading order: ``table.py`` (the interface every tier keeps), ``resident.py`` (the tables that live in memory: a plain
one to read from and a trainable one); ``codec.py`` and ``block_float8.py`` (what the bytes of a stored row mean),
``layout.py`` (where they lie), ``safetensors_file.py`` and ``safetensors_writer.py`` (one kind of file they lie in),
``record_table.py`` (what all tables of stored rows share), ``mapped.py`` (the first tier of them).
"""

from engram.tables.codec import RowCodec
from engram.tables.layout import RowLayout, tensor_layout
from engram.tables.mapped import MappedTable
from engram.tables.record_table import RecordTable
from engram.tables.resident import ParameterTable, ResidentTable
from engram.tables.safetensors_file import StoredTensor, TensorFolder
from engram.tables.table import Table, Ticket

__all__ = [
    "MappedTable",
    "ParameterTable",
    "RecordTable",
    "ResidentTable",
    "RowCodec",
    "RowLayout",
    "StoredTensor",
    "Table",
    "TensorFolder",
    "Ticket",
    "tensor_layout",
]
