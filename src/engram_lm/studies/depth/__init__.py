"""Where does memory belong, and how much depth does it stand for? One module at every depth, compared with none.

Reading order: ``arms.py`` (the models and what is the same about them), ``text.py`` (what they are trained on),
``train.py`` (one model), ``measure.py`` (lens and CKA of what was trained), ``command.py`` (the study),
``summary.py`` and ``figures.py`` (what came out).
"""
