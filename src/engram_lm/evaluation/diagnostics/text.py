"""The reference of a model's diagnostics: a text that a user names, or the one that the model was trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import EngramError
from engram_lm.evaluation.diagnostics.reference import ReferenceText
from engram_lm.files import user_path
from engram_lm.training.assembly import open_text
from engram_lm.training.data.documents import pack, read_documents
from engram_lm.training.recipe import Recipe

_RECIPE = "recipe.toml"
_MOST_TOKENS = 1 << 25
"""Tokens of a reference that are looked at, from the first on; counting words takes a second for each million."""


def find_reference(
    sources: Sequence[str], folders: Sequence[Path], tokenizer: Any, *, note: Callable[[str], None]
) -> ReferenceText | None:
    """Read the text in which frequencies are counted; None if there is none, which ``note`` tells a person.

    Args:
        sources: Text, as `read_documents` takes it. Without any, the text is looked for that a model was trained on. It
            is tokenized again if its token shards are gone.
        folders: Folders of an adapter or a model; the first that lies in the folder of a training run decides.
        tokenizer: The model's tokenizer.
        note: Called with what people should know.

    Raises:
        DataError: A source cannot be read.
    """
    if sources:
        corpus = read_documents(sources)
        tokens = pack(corpus.documents, tokenizer)
        return ReferenceText(name=corpus.source, tokens=tokens, num_tokens=min(len(tokens), _MOST_TOKENS))
    for folder in folders:
        run = user_path(folder).resolve().parent
        if not (run / _RECIPE).is_file():
            continue
        try:
            text = open_text(Recipe.read(run / _RECIPE), tokenizer)
        except EngramError as error:
            note(f"the text that {folder} was trained on cannot be read: {error}")
            continue
        name = f"the training text of {run.name}"
        note(f"occurrences are counted in {name}; --reference names another text")
        return ReferenceText(name=name, tokens=text.train, num_tokens=min(text.num_tokens, _MOST_TOKENS))
    note("occurrences are counted in the evaluated text itself; --reference names another text")
    return None
