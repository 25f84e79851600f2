"""The candidates for a better layer. A candidate is one line here, and perhaps a layer of its own in ``rivals/``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engram_lm.memory import EngramConfig
from engram_lm.studies.candidates import REFERENCE, Candidate, CandidateStudy

CONTROL = "bigrams"
"""The candidate that a winner must beat too: the paper's layer with all of its bytes for bigrams."""
_KNOWN_SHARE = 16
"""The part of the table's bytes that a filter of N-grams or their counts take, as its inverse."""
_Memory = Callable[[CandidateStudy], Mapping[str, Any]]
"""What differs from the paper's layer, as fields of `EngramConfig`."""


def _divided(*shares: int) -> _Memory:
    """Divide the rows over the orders in these shares."""

    def memory(study: CandidateStudy) -> Mapping[str, Any]:
        rows = sum(study.reference.rows_per_order)
        return {"rows_per_head": [max(2, rows * share // sum(shares)) for share in shares]}

    return memory


def _with_unigrams(study: CandidateStudy) -> Mapping[str, Any]:
    """Add heads for single tokens, with rows of the same width; the other orders pay for them."""
    base = study.reference
    rows = base.rows_per_order
    single, width = min(study.vocab_size, *rows), base.memory_dim * (len(rows) + 1) // len(rows)
    wider = {"orders": (1, *base.orders), "memory_dim": width}
    grown = EngramConfig.from_dict({**base.to_dict(), **wider, "rows_per_head": 1}).layer_parameters()
    paid = single + round((grown - base.layer_parameters()) / (base.num_heads * base.head_dim))
    return {**wider, "rows_per_head": [single, *(number - paid // len(rows) for number in rows)]}


def _tokens_and_bigrams(study: CandidateStudy) -> Mapping[str, Any]:
    """Give trigrams' heads to single tokens, and the rows that these do not need to bigrams."""
    rows = sum(study.reference.rows_per_order)
    single = min(study.vocab_size, rows // 2)
    return {"orders": (1, 2), "rows_per_head": [single, rows - single]}


def _knows(layer: str, option: str, per_number: int) -> _Memory:
    """Give a sixteenth of the table's bytes to what a layer knows of the training text; the table has fewer rows."""

    def memory(study: CandidateStudy) -> Mapping[str, Any]:
        numbers = max(1, study.reference.table_parameters() // _KNOWN_SHARE)
        return {"layer": layer, "layer_options": {option: numbers * per_number}}

    return memory


def _as_many_as_rows(study: CandidateStudy) -> Mapping[str, Any]:
    """Let a filter of 8 bits for each N-gram know as many trigrams as a head has rows."""
    words = -(-8 * study.reference.rows_per_order[-1] // 32)
    return {"layer": "back_off", "layer_options": {"filter_bits": 32 * words}}


CANDIDATES: Sequence[Candidate] = (
    Candidate(
        name=REFERENCE, title="Engram", about="the paper's layer: bigrams and trigrams, read in the second block"
    ),
    Candidate(
        name=CONTROL,
        title="bigrams alone",
        about="as many heads and rows of the same width, all of order 2",
        memory=lambda study: {"orders": (2,), "num_heads": study.reference.num_heads_total},
    ),
    Candidate(name="none", title="no memory", about="the backbone alone", memory=None, is_control=True),
    Candidate(
        name="rows_3_1", title="bytes 3 : 1", about="three quarters of the rows for bigrams", memory=_divided(3, 1)
    ),
    Candidate(
        name="rows_7_1", title="bytes 7 : 1", about="seven eighths of the rows for bigrams", memory=_divided(7, 1)
    ),
    Candidate(
        name="back_off",
        title="longest match",
        about="rare trigrams lend their rows to bigrams; a filter of a sixteenth of the bytes knows the frequent ones",
        memory=_knows("back_off", "filter_bits", 32),
    ),
    Candidate(
        name="back_off_few",
        title="longest match, few",
        about="the same, where the filter knows only as many trigrams as a head has rows",
        memory=_as_many_as_rows,
    ),
    Candidate(
        name="per_order",
        title="gate per order",
        about="a key, a value and a gate for each order",
        memory=lambda study: {"layer": "per_order"},
    ),
    Candidate(
        name="factor_engram",
        title="FactorEngram's reader",
        about="a gate for each number of the memory vector, by a dictionary (arXiv 2609.35578), with these orders",
        memory=lambda study: {"layer": "factor_engram"},
    ),
    Candidate(
        name="factor_unigrams",
        title="FactorEngram",
        about="the same with orders 1 to 3, as it was published",
        memory=lambda study: {"layer": "factor_engram", **_with_unigrams(study)},
    ),
    Candidate(
        name="segment_gate",
        title="gate per head",
        about="a gate for each head's row, from the hidden state alone, before the value projection",
        memory=lambda study: {"layer": "segment_gate"},
    ),
    Candidate(
        name="slots",
        title="rows of 6 slots",
        about="the hidden state mixes 2 of 6 slots of each row; a sixth of the rows (MoME, arXiv 2609.15126)",
        memory=lambda study: {"layer": "slots", "memory_dim": 6 * study.reference.memory_dim},
    ),
    Candidate(
        name="sink",
        title="orders and a sink",
        about="orders compete in a softmax with a sink whose value is zero (after arXiv 2609.03426)",
        memory=lambda study: {"layer": "sink"},
    ),
    Candidate(
        name="counted_gate",
        title="gate with counts",
        about="the gate also sees how often the text has an N-gram; the counts take a sixteenth of the bytes",
        memory=_knows("counted_gate", "count_bytes", 4),
    ),
    Candidate(
        name="pooled",
        title="one pool of rows",
        about="every head of every order may read any row",
        memory=lambda study: {"layer": "pooled"},
    ),
    Candidate(
        name="values",
        title="into values",
        about="added to the values of its block's attention, not to the hidden state (after X-gram, arXiv 2604.21724)",
        memory=lambda study: {"layer": "values"},
    ),
    Candidate(
        name="unigrams",
        title="with unigrams",
        about="orders 1 to 3; single tokens have as many rows as there are tokens",
        memory=_with_unigrams,
    ),
    Candidate(
        name="orders_1_2",
        title="unigrams and bigrams",
        about="single tokens in place of trigrams, with as many rows as there are tokens",
        memory=_tokens_and_bigrams,
    ),
    Candidate(
        name="factor_1_2",
        title="FactorEngram, 1 and 2",
        about="FactorEngram's reader of single tokens and bigrams",
        memory=lambda study: {"layer": "factor_engram", **_tokens_and_bigrams(study)},
    ),
    Candidate(
        name="block_0", title="block 0", about="read before the first block", memory=lambda study: {"layers": (0,)}
    ),
    Candidate(
        name="block_2",
        title="block 2",
        about="read before the third block, the middle of a model of four",
        memory=lambda study: {"layers": (2,)},
    ),
)
"""Name, title and what differs from the paper's layer. The first is the paper's layer itself."""
