"""Row numbers → rows. Knows nothing of tokens or N-grams.

Reading order: ``table.py`` (the interface every tier keeps), ``resident.py`` (the tables that live in memory: a plain
one to read from and a trainable one), ``mapped.py`` (a table read where it lies in files), ``safetensors_file.py`` and
``safetensors_writer.py`` (those files), ``block_float8.py`` (8-bit rows).
"""

from engram.tables.mapped import MappedTable
from engram.tables.resident import ParameterTable, ResidentTable
from engram.tables.safetensors_file import StoredTensor, TensorFolder
from engram.tables.table import Table, Ticket

__all__ = ["MappedTable", "ParameterTable", "ResidentTable", "StoredTensor", "Table", "TensorFolder", "Ticket"]
