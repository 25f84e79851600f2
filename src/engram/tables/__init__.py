"""Row numbers → rows. Knows nothing of tokens or N-grams.

Reading order: ``table.py`` (the interface every tier keeps), ``resident.py`` (the tables that live in memory: a plain
one to read from and a trainable one).
"""

from engram.tables.resident import ParameterTable, ResidentTable
from engram.tables.table import Table, Ticket

__all__ = ["ParameterTable", "ResidentTable", "Table", "Ticket"]
