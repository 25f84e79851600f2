"""A recipe's text made real: tokenizer, and token shards to train and to evaluate on."""

import contextlib
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import RepoFile, list_repo_tree, try_to_load_from_cache
from transformers import AutoTokenizer

from engram_lm.adapt.hub import hub_answers
from engram_lm.adapt.model_card import REPOSITORY
from engram_lm.errors import CheckpointError, ConfigError, RemoteError
from engram_lm.files import lock_file, new_folder, user_path
from engram_lm.training.data.text import TrainingText, beginning, cache_folder, prepare_text
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe

_FIRST_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""Files of a repository, one of which is downloaded before any other."""
_MODEL_FILES = ["model*.safetensors*", "*.json", "*.model", "*.txt"]
"""What transformers downloads of a model, for most of them."""


def find_tokenizer(recipe: Recipe, folder: Path) -> Any:
    """Load the tokenizer in ``folder``; if there is none, put the recipe's there, or train it once and keep it there.

    Several processes may call this at a time; one of them trains.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
        DataError: There is no text to train one on.
    """
    model = recipe.model
    for key, given in (("weights", model.weights), ("base", model.base and user_path(model.base))):
        if given and not (given / "config.json").is_file() and (given / "model").is_dir():
            raise ConfigError(f"{given} is a run; its model is in {given / 'model'}: give that as model.{key}")
    source = recipe.tokenizer.path or model.base or (None if model.weights is None else str(model.weights))
    with _locked(folder):
        if not folder.is_dir():
            if source is None:
                cache = cache_folder(recipe.data.cache)
                data, length = recipe.data, recipe.tokenizer.train_bytes
                texts = beginning(data.sources, cache, length, max_bytes=data.max_bytes)
                tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
            else:
                tokenizer = load_tokenizer(source, None if recipe.tokenizer.path else model.revision)
            with new_folder(folder) as aside:
                tokenizer.save_pretrained(aside)
    return load_tokenizer(folder)


def locate(source: str | Path, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Find a model or a tokenizer: in a folder of that name if there is one, otherwise on the Hub.

    Returns:
        What ``from_pretrained`` of transformers is called with: the place, and the options. Where the Hub does not
        answer, the files that were downloaded before are used.

    Raises:
        CheckpointError: There is no such folder, and the Hub has no such repository or revision.
        RemoteError: There is no such folder, the Hub does not answer, and nothing was downloaded before.
    """
    folder, name = user_path(source), str(source)
    if folder.is_dir():
        return str(folder), {"revision": revision}
    if not REPOSITORY.fullmatch(name):
        raise CheckpointError(f"there is no folder {folder}, and no repository of the Hub can have this name")
    answers = hub_answers(name, revision)
    if not answers and not any(_is_downloaded(name, file, revision) for file in _FIRST_FILES):
        raise RemoteError(
            f"there is no folder {folder}, nothing of a repository {name} was downloaded before, and the Hub does not "
            "answer, or is not asked (HF_HUB_OFFLINE, HF_ENDPOINT, HTTPS_PROXY); look at how the name is spelled"
        )
    return name, {"revision": revision, "local_files_only": not answers}


def _is_downloaded(source: str, file: str, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(source, file, revision=revision), str)


def bytes_to_download(source: str, revision: str | None = None) -> int | None:
    """Count the bytes of a model on the Hub that are not on this disk yet; 0 for a folder, None if nobody can say.

    Errors as for `locate`.
    """
    place, options = locate(source, revision)
    if "local_files_only" not in options:
        return 0
    if options["local_files_only"]:
        return None
    try:
        files = [file for file in list_repo_tree(place, revision=revision) if isinstance(file, RepoFile)]
    except Exception:  # the Hub, its client and the network each raise their own; loading will say what is wrong
        return None
    wanted = [file for file in files if any(fnmatch.fnmatch(file.path, name) for name in _MODEL_FILES)]
    return sum(file.size for file in wanted if not _is_downloaded(place, file.path, revision))


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """Load a tokenizer from a folder or from the Hub.

    Raises:
        ConfigError: It cannot be loaded.
        EngramError: It cannot be found; see `locate`.
    """
    place, options = locate(source, revision)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # tokenizers raises a bare Exception where its file is damaged
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot load the tokenizer {source}: {why}; give a folder that save_pretrained wrote, or the name of one "
            "on the Hub"
        ) from error


def open_text(recipe: Recipe, tokenizer: Any, progress: RunProgress | None = None) -> TrainingText:
    """Tokenize the recipe's text into shards, divide it, and show how far that is; see `prepare_text`."""
    data, progress = recipe.data, progress or RunProgress(silent=True)
    with progress.packing() as advance:
        text = prepare_text(
            data.sources,
            tokenizer,
            cache_folder(data.cache),
            sequence_length=data.sequence_length,
            held_out=data.held_out,
            validation=data.validation,
            held_out_sources=data.held_out_sources,
            max_held_out_tokens=recipe.evaluation.max_tokens,
            max_bytes=data.max_bytes,
            texts=recipe.evaluation.texts,
            general=data.general,
            general_held_out=data.general_held_out,
            on_progress=advance,
        )
    if text.about is not None:
        progress.note(text.about)
    return text


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        lock_file(file)
        yield
