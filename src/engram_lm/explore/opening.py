"""A folder, a run or a published configuration → an explorer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.adapt import MemoryAdapter
from engram_lm.errors import ConfigError, DataError
from engram_lm.explore.explorer import Explorer
from engram_lm.files import user_path
from engram_lm.hashing import HashSpec
from engram_lm.hashing.published import read_config
from engram_lm.serving.load import ModelFlags, load_model
from engram_lm.tokenizing import text_tokens
from engram_lm.training.data.documents import read_documents

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
            where empty.
        tokenizer: A folder with tokenizer.json, or that file, for a configuration without weights; the one beside it,
            if there is one, where None.
        tables: Where the memory tables are read from.
        device: Where to run, as torch names it.
        max_tokens: Tokens of a text that are read, at most.

    Raises:
        ConfigError: There is no model and no configuration, or a flag is not for what there is.
        DataError: A path of ``data`` does not exist.
        EngramError: As `engram_lm.serving.load.load_model`, `HashSpec.from_config` and
            `engram_lm.training.data.documents.read_documents`.
    """
    path = user_path(source)
    config = path / "config.json" if path.is_dir() else path
    folder = config.parent
    options: dict[str, Any] = {"max_tokens": max_tokens}
    for text in data:  # it is read when it is first needed, but a wrong path is to be said now
        if not str(text).startswith("hf:") and not user_path(text).exists():
            raise DataError(f"{text} is neither a file nor a folder; check the path of the text to compare with")
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
        options |= {"name": f"{folder.name or config.name} ({spec.variant}, no weights)", "spec": spec}
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
        options["reference_name"] = ", ".join(map(str, data)) or "the Python standard library's own sources"
        options["reference"] = lambda: _read_reference(found, data)
    return Explorer(tokenizer=found, **options)


def _names(adapters: Sequence[str]) -> list[str]:
    """Name memories by the last part of their folders or repositories, with a number where two are alike."""
    found: list[str] = []
    for adapter in adapters:
        # The name becomes a module's, so it holds no dot.
        name = Path(adapter).name.replace(".", "_") or "memory"
        found.append(f"{name} {len(found) + 1}" if name in found else name)
    return found


def _tokenizer(path: Path) -> Any:
    """Open a tokenizer.json as a tokenizer of transformers, which spells tokens for the page."""
    from transformers import PreTrainedTokenizerFast

    from engram_lm.hashing.token_map import load_tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(path))


def _read_reference(tokenizer: Any, data: Sequence[str | Path]) -> np.ndarray:
    """Tokenize the beginning of a text."""
    corpus = read_documents(list(data), max_bytes=None if data else _REFERENCE_BYTES)
    pieces, num_tokens = [], 0
    for document in corpus.documents:
        tokens = text_tokens(tokenizer, document.text)[: _REFERENCE_TOKENS - num_tokens]
        pieces.append(tokens)
        num_tokens += len(tokens)
        if num_tokens >= _REFERENCE_TOKENS:
            break
    return np.concatenate(pieces)
