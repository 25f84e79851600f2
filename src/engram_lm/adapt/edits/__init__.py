"""Joint edits: many facts, each in several wordings, written into the rows of one memory together.

Reading order: ``../fact_edit.py`` (a fact and its file), ``expressions.py`` (which rows a fact is read from, in every
wording), ``scoring.py`` (how well answers are given), ``shifts.py`` (the change of the memory vector that makes the
model give one), ``../joint_edit.py`` (the rows that give all facts their changes at once, in closed form), ``fit.py``
(all of it).

Source: EngramEdit, as described for LongCat-Flash-Lite; what differs is said in ``joint_edit.py``.
"""
