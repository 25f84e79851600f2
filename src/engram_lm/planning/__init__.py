"""What a model costs and where its tables should lie, worked out without building anything.

Reading order: ``sizes.py`` (parameters and FLOPs), ``budget.py`` (experts against memory at equal budget),
``deduplication.py``, ``shape.py``, ``bill.py`` and ``machines.py`` (what training costs per rank and step, and how long
it takes on a machine that is not here), ``this_machine.py`` and ``placement.py`` (where tables should lie here),
``command.py`` (``engram-lm plan``).
"""
