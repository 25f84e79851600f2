"""Files and folders → documents, split into training and held-out files."""

import dataclasses
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from engram_lm.errors import DataError

__all__ = ["Corpus", "Document", "read_corpus", "split_corpus", "standard_library", "standard_library_files"]

_NO_TEXT_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One file."""

    name: str
    """Path relative to the source it was found in."""
    text: str
    """Its contents."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What was read, and what was passed over."""

    documents: tuple[Document, ...]
    """In an order that depends on the names alone."""
    skipped: dict[str, int]
    """Files passed over, by reason."""
    source: str
    """Where it came from, for people."""

    @property
    def num_bytes(self) -> int:
        """Size as UTF-8."""
        return sum(len(document.text.encode()) for document in self.documents)


def standard_library() -> Path:
    """Find the Python standard library's sources on this machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def standard_library_files() -> list[Path]:
    """The Python standard library's own sources on this machine, without its tests and empty files, in order."""
    found = (path for _, path in _find(standard_library(), tests=False, suffix=".py"))
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def read_corpus(paths: Sequence[str | Path] = (), *, max_bytes: int = 64_000_000) -> Corpus:
    """Read text files.

    Files that are empty, binary (a NUL byte), not UTF-8 or unreadable are skipped and counted. Of a corpus larger than
    ``max_bytes``, files are taken in an order that depends on their names alone, until it is reached.

    Args:
        paths: Files, or folders that are searched through; the Python standard library's own sources where empty
            (``*.py`` without its tests).
        max_bytes: Text to read at most.

    Raises:
        DataError: A path does not exist, or none of the files holds text.
    """
    if paths:
        source = _printable(", ".join(str(path) for path in paths))
        found = [item for path in paths for item in _find(Path(path), tests=True, suffix="")]
    else:
        root = standard_library()
        source = "the Python standard library"
        found = list(_find(root, tests=False, suffix=".py"))
    skipped: Counter[str] = Counter()
    documents: list[Document] = []
    seen: set[bytes] = set()
    size = 0
    for name, path in sorted(set(found), key=lambda item: (_name_hash(item[0]), item)):
        if size >= max_bytes:
            skipped["beyond the size limit"] += 1
            continue
        text = _read_text(path)
        if text is None or isinstance(text, _Unreadable):
            skipped[text.reason if text else "empty"] += 1
            continue
        # A file reached by two names, or copied, must not be trained on under one and held out under the other.
        content = hashlib.sha256(text.encode()).digest()
        if content in seen:
            skipped["a copy of another"] += 1
            continue
        seen.add(content)
        documents.append(Document(name, text))
        size += len(text)
    if not documents:
        detail = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no files at all"
        raise DataError(f"no text in {source}: {detail}; pass --data with UTF-8 text files or folders that hold some")
    return Corpus(tuple(documents), dict(skipped), source)


def split_corpus(corpus: Corpus, held_out: float = 0.03) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Set files aside for evaluation: whole files, chosen by their names and sizes alone.

    Where no file is small enough for that (a corpus of one file, or of a few large ones), the end of the largest is
    set aside instead, from a line break if there is one near.

    Args:
        corpus: What to split.
        held_out: Share of the text to set aside; at most a third more than that is.

    Returns:
        Training documents and held-out documents.

    Raises:
        DataError: There is too little text to split.
    """
    documents = corpus.documents
    wanted = held_out * sum(len(document.text) for document in documents)
    aside: list[Document] = []
    taken = 0
    # From the back: the order of reading decides what a size limit keeps, and need not decide what is held out.
    for document in reversed(documents):
        if taken < wanted and taken + len(document.text) <= wanted * 4 / 3:
            aside.append(document)
            taken += len(document.text)
    if taken >= wanted / 2 and len(aside) < len(documents):
        chosen = {id(document) for document in aside}
        return tuple(document for document in documents if id(document) not in chosen), tuple(aside)
    largest = max(documents, key=lambda document: len(document.text))
    beginning, end = _cut(largest.text, len(largest.text) - round(wanted))
    if not beginning.strip() or not end.strip():
        raise DataError(f"{largest.name} is one short piece of text; nothing could be held out of it")
    train = tuple(
        Document(f"{largest.name} (beginning)", beginning) if document is largest else document
        for document in documents
    )
    return train, (Document(f"{largest.name} (end)", end),)


def _cut(text: str, place: int) -> tuple[str, str]:
    """Cut a text in two, at the last line break before the place unless that is far from it."""
    line = text.rfind("\n", 0, place) + 1
    if place - line <= (len(text) - place) / 2:
        place = line
    return text[:place], text[place:]


def _find(path: Path, *, tests: bool, suffix: str) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield _printable(path.name), path
        return
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder; check the path given to --data")
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and name not in _NO_TEXT_FOLDERS and (tests or name not in _TEST_FOLDERS)
        )
        for name in sorted(files):
            if name.endswith(suffix) and not name.startswith("."):
                full = Path(folder) / name
                yield _printable(full.relative_to(path).as_posix()), full


@dataclasses.dataclass(frozen=True)
class _Unreadable:
    reason: str


def _read_text(path: Path) -> "str | _Unreadable | None":
    """The file's text; None where it is empty."""
    try:
        if not path.is_file():  # a socket, a pipe, a link to nothing
            return _Unreadable("not a regular file")
        data = path.read_bytes()
    except OSError:
        return _Unreadable("unreadable")
    if b"\0" in data:
        return _Unreadable("binary")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n") if data.strip() else None
    except UnicodeDecodeError:
        return _Unreadable("not UTF-8")


def _printable(name: str) -> str:
    """A file name as text, whatever its bytes are."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
