"""The project's models in vLLM, which serves many requests at once from one paged cache.

vLLM finds them through the entry point in ``pyproject.toml``; nothing here is imported by hand. Reading order:
``version.py`` and ``register.py`` (what vLLM calls), ``config_check.py`` (what it is told, and what is refused),
``checkpoint.py`` and ``tables.py`` (where rows are read from), ``state.py`` (what memory keeps of each token in vLLM's
cache), ``memory.py`` (one forward pass seen from the memory), ``model.py`` (the model) and ``weights.py`` (its
checkpoint). ``adapted_names.py``, ``adapted_config.py``, ``adapters.py`` and ``adapted.py`` do the same for models of
others with an adapter: how vLLM knows them, what they read, how they compute. ``lost_rows.py``, ``worker.py``,
``scheduler.py`` and ``request_errors.py`` end a request whose rows cannot be read, and no other. ``staging.py`` reads
rows before a forward pass, where vLLM runs on a GPU.
"""
