"""What does memory hold that attention does not? Facts recalled against facts read, with memory on and suppressed.

Reading order: ``families.py`` (the text and the two families of questions), ``recipe.toml`` (the model and how it is
trained), ``study.py`` (train, ask, suppress, compare), ``summary.py`` (what came out, as a table and a picture).
"""
