"""Open a model folder: the model, its tokenizer, and the check that they belong together."""

from pathlib import Path
from typing import Any, Literal

from engram.errors import ConfigError, EngramError, MismatchError

__all__ = ["TableTier", "check_table_options", "load_model"]

TableTier = Literal["device", "auto", "host", "shared", "mmap", "file"]
"""Where a model's tables may be; the model's own list is checked against it by a test."""


def check_table_options(table_tier: str, table_cache_mib: int) -> None:
    """Refuse a cache of tables that are loaded with the model, and a negative one.

    Raises:
        ConfigError: As said.
    """
    if table_cache_mib < 0 or (table_cache_mib and table_tier == "device"):
        raise ConfigError(
            f"--table-cache-mib {table_cache_mib} with --table-tier {table_tier}: a cache has at least 0 MiB, and "
            "stands before tables of another tier, such as --table-tier file"
        )


_STAGED_TOKENS = 1024
"""Tokens of a forward pass whose rows get a place in pinned memory and on the GPU."""


def load_model(
    path: str | Path, *, device: str = "cpu", table_tier: str = "device", table_cache_mib: int = 0
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder.

    Args:
        path: A folder as ``save_pretrained`` writes it.
        device: Where the model shall be.
        table_tier: Where its memory tables shall be read from; ``"device"`` loads them with the model. See
            ``EngramForCausalLM.from_pretrained``.
        table_cache_mib: MiB of a cache before each table on another tier.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ConfigError: The folder is not a model's, the device is not there, or the tier is unknown or not for this model.
        MismatchError: The tokenizer in it is larger than the model's vocabulary, or not the one that its memory was
            trained with.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
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
        options: dict[str, Any] = {}
        if table_tier != "device" or table_cache_mib:
            options = {"table_tier": table_tier, "table_cache_bytes": table_cache_mib << 20}
            if AutoConfig.from_pretrained(folder, local_files_only=True).model_type != "engram_lm":
                raise ConfigError(f"{folder} is no EngramForCausalLM: it has no tables that --table-tier could place")
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
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
    model = model.to(wanted).eval()
    if hasattr(model, "stage_tables"):
        model.stage_tables(_STAGED_TOKENS)
    return model, tokenizer
