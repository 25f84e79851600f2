"""The rivals of the paper's layer, and the controls. A rival is one line here, and perhaps a layer of its own."""

from collections.abc import Sequence

from engram_lm.studies.candidates import REFERENCE, Candidate, CandidateStudy
from engram_lm.studies.rivals import knn

_WEIGHT_BYTES = 4  # weights are trained in float32


def _bytes_of_all_contexts(study: CandidateStudy) -> int:
    """Bytes of a store with every context that a model is trained on."""
    num_contexts = study.num_steps * study.batch_size * study.sequence_length
    return num_contexts * knn.entry_bytes(study.config().hidden_size)


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
    Candidate(
        name="knn_bytes",
        title="kNN-LM, equal bytes",
        about="no memory, but as many bytes of contexts that it was trained on, searched exactly (ICLR 2020)",
        memory=None,
        extra_bytes=lambda study: _WEIGHT_BYTES * study.reference.num_parameters(),
        evaluate=knn.evaluate,
    ),
    Candidate(
        name="knn",
        title="kNN-LM, whole text",
        about="the same with every context that it was trained on",
        memory=None,
        extra_bytes=_bytes_of_all_contexts,
        evaluate=knn.evaluate,
        is_control=True,
    ),
    Candidate(
        name="knn_engram",
        title="Engram and kNN-LM",
        about="the paper's layer, and every context that it was trained on",
        extra_bytes=_bytes_of_all_contexts,
        evaluate=knn.evaluate,
        is_control=True,
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
