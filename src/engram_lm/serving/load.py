"""Open a model folder: the model, its tokenizer, and the check that they belong together."""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engram_lm.errors import ConfigError, EngramError
from engram_lm.files import user_path

_STAGED_TOKENS = 1024
"""Tokens of a forward pass whose rows get a place in pinned memory and on the GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which memory is added to a model, and where tables are read from: flags of commands that run one model."""

    adapter: str | None = None
    """Memory to add to the model: a folder as MemoryAdapter.save_pretrained writes it, or a repository of the Hugging
    Face Hub. MODEL is then any causal language model of transformers, and the table flags are for this memory."""

    table_tier: Annotated[str | None, tyro.conf.arg(metavar="device|host|mmap|file|remote|auto")] = None
    """Where the memory tables are read from: loaded with the model (device), loaded as they are stored (host), left in
    their files (mmap, file), on the machine of a --table-source (remote), or what suits the machine (auto). The default
    is device, and auto with a --table-source."""
    table_source: str | None = None
    """Read the tables from here and not from the checkpoint: a folder of packed tables, a file, or an address that
    fsspec opens (https, s3, gs, hf, ...) or mooncake://HOST:PORT/NAME. {table} in it stands for each table's name."""
    table_cache_mib: int = 0
    """Size in MiB of a cache before each table that is not loaded with the model; 0 for none."""
    table_cache_policy: Literal["clock", "lru"] = "clock"
    """Which rows give way when that cache is full."""
    table_pinned: Path | None = None
    """A recorded trace (.npz) whose most read rows fill that cache and stay in it."""
    patch: tuple[Path, ...] = ()
    """Row patches to apply to the memory, in this order, after those that belong to its folder."""

    def __post_init__(self) -> None:
        if self.table_tier is not None:
            from engram_lm.tables.choose import check_tier

            check_tier(self.table_tier, "--table-tier")
        if self.table_cache_mib < 0 or (self.table_cache_mib and (self._with_the_model or self.table_tier == "device")):
            raise ConfigError(
                f"--table-cache-mib {self.table_cache_mib} with --table-tier {self.table_tier or 'device'}: a cache "
                "has at least 0 MiB, and stands before tables of another tier, such as --table-tier file"
            )
        if not self.table_cache_mib and (self.table_pinned is not None or self.table_cache_policy != "clock"):
            raise ConfigError(
                "--table-pinned and --table-cache-policy say what a cache keeps; give it room with --table-cache-mib"
            )
        if self.table_tier == "remote" and self.table_source is None:
            raise ConfigError("--table-tier remote reads from an address: name it with --table-source")

    @property
    def _with_the_model(self) -> bool:
        return self.table_source is None and self.table_tier in (None, "device")

    def check_places(self, model: str | Path, *, has_memory: bool) -> None:
        """Refuse, by a ConfigError, to place tables of a model that has none, by itself or by an adapter."""
        if self.adapter is None and not has_memory and (self.table_tier or self.table_source):
            raise ConfigError(
                f"{model} is no EngramForCausalLM: it has no tables that --table-tier or --table-source could place; "
                "memory for it is named with --adapter"
            )

    def table_options(self) -> dict[str, Any]:
        """What ``EngramForCausalLM.from_pretrained`` is told; empty where nothing was asked for."""
        if self._with_the_model:
            return {}
        return {
            "table_tier": self.table_tier,
            "table_source": self.table_source,
            "table_cache_bytes": self.table_cache_mib << 20,
            "table_cache_policy": self.table_cache_policy,
            "table_pinned": self.table_pinned,
        }


def model_folder(path: str | Path) -> Path:
    """Return the folder of a model that a person named.

    Raises:
        ConfigError: It holds no model.
    """
    folder = user_path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        raise ConfigError(f"{folder} is a run; its model is in {folder / 'model'}: name that folder")
    raise ConfigError(
        f"{folder} is no model folder: it has no config.json; `engram-lm quickstart` makes one in runs/quickstart"
    )


def load_model(
    path: str | Path,
    *,
    device: str = "cpu",
    tables: ModelFlags | None = None,
    adapter: str | Path | None = None,
    adapter_name: str = "default",
) -> tuple[Any, Any]:
    """Load a causal language model, in evaluation mode, and its tokenizer from a folder of transformers.

    ``tables`` says where its memory tables are read from, or, with an ``adapter`` (folder or repository of a
    `MemoryAdapter`), those of the adapter, which is then called ``adapter_name``. Row patches of the folder, and those
    that ``tables`` names, are applied.

    Raises:
        CheckpointError: Weights or tables are missing, truncated or malformed.
        ConfigError: The folder holds no model, the device does not exist, or the tier or source is not for this model.
        MismatchError: The tokenizer in it is not the one that its memory was trained with; tables of a source are not
            this model's; or the adapter is for another model.
        RemoteError: Nobody answers at the address of a source, or at the Hub.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    import engram_lm.model  # noqa: F401 - registers the model's classes
    from engram_lm.training.loop import find_device

    wanted = find_device(device)
    folder = model_folder(path)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        placed = {} if tables is None else tables.table_options()
        options = placed if adapter is None else {}
        if tables is not None and options:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tables.check_places(folder, has_memory=config.model_type == "engram_lm")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the row patches in")  # they are applied below
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, EngramError):
            raise
        raise ConfigError(f"cannot load {folder}: {error}") from error
    if hasattr(model, "check_tokenizer"):
        model.check_tokenizer(tokenizer)
    model = model.to(wanted).eval()
    if hasattr(model, "stage_tables"):
        model.stage_tables(_STAGED_TOKENS)
    from engram_lm.adapt import MemoryAdapter, RowPatch
    from engram_lm.adapt.patch_folder import patch_files

    if adapter is not None:
        MemoryAdapter.from_pretrained(model, adapter, tokenizer=tokenizer, name=adapter_name, **placed)
    own = patch_files(folder) if adapter is None else []
    for path in (*own, *(() if tables is None else tables.patch)):
        RowPatch.load(path).apply(model)
    return model, tokenizer
