"""``engram-lm study layers``: candidates for a layer that is better than the paper's.

``arms.py`` lists them, ``study.py`` is the command, and ``verdict.py`` says whether one of them wins. Layers that
nobody would use beyond the comparison stand in ``studies/rivals/``.
"""
