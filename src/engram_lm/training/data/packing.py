"""Sources → packed token shards on disk, once: what was packed before is reused, and a stop is continued.

A corpus is in a folder named by a digest of its contents, the tokenizer and the options::

    cache/files.json            digests of files, so that a second run need not read them
    cache/<digest>/index.json   written last
    cache/<digest>/state.json   while packing: the complete shards, and where to continue
    cache/<digest>/train/       token shards, see `engram_lm.training.data.shards`
    cache/<digest>/held_out/

Documents are tokenized in batches of fixed size, and a shard ends between two batches. The batches depend on the
sources alone, so packing that is continued writes the same bytes as packing without a stop.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import ConfigError, DataError, RunFolderError
from engram_lm.files import lock_file, write_atomically
from engram_lm.hashing.token_map import read_vocabulary
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.documents import draw, text_encoder
from engram_lm.training.data.formats import PIECE_CHARACTERS, Piece
from engram_lm.training.data.shards import (
    INDEX_NAME,
    Shard,
    TokenShards,
    token_dtype,
    tokenizer_digest,
    write_index,
    write_shard,
)
from engram_lm.training.data.sources import OpenSources, open_sources
from engram_lm.training.data.text_source import Sources, TextSource

_FORMAT = "engram.packed.1"
_STATE_NAME = "state.json"
_SIDES = ("train", "held_out")
_BATCH_CHARACTERS = 4 << 20
_BATCH_PIECES = 8192
"""A batch is complete when it has this many characters or pieces; at most two batches are in memory."""


class OneSidedError(DataError):
    """No document fell on one side: there are too few of them for the given share."""


@dataclasses.dataclass(frozen=True)
class PackedCorpus:
    """Token shards of a corpus, divided by document."""

    train: TokenShards
    """What to train on."""
    held_out: TokenShards | None
    """Documents held out; None if the share was 0."""
    folder: Path
    """Folder of both; its name is the digest of sources, tokenizer and options."""
    skipped: dict[str, int]
    """Files passed over, by reason."""
    reused: bool
    """Whether it had been packed before."""

    @property
    def digest(self) -> str:
        """Digest of sources, tokenizer and options."""
        return self.folder.name


def pack_to_shards(
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    cache_folder: str | os.PathLike[str],
    *,
    held_out: float = 0.01,
    max_bytes: int | None = None,
    seed: int = 0,
    shard_tokens: int = 1 << 26,
    on_progress: Callable[[str, int, int | None], None] = lambda task, num_bytes, total_bytes: None,
) -> PackedCorpus:
    """Tokenize sources into shards on disk, or open those of an earlier run.

    Tokenization runs on all cores (unless ``TOKENIZERS_PARALLELISM=false``) while the next batch is read and the
    previous one is stored. A document is tokenized as text even where it spells a special token. It begins as the
    tokenizer begins a text (see `engram_lm.tokenizing`), an end-of-text token follows it if the tokenizer has one, and
    a document of more than 262,144 characters is tokenized in pieces (see
    `engram_lm.training.data.formats.cut_text`). After a kill at any moment, the next call continues from the last
    complete shard and produces the same bytes. A second process that packs the same corpus waits for the first and
    reuses its work. Needs memory for two batches of text and encodings (some hundred MB), a shard and the largest
    record.

    Args:
        sources: What to pack, in this order; the Python standard library's own sources where empty.
        tokenizer: A fast tokenizer.
        cache_folder: Where packed corpora are kept; made if missing.
        held_out: Share of the documents to hold out, in [0, 1). A document's side depends on its text and ``seed``
            alone, so copies of a document are on the same side.
        max_bytes: Of more files than this, pack some; see `open_sources`.
        seed: Another seed holds out other documents.
        shard_tokens: A shard ends with the batch that brings it to this many tokens.
        on_progress: Called with a task (``"reading"`` or ``"tokenizing"``), the source bytes just done, and all source
            bytes (None where a dataset does not say). If it raises, packing stops; complete shards stay.

    Raises:
        DataError: A source is missing, empty or broken, or changes while it is read; no document fell on one side;
            shards of an earlier run are damaged.
        ConfigError: Impossible options, or a tokenizer without a fast backend.
        MissingExtraError: The packages that read Parquet or datasets are missing.
        RunFolderError: The cache folder cannot be written, or its disk is full.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out is a share of the documents, at least 0 and below 1, got {held_out}")
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens is at least 1, got {shard_tokens}")
    options = {
        "held_out": held_out,
        "max_held_out_tokens": None,  # no option any more, but part of the digest of what was packed before
        "seed": seed,
        "shard_tokens": shard_tokens,
        "batch": [_BATCH_CHARACTERS, _BATCH_PIECES, PIECE_CHARACTERS],
    }
    made_by = tokenizer_digest(tokenizer)
    cache = Path(cache_folder)
    try:
        opened = open_remembered(
            sources, cache, max_bytes=max_bytes, on_progress=lambda *done: on_progress("reading", *done)
        )
        contents = [_FORMAT, options, made_by, [item.identity for item in opened.items]]
        folder = cache / hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]
        folder.mkdir(exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            lock_file(lock)  # let go when the file is closed, however the process ends
            reused = (folder / INDEX_NAME).is_file()
            if not reused:
                _Packing(folder, opened, tokenizer, made_by, options).run(
                    lambda num_bytes: on_progress("tokenizing", num_bytes, opened.num_bytes)
                )
        names = _SIDES[: 2 if held_out else 1]
        train, *apart = (TokenShards.open(folder / side, tokenizer=made_by) for side in names)
        return PackedCorpus(train, apart[0] if apart else None, folder, opened.skipped, reused)
    except RunFolderError:
        raise
    except OSError as error:
        raise RunFolderError(f"cannot write the cache folder {cache}: {error}; make room and start again") from error


def open_remembered(
    sources: Sources,
    cache: Path,
    *,
    max_bytes: int | None = None,
    on_progress: Callable[[int, int | None], None] = lambda num_bytes, total_bytes: None,
) -> OpenSources:
    """Open sources; all runs that share a cache folder compute the digest of a file once."""
    given = [TextSource.of(source) for source in sources]
    for source in given:
        if cache.resolve().is_relative_to(Path(source.path).resolve()):
            raise ConfigError(f"the cache folder {cache} lies in the source {source.path}; keep it elsewhere")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return open_sources(given, max_bytes=max_bytes, remembered=cache / "files.json", on_progress=on_progress)
    except OSError as error:
        raise RunFolderError(f"cannot write the cache folder {cache}: {error}") from error


@dataclasses.dataclass
class _Side:
    """One side of the corpus: what is stored, and what waits to be."""

    shards: list[Shard] = dataclasses.field(default_factory=list)
    num_text_bytes: int = 0
    num_tokens: int = 0
    """Stored or not."""
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    waiting: int = 0
    """Tokens in ``tokens``."""

    def add(self, tokens: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.waiting += len(tokens)
        self.num_tokens += len(tokens)


@dataclasses.dataclass
class _Place:
    """How far packing is between two batches."""

    item: int = 0
    pieces: int = 0
    """Pieces of the item that are done."""
    document_tokens: int = 0
    """Tokens of the document that is not yet at its end."""


class _Packing:
    """Packs one corpus into its folder, from the place where an earlier attempt stopped."""

    def __init__(
        self, folder: Path, opened: OpenSources, tokenizer: Any, made_by: str, options: dict[str, Any]
    ) -> None:
        self.folder, self.opened, self.options, self.made_by = folder, opened, options, made_by
        self.encoder = text_encoder(tokenizer)
        self.vocab_size, self.end_token = len(read_vocabulary(tokenizer)), tokenizer.eos_token_id
        self.dtype = token_dtype(self.vocab_size)
        self.end = np.array([] if self.end_token is None else [self.end_token], dtype=self.dtype)
        self.beginning = np.array(beginning_tokens(tokenizer), dtype=self.dtype)
        self.sides = {name: _Side() for name in _SIDES[: 2 if options["held_out"] else 1]}
        self.place = _Place()
        self.facts = {"num_documents": 0, "lowest": 1.0}

    def run(self, on_progress: Callable[[int], None]) -> None:
        """Pack what is left, and write the index."""
        for leftover in self.folder.rglob(".*.part"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        self._resume()
        # One thread hands batches to the tokenizer, whose own threads do the work without Python's lock.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting: list[tuple[list[Piece], _Place, concurrent.futures.Future[list[Encoding]]]] = []
            for batch, place in self._batches(on_progress):
                texts = [piece.text for piece in batch]
                encode = functools.partial(self.encoder.encode_batch_fast, texts, add_special_tokens=False)
                waiting.append((batch, place, pool.submit(encode)))
                if len(waiting) > 1:
                    self._store(*waiting.pop(0), on_progress)
            for last in waiting:
                self._store(*last, on_progress)
        self._finish()

    def _batches(self, on_progress: Callable[[int], None]) -> Iterator[tuple[list[Piece], _Place]]:
        """Yield pieces that are not stored yet, in batches, each with the place after it."""
        batch: list[Piece] = []
        size, done, first = 0, dataclasses.replace(self.place), dataclasses.replace(self.place)
        for item in self.opened.items[: first.item]:
            on_progress(item.num_bytes or 0)
        for number in range(first.item, len(self.opened.items)):
            done.item, done.pieces = number, 0
            for piece in self.opened.items[number].pieces():
                done.pieces += 1
                if number == first.item and done.pieces <= first.pieces:
                    on_progress(piece.source_bytes)
                    continue
                batch.append(piece)
                size += len(piece.text)
                if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
                    yield batch, dataclasses.replace(done)
                    batch, size = [], 0
        if batch:
            yield batch, done

    def _store(
        self,
        batch: list[Piece],
        place: _Place,
        encodings: "concurrent.futures.Future[list[Encoding]]",
        on_progress: Callable[[int], None],
    ) -> None:
        state = self.place
        for piece, encoding in zip(batch, encodings.result(), strict=True):
            on_progress(piece.source_bytes)
            number = draw(piece.digest, self.options["seed"])
            side = self.sides["held_out" if number < self.options["held_out"] else "train"]
            tokens = np.array(encoding.ids, dtype=self.dtype)
            if not state.document_tokens:
                tokens = np.concatenate([self.beginning, tokens])
            state.document_tokens += len(tokens)
            side.add(tokens)
            side.num_text_bytes += len(piece.text.encode())
            if piece.ends_document:
                side.add(self.end)
                if state.document_tokens + len(self.end):
                    side.ends.append(side.waiting)
                self.facts["num_documents"] += 1
                self.facts["lowest"] = min(self.facts["lowest"], number)
                state.document_tokens = 0
        state.item, state.pieces = place.item, place.pieces
        if max(side.waiting for side in self.sides.values()) >= self.options["shard_tokens"]:
            self._write_shards()

    def _write_shards(self) -> None:
        # Tokens of a file that has changed must not be stored under the digest of its earlier contents.
        for item in self.opened.items[: self.place.item + 1]:
            item.check_unchanged()
        for name, side in self.sides.items():
            if side.tokens:
                path = self.folder / name / f"{len(side.shards):05d}.safetensors"
                side.shards.append(write_shard(path, side.tokens, side.ends, self.dtype))
                side.tokens, side.ends, side.waiting = [], [], 0
        state = {
            "format": _FORMAT,
            "place": dataclasses.asdict(self.place),
            "facts": self.facts,
            "sides": {
                name: {"shards": side.shards, "num_text_bytes": side.num_text_bytes, "num_tokens": side.num_tokens}
                for name, side in self.sides.items()
            },
        }
        # The shards count from here on; without this file they would be written again.
        write_atomically(self.folder / _STATE_NAME, json.dumps(state))

    def _resume(self) -> None:
        """Take over what an earlier attempt stored, unless that is incomplete."""
        try:
            state = json.loads((self.folder / _STATE_NAME).read_bytes())
            if state["format"] != _FORMAT:
                return
            sides = {name: _Side(**state["sides"][name]) for name in self.sides}
            place, facts = _Place(**state["place"]), {name: state["facts"][name] for name in self.facts}
            for name, side in sides.items():
                for shard in side.shards:
                    if (self.folder / name / shard["file"]).stat().st_size != shard["file_bytes"]:
                        return
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        self.sides, self.place, self.facts = sides, place, facts

    def _finish(self) -> None:
        if not self.facts["num_documents"]:
            raise DataError("the sources hold no text: every document is blank; name sources that hold some")
        for name, side in self.sides.items():
            if not side.num_tokens:
                documents, share = self.facts["num_documents"], self.options["held_out"]
                if documents == 1:
                    raise OneSidedError(
                        "the sources hold a single document, so none could be held out; give more documents, cut it "
                        "into several files, or pass held_out=0"
                    )
                if name == "train":
                    raise OneSidedError(
                        f"all {documents} documents fell on the held-out side (held_out={share}); give a smaller share"
                    )
                raise OneSidedError(
                    f"none of {documents} documents fell on the held-out side (held_out={share}); give more documents, "
                    f"or a share of at least {self.facts['lowest'] * 1.001 + 1e-6:.6f}, which would hold one out"
                )
        if any(side.tokens for side in self.sides.values()):
            self._write_shards()
        for name, side in self.sides.items():
            shared = {
                "vocab_size": self.vocab_size,
                "tokenizer": self.made_by,
                "end_token": self.end_token,
                "num_text_bytes": side.num_text_bytes,
            }
            write_index(self.folder / name, shared, side.shards)
        write_atomically(self.folder / INDEX_NAME, json.dumps({"format": _FORMAT, "options": self.options}, indent=1))
        (self.folder / _STATE_NAME).unlink(missing_ok=True)
