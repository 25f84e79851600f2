"""Tasks of lm-evaluation-harness that are part of this library: a folder for each suite, found without registration."""
