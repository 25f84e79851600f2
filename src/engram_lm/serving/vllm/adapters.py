"""The memory adapters of a model that vLLM serves: found where its user or its folder names them, read and checked."""

from pathlib import Path

from vllm.config import VllmConfig

from engram_lm.adapt.adapter import CONTAINER
from engram_lm.adapt.folder import AdapterFiles, BaseModel, LocalFiles, StoredAdapter, read_adapter
from engram_lm.adapt.hub import files_of
from engram_lm.adapt.patch_folder import refuse_patches
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.serving.vllm.adapted_names import OPTION
from engram_lm.serving.vllm.checkpoint import checkpoint_folder
from engram_lm.serving.vllm.tables import table_place


def read_adapters(vllm_config: VllmConfig) -> list[StoredAdapter]:
    """Read the adapters of the model, without their tables, in the order in which their updates are added.

    Raises:
        CheckpointError: There is none, or one is malformed.
        ConfigError: The option is no name, an adapter's folder has row patches, or several adapters are to read tables
            of one source.
        MismatchError: An adapter was made for another model.
        RemoteError: The Hub cannot be reached.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    base = BaseModel(
        model_type=str(model.hf_config.model_type),
        name=str(model.model),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
    )
    found = _found(vllm_config)
    for files in found:
        if isinstance(files, LocalFiles):
            refuse_patches(files.folder, "vLLM")
    adapters = [read_adapter(files, base) for files in found]
    if len(adapters) > 1 and table_place(vllm_config.additional_config).source is not None:
        raise ConfigError(
            f"{len(adapters)} adapters are to be served, and one source of tables would be read for each; leave the "
            "source out, so that each reads the tables of its folder"
        )
    return adapters


def _found(vllm_config: VllmConfig) -> list[AdapterFiles]:
    given = vllm_config.additional_config.get(OPTION)
    if given is not None:
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{OPTION} is the folder or repository of an adapter, or a list of them, not {given!r}")
        return [files_of(name) for name in names]
    model, folder = vllm_config.model_config.model, checkpoint_folder(vllm_config) / CONTAINER
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        of = ";"
        if not Path(model).is_dir():
            of = (
                f", as far as it was downloaded to {folder.parent}. The Hub's client takes what is there for all of it "
                "where the Hub fails in the middle: start again if the repository has an adapter, or"
            )
        raise CheckpointError(
            f"{model} is to be served with memory, and holds no adapter in {CONTAINER}{of} "
            f"""name one: --additional-config '{{"{OPTION}": "..."}}'"""
        )
    return [LocalFiles(path) for path in found]
