"""Sources of text → the files and datasets they consist of, identified by their contents.

A source is opened in two steps. `open_sources` finds its items (files, or one dataset), identifies their contents by a
digest, and passes over what holds no text. Each item's ``pieces`` then reads it, as often as asked and always the same;
a file that has changed in between is refused.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engram_lm.errors import DataError
from engram_lm.files import write_atomically
from engram_lm.training.data.file_kind import NoTextError, find_kind
from engram_lm.training.data.formats import (
    Piece,
    check_text_begins,
    digest_file,
    inspect_text,
    need,
    no_field,
    read_dataset,
    read_jsonl,
    read_parquet,
    read_text,
)
from engram_lm.training.data.text_source import HUB, STANDARD_LIBRARY, Kind, Sources, TextSource, is_saved, printable

_NO_TEXT_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_RACY_NANOSECONDS = 2_000_000_000
"""A file changed this recently may change again without its time showing it, so its digest is not remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One file or one dataset, identified by its contents."""

    label: str
    """What messages call it."""
    name: str
    """Its path relative to the folder it was found in."""
    identity: str
    """Digest of everything that its pieces depend on."""
    num_bytes: int | None
    """Its size on disk; None where it is unknown."""
    read: Callable[[], Iterator[Piece]]
    """Begins to read it."""
    stamps: tuple["_Stamp", ...] = ()
    """The files that must not change, as they were when the identity was taken."""

    def pieces(self) -> Iterator[Piece]:
        """Read it from the beginning; an error says whether it is broken, lacks the field, or has changed."""
        self.check_unchanged()
        try:
            yield from self.read()
        except DataError:
            self.check_unchanged()  # the better explanation, where it is one
            raise
        except OSError as error:
            raise DataError(f"cannot read {self.label}: {error}; check it and start again") from error
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Check that its files have not changed since they were opened."""
        for stamp in self.stamps:
            if _stamp(stamp.path) != stamp:
                raise DataError(
                    f"{stamp.path} changed while it was read; start again when nothing writes to it (tokens of "
                    "its earlier contents are not used)"
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
    sources: Sources = (),
    *,
    max_bytes: int | None = None,
    whole_files: bool = True,
    remembered: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int | None], None] = lambda num_bytes, total_bytes: None,
) -> OpenSources:
    """Find the items of sources and identify their contents.

    Every file is read once for its digest, unless one of the same path, size and time of change is remembered. Of files
    found in a folder, those that are empty, binary or not UTF-8, and copies of others, are passed over and counted.

    Args:
        sources: Paths, tables, or `TextSource`s; the Python standard library's own sources where empty.
        max_bytes: Of more files than this, take some: in an order that depends on their names alone, until they hold
            this many bytes. They are read in the usual order all the same. Datasets are not limited.
        whole_files: False opens a file of more than ``max_bytes`` without reading it, for callers that read only the
            beginning: it is identified by its path, size and time of change, and whether it is text is found out later.
        remembered: A file that keeps digests from one call to the next; made if missing, ignored if broken.
        on_progress: Called with the bytes just inspected and the bytes in all.

    Raises:
        DataError: A path does not exist or cannot be read; a named file is not text; there is no text at all.
        ConfigError: A source has an impossible value.
        MissingExtraError: The packages that read Parquet or datasets are missing.
    """
    given = [TextSource.of(source) for source in sources] or [TextSource(path=STANDARD_LIBRARY)]
    memory = _Digests(Path(remembered) if remembered is not None else None)
    skipped: Counter[str] = Counter()
    found: list[TextSource | _File] = []
    for source in given:
        found += [source] if source.is_dataset() else _find(source, skipped)
    if max_bytes is not None:
        found = _limited(found, max_bytes, skipped)
    total = sum(entry.num_bytes for entry in found if isinstance(entry, _File))
    items: list[SourceItem] = []
    seen: set[str] = set()
    try:
        for entry in found:
            if isinstance(entry, TextSource):
                items.append(_open_dataset(entry, memory))
                continue
            try:
                begun = not whole_files and max_bytes is not None and entry.num_bytes > max_bytes
                item = _open_file(entry, memory, unread=begun)
                if item.identity in seen and not entry.named:
                    raise NoTextError("a copy of another")
                seen.add(item.identity)
                items.append(item)
            except NoTextError as reason:
                if entry.named:
                    raise DataError(
                        f"{entry.path} is {reason}; expected text in UTF-8, JSON lines or Parquet"
                    ) from None
                skipped[str(reason)] += 1
            on_progress(entry.num_bytes, total)
    finally:
        memory.save()
    if not items:
        detail = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no files at all"
        names = printable(", ".join(source.path for source in given))
        raise DataError(f"no text in {names}: {detail}; name files or folders that hold some")
    return OpenSources(tuple(items), dict(skipped))


