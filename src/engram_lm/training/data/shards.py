"""Packed tokens on disk, memory-mapped: many files that are read as one long array."""

import bisect
import collections
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError, RunFolderError
from engram_lm.files import read_json, replacing, write_atomically
from engram_lm.tables.files.safetensors_file import read_header

__all__ = ["INDEX_NAME", "Shard", "TokenShards", "token_dtype", "tokenizer_digest", "write_index", "write_shard"]

INDEX_NAME = "index.json"
"""Written last: a folder that has it is complete."""
_FORMAT = "engram.tokens.1"
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_ENDS = _DTYPES["I64"]
_OPEN_AT_ONCE = 128
"""Every mapping holds a file descriptor, of which a process often has 1,024."""

Shard = dict[str, Any]
"""What the index says about a file: ``file``, ``num_tokens``, ``num_documents`` (that end in it), ``file_bytes``."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Compute a digest of everything that decides which tokens a text becomes.

    Args:
        tokenizer: A fast Hugging Face tokenizer. Truncation, padding, post-processing and decoding do not count.

    Raises:
        ConfigError: It has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"packing needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    added = sorted((number, token.content) for number, token in backend.get_added_tokens_decoder().items())
    digest = hashlib.sha256(json.dumps([added, tokenizer.eos_token_id]).encode())
    for part in (backend.normalizer, backend.pre_tokenizer, backend.model):
        # JSON, as in tokenizer.json but without a detour over all of it, which takes ten times as long.
        text = b"null" if part is None else part.__getstate__()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the smallest type that holds every token: uint16, or uint32 beyond 65,536 tokens."""
    return _DTYPES["U16" if vocab_size <= 2**16 else "U32"]


def write_shard(path: Path, tokens: Sequence[np.ndarray], ends: Sequence[int], dtype: np.dtype[Any]) -> Shard:
    """Write one file, atomically.

    Args:
        path: The file.
        tokens: Tokens, in pieces.
        ends: One past the last token of each document that ends in this file, counted from its beginning.
        dtype: Result of `token_dtype`.

    Returns:
        Its entry for the index.

    Raises:
        RunFolderError: The disk is full, or the folder cannot be written. What was there stays as it was.
    """
    joined = np.concatenate([np.empty(0, dtype), *tokens])
    tensors = {"document_ends": np.array(ends, dtype=_ENDS), "tokens": joined}
    try:
        with replacing(path) as aside:
            safetensors.numpy.save_file(tensors, aside)
            num_bytes = aside.stat().st_size
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"cannot write {path} ({8 * len(ends) + joined.nbytes} bytes): {error}; make room and start again, the "
            "shards before it are kept"
        ) from error
    return {
        "file": path.name,
        "num_tokens": len(joined),
        "num_documents": len(ends),
        "file_bytes": num_bytes,
    }


