"""Whole questions asked of memory: train several models under one budget, compare them, show what came out.

Reading order: ``study.py`` (a study as a value), ``budget.py`` (what its arms must share), ``runner.py`` and
``progress.py`` (its arms as ordinary runs), ``summary.py`` and ``result.py`` (what several seeds say), ``curves.py``,
``figures.py`` and ``page.py`` (how it is shown), ``command.py`` (``engram-lm study``); ``text_flags.py`` (text
and training of a study's models), ``small_models.py`` (the models of the quickstart and of depth), ``micro_models.py``
(the smallest ones, by preset); then one folder for each study.
"""
