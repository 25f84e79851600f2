"""Packed tokens on disk, memory-mapped: many files that are read as one long array."""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError, RunFolderError
from engram_lm.files import read_json, replacing, write_atomically
from engram_lm.tables.files.safetensors_file import read_header
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.formats import digest_file

INDEX_NAME = "index.json"
"""Written last: a folder that has it is complete."""
_FORMAT = "engram.tokens.1"
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_ENDS = _DTYPES["I64"]
_OPEN_AT_ONCE = 128
"""Every mapping holds a file descriptor, of which a process often has 1,024."""

Shard = dict[str, Any]
"""What the index says about a file: ``file``, ``num_tokens``, ``num_documents`` (that end in it), ``file_bytes``,
``sha256``."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Compute a digest of everything in a fast tokenizer that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"packing needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    added = sorted((number, token.content) for number, token in backend.get_added_tokens_decoder().items())
    beginning = beginning_tokens(tokenizer)
    # Most tokenizers add nothing before a text, and the digest of those is that of their earlier shards.
    digest = hashlib.sha256(json.dumps([added, tokenizer.eos_token_id, *([beginning] if beginning else [])]).encode())
    for part in (backend.normalizer, backend.pre_tokenizer, backend.model):
        # JSON, as in tokenizer.json but without a detour over all of it, which takes ten times as long.
        text = b"null" if part is None else part.__getstate__()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the smallest type that holds every token: uint16, or uint32 beyond 65,536 tokens."""
    return _DTYPES["U16" if vocab_size <= 2**16 else "U32"]


def write_shard(path: Path, tokens: Sequence[np.ndarray], ends: Sequence[int], dtype: np.dtype[Any]) -> Shard:
    """Write one file atomically: tokens, and ends of documents counted from its beginning. Returns its index entry."""
    joined = np.concatenate([np.empty(0, dtype), *tokens])
    tensors = {"document_ends": np.array(ends, dtype=_ENDS), "tokens": joined}
    try:
        with replacing(path) as aside:
            safetensors.numpy.save_file(tensors, aside)
            num_bytes, digest = aside.stat().st_size, digest_file(aside)
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
        "sha256": digest,
    }


def write_index(folder: Path, facts: dict[str, Any], shards: Sequence[Shard]) -> None:
    """Complete a folder of shards.

    Facts: ``vocab_size``, ``tokenizer`` (its digest), ``end_token``, ``num_text_bytes``.
    """
    write_atomically(folder / INDEX_NAME, json.dumps({"format": _FORMAT, **facts, "shards": shards}, indent=1))


class TokenShards:
    """Tokens of a folder of shards, memory-mapped; made by `open`.

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
        self._unread = {shard["file"]: shard["sha256"] for shard in self.shards}
        self._firsts = [0, *itertools.accumulate(shard["num_tokens"] for shard in self.shards)]
        self.num_tokens: int = self._firsts[-1]
        """Tokens in all files."""
        self.num_documents: int = sum(shard["num_documents"] for shard in self.shards)
        """Documents in all files."""
        # A mapping is closed when it falls out of the cache and its last reader lets go of it.
        self._map = functools.lru_cache(_OPEN_AT_ONCE)(self._open_map)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> "TokenShards":
        """Open a folder of shards; reads its index and the size of each file.

        Args:
            folder: A folder with an ``index.json``.
            tokenizer: The tokenizer that must have made them, or its `tokenizer_digest`; any where None.

        Raises:
            DataError: The folder or a file is missing, unfinished, truncated or malformed. That the contents of a file
                have changed is found, and raised, when they are first read.
            MismatchError: The shards were made with another tokenizer.
        """
        folder = Path(folder)
        path = folder / INDEX_NAME
        if not path.is_file():
            raise DataError(f"{folder} holds no finished token shards: there is no {path}; pack the text first")
        index = read_json(path, error=DataError, advice=_again(folder))
        if index.get("format") != _FORMAT:
            raise DataError(f"{path} has the format {index.get('format')!r:.100}, expected {_FORMAT!r}")
        try:
            shards = cls(folder, index)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is malformed ({error!r:.200}); {_again(folder)}") from error
        given = tokenizer if isinstance(tokenizer, str | None) else tokenizer_digest(tokenizer)
        if given not in (None, shards.tokenizer_digest):
            raise MismatchError(
                f"{folder} holds tokens of the tokenizer {shards.tokenizer_digest}, this one is {given}; use the "
                "tokenizer they were made with, or pack the text again with this one"
            )
        for shard in shards.shards:
            file = folder / shard["file"]
            if not file.is_file():
                raise DataError(f"{file} is missing; {_again(folder)}")
            if file.stat().st_size != shard["file_bytes"]:
                raise DataError(
                    f"{file} has {file.stat().st_size} bytes, expected {shard['file_bytes']}; {_again(folder)}"
                )
        return shards

    def __len__(self) -> int:
        return self.num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards.open, (self.folder,)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Read the tokens of a slice without a step, int64; a copy, whichever files they are in."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"token shards are read by slices without a step, got {part!r}")
        start, stop, _ = part.indices(self.num_tokens)
        found = [np.empty(0, dtype=np.int64)]
        number = bisect.bisect_right(self._firsts, start) - 1
        while number < len(self.shards) and self._firsts[number] < stop:
            first = self._firsts[number]
            found.append(self._map(number)[0][max(0, start - first) : stop - first])
            number += 1
        return np.concatenate(found)

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Find where documents end: every e, one past a document's last token, with start < e <= stop; int64."""
        found = []
        number = max(0, bisect.bisect_left(self._firsts, start + 1) - 1)
        while number < len(self.shards) and self._firsts[number] <= stop:
            ends, first = self._map(number)[1], self._firsts[number]
            low, high = np.searchsorted(ends, (start - first, stop - first), side="right")
            found.append(ends[low:high] + first)
            number += 1
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def _open_map(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Map the tokens and document ends of a shard, whose checksum is compared the first time."""
        shard = self.shards[number]
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
            if shard["file"] in self._unread and (found := digest_file(path)) != shard["sha256"]:
                raise DataError(
                    f"{path} has changed since it was written: its SHA-256 is {found}, expected {shard['sha256']}"
                )
            self._unread.pop(shard["file"], None)
        except (OSError, CheckpointError, DataError) as error:
            raise DataError(f"{error}; {_again(self.folder)}") from error
        return arrays[0], arrays[1]


def _again(folder: Path) -> str:
    return f"remove {folder.parent if folder.name in ('train', 'held_out') else folder} to pack the text again"
