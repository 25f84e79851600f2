"""Where does memory belong, and how much depth does it stand for? One module at every depth, compared with none.

Reading order: ``study.py`` (the arms and what is the same about them), ``layers.py`` (lens and CKA of what was
trained),
``summary.py`` and ``figures.py`` (what came out).
"""
