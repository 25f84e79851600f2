"""Files, folders, JSONL, Parquet and Hugging Face datasets → documents, one after another, in bounded memory.

A source is opened in two steps. `open_sources` finds its items (files, or one dataset), tells what they contain by a
digest, and passes over what is no text. Each item's ``pieces`` then reads it, as often as asked, always the same; a
file that has changed in between is refused.
"""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from engram_lm.errors import ConfigError, DataError, MissingExtraError, suggestion
from engram_lm.files import write_atomically

__all__ = ["PIECE_CHARACTERS", "OpenSources", "Piece", "SourceItem", "TextSource", "cut_text", "open_sources"]

Kind = Literal["auto", "text", "jsonl", "parquet", "dataset"]

PIECE_CHARACTERS = 1 << 18
"""Longest text handed on at once; a longer document comes in several pieces."""
_LONGEST_RECORD_BYTES = 1 << 30
_ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20
_HUB = "hf://"
_NO_TEXT_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_ENDINGS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_RACY_NANOSECONDS = 2_000_000_000
"""A file changed so recently may change again without its time telling, so its digest is not remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from, as a recipe says it: a string (its path) or a table of these fields."""

    path: str
    """A file, a folder that is searched through, or ``hf://owner/name`` for a dataset of the Hugging Face hub."""
    kind: Kind = "auto"
    """What it is. ``auto`` goes by the name: ``.jsonl`` and ``.ndjson`` (``.gz`` too) are JSON lines, ``.parquet`` is
    Parquet, a folder written by ``save_to_disk`` is a dataset, and other files are plain text, one document each. In a
    folder any other kind takes only the files whose names say so."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet file or dataset, that holds the text."""
    split: str = "train"
    """Split of a dataset."""
    name: str | None = None
    """Configuration of a dataset of the hub, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a dataset of the hub."""
    streaming: bool = False
    """Read a dataset while it is downloaded, without keeping it on disk."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"path of a data source is a file, a folder or hf://owner/name, got {self.path!r}")
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind of {self.path} is one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for option in ("field", "split"):
            if not isinstance(getattr(self, option), str) or not getattr(self, option):
                raise ConfigError(f"{option} of {self.path} is a name, got {getattr(self, option)!r}")
        if not isinstance(self.streaming, bool):
            raise ConfigError(f"streaming of {self.path} is true or false, got {self.streaming!r}")
        if self.path.startswith(_HUB) and self.kind not in ("auto", "dataset"):
            raise ConfigError(f"{self.path} is a dataset of the hub, so its kind is dataset, not {self.kind}")
        if not self._is_dataset():
            changed = [
                field.name
                for field in dataclasses.fields(self)
                if field.name in ("name", "revision", "streaming") and getattr(self, field.name) != field.default
            ]
            if changed:
                raise ConfigError(
                    f"{', '.join(changed)} belong to datasets, {self.path} is none; write hf://owner/name for one of "
                    "the hub, or kind = 'dataset' for one on this machine"
                )

    @classmethod
    def of(cls, value: "str | os.PathLike[str] | Mapping[str, Any] | TextSource") -> "TextSource":
        """Make a source from what a recipe holds: a path, or a table of fields.

        Raises:
            ConfigError: An unknown field (the message suggests one), or an impossible value.
        """
        if isinstance(value, TextSource):
            return value
        if isinstance(value, str | os.PathLike):
            return cls(path=os.fspath(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"a data source is a path or a table with a path, got {value!r:.200}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(f"a data source has no field {key!r}; {suggestion(key, known)}")
        if "path" not in value:
            raise ConfigError(f"a data source needs a path, got only {', '.join(map(str, value)) or 'an empty table'}")
        return cls(**value)

    def _is_dataset(self) -> bool:
        return self.kind == "dataset" or self.path.startswith(_HUB) or (self.kind == "auto" and _is_saved(self.path))


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
    """Bytes of its item that are done with it, for progress; all pieces of an item sum up to its ``num_bytes``."""


class SourceItem:
    """One file or one dataset, known by what it contains.

    Args:
        label: What messages call it.
        identity: Digest of everything that its pieces depend on.
        num_bytes: Its size on disk; None where it is unknown.
        read: Begins to read it.
        files: What must not change, as it was when the identity was taken.
    """

    def __init__(
        self,
        label: str,
        identity: str,
        num_bytes: int | None,
        read: Callable[[], Iterator[Piece]],
        files: Sequence["_Stamp"] = (),
    ) -> None:
        self.label, self.identity, self.num_bytes = label, identity, num_bytes
        self._read, self._files = read, files

    def pieces(self) -> Iterator[Piece]:
        """Read it from the beginning.

        Raises:
            DataError: It is broken (the message names the line or row), lacks the field, or has changed.
        """
        self.check_unchanged()
        try:
            yield from self._read()
        except DataError:
            self.check_unchanged()  # the better explanation, where it is one
            raise
        except OSError as error:
            raise DataError(f"cannot read {self.label}: {error}; check it and start again") from error
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Compare its files with what they were when they were opened.

        Raises:
            DataError: One has changed or is gone.
        """
        for stamp in self._files:
            if _stamp(stamp.path) != stamp:
                raise DataError(
                    f"{stamp.path} changed while it was read; start again when nobody writes to it (what was packed "
                    "of its earlier contents is not used)"
                )


