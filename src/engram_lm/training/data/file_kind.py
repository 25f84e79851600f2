"""What a file of text is: by its name where that says it, otherwise by what it begins with."""

import codecs
import gzip
import json
import os
import zlib
from pathlib import Path
from typing import IO, cast

from engram_lm.errors import DataError
from engram_lm.training.data.text_source import Kind

_ENDINGS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_OPEN_ENDINGS = ("", ".json")
"""Endings of names that leave open what a file is."""

_GZIP = b"\x1f\x8b"
_UNREAD = {
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard, which is not read here (unpack it, with zstd -d)",
    **dict.fromkeys(
        (b"BZh%d1AY&" % level for level in range(1, 10)),
        "compressed with bzip2, which is not read here (unpack it, with bunzip2)",
    ),
    b"\xfd7zXZ\0": "compressed with xz, which is not read here (unpack it, with unxz)",
    b"PK\x03\x04": "a zip archive, which is not read here (unpack it)",
    codecs.BOM_UTF32_LE: "in UTF-32, not UTF-8 (convert it, with iconv)",
    codecs.BOM_UTF32_BE: "in UTF-32, not UTF-8 (convert it, with iconv)",
    codecs.BOM_UTF16_LE: "in UTF-16, not UTF-8 (convert it, with iconv)",
    codecs.BOM_UTF16_BE: "in UTF-16, not UTF-8 (convert it, with iconv)",
}
"""What a file may begin with that is no text in UTF-8, and what it is then; the longer ones first."""
_LONGEST_FIRST_LINE = 1 << 24

BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


class NoTextError(Exception):
    """A file holds no text; the message is the reason, such as ``"binary"``."""


def find_kind(path: Path, field: str, wanted: Kind, *, named: bool) -> Kind:
    """Say how to read a file: as ``text``, ``jsonl`` (JSON lines, or an array of JSON objects) or ``parquet``.

    Parquet is also known by its first bytes. A name that ends in ``.json`` or has no ending leaves open whether it is
    JSON lines, and so does every name of plain text where ``jsonl`` is wanted: then the file is JSON lines if it begins
    with an object on a line of its own, or an array of objects, that has the ``field``. Without the field it is that
    too if another object follows on the next line, or if the file was ``named``; reading it then names the field that
    is missing. Other JSON, such as a configuration found in a folder, is text. What is packed in a way that is not
    read, or in another encoding, is passed over in a folder: a `NoTextError` says why.
    """
    ending = os.path.splitext(path.name.lower().removesuffix(".gz"))[1]
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    try:
        # Opening a pipe would wait for its other end.
        if not path.is_file():
            return "text"
        file, raw = open_bytes(path)
        with raw, file:
            first = file.readline(_LONGEST_FIRST_LINE).removeprefix(codecs.BOM_UTF8)
            if first.startswith(b"PAR1"):
                return "parquet"
            if ending not in _OPEN_ENDINGS and wanted != "jsonl":
                return "text"
            while first.isspace():
                first = file.readline(_LONGEST_FIRST_LINE)
            if first.lstrip()[:1] == b"[":
                start = first + file.read(_LONGEST_FIRST_LINE)
                record, more = _first_of_array(start), named
            else:
                record, more = _object(first), named or _object(file.readline(_LONGEST_FIRST_LINE)) is not None
            return "jsonl" if record is not None and (field in record or more) else "text"
    except NoTextError:
        if not named:
            raise
    except (OSError, *BROKEN_GZIP):
        pass
    return "text"  # reading it says what is wrong


def open_bytes(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """Open a file to read from, unpacked, and the one whose position tells how far it is; the caller closes both.

    `NoTextError` says that it is packed in a way that is not read here, or in another encoding than UTF-8.
    """
    raw: IO[bytes] = open(path, "rb")  # noqa: SIM115, closed by the caller
    try:
        begin = raw.read(8)
        raw.seek(0)
        file = cast(IO[bytes], gzip.open(raw)) if begin.startswith(_GZIP) else raw  # noqa: SIM115
        for mark, reason in _UNREAD.items():
            if begin.startswith(mark):
                raise NoTextError(reason)
    except BaseException:
        raw.close()
        raise
    return file, raw


def broken_gzip(path: Path, error: Exception) -> DataError:
    """Say that a file cannot be unpacked."""
    return DataError(f"{path} is a broken gzip file ({error}); make it again")


def _object(line: bytes) -> dict[str, object] | None:
    """The JSON object that is a line, if it is one."""
    try:
        value = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _first_of_array(start: bytes) -> dict[str, object] | None:
    """The JSON object that an array begins with, if it begins with one."""
    text = start.decode(errors="replace").lstrip()[1:].lstrip()
    try:
        value = json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
