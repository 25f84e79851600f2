"""What a bug report needs: versions, the machine, and which table tiers work on it.

Reading order: ``machine.py`` (processor, accelerators, memory, disks), ``tier_trials.py`` (every tier, tried) and
``command.py`` (the verb). Parts of the library and other packages are imported where they are tried, so that a
broken one is a line of the answer and nothing more.
"""