@dataclasses.dataclass(frozen=True)
class OpenSources:
    """What was found in some sources."""

    items: tuple[SourceItem, ...]
    """In the order of the sources, files of a folder by name."""
    skipped: dict[str, int]
    """Files of folders passed over, by reason."""

    @property
    def num_bytes(self) -> int | None:
        """Size of all items on disk; None where one is unknown."""
        sizes = [item.num_bytes for item in self.items if item.num_bytes is not None]
        return sum(sizes) if len(sizes) == len(self.items) else None

    def pieces(self) -> Iterator[Piece]:
        """Read everything, item by item."""
        for item in self.items:
            yield from item.pieces()


def open_sources(
    sources: "Iterable[str | os.PathLike[str] | Mapping[str, Any] | TextSource]",
    *,
    remembered: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int | None], None] = lambda num_bytes, total_bytes: None,
) -> OpenSources:
    """Find the items of sources and what they contain.

    Every file is read once for its digest, unless one of the same path, size and time of change is remembered.

    Args:
        sources: Paths, tables, or `TextSource`s.
        remembered: A file that keeps digests from one call to the next; made if missing, ignored if broken.
        on_progress: Called with the bytes just inspected and the bytes in all.

    Raises:
        DataError: A path does not exist or cannot be read; a file that was named is no text; there is no text at all.
        ConfigError: A source that cannot be.
        MissingExtraError: Parquet or datasets without the packages that read them.
    """
    given = [TextSource.of(source) for source in sources]
    if not given:
        raise DataError("no data source was given; name files, folders, or datasets as hf://owner/name")
    memory = _Digests(Path(remembered) if remembered is not None else None)
    skipped: Counter[str] = Counter()
    found: list[tuple[TextSource, Kind, Path, bool] | TextSource] = []
    for source in given:
        found += [source] if source._is_dataset() else _find(source)
    total = sum(_size(entry[2]) for entry in found if isinstance(entry, tuple))
    items: list[SourceItem] = []
    try:
        for entry in found:
            if isinstance(entry, TextSource):
                items.append(_open_dataset(entry, memory))
                continue
            source, kind, path, named = entry
            item = _open_file(source, kind, path, memory)
            on_progress(_size(path), total)
            if isinstance(item, SourceItem):
                items.append(item)
            elif named:
                raise DataError(f"{path} is {item}; expected text in UTF-8 (JSON lines and Parquet are known by name)")
            else:
                skipped[item] += 1
    finally:
        memory.save()
    if not items:
        detail = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no files at all"
        raise DataError(
            f"no text in {', '.join(source.path for source in given)}: {detail}; name files or folders that hold some"
        )
    return OpenSources(tuple(items), dict(skipped))


