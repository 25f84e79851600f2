"""The folder of a checkpoint that vLLM was given by a path or as a repository of the Hub."""

from pathlib import Path

from vllm.config import VllmConfig

from engram_lm.adapt.adapter import CONTAINER


def checkpoint_folder(vllm_config: VllmConfig) -> Path:
    """Return the folder; the files of a repository are downloaded unless vLLM has just loaded the weights."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", f"{CONTAINER}/*"]
    return Path(
        snapshot_download(model.model, revision=model.revision, cache_dir=load.download_dir, allow_patterns=wanted)
    )
