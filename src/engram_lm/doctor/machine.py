"""The machine: processor and threads, accelerators, memory and its limits, disks."""

import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engram_lm.threads import allowed_cores

_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)
"""What makes matrix products fast, as Linux calls it."""
_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY",
    "KMP_BLOCKTIME", "KMP_AFFINITY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE",
)  # fmt: skip
"""Environment variables that are shown; no other is, because some hold secrets."""


def processor() -> dict[str, Any]:
    """Say what the processor is, how many cores this process may use, how busy they are, and how threads are set."""
    described: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):  # none but on Linux
        name, _, value = line.partition(":")
        described.setdefault(name.strip(), value.strip())
    flags = set((described.get("flags") or described.get("Features") or "").split())
    return {
        "model": described.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores allowed": allowed_cores(),
        "features": [name for name in _FEATURES if name in flags],
        "load of the last minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def torch_build() -> dict[str, Any]:
    """Say how torch computes here: threads, kernels, accelerators with their memory and driver, pinned memory."""
    import torch

    devices = {}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices[f"device {number}"] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{_gigabytes(properties.total_memory)} in all, {_gigabytes(torch.cuda.mem_get_info(number)[0])} free"
        )
    if not devices:
        pinned = "no: pinned memory needs an accelerator"
    else:
        pinned = "yes" if torch.empty(4096, pin_memory=True).is_pinned() else "no"
    return {
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "CUDA of this build": torch.version.cuda,
        "ROCm of this build": getattr(torch.version, "hip", None),
        "driver": next(iter(_lines("/proc/driver/nvidia/version")), None),
        **(devices or {"devices": "none: the CPU computes"}),
        "pinned memory": pinned,
    }


def memory() -> dict[str, Any]:
    """Say how much memory there is, how much may be taken, and how much may be locked."""
    from engram_lm.tables.available_memory import (  # needs torch
        available_bytes,
        container_limit_bytes,
        read_meminfo,
    )

    found = read_meminfo(Path("/proc/meminfo"))
    allowed = available_bytes()
    return {
        "total": _gigabytes(found.get("MemTotal")),
        "available": _gigabytes(found.get("MemAvailable")),
        "available within the container": _gigabytes(allowed),
        "container limit": _gigabytes(container_limit_bytes()),
        "swap": _gigabytes(found.get("SwapTotal")),
        "may be locked": _lockable(),
        "shared memory": _free("/dev/shm") if os.path.isdir("/dev/shm") else None,
    }


def disks() -> dict[str, Any]:
    """Say how much room there is in the working folder, in the cache of Hugging Face and in the folder for scratch."""
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"), "hub"
    )
    return {
        "working folder": _free(os.getcwd()),
        "Hugging Face cache": _free(os.path.expanduser(cache)),
        "scratch folder": _free(tempfile.gettempdir()),
    }


def _free(path: str) -> str:
    from engram_lm.tables.available_memory import is_on_network  # needs torch

    place = Path(path)
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    where = path.replace(os.path.expanduser("~"), "~", 1) if path.startswith(os.path.expanduser("~")) else path
    network = ", on a network file system" if is_on_network(place) else ""
    written = "" if os.access(place, os.W_OK) else ", not writable"
    return f"{where}: {_gigabytes(usage.free)} of {_gigabytes(usage.total)} free{network}{written}"


def _gigabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e9:.1f} GB"


def _lockable() -> str | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} bytes (ulimit -l)"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
