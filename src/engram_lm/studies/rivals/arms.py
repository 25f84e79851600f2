"""The rivals of the paper's layer, and the controls. A rival is one line here, and perhaps a layer of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from engram_lm.memory import EngramConfig
from engram_lm.studies.candidates import REFERENCE, Candidate, CandidateStudy
from engram_lm.studies.layers.arms import CANDIDATES
from engram_lm.studies.rivals import knn
from engram_lm.studies.rivals.f_grams import FGramLayer
from engram_lm.studies.rivals.stored_text import stored_text_memory

_PLAIN: dict[str, Any] = {"orders": (1,), "gate": "none", "kernel_size": 0}
"""Fields of layers that have neither the gate nor the convolution of the paper's layer."""
_NO_TABLE: dict[str, Any] = {**_PLAIN, "token_map": "raw", "num_heads": 1, "rows_per_head": 1}
_LONGEST = 5
"""Tokens of the longest f-gram, as published."""


_WEIGHT_BYTES = 4  # weights are trained in float32


def _bytes_of_all_contexts(study: CandidateStudy) -> int:
    """Bytes of a store with every context that a model is trained on."""
    num_contexts = study.num_steps * study.batch_size * study.sequence_length
    return num_contexts * knn.entry_bytes(study.config().hidden_size)


def _product_keys(study: CandidateStudy, **options: Any) -> dict[str, Any]:
    heads, base = 4, study.reference
    return {
        **_PLAIN,
        "layer": "pkm",
        "num_heads": heads,
        "memory_dim": heads * base.hidden_size,
        "table_std": base.hidden_size**-0.5,
        "layer_options": {"chosen": 8, **options},  # 32 as published would be a larger part of so small a table
    }


def scone_memory(base: EngramConfig) -> EngramConfig:
    """Configure SCONE with as many f-grams as its table for serving has room for in the bytes of the paper's layer.

    The transformer that computes the table is not paid for: with the table, the published model is used without it.
    """
    orders = tuple(range(2, _LONGEST + 1))
    fields = _NO_TABLE | {"layer": "scone", "layers": (0,), "orders": orders, "memory_dim": len(orders)}
    config = EngramConfig.from_dict({**base.to_dict(), **fields})
    one = dataclasses.replace(config, layer_options={"num_f_grams": 1})
    room = _WEIGHT_BYTES * base.num_parameters()
    return dataclasses.replace(config, layer_options={"num_f_grams": max(1, room // FGramLayer.beside(one))})


def _scone_bytes(study: CandidateStudy) -> int:
    """Bytes of SCONE's table, less those of the transformer, which is among the weights and not needed beside it."""
    config = scone_memory(study.reference)
    return FGramLayer.beside(config) - _WEIGHT_BYTES * config.num_parameters()


def _known(name: str, /, **changed: Any) -> Candidate:
    """A candidate that the study of better layers has too."""
    return dataclasses.replace(next(one for one in CANDIDATES if one.name == name), **changed)


RIVALS: Sequence[Candidate] = (
    _known(REFERENCE),
    _known("bigrams"),
    _known("unigrams"),
    _known("orders_1_2"),
    Candidate(
        name="over_encoding",
        title="OverEncoding",
        about="projected rows are averaged with the token embedding, at the input (arXiv 2501.16975)",
        memory=lambda study: {"layer": "over_encoding", "layers": (0,), "gate": "none", "kernel_size": 0},
        table_rate=1.0,
    ),
    _known("factor_unigrams", name="factor_engram"),
    _known("slots", name="mome", title="MoME"),
    Candidate(
        name="per_token",
        title="per-layer embeddings",
        about="a row of its own for every token in every block, gated by the hidden state (Gemma 3n)",
        memory=lambda study: _PLAIN | {"layer": "per_token", "num_heads": 1, "token_map": "raw"},
        fit="width",
        every_block=True,
        table_rate=5.0,
    ),
    Candidate(
        name="pkm",
        title="product keys",
        about="each position chooses 4 × 8 rows by comparing queries with keys (arXiv 1907.05242)",
        memory=lambda study: _product_keys(study, gate="none", query_norm="layer"),
        table_rate=1.5,
    ),
    Candidate(
        name="memory_plus",
        title="Memory+",
        about="product keys whose average of rows is gated and projected (arXiv 2412.09764)",
        memory=lambda study: _product_keys(study, gate="silu", query_norm="none"),
        table_rate=1.5,
    ),
    Candidate(
        name="ultra_mem",
        title="UltraMem",
        about="each position chooses 32 rows by a grid of scores with a Tucker core (arXiv 2411.12364)",
        memory=lambda study: (
            _PLAIN | {"layer": "ultra_mem", "num_heads": 1, "memory_dim": study.reference.hidden_size // 2}
        ),
        table_rate=1.5,
    ),
    Candidate(
        name="scone",
        title="SCONE",
        about="frequent N-grams of the training text have embeddings that a small transformer computes; its bytes are "
        "those of the table that it is served from, without the transformer (arXiv 2502.01637)",
        memory=lambda study: scone_memory(study.reference).to_dict(),
        extra_bytes=_scone_bytes,
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
    Candidate(
        name="retro",
        title="RETRO",
        about="chunked cross-attention to neighbors of each chunk in a stored text of as many bytes (ICML 2022)",
        memory=lambda study: stored_text_memory(study.reference, "retro", vocabulary=study.vocab_size),
    ),
    Candidate(
        name="realm",
        title="REALM",
        about="learned retrieval of chunks of a stored text of as many bytes: what a token reads is the mean over the "
        "best documents of a rebuilt index, weighted by p(z|x), inside the layer and not of the output (ICML 2020)",
        memory=lambda study: stored_text_memory(study.reference, "realm"),
    ),
    Candidate(
        name="ngram_mean",
        title="NGM",
        about="means of token embeddings behind a cosine gate, without a table or parameters (arXiv 2605.16893)",
        memory=lambda study: _NO_TABLE | {"layer": "ngram_mean", "orders": (2, 3), "memory_dim": 2},
        is_control=True,
    ),
    _known("none"),
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
        memory=lambda study: {"layer": "one_row"},
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
        memory=lambda study: {"layer": "permuted"},
        is_control=True,
    ),
)
"""Name, title and what differs from the paper's layer. The first is the paper's layer itself."""
