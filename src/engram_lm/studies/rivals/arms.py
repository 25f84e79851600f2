"""The rivals of the paper's layer, and the controls. A rival is one line here, and perhaps a layer of its own."""

from collections.abc import Sequence

from engram_lm.studies.candidates import REFERENCE, Candidate

RIVALS: Sequence[Candidate] = (
    Candidate(
        name=REFERENCE, title="Engram", about="the paper's layer: bigrams and trigrams, read in the second block"
    ),
    Candidate(
        name="bigrams",
        title="bigrams alone",
        about="as many heads and rows of the same width, all of order 2",
        memory=lambda base: {"orders": (2,), "num_heads": base.num_heads_total},
    ),
    Candidate(
        name="over_encoding",
        title="OverEncoding",
        about="projected rows are averaged with the token embedding, at the input (arXiv 2501.16975)",
        memory=lambda base: {"layer": "over_encoding", "layers": (0,), "gate": "none", "kernel_size": 0},
        table_rate=1.0,
    ),
    Candidate(name="none", title="no memory", about="the backbone alone", memory=None, is_control=True),
    Candidate(
        name="feed_forward",
        title="wider feed-forward",
        about="no memory; feed-forward networks as much wider as the paper's layer takes operations",
        memory=None,
        equal_flops=True,
        is_control=True,
    ),
    Candidate(
        name="one_row",
        title="one row",
        about="every N-gram reads the same row of each head: the gate and the projections without a table",
        memory=lambda base: {"layer": "one_row"},
        is_control=True,
    ),
    Candidate(
        name="frozen_rows",
        title="random frozen rows",
        about="rows stay as they were drawn",
        model={"frozen_tables": True},
        is_control=True,
    ),
    Candidate(
        name="permuted",
        title="permuted addresses",
        about="an N-gram reads other rows at every position of a sequence, so that rows cannot belong to N-grams",
        memory=lambda base: {"layer": "permuted"},
        is_control=True,
    ),
)
"""Name, title and what differs from the paper's layer. The first is the paper's layer itself."""
