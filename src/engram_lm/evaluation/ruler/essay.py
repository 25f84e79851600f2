"""The prose that needles are hidden in."""

import functools
import hashlib
import itertools
import re
from pathlib import Path

from engram_lm.errors import DataError
from engram_lm.files import read_text

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LEAST_WORDS = 100


class Essay:
    """Prose of any length: a text, read again from its beginning where more of it is needed.

    Args:
        text: The text; at least 100 words.

    Raises:
        DataError: It is shorter.
    """

    def __init__(self, text: str) -> None:
        self._words = text.split()
        if len(self._words) < _LEAST_WORDS:
            raise DataError(
                f"the text that needles are hidden in has {len(self._words)} words; give one of {_LEAST_WORDS} or more"
            )
        self.digest = hashlib.sha256(" ".join(self._words).encode()).hexdigest()[:16]
        """Names the text: samples made with equal digests, seeds and tokenizers are the same."""

    def sentences(self, num_words: int) -> list[str]:
        """Divide the first ``num_words`` words into sentences; the last one may be cut."""
        text = " ".join(itertools.islice(itertools.cycle(self._words), num_words))
        return _SENTENCE_END.split(text) if text else []


@functools.cache
def default_essay() -> Essay:
    """The reference of the Python language, as the standard library brings it for ``help()``: prose, some 40,000 words.

    Releases of Python differ in it, so samples are the same on all machines with one minor version of Python.
    """
    from pydoc_data import topics

    paragraphs = (part for name in sorted(topics.topics) for part in topics.topics[name].split("\n\n"))
    return Essay("\n\n".join(part for part in paragraphs if part[:1].isalpha() and part.endswith((".", "?", "!"))))


def read_essay(path: Path) -> Essay:
    """Read the essay of a person: a text file, or all ``.txt`` files of a folder in the order of their names.

    Raises:
        DataError: It cannot be read, or is too short.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        return Essay("\n\n".join(read_text(file) for file in files))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {path} that needles are hidden in: {error}") from error
