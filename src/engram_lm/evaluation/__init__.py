"""How good a model is: its loss on held-out text, its answers to the questions of task files, what rounding costs it.

Reading order: ``command.py`` (``engram-lm eval``), ``tasks.py`` and ``task_scores.py``, ``rounding.py``.
"""
