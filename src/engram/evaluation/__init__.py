"""How good a model is: loss on held-out text."""