def cut_text(text: str, longest: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text where tokenizers cut it too.

    A cut lies behind a line break that stands between two characters that are no white space. The pre-tokenizers of
    GPT-2, of cl100k and of what follows them (Llama 3, Qwen, DeepSeek, those trained here) separate tokens there
    whatever stands around it, so the tokens of the pieces are the tokens of the whole. Where there is no such line
    break in the second half of a piece, the cut is behind another line break, in front of a space, or anywhere, and the
    tokens next to it may differ; so may they with tokenizers that mark the beginning of a text (SentencePiece).

    Args:
        text: Anything.
        longest: Characters in a piece, at least 2.

    Yields:
        The text, in one or more pieces; one empty piece for an empty text.
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


def _document(text: str, source_bytes: int) -> Iterator[Piece]:
    """The pieces of a document that is in memory; none where it is blank."""
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer can read
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = text.encode()
    if not text or text.isspace():
        return
    digest = hashlib.sha256(data).digest()
    pieces = list(cut_text(text))
    for piece in pieces[:-1]:
        yield Piece(piece, digest, False, 0)
    yield Piece(pieces[-1], digest, True, source_bytes)


# Files


@dataclasses.dataclass(frozen=True)
class _Stamp:
    """What tells that a file is still the one it was."""

    path: Path
    num_bytes: int
    changed: int
    inode: int


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _Stamp(path, status.st_size, status.st_mtime_ns, status.st_ino)


def _size(path: Path) -> int:
    stamp = _stamp(path)
    return stamp.num_bytes if stamp else 0


def _find(source: TextSource) -> Iterator[tuple[TextSource, Kind, Path, bool]]:
    """Files of a source, with their kind, and whether they were named rather than found."""
    path = Path(source.path)
    if path.is_file():
        yield source, _kind(path) if source.kind == "auto" else source.kind, path, True
        return
    if not path.is_dir():
        raise DataError(
            f"{path} is neither a file nor a folder; check the path, or write hf://owner/name for a dataset of the hub"
        )

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable") from error

    for folder, subfolders, files in os.walk(path, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in _NO_TEXT_FOLDERS)
        for name in sorted(files):
            kind = _kind(Path(name))
            if not name.startswith(".") and source.kind in ("auto", kind):
                yield source, kind, Path(folder) / name, False


def _kind(path: Path) -> Kind:
    name = path.name.lower().removesuffix(".gz")
    return _ENDINGS.get(os.path.splitext(name)[1], "text")


def _open_file(source: TextSource, kind: Kind, path: Path, memory: "_Digests") -> SourceItem | str:
    """The item of a file, or why there is none."""
    if not path.is_file():  # a socket, a pipe, a link to nothing
        return "not a regular file"
    if kind == "parquet":
        _need("pyarrow")
    stamp, (identity, verdict) = memory.inspect(path, kind)
    if verdict:
        return verdict
    reader = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[kind]

    def read() -> Iterator[Piece]:
        return reader(path, source.field, identity)

    field = "" if kind == "text" else source.field
    return SourceItem(str(path), f"{kind}:{field}:{identity}", stamp.num_bytes, read, (stamp,))


def _open_bytes(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """A file to read from, and the one whose position tells how far it is."""
    raw: IO[bytes] = open(path, "rb")  # noqa: SIM115, closed by who asked
    return (cast(IO[bytes], gzip.open(raw)) if path.name.lower().endswith(".gz") else raw), raw


def _inspect(path: Path, kind: Kind) -> tuple[str, str]:
    """SHA-256 of a file, of the text as it will be read where it is plain text; and what is wrong with it, or ''."""
    digest = hashlib.sha256()
    if kind != "text":
        with open(path, "rb") as whole:
            while chunk := whole.read(_READ_BYTES):
                digest.update(chunk)
            return digest.hexdigest(), "" if whole.tell() else "empty"
    blank, first, held = True, True, b""
    check = codecs.getincrementaldecoder("utf-8")()
    file, raw = _open_bytes(path)
    with raw, file:
        try:
            while chunk := file.read(_READ_BYTES):
                if b"\0" in chunk:
                    return "", "binary"
                if first:
                    first, chunk = False, chunk.removeprefix(b"\xef\xbb\xbf")
                check.decode(chunk)
                chunk = held + chunk
                held = b"\r" if chunk.endswith(b"\r") else b""
                chunk = chunk[: len(chunk) - len(held)]
                blank = blank and not chunk.strip()
                digest.update(chunk.replace(b"\r\n", b"\n") if b"\r\n" in chunk else chunk)
            check.decode(b"", True)
        except UnicodeDecodeError:
            return "", "not UTF-8"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is a broken gzip file ({error}); make it again") from error
    digest.update(held)
    return digest.hexdigest(), "empty" if blank else ""


def _read_text(path: Path, field: str, identity: str) -> Iterator[Piece]:
    file, raw = _open_bytes(path)
    digest, done, text = bytes.fromhex(identity), 0, ""
    with raw, file:
        # Line ends are left as they are but for \r\n, as the digest has it.
        reader = io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig", newline="\n")
        try:
            while True:
                chunk = reader.read(PIECE_CHARACTERS)
                while chunk.endswith("\r") and (more := reader.read(1)):
                    chunk += more
                text += chunk.replace("\r\n", "\n")
                while len(text) > PIECE_CHARACTERS:
                    place = _place_to_cut(text, 0, PIECE_CHARACTERS)
                    position = raw.tell()
                    yield Piece(text[:place], digest, False, position - done)
                    done, text = position, text[place:]
                if not chunk:
                    break
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} has become unreadable ({error})") from error
        yield Piece(text, digest, True, raw.tell() - done)


def _read_jsonl(path: Path, field: str, identity: str) -> Iterator[Piece]:
    file, raw = _open_bytes(path)
    done, number = 0, 0
    with raw, file:
        while True:
            number += 1
            try:
                line = file.readline(_LONGEST_RECORD_BYTES + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path} is a broken gzip file ({error}); make it again") from error
            if not line:
                return
            if len(line) > _LONGEST_RECORD_BYTES:
                raise DataError(
                    f"line {number} of {path} is longer than {_LONGEST_RECORD_BYTES} bytes; cut it into several"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            # A compressed file is read ahead of its lines, so its last lines weigh nothing.
            position = raw.tell() if file is not raw else done + len(line)
            weight, done = position - done, position
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is no JSON ({error!s:.200}); repair or remove it") from error
            if not isinstance(record, dict):
                raise DataError(
                    f"line {number} of {path} holds a JSON {type(record).__name__}; expected an object with the "
                    f"field {field!r}"
                )
            if field not in record:
                raise DataError(_no_field(f"line {number} of {path}", field, record))
            yield from _document(_text(record[field], field, f"line {number} of {path}"), weight)


def _read_parquet(path: Path, field: str, identity: str) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        # Read through a small buffer: a row group may be as large as the file.
        with parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        ) as file:
            num_rows, size = file.metadata.num_rows, _size(path)
            if field not in file.schema_arrow.names:
                raise DataError(_no_field(str(path), field, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    row += 1
                    weight = size * row // num_rows - size * (row - 1) // num_rows
                    yield from _document(_text(value, field, f"row {row} of {path}"), weight)
            if row != num_rows:
                raise DataError(
                    f"{path} is a broken Parquet file: {num_rows} rows expected, {row} found; make it again"
                )
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        where = f", after row {row}" if row else ""
        raise DataError(f"{path} is a broken Parquet file ({error!s:.200}){where}; make it again") from error


def _text(value: object, field: str, where: str) -> str:
    """The text of a record; an absent one is blank."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{field!r} in {where} is of type {type(value).__name__}; expected text; name another field")
    return value


def _no_field(where: str, field: str, present: Iterable[str]) -> str:
    names = ", ".join(repr(name) for name in list(present)[:20]) or "none"
    return f"{where} has no field {field!r}, it has {names}; name the one that holds the text as field"


# Datasets


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"this data source is read with {package}, which is not installed; install the extra with "
            "`pip install 'engram-lm[data]'`"
        )


def _is_saved(path: str) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _open_dataset(source: TextSource, memory: "_Digests") -> SourceItem:
    _need("datasets")
    import datasets

    folder, stamps, digests = Path(source.path), [], []
    on_hub = source.path.startswith(_HUB) or not folder.exists()
    path, revision = source.path.removeprefix(_HUB).removeprefix("datasets/"), source.revision
    try:
        if on_hub:
            if source.streaming:
                from huggingface_hub import HfApi

                # Nothing else names what a stream will bring.
                revision = HfApi().dataset_info(path, revision=revision).sha
            data = datasets.load_dataset(
                path, source.name, split=source.split, revision=revision, streaming=source.streaming
            )
            contents = revision if source.streaming else data._fingerprint
            identity = f"hub:{path}:{source.name}:{contents}"
        else:
            where = folder
            if (folder / "dataset_dict.json").is_file():
                splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
                if source.split not in splits:
                    raise DataError(f"{folder} has no split {source.split!r}, it has {', '.join(splits) or 'none'}")
                where = folder / source.split
            names = [path for path in sorted(where.rglob("*")) if path.is_file() and not path.name.startswith(".")]
            for file in names:
                stamp, (digest, _) = memory.inspect(file, "dataset")
                stamps.append(stamp)
                digests.append(f"{file.relative_to(where).as_posix()} {digest}")
            identity = "local:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()
            if _is_saved(str(where)):
                data = datasets.load_from_disk(str(where))
            else:
                data = datasets.load_dataset(str(folder), source.name, split=source.split, streaming=source.streaming)
    except DataError:
        raise
    except Exception as error:  # of many libraries: the hub's, HTTP's, Arrow's, the file system's
        raise DataError(
            f"cannot open the dataset {source.path}, split {source.split!r}: {type(error).__name__}: {error!s:.500}"
        ) from error
    columns = data.column_names
    if columns is not None and source.field not in columns:
        raise DataError(_no_field(f"the dataset {source.path}", source.field, columns))

    def read() -> Iterator[Piece]:
        row = 0
        batches = iter(data.select_columns([source.field]).iter(batch_size=_ROWS_AT_ONCE))
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise DataError(
                    f"the dataset {source.path} could not be read after row {row}: {type(error).__name__}: "
                    f"{error!s:.300}; start again to go on from the last complete shard"
                ) from error
            if batch is None:
                return
            if source.field not in batch:
                raise DataError(_no_field(f"the dataset {source.path}", source.field, batch))
            for value in batch[source.field]:
                row += 1
                yield from _document(_text(value, source.field, f"row {row} of {source.path}"), 0)

    identity = f"dataset:{source.split}:{source.field}:{identity}"
    return SourceItem(source.path, identity, None, read, stamps)


# Digests


class _Digests:
    """What files contain, remembered by path, size and time of change."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.changed = path, False
        self.known: dict[str, Any] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                known = json.loads(path.read_bytes())
                self.known = known if isinstance(known, dict) else {}

    def inspect(self, path: Path, kind: Kind) -> tuple[_Stamp, tuple[str, str]]:
        """Stamp, digest and verdict of a file."""
        path = path.absolute()
        stamp = _stamp(path)
        key = f"{'text' if kind == 'text' else 'bytes'}:{path}"
        entry = self.known.get(key)
        try:
            if stamp is None or not os.access(path, os.R_OK):
                path.open("rb").close()
                raise DataError(f"{path} changed while it was read; start again")
            if (
                isinstance(entry, list)
                and entry[:2] == [stamp.num_bytes, stamp.changed]
                and len(entry) == 4
                and isinstance(entry[2], str)
                and isinstance(entry[3], str)
                and (entry[3] or re.fullmatch("[0-9a-f]{64}", entry[2]))
            ):
                return stamp, (entry[2], entry[3])
            result = _inspect(path, kind)
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; make it readable or leave it out"
            ) from error
        if _stamp(path) != stamp:
            raise DataError(f"{path} changed while it was read; start again when nobody writes to it")
        if time.time_ns() - stamp.changed > _RACY_NANOSECONDS:
            self.known[key] = [stamp.num_bytes, stamp.changed, *result]
            self.changed = True
        return stamp, result

    def save(self) -> None:
        """Write what is known now."""
        if self.path is not None and self.changed:
            write_atomically(self.path, json.dumps(self.known, indent=0))
