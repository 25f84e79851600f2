"""``engram-lm study rivals``: published rivals of the paper's layer beside it, at equal bytes."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from engram_lm.studies.candidates import Candidate, CandidateStudy
from engram_lm.studies.rivals.arms import RIVALS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RivalsStudy(CandidateStudy):
    """Put the rivals of the paper's layer side by side: one backbone, as many bytes, the same text in the same order.

    Every rival is trained in the backbone of all, with a table (or whatever it has in place of one) that comes to the
    same number of bytes. Operations differ and stand in the table; --equal-flops adds a twin of every rival whose
    feed-forward networks are wider or narrower, so that it takes as many as the paper's layer. Rates of the tables were
    tuned for those rivals that need another one than the paper's layer; --arm-rates sets them. Controls show what a
    difference consists of: no memory, the operations of memory in the feed-forward networks instead, one row for
    every N-gram, rows that are never trained, and rows that N-grams cannot own.

    Examples::

        engram-lm study rivals --dry-run
        engram-lm study rivals --data corpus/ --arms bigrams over_encoding none --other-data wikitext=wiki.txt
    """

    name: ClassVar[str] = "rivals"
    candidates: ClassVar[Sequence[Candidate]] = RIVALS
    question: ClassVar[str] = "What else could be done with the bytes of memory?"
