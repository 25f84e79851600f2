"""Which versions of other packages this one was tested with, as its own metadata declares them, and which are here.

Imports none of them, so it works where one of them is broken.
"""

import dataclasses
import functools
import importlib.metadata
import re
import warnings

DISTRIBUTION = "engram-lm"
_LINE = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"\bextra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that the library uses."""

    name: str
    """Its name on the package index."""
    tested: str
    """The versions that were tested, such as ``>=2.13,<2.14``; empty where nobody says."""
    extra: str | None = None
    """The extra that brings it; None where the library always needs it."""
    installed: str | None = None
    """The version that is installed; None where none is."""

    @property
    def is_tested(self) -> bool | None:
        """Whether the installed version is among the tested ones; None where it is not installed."""
        return None if self.installed is None else is_within(self.installed, self.tested)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_within(version: str, tested: str) -> bool:
    """Whether a version satisfies conditions such as ``>=2.13,<2.14``; only its numbers count."""
    here = _numbers(version)
    compare = {">=": here.__ge__, "<=": here.__le__, ">": here.__gt__, "<": here.__lt__, "==": here.__eq__}
    compare["!="] = here.__ne__
    conditions = [re.fullmatch(r"\s*(>=|<=|==|!=|<|>)\s*(\S+)\s*", one) for one in tested.split(",") if one.strip()]
    return all(compare[one[1]](_numbers(one[2])) for one in conditions if one is not None)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()  # 5.19.0 is 5.19
    return tuple(numbers)


def declared_packages() -> list[Package]:
    """List what the library needs, then what its extras for users need; empty where its metadata is not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        parts = _LINE.fullmatch(line.strip())
        of = _EXTRA.search((parts and parts[3]) or "")  # some are for one system alone, which does not matter here
        extra = of and of[1]
        if parts is None or extra in ("dev", "docs"):
            continue
        tested = ",".join(sorted(parts[2].replace(" ", "").split(","), reverse=True))
        found.append(Package(parts[1], tested, extra, installed_version(parts[1])))
    return found


@functools.cache  # once: torch and others reset what Python remembers of warnings
def warn_if_untested(*names: str) -> None:
    """Warn where a package with one of these names has a version that was not tested."""
    for package in declared_packages():
        if package.name in names and package.is_tested is False:
            warnings.warn(
                f"engram-lm was tested with {package.name} {package.tested}, and {package.installed} is installed: "
                "it may fail, or compute something else; `engram-lm doctor` lists all versions",
                RuntimeWarning,
                stacklevel=3,
            )
