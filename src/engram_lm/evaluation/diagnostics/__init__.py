"""Where a model pays its bits: on frequent and rare tokens, on rare words that a document repeats, on known N-grams.

Reading order: ``reference.py`` (how often something occurs), ``divisions.py`` (tokens into groups), ``measure.py`` (the
bits of each group, memory on and off), ``tables.py``.
"""