def write_index(folder: Path, facts: dict[str, Any], shards: Sequence[Shard]) -> None:
    """Complete a folder of shards.

    Args:
        folder: Where the shards lie.
        facts: ``vocab_size``, ``tokenizer`` (its digest), ``end_token`` (or None), ``num_text_bytes``.
        shards: What `write_shard` returned, in order.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    try:
        write_atomically(folder / INDEX_NAME, json.dumps({"format": _FORMAT, **facts, "shards": shards}, indent=1))
    except OSError as error:
        raise RunFolderError(f"cannot write {folder / INDEX_NAME}: {error}; make room and start again") from error


class TokenShards:
    """Tokens of a folder of shards, read where they lie; made by `open`.

    Slicing (``shards[a:b]``) and ``len`` work as for an array. Reading is safe from several threads, and a copy or a
    pickle opens the same folder again.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        """The folder."""
        self.vocab_size: int = index["vocab_size"]
        """Every token is below this."""
        self.tokenizer_digest: str = index["tokenizer"]
        """`tokenizer_digest` of the tokenizer that made them."""
        self.end_token: int | None = index["end_token"]
        """Token after every document; None where the tokenizer has none."""
        self.num_text_bytes: int = index["num_text_bytes"]
        """Size of the text, as UTF-8."""
        self.dtype = token_dtype(self.vocab_size)
        """Type on disk."""
        self.shards: tuple[Shard, ...] = tuple(index["shards"])
        """The files, in order."""
        self._firsts = [0, *itertools.accumulate(shard["num_tokens"] for shard in self.shards)]
        self.num_tokens: int = self._firsts[-1]
        """Tokens in all files."""
        self.num_documents: int = sum(shard["num_documents"] for shard in self.shards)
        """Documents in all files."""
        self._maps: collections.OrderedDict[int, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> "TokenShards":
        """Open a folder of shards; reads its index and the size of each file.

        Args:
            folder: A folder with an ``index.json``.
            tokenizer: The tokenizer that must have made them, or its `tokenizer_digest`; any where None.

        Raises:
            DataError: The folder or a file is missing, unfinished, truncated or malformed.
            MismatchError: The shards were made with another tokenizer.
        """
        folder = Path(folder)
        index = _read_index(folder)
        try:
            shards = cls(folder, index)
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / INDEX_NAME} is malformed ({error!r:.200}); {_again(folder)}") from error
        if tokenizer is not None:
            shards.check_tokenizer(tokenizer)
        for shard in shards.shards:
            path = folder / shard["file"]
            try:
                found = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path} is missing ({error.strerror}); {_again(folder)}") from error
            if found != shard["file_bytes"]:
                raise DataError(f"{path} has {found} bytes, expected {shard['file_bytes']}; {_again(folder)}")
        return shards

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens of a slice without a step, int64."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"token shards are read by slices without a step, got {part!r}")
        start, stop, _ = part.indices(self.num_tokens)
        return self.slice(start, max(start, stop))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards.open, (self.folder,)

    def __repr__(self) -> str:
        return f"TokenShards({self.num_tokens:,} tokens, {self.num_documents:,} documents, in {self.folder})"

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer other than the one these tokens were made with.

        Args:
            tokenizer: A fast tokenizer, or its `tokenizer_digest`.

        Raises:
            MismatchError: It is another tokenizer.
        """
        given = tokenizer if isinstance(tokenizer, str) else tokenizer_digest(tokenizer)
        if given != self.tokenizer_digest:
            raise MismatchError(
                f"{self.folder} holds tokens of the tokenizer {self.tokenizer_digest}, this one is {given}; use the "
                "tokenizer they were made with, or pack the text again with this one"
            )

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop), int64; a copy, whichever files they are in.

        Raises:
            IndexError: Not within [0, num_tokens].
            DataError: A file cannot be read, or does not hold what its index says.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        result = np.empty(stop - start, dtype=np.int64)
        number = bisect.bisect_right(self._firsts, start) - 1
        done = start
        while done < stop:
            first, last = self._firsts[number], min(stop, self._firsts[number + 1])
            if last > done:  # not a shard without tokens
                result[done - start : last - start] = self._map(number)[0][done - first : last - first]
                done = last
            number += 1
        return result

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Find where documents end: every e, one past a document's last token, with start < e <= stop; int64.

        Raises:
            DataError: A file cannot be read, or does not hold what its index says.
        """
        found = []
        number = max(0, bisect.bisect_left(self._firsts, start + 1) - 1)
        while number < len(self.shards) and self._firsts[number] <= stop:
            ends, first = self._map(number)[1], self._firsts[number]
            low, high = np.searchsorted(ends, (start - first, stop - first), side="right")
            found.append(ends[low:high] + first)
            number += 1
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def _map(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Map the tokens and document ends of a shard; the mappings used last stay open."""
        with self._lock:
            found = self._maps.get(number)
            if found is not None:
                self._maps.move_to_end(number)
                return found
            found = self._open_map(self.shards[number])
            self._maps[number] = found
            if len(self._maps) > _OPEN_AT_ONCE:
                self._maps.popitem(last=False)  # closed when the last reader lets go of it
            return found

    def _open_map(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        path, arrays = self.folder / shard["file"], []
        expected = [("tokens", self.dtype, shard["num_tokens"]), ("document_ends", _ENDS, shard["num_documents"])]
        try:
            header = read_header(path)
            for name, dtype, length in expected:
                tensor = header.get(name)
                if tensor is None or (_DTYPES.get(tensor.dtype), tensor.shape) != (dtype, (length,)):
                    raise DataError(f"{path} holds {tensor} where {dtype} [{length}] was expected for {name}")
                mapped = np.memmap(path, dtype, "r", tensor.start_bytes, (length,)) if length else np.empty(0, dtype)
                arrays.append(mapped.view(np.ndarray))
        except (OSError, CheckpointError, DataError) as error:
            raise DataError(f"{error}; {_again(self.folder)}") from error
        return arrays[0], arrays[1]


def _again(folder: Path) -> str:
    return f"remove {folder.parent if folder.name in ('train', 'held_out') else folder} to pack the text again"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(f"{folder} holds no finished token shards: there is no {path}; pack the text first")
    index = read_json(path, error=DataError, advice=_again(folder))
    if index.get("format") != _FORMAT:
        raise DataError(f"{path} has the format {index.get('format')!r:.100}, expected {_FORMAT!r}")
    return index
