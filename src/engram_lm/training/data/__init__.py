"""Text on disk → batches of tokens: one reader of text for every command and study.

Reading order: ``text_source.py`` (where text comes from), ``sources.py`` and ``formats.py`` (its files → documents, in
bounded memory), ``documents.py`` (documents in memory), ``tokenizer.py`` (documents → a tokenizer), ``packing.py`` and
``shards.py`` (documents → packed tokens on disk), ``text.py`` (what is trained and what is held out), ``batches.py``
(tokens → batches, a pure function of seed and step).
"""
