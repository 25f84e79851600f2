"""How good a model is: loss on held-out text (``loss.py``), answers to the questions of task files (``tasks.py``)."""
