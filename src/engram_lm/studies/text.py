"""The text of a study: a tokenizer trained on the training documents alone, which all arms share."""

from collections.abc import Sequence
from pathlib import Path

from engram_lm.files import new_folder
from engram_lm.training.data.documents import read_documents, split_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.export import TOKENIZER

__all__ = ["HELD_OUT_SHARE", "prepare_tokenizer"]

HELD_OUT_SHARE = 0.03
"""Share of the documents that small models are compared on and not trained on."""


def prepare_tokenizer(study: Path, data: Sequence[Path], *, vocab_size: int, max_bytes: int) -> list[str]:
    """Train the tokenizer of a study on the documents that its models are trained on, unless there is one.

    Args:
        study: The folder of the study; the tokenizer is kept in ``tokenizer/``, where `Runner` looks for it.
        data: Files and folders to read; the Python standard library's own sources where empty.
        vocab_size: Tokens of the tokenizer.
        max_bytes: Text to read at most.

    Returns:
        Names of the documents that are held out, in order; empty where the tokenizer is there already.

    Raises:
        DataError: There is no text, or too little.
    """
    if (study / TOKENIZER).is_dir():
        return []
    train, held_out = split_documents(read_documents(data, max_bytes=max_bytes), HELD_OUT_SHARE)
    tokenizer = train_tokenizer((document.text for document in train), vocab_size)
    with new_folder(study / TOKENIZER) as aside:
        tokenizer.save_pretrained(aside)
    return [document.name for document in held_out]
