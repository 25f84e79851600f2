"""What does memory add to a pretrained model on a new domain, and what does the model forget? With controls.

Reading order: ``recipe.py`` (what is asked), ``text.py`` (what is trained and evaluated on), ``arms.py`` (what is
trained), ``controls.py`` (what a gain is compared with), ``cost.py`` (what makes the comparison fair), ``trial.py``
(one arm, one seed), ``diagnostics.py`` (what the memory does), ``folder.py`` and ``run.py`` (all of it, and back after
a stop), ``command.py`` (``engram-lm adapt``).
"""
