"""What does memory add to a pretrained model in a new domain, and what does the model forget? With controls.

Reading order: ``recipe.py`` (what is asked), ``arms.py`` (each arm as a training recipe), ``bench.py`` (the base before
training, and what makes the comparison fair), ``duration.py`` (how long it takes), ``diagnostics.py`` (what the memory
does), ``run.py`` (all arms and seeds, and going on after a stop), ``command.py`` (``engram-lm adapt``); then
``finding.py`` (what came out, in words and tables), ``figures.py`` and ``report.py`` (the page).
"""
