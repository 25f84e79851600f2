"""A folder, a run or a published configuration → an explorer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.adapt import MemoryAdapter
from engram_lm.errors import ConfigError
from engram_lm.explore.explorer import Explorer
from engram_lm.files import user_path
from engram_lm.hashing import HashSpec
from engram_lm.hashing.published import read_config
from engram_lm.serving.load import ModelFlags, load_model
from engram_lm.tokenizing import text_tokens
from engram_lm.training.data.sources import OpenSources, open_sources

_REFERENCE_BYTES = 2_000_000
_REFERENCE_TOKENS = 200_000
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


def open_explorer(
    source: str | Path,
    *,
    adapters: Sequence[str] = (),
    data: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    tables: ModelFlags | None = None,
    device: str = "cpu",
    max_tokens: int = 256,
) -> Explorer:
    """Open what the page is to look at.

    Args:
        source: A model folder, or a published ``config.json`` (or a folder with no weights), of which only the
            addresses can be shown.
        adapters: Folders or repositories of memory adapters to attach to the model, all of them.
        data: Text whose frequent N-grams are compared, files or folders; the Python standard library's own sources
            where empty. Of a long one, the beginning is read: at most 200,000 tokens.
        tokenizer: A folder with tokenizer.json, or that file, for a configuration without weights; the one beside it,
            if there is one, where None.
        tables: Where the memory tables are read from.
        device: Where to run, as torch names it.
        max_tokens: Tokens of a text that are read, at most.

    Raises:
        ConfigError: There is no model and no configuration, or a flag is not for what there is.
        DataError: A path of ``data`` does not exist, or there is no text.
        EngramError: As `engram_lm.serving.load.load_model`, `HashSpec.from_config` and
            `engram_lm.training.data.sources.open_sources`.
    """
    path = user_path(source)
    config = path / "config.json" if path.is_dir() else path
    folder = config.parent
    options: dict[str, Any] = {"max_tokens": max_tokens}
    if config.suffix == ".json" and config.is_file() and not any(any(folder.glob(name)) for name in _WEIGHTS):
        if adapters:
            raise ConfigError(f"{path} has no weights, so no memory can be attached to it; name a model folder")
        own = None if tokenizer is None and not (folder / "tokenizer.json").is_file() else tokenizer or folder
        found = None if own is None else _tokenizer(user_path(own))
        spec = HashSpec.from_config(read_config(config), found)
        if spec.token_map is None:
            raise ConfigError(
                f"{config} hashes canonical tokens, which its tokenizer decides: name the model's tokenizer with "
                "--tokenizer, a folder with tokenizer.json or that file"
            )
        options |= {"name": folder.resolve().name or config.name, "spec": spec}
    else:
        if tokenizer is not None:
            raise ConfigError("--tokenizer is for a configuration without weights; a model folder holds its own")
        path = folder if config.is_file() and path.name == "config.json" else path
        names = _names(adapters)
        first = {"adapter": adapters[0], "adapter_name": names[0]} if adapters else {}
        model, found = load_model(path, device=device, tables=tables, **first)
        for more, name in zip(adapters[1:], names[1:], strict=True):
            MemoryAdapter.from_pretrained(model, more, tokenizer=found, name=name)
        options |= {"name": path.resolve().name, "model": model}
    if found is not None:
        # It is read when it is first needed, but what is wrong with its path is to be said now.
        opened = open_sources(data, max_bytes=_REFERENCE_BYTES, whole_files=False)
        options["reference_name"] = ", ".join(map(str, data)) or "the Python standard library’s own sources"
        options["reference"] = lambda: _read_reference(found, opened)
    return Explorer(tokenizer=found, **options)


def _names(adapters: Sequence[str]) -> list[str]:
    """Name memories by the last part of their folders or repositories, by the last two if it is the same for some."""
    parts = [Path(adapter).parts for adapter in adapters]
    number = 1 if len({part[-1:] for part in parts}) == len(parts) else 2
    found: list[str] = []
    for part in parts:
        # An adapter's name is a Python identifier.
        name = re.sub(r"\W+", "_", "_".join(part[-number:])).strip("_") or "memory"
        name = name if name.isidentifier() else f"memory_{name}"
        found.append(f"{name}_{len(found) + 1}" if name in found else name)
    return found


def _tokenizer(path: Path) -> Any:
    """Open a tokenizer.json as a tokenizer of transformers, which spells tokens for the page."""
    from transformers import PreTrainedTokenizerFast

    from engram_lm.hashing.token_map import load_tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(path))


def _read_reference(tokenizer: Any, opened: OpenSources) -> np.ndarray:
    """Tokenize the beginning of a text, which may be far longer than memory."""
    found, begins = [np.zeros(0, np.int64)], True
    for piece in opened.pieces():
        if begins:
            found.append(text_tokens(tokenizer, piece.text))
        else:  # the middle of a document has no beginning
            found.append(np.array(tokenizer(piece.text, add_special_tokens=False)["input_ids"], np.int64))
        begins = piece.ends_document
        if sum(map(len, found)) >= _REFERENCE_TOKENS:
            break
    return np.concatenate(found)[:_REFERENCE_TOKENS]
