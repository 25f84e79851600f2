"""One file or dataset → documents, piece by piece, in bounded memory."""

import codecs
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from engram_lm.errors import DataError, MissingExtraError
from engram_lm.training.data.file_kind import BROKEN_GZIP, NoTextError, broken_gzip, open_bytes

PIECE_CHARACTERS = 1 << 18
"""Longest text handed on at once; a longer document comes in several pieces."""
_ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one. The pieces of a document follow each other."""

    text: str
    """At most `PIECE_CHARACTERS` characters."""
    digest: bytes
    """SHA-256 of the whole document as UTF-8."""
    ends_document: bool
    """Whether it is the last piece of its document."""
    source_bytes: int
    """Bytes of its file that are done once it is, for progress; those of all pieces add up to the file's size."""


def cut_text(text: str, longest: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text where tokenizers cut it too, into pieces of at most ``longest`` characters, itself at least 2.

    A cut follows a line break that stands between two characters that are not white space. The pre-tokenizers of GPT-2,
    of cl100k and of their successors (Llama 3, Qwen, DeepSeek, those trained here) separate tokens there whatever
    surrounds it, so the tokens of the pieces are the tokens of the whole. Where there is no such line break in the
    second half of a piece, the cut follows another line break, precedes a space, or lies anywhere, and the tokens next
    to it may differ. They may also differ with tokenizers that mark the beginning of a text (SentencePiece). An empty
    text gives one empty piece.
    """
    start = 0
    while len(text) - start > longest:
        stop = _place_to_cut(text, start, start + longest)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _place_to_cut(text: str, start: int, stop: int) -> int:
    """A place in (start, stop]; needs the character at ``stop``."""
    lowest = start + (stop - start) // 2
    place = text.rfind("\n", lowest, stop)
    other = place + 1
    while place > lowest:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place + 1
        place = text.rfind("\n", lowest, place)
    if other > lowest:
        return other
    space = text.rfind(" ", lowest, stop)
    return space if space > start else stop


def digest_file(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Plain text: one document a file


def inspect_text(path: Path) -> str:
    """Compute the SHA-256 of a text file as it will be read.

    `NoTextError` says that it is binary, not UTF-8, or blank.
    """
    digest, blank = hashlib.sha256(), True
    for text, _ in _decoded(path):
        blank = blank and not text.strip()
        digest.update(text.encode())
    if blank:
        raise NoTextError("empty")
    return digest.hexdigest()


def check_text_begins(path: Path) -> None:
    """Refuse a file whose beginning is no text, by a NoTextError that says why."""
    next(_decoded(path), None)


def read_text(path: Path, digest: str) -> Iterator[Piece]:
    """Read the document that is a plain text file, whose digest is what `inspect_text` found."""
    done, text, position = 0, "", 0
    try:
        for more, position in _decoded(path):
            text += more
            *whole, text = cut_text(text)
            for piece in whole:
                yield Piece(piece, bytes.fromhex(digest), False, position - done)
                done = position
    except NoTextError as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    yield Piece(text, bytes.fromhex(digest), True, position - done)


def _decoded(path: Path) -> Iterator[tuple[str, int]]:
    r"""Text of a file without a byte order mark and with ``\r\n`` as ``\n``, and how far into the file it reaches."""
    decoder, held, last = codecs.getincrementaldecoder("utf-8-sig")(), "", False
    file, raw = open_bytes(path)
    with raw, file:
        while not last:
            try:
                chunk = file.read(_READ_BYTES)
                last = not chunk
                if b"\0" in chunk:
                    raise NoTextError("binary")
                text = held + decoder.decode(chunk, last)
            except UnicodeDecodeError as error:
                raise NoTextError("not UTF-8") from error
            except BROKEN_GZIP as error:
                raise broken_gzip(path, error) from error
            held = "\r" if text.endswith("\r") and not last else ""
            yield text.removesuffix(held).replace("\r\n", "\n"), raw.tell()


# Records: JSON lines, Parquet, datasets


def read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    """Read the documents of a file of JSON lines, or of an array of JSON objects; an error names the line or object."""
    try:
        file, raw = open_bytes(path)
    except NoTextError as error:
        raise DataError(f"{path} is {error}; expected JSON lines in UTF-8") from error
    with raw, file:
        try:
            for record, where, weight in _objects(file, raw, path):
                if not isinstance(record, dict):
                    raise DataError(
                        f"{where} holds a JSON {type(record).__name__}; expected an object with the field {field!r}"
                    )
                if field not in record:
                    raise DataError(no_field(where, field, record))
                yield from _record(record[field], field, where, weight)
        except BROKEN_GZIP as error:
            raise broken_gzip(path, error) from error


def _objects(file: IO[bytes], raw: IO[bytes], path: Path) -> Iterator[tuple[Any, str, int]]:
    """The values of JSON lines or of an array, where each stands, and the bytes of the file that are done with it."""
    done, number, begun = 0, 0, False
    while line := file.readline():
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        # A compressed file is read ahead of its lines, so its last lines weigh nothing.
        position = raw.tell() if file is not raw else done + len(line)
        weight, done = position - done, position
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        if not begun and line.lstrip().startswith(b"["):
            rest = line.lstrip()[1:].lstrip() or file.readline().lstrip()
            if rest.startswith(b"{"):
                yield from _array(rest, file, raw, path)
                return
            line = line if line.lstrip()[1:].strip() else line + rest
        begun = True
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error!s:.200}); repair or remove it") from error
        yield record, where, weight


def _array(start: bytes, file: IO[bytes], raw: IO[bytes], path: Path) -> Iterator[tuple[Any, str, int]]:
    """The values of a JSON array, one at a time, as `_objects`; what follows its bracket begins with ``start``."""
    decoder, parser = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
    number, done, size, at_end = 1, 0, _READ_BYTES, False
    text, place = "", 0
    chunk = start
    while True:
        where = f"object {number} of {path}"
        try:
            text, place = text[place:] + decoder.decode(chunk, at_end), 0
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not JSON ({error!s:.200}); repair or remove it") from error
        while True:
            place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n,"))
            if text[place : place + 1] == "]":
                if text[place + 1 :].strip() or (chunk := file.read(_READ_BYTES)).strip():
                    raise DataError(f"{path} holds more behind the array that it begins with; make it JSON lines")
                return
            try:
                record, place = parser.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                if at_end or isinstance(error, RecursionError):
                    raise DataError(f"{where} is not JSON ({error!s:.200}); repair or remove it") from error
                break
            position = raw.tell()
            yield record, where, position - done
            done, number, size = position, number + 1, _READ_BYTES
            where = f"object {number} of {path}"
        # A long object is not parsed anew for every piece of it.
        chunk, size = file.read(size), 2 * size
        at_end = not chunk


def read_parquet(path: Path, field: str) -> Iterator[Piece]:
    """Read the documents of a Parquet file; an error names the row."""
    import pyarrow
    from pyarrow import parquet

    row, size = 0, path.stat().st_size
    try:
        # Read through a small buffer: a row group may be as large as the file.
        with parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        ) as file:
            num_rows = file.metadata.num_rows
            if field not in file.schema_arrow.names:
                raise DataError(no_field(str(path), field, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    row += 1
                    weight = size * row // num_rows - size * (row - 1) // num_rows
                    yield from _record(value, field, f"row {row} of {path}", weight)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        where = f", after row {row}" if row else ""
        raise DataError(f"{path} is a broken Parquet file ({error!s:.200}){where}; make it again") from error


def read_dataset(data: Any, name: str, field: str) -> Iterator[Piece]:
    """Read the documents of an open dataset of the ``datasets`` package; an error names it and the row."""
    row = 0
    batches = iter(data.select_columns([field]).iter(batch_size=_ROWS_AT_ONCE))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # of many libraries: HTTP's, Arrow's, the file system's
            raise DataError(
                f"the dataset {name} could not be read after row {row}: {type(error).__name__}: {error!s:.300}; start "
                "again to go on from the last complete shard"
            ) from error
        if batch is None:
            return
        if field not in batch:
            raise DataError(no_field(f"the dataset {name}", field, batch))
        for value in batch[field]:
            row += 1
            yield from _record(value, field, f"row {row} of {name}", 0)


def _record(value: object, field: str, where: str, source_bytes: int) -> Iterator[Piece]:
    """The pieces of a record's text; none where it is absent or blank."""
    if value is None:
        return
    if not isinstance(value, str):
        raise DataError(f"{field!r} in {where} is of type {type(value).__name__}; expected text; name another field")
    try:
        data = value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer can read
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = value.encode()
    if not value or value.isspace():
        return
    digest = hashlib.sha256(data).digest()
    *pieces, last = cut_text(value)
    for piece in pieces:
        yield Piece(piece, digest, False, 0)
    yield Piece(last, digest, True, source_bytes)


def no_field(where: str, field: str, present: Iterable[str]) -> str:
    """Say that a record lacks a field, and which it has."""
    names = ", ".join(repr(name) for name in list(present)[:20]) or "none"
    return f"{where} has no field {field!r}, it has {names}; name the one that holds the text as field"


def need(package: str) -> None:
    """Check that a package of the extra ``data`` is installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"this data source is read with {package}, which is not installed; install the extra with "
            "`pip install 'engram-lm[data]'`"
        )
