"""The folder of a checkpoint that vLLM was given by a path or as a repository of the Hub."""

from pathlib import Path

from vllm.config import VllmConfig

from engram_lm.adapt.adapter import CONTAINER
from engram_lm.adapt.patch_folder import refuse_patches


def checkpoint_folder(vllm_config: VllmConfig) -> Path:
    """Return the folder; the files of a repository are downloaded unless vLLM has just loaded the weights.

    Raises:
        ConfigError: Row patches belong to the folder, which would not be applied.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    if Path(model.model).is_dir():
        refuse_patches(model.model, "vLLM")
        return Path(model.model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", f"{CONTAINER}/*"]
    return Path(
        snapshot_download(model.model, revision=model.revision, cache_dir=load.download_dir, allow_patterns=wanted)
    )
