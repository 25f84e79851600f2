"""A page to play with: what a memory reads of a text, what that changes, and facts written into it and taken back.

Reading order: ``addresses.py`` (tokens → N-grams → row numbers and who shares them), ``predictions.py``,
``explorer.py`` (all that is asked of a model), ``opening.py`` (a folder → an explorer), ``markup.py`` (HTML),
``app.py`` (the page), ``command.py``.
"""

from engram_lm.explore.app import build_app
from engram_lm.explore.explorer import Explorer
from engram_lm.explore.opening import open_explorer

__all__ = ["Explorer", "build_app", "open_explorer"]
