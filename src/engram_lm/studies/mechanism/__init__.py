"""How does memory help? The layers and the questions of models with one module at every depth, and of one with none."""
