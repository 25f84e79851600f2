"""Where rows are kept and read, one file for each tier.

Reading order: ``device.py`` (decoded rows, to read or to train), ``record_table.py`` (what all tables of stored rows
share), ``host.py`` (RAM), ``mapped.py`` and ``file.py`` with ``page_cache.py`` (files of this machine), ``remote.py``
with ``remote_files.py`` and ``http_files.py`` (files elsewhere), ``mooncake.py`` with its store, client and process (a
Mooncake Store), ``sharded.py`` and ``row_exchange.py`` (a trained table divided over processes).
"""
