"""The memory layers that a configuration can name. A rival layer is one file and one line here."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Literal

from engram_lm.errors import ConfigError, suggestion

Reads = Literal["rows", "tokens", "hidden"]
"""What a layer is handed beside the hidden states. ``rows``: numbers of the rows that the N-grams of a position hash
to. ``tokens``: the last tokens themselves, as many as the highest order says. ``hidden``: nothing; the layer finds what
it reads by the hidden states."""
Writes = Literal["hidden", "values"]
"""What the update of a layer is added to. ``hidden``: the hidden states, before attention. ``values``: the values of
its block's attention, so that other positions see it and the hidden state itself stays as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """What is known of a layer without importing it."""

    place: str
    """Where its class is; it is imported when it is built or priced."""
    reads: Reads = "rows"
    """What it is handed."""
    writes: Writes = "hidden"
    """What its update is added to."""
    has_table: bool = True
    """Whether it has a `Table`. One without has all its numbers among its own parameters, or reads text itself."""
    options: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Names and defaults of the options that it has beside the fields of `EngramConfig`."""


LAYERS: dict[str, LayerEntry] = {
    "engram": LayerEntry(place="engram_lm.memory.layer.EngramLayer"),
    "over_encoding": LayerEntry(place="engram_lm.memory.over_encoding.OverEncodingLayer"),
    # Rivals and controls that nobody would use beyond a comparison.
    "one_row": LayerEntry(place="engram_lm.studies.rivals.controls.OneRowLayer"),
    "permuted": LayerEntry(place="engram_lm.studies.rivals.controls.PermutedLayer"),
    "values": LayerEntry(place="engram_lm.memory.layer.EngramLayer", writes="values"),
    "per_order": LayerEntry(place="engram_lm.studies.rivals.per_order.PerOrderLayer"),
    "sink": LayerEntry(place="engram_lm.studies.rivals.per_order.SinkLayer"),
    "segment_gate": LayerEntry(place="engram_lm.studies.rivals.factor.SegmentGateLayer"),
    "factor_engram": LayerEntry(place="engram_lm.studies.rivals.factor.FactorEngramLayer"),
    "slots": LayerEntry(place="engram_lm.studies.rivals.slots.SlotLayer", options={"slots": 6, "chosen": 2}),
    "back_off": LayerEntry(place="engram_lm.studies.rivals.back_off.BackOffLayer", options={"filter_bits": 1 << 20}),
    "counted_gate": LayerEntry(
        place="engram_lm.studies.rivals.counted_gate.CountedGateLayer", options={"count_bytes": 1 << 17}
    ),
    "retro": LayerEntry(
        place="engram_lm.studies.rivals.retro.RetroLayer",
        reads="tokens",
        has_table=False,
        options={"chunk": 16, "chunks": 4096, "neighbors": 2, "embedding": 64, "vocabulary": 4096, "end_token": 0},
    ),
    "realm": LayerEntry(
        place="engram_lm.studies.rivals.realm.RealmLayer",
        reads="tokens",
        has_table=False,
        options={
            "chunk": 16,
            "chunks": 4096,
            "neighbors": 4,
            "embedding": 64,
            "refresh_tokens": 200_000,
            "end_token": 0,
        },
    ),
    "pooled": LayerEntry(place="engram_lm.studies.rivals.pooled.PooledLayer"),
    "pkm": LayerEntry(
        place="engram_lm.studies.rivals.product_keys.ProductKeyLayer",
        reads="hidden",
        options={"chosen": 32, "key_width": 64, "gate": "silu", "query_norm": "none"},
    ),
    "per_token": LayerEntry(place="engram_lm.studies.rivals.per_token.PerTokenLayer", reads="tokens"),
    "ngram_mean": LayerEntry(
        place="engram_lm.studies.rivals.ngram_mean.NgramMeanLayer", reads="tokens", has_table=False
    ),
    "ultra_mem": LayerEntry(
        place="engram_lm.studies.rivals.tucker_keys.TuckerKeyLayer",
        reads="hidden",
        options={"chosen": 32, "key_width": 64, "rank": 2, "cores": 2, "expansion": 4},
    ),
    "scone": LayerEntry(
        place="engram_lm.studies.rivals.f_grams.FGramLayer",
        reads="tokens",
        has_table=False,
        options={"num_f_grams": 10_000, "blocks": 2, "heads": 2, "min_count": 5, "counted_tokens": 4_000_000},
    ),
}
"""Name of a layer in `EngramConfig.layer` → what it is."""


def check_layer(name: object) -> None:
    """Refuse a name that no layer has, by a ConfigError with the nearest one."""
    if not isinstance(name, str) or name not in LAYERS:
        raise ConfigError(f"there is no memory layer {name!r}; {suggestion(name, LAYERS)}")


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse, by a ConfigError, options that a layer does not have, or of another type than their defaults."""
    known = LAYERS[name].options
    for option, value in options.items():
        if option not in known:
            has = suggestion(option, known) if known else "it has none"
            raise ConfigError(f"the memory layer {name!r} has no option {option!r}; {has}")
        kind = type(known[option])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"the option {option} of the memory layer {name!r} is of type {kind.__name__}: {value!r}")


def layer_entry(name: str) -> LayerEntry:
    """Return what is known of a layer that there is."""
    return LAYERS[name]


def layer_class(name: str) -> Any:
    """Return the class of a layer, an `engram_lm.memory.interface.MemoryLayer`."""
    module, _, attribute = LAYERS[name].place.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
