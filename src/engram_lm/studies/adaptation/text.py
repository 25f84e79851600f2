"""The text of an adaptation: what is trained on, what rates are chosen on, what is measured on, what is remembered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, DataError
from engram_lm.studies.adaptation.recipe import DomainOptions
from engram_lm.training.data.packing import OneSidedError, PackedCorpus, pack_to_shards
from engram_lm.training.data.shards import TokenShards
from engram_lm.training.data.text import cache_folder
from engram_lm.training.data.text_source import STANDARD_LIBRARY, TextSource, name_sources

__all__ = ["AdaptationText", "HeldOutText", "open_text"]


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutText:
    """Tokens that are evaluated on, and never trained on here."""

    tokens: np.ndarray
    """int64 ``[num_tokens]``."""
    num_bytes: int
    """Bytes of the text they came from."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptationText:
    """All of it."""

    train: TokenShards
    """The domain's text to train on, and perhaps more behind it."""
    num_tokens: int
    """How many of its tokens are trained on."""
    validation: HeldOutText | None
    """What learning rates are chosen on; None where the share is 0."""
    held_out: HeldOutText
    """What the result is measured on."""
    retained: HeldOutText | None
    """Text that the base knew before; None where forgetting is not measured."""
    domain_about: str
    """What the domain is, for people."""
    retained_about: str | None
    """What the retained text is."""
    digest: str
    """Of all of it."""
    about: str | None
    """What people should know of how it was divided."""


def open_text(
    data: DomainOptions,
    tokenizer: Any,
    on_progress: Callable[[str, int, int | None], None] = lambda task, num_bytes, total_bytes: None,
) -> AdaptationText:
    """Tokenize the text of both, or open what an earlier run made of it.

    Args:
        data: Which text.
        tokenizer: The base model's.
        on_progress: See `pack_to_shards`.

    Raises:
        ConfigError: No domain is named.
        DataError: There is no text, too little of it, or it cannot be read.
    """
    if not data.domain:
        raise ConfigError(
            "data.domain is not given: name the text that the model shall learn, files or folders, such as "
            "--data.domain '[\"my-text/\"]'"
        )

    def pack(sources: Sequence[TextSource], held_out: float) -> PackedCorpus:
        return pack_to_shards(sources, tokenizer, cache_folder(data.cache), held_out=held_out, on_progress=on_progress)

    share = data.held_out + data.validation
    try:
        corpus = pack(data.domain, share)
    except OneSidedError:
        corpus = pack(data.domain, 0.0)
    about = None
    train, apart = corpus.train, corpus.held_out
    # Of a few large documents, those set aside may be half of all; then the end of the text stands in for them.
    if apart is not None and not 0.5 < apart.num_tokens / max(1.0, share * (train.num_tokens + len(apart))) < 2:
        corpus = pack(data.domain, 0.0)
        train, apart = corpus.train, None
    num_tokens, first = train.num_tokens, 0
    if apart is None:
        apart = train
        num_tokens = first = train.num_tokens - round(share * train.num_tokens)
        about = f"few documents: the last {train.num_tokens - first:,} tokens of the domain are held out"
    if num_tokens < data.sequence_length + 1:
        raise DataError(
            f"the domain gives {num_tokens} tokens to train on, one sequence needs {data.sequence_length + 1}; give "
            "more text, or a smaller data.sequence_length"
        )
    middle = first + round((apart.num_tokens - first) * data.validation / share)
    validation = _read(apart, first, middle, data.held_out_tokens // 2, tokenizer) if data.validation else None
    held_out = _read(apart, middle, apart.num_tokens, data.held_out_tokens, tokenizer)
    for name, part in (("held_out", held_out), ("validation", validation)):
        if part is not None and len(part.tokens) < 2:
            raise DataError(
                f"data.{name} leaves {len(part.tokens)} tokens, 2 are needed; give more text, or more of it"
            )
    digest, retained = corpus.digest, None
    if data.retained:
        sources = _sources(data)
        try:
            old = pack(sources, data.retained_held_out)
        except OneSidedError as error:
            raise DataError(
                f"data.retained_held_out = {data.retained_held_out} of the retained text is no document or all of "
                "them; set it to 0 to use all of the text"
            ) from error
        shards = old.train if old.held_out is None else old.held_out
        retained = _read(shards, 0, shards.num_tokens, data.retained_tokens, tokenizer)
        if len(retained.tokens) < 2:
            raise DataError(f"data.retained gives {len(retained.tokens)} tokens, 2 are needed; give more text")
        digest = f"{digest}, {old.digest}"
    return AdaptationText(
        train=train,
        num_tokens=num_tokens,
        validation=validation,
        held_out=held_out,
        retained=retained,
        domain_about=name_sources(data.domain),
        retained_about=name_sources(_sources(data)) if retained is not None else None,
        digest=f"{digest}, the first {num_tokens}",
        about=about,
    )


def _sources(data: DomainOptions) -> tuple[TextSource, ...]:
    if data.retained == "standard-library":
        return (TextSource(path=STANDARD_LIBRARY),)
    return data.retained


def _read(shards: TokenShards, start: int, stop: int, most: int, tokenizer: Any) -> HeldOutText:
    tokens = shards.slice(start, min(stop, start + most + 1))
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return HeldOutText(tokens, len(text.encode("utf-8", "replace")))
