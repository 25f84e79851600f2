"""What could be done with the bytes of memory instead: published rivals and controls beside the paper's layer.

``arms.py`` lists them, ``study.py`` is ``engram-lm study rivals``; every other file is a rival that nobody would use
beyond the comparison, named by its line in ``memory/registry.py``.
"""
