"""Checkpoints of training, which any number of processes reads, and the model that is made of one.

Reading order: ``saved_state.py`` (what ``state.json`` says), ``storage.py`` (files of one checkpoint),
``checkpoints.py`` (saving and loading, also in the background), ``training_state.py`` (which tensors are saved, and how
they become a Hugging Face folder).
"""

from engram_lm.training.checkpoints.checkpoints import Checkpoints, latest_checkpoint, read_facts

__all__ = ["Checkpoints", "latest_checkpoint", "read_facts"]
