"""Does memory help to read far back? A MoE and a memory model, trained on short text and extended to longer text."""
