"""Where does memory belong, and how much depth does it stand for? One module at every depth, compared with none.

Reading order: ``study.py`` (the arms, what is the same about them, and what is measured), ``summary.py`` and
``figures.py`` (what came out).
"""
