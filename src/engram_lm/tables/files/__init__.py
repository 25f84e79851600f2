"""Tables in files: safetensors in and out, and the packed format.

Reading order: ``byte_source.py``, ``safetensors_file.py`` and ``safetensors_writer.py`` (any safetensors file);
``sources.py`` (which tables a checkpoint holds); ``packed.py``, ``packed_writer.py``, ``convert.py`` and ``verify.py``
(the packed format, see ``docs/format.md``), ``row_error.py`` (what rounding did to rows); ``command.py``
(``engram-lm table inspect`` and ``verify``).
"""
