"""Open a model folder: the model, its tokenizer, and the check that they belong together."""

from pathlib import Path
from typing import Any

from engram.errors import ConfigError, EngramError, MismatchError

__all__ = ["load_model"]


def load_model(path: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder.

    Args:
        path: A folder as ``save_pretrained`` writes it.
        device: Where the model shall be.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ConfigError: The folder is not a model's, or the device is not there.
        MismatchError: The tokenizer in it is larger than the model's vocabulary, or not the one that its memory was
            trained with.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    import engram.model  # noqa: F401 - registers the model's classes
    from engram.training.loop import find_device

    wanted = find_device(device)
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is no model folder: it has no config.json; `engram quickstart` makes one in runs/quickstart"
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, EngramError):
            raise
        raise ConfigError(f"cannot load {folder}: {error}") from error
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise MismatchError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model's vocabulary {size}; "
            "they do not belong together"
        )
    if hasattr(model, "check_tokenizer"):
        model.check_tokenizer(tokenizer)
    return model.to(wanted).eval(), tokenizer
