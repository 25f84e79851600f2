"""Text on disk → batches of tokens: one reader of text for every command and study.

Reading order: ``sources.py`` (where text comes from → documents, in bounded memory), ``tokenizer.py`` (documents → a
tokenizer), ``packing.py`` and ``shards.py`` (documents → packed tokens on disk), ``batches.py`` (tokens → batches, a
pure function of seed and step).
"""
