"""Documents in memory, read from the same sources in the same order as those that are packed to disk."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import DataError
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.formats import cut_text
from engram_lm.training.data.sources import open_sources
from engram_lm.training.data.text_source import Sources, name_sources

_PIECES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Document:
    """One document."""

    name: str
    """Path of its file relative to the source it was found in, and its number there where a file holds several."""
    text: str
    """Its contents."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).digest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What was read, and what was passed over."""

    documents: tuple[Document, ...]
    """In the order of the sources, files of a folder by name."""
    skipped: dict[str, int]
    """Files passed over, by reason."""
    source: str
    """Where it came from, for people."""

    @property
    def num_bytes(self) -> int:
        """Size as UTF-8."""
        return sum(len(document.text.encode()) for document in self.documents)


def json_lines(texts: Iterable[str]) -> str:
    """Write texts as a JSON Lines file, of which each line is a document to `read_documents`."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def read_documents(sources: Sources = (), *, max_bytes: int | None = None) -> Corpus:
    """Read the documents of sources into memory: paths, tables, or `TextSource`s; see `open_sources`.

    Raises:
        DataError: As `open_sources`, or every document is blank.
        ConfigError: A source has an impossible value.
        MissingExtraError: The packages that read Parquet or datasets are missing.
    """
    sources = list(sources)
    opened = open_sources(sources, max_bytes=max_bytes)
    documents: list[Document] = []
    for item in opened.items:
        first, parts = len(documents), []
        for piece in item.pieces():
            parts.append(piece.text)
            if piece.ends_document:
                documents.append(Document(item.name, "".join(parts)))
                parts = []
        if len(documents) > first + 1:
            for number, document in enumerate(documents[first:]):
                documents[first + number] = dataclasses.replace(document, name=f"{item.name} ({number + 1})")
    if not documents:
        raise DataError("the sources hold no text: every document is blank; name sources that hold some")
    return Corpus(tuple(documents), opened.skipped, name_sources(sources))


def draw(digest: bytes, seed: int = 0) -> float:
    """Draw a document's number in [0, 1) by its SHA-256. It is held out if that is below the share to hold out."""
    number = hashlib.sha256(f"{seed}:".encode() + digest).digest()
    return int.from_bytes(number[:6], "big") / 2**48


def is_balanced(num_held_out: int, num_all: int, share: float) -> bool:
    """Whether between half and twice the given share is held out, and something is left to train on."""
    return share * num_all / 2 <= num_held_out <= share * num_all * 2 and 0 < num_held_out < num_all


def split_documents(corpus: Corpus, held_out: float = 0.03) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Hold out a share of the documents for evaluation, chosen by their contents alone, the same ones as in training.

    If that holds out less than half or more than twice the share of the text (a few large documents), the end of the
    text is held out instead, from a line break if one is near. All that training holds out is in it.

    Returns:
        Training documents and held-out documents.

    Raises:
        DataError: There is too little text to split.
    """
    documents = corpus.documents
    is_aside = [draw(document.digest) < held_out for document in documents]
    sizes = [len(document.text.encode()) for document in documents]
    if is_balanced(sum(itertools.compress(sizes, is_aside)), sum(sizes), held_out):
        is_train = [not aside for aside in is_aside]
        return tuple(itertools.compress(documents, is_train)), tuple(itertools.compress(documents, is_aside))
    train, aside, left = list(documents), list[Document](), round(held_out * sum(sizes))
    while train and left > 0:
        document, size = train.pop(), sizes.pop()
        if size > left:
            text = document.text
            place = len(text.encode()[: size - left].decode(errors="ignore"))
            line = text.rfind("\n", 0, place) + 1
            place = line if place - line <= (len(text) - place) / 2 else place
            train.append(Document(f"{document.name} (beginning)", text[:place]))
            document = Document(f"{document.name} (end)", text[place:])
        aside.insert(0, document)
        left -= size
    if not all(any(document.text.strip() for document in side) for side in (train, aside)):
        raise DataError(f"the text of {corpus.source} is too short; nothing could be held out of it")
    return tuple(train), tuple(aside)


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy a tokenizer's backend into one that neither cuts nor pads, and reads the names of special tokens as text."""
    encoder: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    on_progress: Callable[[int], None] = lambda num_characters: None,
) -> Iterator[np.ndarray]:
    """Tokenize documents as `pack_to_shards` does.

    Each begins as the tokenizer begins a text (see `engram_lm.tokenizing`), and ends with the end-of-text token if the
    tokenizer has one.

    ``on_progress`` is called with the number of characters done since the last call.

    Yields:
        Tokens of a document, or of a piece of a long one, int32 ``[num_tokens]``.
    """
    encoder = text_encoder(tokenizer)
    first, last = beginning_tokens(tokenizer), () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    cut = ([*cut_text(document.text)] for document in documents)
    pieces = ((text, number == 1, number == len(texts)) for texts in cut for number, text in enumerate(texts, start=1))
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        encodings = encoder.encode_batch_fast([text for text, _, _ in batch], add_special_tokens=False)
        for (_, is_first, is_last), encoding in zip(batch, encodings, strict=True):
            ids = [*(first if is_first else ()), *encoding.ids, *(last if is_last else ())]
            yield np.array(ids, dtype=np.int32)
        on_progress(sum(len(text) for text, _, _ in batch))


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    on_progress: Callable[[int], None] = lambda num_characters: None,
) -> np.ndarray:
    """Lay the tokens of documents end to end, int32 ``[num_tokens]``; see `tokenize`."""
    tokens = list(tokenize(documents, tokenizer, on_progress=on_progress))
    return np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)
