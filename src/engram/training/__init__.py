"""Text on disk → trained weights.

Reading order: ``corpus.py`` (files → documents, split by file), ``tokenizer.py`` (documents → a tokenizer),
``batches.py`` (tokens → batches, a pure function of seed and step), ``optimizers.py`` (Adam for the backbone, Adam on
touched rows for tables), ``loop.py`` (steps).
"""
