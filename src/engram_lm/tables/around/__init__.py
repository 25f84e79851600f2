"""Tables around tables, which give the same rows: kept, read early, or brought to a GPU.

Reading order: ``cache.py``, ``read_ahead.py``, ``staged.py``; ``row_trace.py`` and ``reuse.py`` say what a recorded
trace of rows would gain from a cache.
"""
