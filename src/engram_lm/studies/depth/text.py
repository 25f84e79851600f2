"""What the models of the study are trained and compared on: tokenized once, kept in the study's folder."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engram_lm.errors import RunFolderError
from engram_lm.files import new_folder
from engram_lm.training.data.documents import pack, read_documents, split_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.run_folder import to_json

__all__ = ["StudyText", "open_text"]

_TRAIN, _HELD_OUT, _FACTS = "train.npy", "held_out.npy", "facts.json"


@dataclasses.dataclass(frozen=True)
class StudyText:
    """A text, divided and tokenized."""

    tokenizer: PreTrainedTokenizerFast
    """Trained on the training files."""
    train: np.ndarray
    """Packed tokens, int32 ``[num_tokens]``."""
    held_out: np.ndarray
    """Those of the files that are held out, int32 ``[num_tokens]``."""
    facts: dict[str, Any]
    """Where it came from and how much there is."""


def open_text(folder: Path, data: Sequence[Path], *, vocab_size: int, max_bytes: int) -> StudyText:
    """Open a study's text, or make it where there is none yet.

    Args:
        folder: Where it is kept.
        data: Files and folders to read; the Python standard library's own sources where empty.
        vocab_size: Tokens of the tokenizer that is trained.
        max_bytes: Text to read at most.

    Raises:
        DataError: There is no text, or too little.
        RunFolderError: The folder's text is damaged.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        corpus = read_documents(data, max_bytes=max_bytes)
        train_files, held_out_files = split_documents(corpus)
        tokenizer = train_tokenizer((file.text for file in train_files), vocab_size)
        train, held_out = pack(train_files, tokenizer), pack(held_out_files, tokenizer)
        facts = {
            "source": corpus.source,
            "files": len(corpus.documents),
            "bytes": corpus.num_bytes,
            "train_tokens": len(train),
            "held_out_tokens": len(held_out),
        }
        with new_folder(folder) as aside:
            np.save(aside / _TRAIN, train)
            np.save(aside / _HELD_OUT, held_out)
            tokenizer.save_pretrained(aside)
            (aside / _FACTS).write_text(to_json(facts), encoding="utf-8")
    # Read back what was written, so that a study that goes on sees what it saw.
    try:
        facts = json.loads((folder / _FACTS).read_bytes())
        train, held_out = (np.load(folder / name, allow_pickle=False) for name in (_TRAIN, _HELD_OUT))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        counts = (facts["train_tokens"], facts["held_out_tokens"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise RunFolderError(f"the text in {folder} is damaged ({error}); name another folder with --out") from error
    if [(one.dtype, one.shape) for one in (train, held_out)] != [(np.int32, (count,)) for count in counts]:
        raise RunFolderError(
            f"{folder} holds {train.dtype} {list(train.shape)} and {held_out.dtype} {list(held_out.shape)} where "
            f"{_FACTS} tells of {counts[0]} and {counts[1]} tokens; name another folder with --out"
        )
    return StudyText(tokenizer, train, held_out, facts)