# Files


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to read."""

    path: Path
    name: str
    """Relative to the source."""
    kind: Kind
    field: str
    named: bool
    """Whether it was named rather than found in a folder."""

    @property
    def num_bytes(self) -> int:
        stamp = _stamp(self.path)
        return stamp.num_bytes if stamp else 0


def _find(source: TextSource, skipped: Counter[str]) -> list[_File]:
    """The files of a source."""
    path = Path(source.path)
    if source.path == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(path for path in _walk(root, _NO_TEXT_FOLDERS | _TEST_FOLDERS) if path.name.endswith(".py"))
        paths = [path for path in paths if path.is_file() and path.stat().st_size]
        return [_File(path, path.relative_to(root).as_posix(), "text", "", True) for path in paths]
    if path.is_file():
        kind = find_kind(path, source.field, "auto", named=True) if source.kind == "auto" else source.kind
        return [_File(path, printable(path.name), kind, source.field, True)]
    if not path.is_dir():
        if path.is_symlink():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; name what it should lead to")
        matches = sorted(glob.glob(source.path, recursive=True))
        if not matches:
            what = "matches nothing" if glob.has_magic(source.path) else "is neither a file nor a folder"
            raise DataError(f"{path} {what}; check the path, or write hf://owner/name for a dataset of the hub")
        each = (dataclasses.replace(source, path=match) for match in matches if match != source.path)
        return [file for match in each for file in _find(match, skipped)]
    found = []
    for inside in _walk(path, _NO_TEXT_FOLDERS):
        try:
            kind = "text" if source.kind == "text" else find_kind(inside, source.field, source.kind, named=False)
        except NoTextError as reason:
            skipped[str(reason)] += 1
            continue
        if source.kind in ("auto", kind):
            found.append(_File(inside, printable(inside.relative_to(path).as_posix()), kind, source.field, False))
        else:
            skipped[f"not {source.kind}"] += 1
    return found


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    """Files below a folder in order of their names, those of a folder before those of its subfolders.

    Links to folders, which may lead anywhere and back, are not followed; they stand among the files.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable") from error

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in left_out)
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder) / name for name in sorted([*files, *links]) if not name.startswith("."))


def _limited(found: list[TextSource | _File], max_bytes: int, skipped: Counter[str]) -> list[TextSource | _File]:
    """Leave out files beyond a limit in bytes."""
    files = [entry for entry in found if isinstance(entry, _File)]
    taken, size = set(), 0
    for file in sorted(files, key=lambda file: (hashlib.sha256(file.name.encode()).digest(), str(file.path))):
        if size < max_bytes:
            taken.add(file)
            size += file.num_bytes
    if len(taken) < len(files):
        skipped["beyond the size limit"] += len(files) - len(taken)
    return [entry for entry in found if entry in taken or isinstance(entry, TextSource)]


def _open_file(file: _File, memory: "_Digests", *, unread: bool = False) -> SourceItem:
    """Make the item of a file; `NoTextError` says why there is none."""
    if not file.path.is_file():  # a socket, a pipe, a link to nothing
        raise NoTextError("a link to a folder" if file.path.is_dir() else "not a regular file")
    if file.kind == "parquet":
        need("pyarrow")
    if unread and (found := _stamp(file.path.absolute())) is not None:
        if file.kind == "text":
            check_text_begins(file.path)
        stamp, digest = found, hashlib.sha256(repr(found).encode()).hexdigest()
    else:
        stamp, digest = memory.inspect(file.path, text=file.kind == "text")
    read: Callable[[], Iterator[Piece]]
    if file.kind == "text":
        identity, read = f"text::{digest}", functools.partial(read_text, file.path, digest)
    else:
        reader = {"jsonl": read_jsonl, "parquet": read_parquet}[file.kind]
        identity, read = f"{file.kind}:{file.field}:{digest}", functools.partial(reader, file.path, file.field)
    return SourceItem(
        label=str(file.path), name=file.name, identity=identity, num_bytes=stamp.num_bytes, read=read, stamps=(stamp,)
    )


