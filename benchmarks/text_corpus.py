r"""Make a corpus of documents out of folders of manuals, dictionaries and books: JSON lines that any recipe can read.

Web pages lose their markup and manual pages their macros, compressed files are opened, long files are cut. Documents
in other languages than English are left out, and so are those of which more than half stands in an earlier one. The
order of the documents is decided by their contents, so the beginning of the corpus is a sample of all of it.

    apt-get download anarchism apache2-doc debian-handbook debian-policy debian-reference-en developers-reference \
        dict-foldoc dict-gcide dict-jargon emacs-common fortunes git-doc harden-doc installation-guide-amd64 \
        libreoffice-help-en-us linux-doc-6.1 manpages manpages-dev miscfiles perl-doc postgresql-doc-15 \
        python-django-doc python3.11-doc r-doc-html vim-doc wordnet-base
    mkdir extracted
    for file in *.deb; do dpkg -x $file extracted/${file%%_*}; done
    python benchmarks/text_corpus.py extracted --out corpus
    engram-lm train recipe.toml --data.sources corpus

These packages of Debian 12 make the corpus of docs/findings.md: 17,838 documents of 154 MB in November 2026, and a few
documents more or less when Debian has updated one of them. The numbers of documents are printed to stdout as JSON.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

LONGEST = 20_000
"""Characters after which a document ends with its paragraph, or with its line where there are no paragraphs."""
SHORTEST = 200
WORDS = 8
"""Words that are compared at a time."""
SAMPLED = 16
"""One in so many of these groups of words is remembered, chosen by its contents."""
REPEATED = 0.5
"""Share of its groups of words in earlier documents above which a document is left out."""
NOT_ENGLISH = 0.02
"""Share of characters beyond ASCII above which a document is left out."""
ENGLISH = re.compile(r"\b(the|of|and|to|is)\b")

TEXT = {".txt", ".rst", ".md", ".pod", ".info", ".dict"}
PLAIN_FOLDERS = {"fortunes", "dict"}
MAN_PAGE = re.compile(r"\.[1-8][a-z]*$")
INVISIBLE = re.compile(r"<(script|style|head|nav|footer)\b.*?</\1\s*>|<!--.*?-->", re.S | re.I)
BREAKS = re.compile(r"</?(p|div|li|tr|h[1-6]|br|dt|dd|pre|table)\b[^>]*>", re.I)
TAGS = re.compile(r"<[^>]+>")


def readable(path: Path) -> str | None:
    """Read the text of a file; None where it holds none."""
    packed = path.suffix in (".gz", ".dz")
    name = path.name.removesuffix(path.suffix) if packed else path.name
    web = re.search(r"\.x?html?(\.en)?$", name)
    manual = path.parent.name.startswith("man") and MAN_PAGE.search(name)
    definitions = name.startswith("data.") and "wordnet" in str(path)
    if not (web or manual or definitions or Path(name).suffix in TEXT or path.parent.name in PLAIN_FOLDERS):
        return None
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if packed else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    if "\0" in text:
        return None
    if web:
        text = html.unescape(TAGS.sub("", BREAKS.sub("\n", INVISIBLE.sub(" ", text))))
    elif manual:
        lines = (
            re.sub(r"^[.'][A-Za-z]{1,2}\s*", "", line)
            for line in text.splitlines()
            if line[:3] not in ('.\\"', "'\\\"")
        )
        text = re.sub(r"\\f\[?\w*\]?|\\[&c]", "", "\n".join(lines)).replace("\\-", "-")
    elif definitions:
        text = "\n".join(line.partition("|")[2].strip() for line in text.splitlines() if "|" in line)
    text = re.sub(r"[ \t\r\xa0]+", " ", text)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def documents(folders: list[Path]) -> Iterator[str]:
    """Read the files of folders in the order of their names, long ones in several documents."""
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        text = readable(path)
        if text is None:
            continue
        parts: list[str] = []
        size = 0
        for part in re.split(r"(?<=\n\n)", text):
            for piece in [part] if len(part) <= LONGEST else part.splitlines(keepends=True):
                parts.append(piece)
                size += len(piece)
                if size > LONGEST:
                    yield "".join(parts).strip()
                    parts, size = [], 0
        if size >= SHORTEST:
            yield "".join(parts).strip()


def is_english(text: str) -> bool:
    """Whether a text is mostly ASCII and has the commonest English words."""
    strange = sum(ord(character) > 127 for character in text)
    return strange <= NOT_ENGLISH * len(text) and len(ENGLISH.findall(text)) * 100 >= len(text.split())


def groups(text: str) -> set[int]:
    """Choose some of the groups of successive words of a text, as numbers."""
    words = text.split()
    numbers = (zlib.crc32(" ".join(words[at : at + WORDS]).encode()) for at in range(max(1, len(words) - WORDS + 1)))
    return {number for number in numbers if number % SAMPLED == 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--files", type=int, default=8, help="number of files to write")
    options = parser.parse_args()
    known: set[int] = set()
    kept: dict[bytes, str] = {}
    counts = {"documents": 0, "bytes": 0, "not_english": 0, "near_duplicates": 0}
    for text in documents(options.folders):
        if not is_english(text):
            counts["not_english"] += 1
            continue
        chosen, digest = groups(text), hashlib.sha256(text.encode()).digest()
        if digest in kept or (chosen and len(chosen & known) > REPEATED * len(chosen)):
            counts["near_duplicates"] += 1
            continue
        known |= chosen
        kept[digest] = text
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
    options.out.mkdir(parents=True, exist_ok=True)
    ordered = [kept[digest] for digest in sorted(kept)]
    for number in range(options.files):
        part = ordered[len(ordered) * number // options.files : len(ordered) * (number + 1) // options.files]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (options.out / f"{number:02d}.jsonl").write_text(lines, encoding="utf-8")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
