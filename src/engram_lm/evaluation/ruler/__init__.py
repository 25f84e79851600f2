"""RULER: thirteen synthetic tasks that ask a model for what stands anywhere in a text of any length.

Reading order: ``needles.py``, ``lists.py`` and ``questions.py`` write the samples, ``sample.py`` says what a sample is
and fits it to a length, ``scoring.py`` checks answers. ``words.py`` and ``essay.py`` are what samples are made of.
``tasks.py`` has all of them by name, and ``harness.py`` gives them to lm-evaluation-harness.

Source: Hsieh et al., “RULER: What's the Real Context Size of Your Long-Context Language Models?” (arXiv 2404.06654),
and NVIDIA/RULER, ``scripts/data/synthetic``: the tasks, their settings and the wordings of their questions. The
generators here are this project's own and download nothing.
"""