# Datasets


def _open_dataset(source: TextSource, memory: "_Digests") -> SourceItem:
    need("datasets")
    folder = Path(source.path)
    try:
        if source.path.startswith(HUB) or not folder.exists():
            data, identity, stamps = _open_hub(source)
        else:
            data, identity, stamps = _open_local(source, folder, memory)
    except DataError:
        raise
    except Exception as error:  # of many libraries: the hub's, HTTP's, Arrow's, the file system's
        raise DataError(
            f"cannot open the dataset {source.path}, split {source.split!r}: {type(error).__name__}: {error!s:.500}"
        ) from error
    if data.column_names is not None and source.field not in data.column_names:
        raise DataError(no_field(f"the dataset {source.path}", source.field, data.column_names))
    return SourceItem(
        label=source.path,
        name=source.path,
        identity=f"dataset:{source.split}:{source.field}:{identity}",
        num_bytes=None,
        read=functools.partial(read_dataset, data, source.path, source.field),
        stamps=tuple(stamps),
    )


def _open_hub(source: TextSource) -> tuple[Any, str, list["_Stamp"]]:
    import datasets

    path, revision = source.path.removeprefix(HUB).removeprefix("datasets/"), source.revision
    if source.streaming:
        from huggingface_hub import HfApi

        # Nothing else identifies what a stream will contain.
        revision = HfApi().dataset_info(path, revision=revision).sha
    data = datasets.load_dataset(path, source.name, split=source.split, revision=revision, streaming=source.streaming)
    contents = revision if source.streaming else data._fingerprint
    return data, f"hub:{path}:{source.name}:{contents}", []


def _open_local(source: TextSource, folder: Path, memory: "_Digests") -> tuple[Any, str, list["_Stamp"]]:
    import datasets

    where = folder
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if source.split not in splits:
            raise DataError(f"{folder} has no split {source.split!r}, it has {', '.join(splits) or 'none'}")
        where = folder / source.split
    files = [path for path in sorted(where.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found = [memory.inspect(file, text=False, empty=True) for file in files]
    names = (f"{file.relative_to(where).as_posix()} {digest}" for file, (_, digest) in zip(files, found, strict=True))
    identity = "local:" + hashlib.sha256("\n".join(names).encode()).hexdigest()
    if is_saved(str(where)):
        data = datasets.load_from_disk(str(where))
    else:
        data = datasets.load_dataset(str(folder), source.name, split=source.split, streaming=source.streaming)
    return data, identity, [stamp for stamp, _ in found]


# Digests


@dataclasses.dataclass(frozen=True)
class _Stamp:
    """What shows that a file is still the one it was."""

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


class _Digests:
    """Digests of what files contain, remembered by path, size and time of change."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.changed = path, False
        self.known: dict[str, Any] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                known = json.loads(path.read_bytes())
                self.known = known if isinstance(known, dict) else {}

    def inspect(self, path: Path, *, text: bool, empty: bool = False) -> tuple[_Stamp, str]:
        """Stamp and digest of a file: of its text where it is read as such, otherwise of its bytes."""
        path = path.absolute()
        stamp, key = _stamp(path), f"{'text' if text else 'bytes'}:{path}"
        entry = self.known.get(key)
        digest, reason = "", ""
        try:
            if stamp is None or not os.access(path, os.R_OK):
                path.open("rb").close()
                raise DataError(f"{path} changed while it was read; start again")
            if isinstance(entry, list) and len(entry) == 4 and entry[:2] == [stamp.num_bytes, stamp.changed]:
                digest, reason = map(str, entry[2:])
            else:
                try:
                    digest = inspect_text(path) if text else digest_file(path)
                except NoTextError as error:
                    reason = str(error)
                if _stamp(path) != stamp:
                    raise DataError(f"{path} changed while it was read; start again when nothing writes to it")
                if time.time_ns() - stamp.changed > _RACY_NANOSECONDS:
                    self.known[key] = [stamp.num_bytes, stamp.changed, digest, reason]
                    self.changed = True
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; make it readable or leave it out"
            ) from error
        if not text and not stamp.num_bytes and not empty:
            reason = "empty"
        if reason:
            raise NoTextError(reason)
        return stamp, digest

    def save(self) -> None:
        """Write down what is known now."""
        if self.path is not None and self.changed:
            write_atomically(self.path, json.dumps(self.known, indent=0))
