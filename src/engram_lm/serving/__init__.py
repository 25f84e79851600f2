"""Weights → text: opening a model's folder (``load.py``), continuing a prompt (``generate.py``), benches of tables."""
