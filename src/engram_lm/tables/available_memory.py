"""How much memory a process may still take, containers included, and whether a path is on a disk of this machine."""

import os
import re
from pathlib import Path

from engram_lm.control_groups import control_groups

_NETWORK = {
    "9p", "afs", "ceph", "cifs", "fuse.gcsfuse", "fuse.goofys", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs",
    "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs", "virtiofs", "wekafs", "beegfs",
}  # fmt: skip
_NO_LIMIT = 1 << 62
"""The first version of control groups says by a number of about this size that there is no limit."""


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, in bytes, container limits included; None where nobody says."""
    machine = read_meminfo(Path("/proc/meminfo")).get("MemAvailable")
    found = [size for size in (machine, _container_bytes()) if size is not None]
    return min(found) if found else None


def read_meminfo(path: Path) -> dict[str, int]:
    """Read a file like ``/proc/meminfo``: name → bytes (or a plain count); empty where there is no such file."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return {}
    found = {}
    for name, number, *unit in (line.split() for line in lines if len(line.split()) > 1):
        if number.isdigit():
            found[name.rstrip(":")] = int(number) * (1024 if unit == ["kB"] else 1)
    return found


def container_limit_bytes() -> int | None:
    """Memory that a container allows this process and those beside it, in bytes; None where there is no limit."""
    limits = (_number(folder / _names(is_second)[0]) for folder, is_second in control_groups("memory"))
    return min((limit for limit in limits if limit is not None and limit < _NO_LIMIT), default=None)


def _names(is_second: bool) -> tuple[str, str, str]:
    """Name the files of a control group: its limit, what it has taken, and its count of file pages."""
    if is_second:
        return "memory.max", "memory.current", "inactive_file"
    return "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def _container_bytes() -> int | None:
    """What the narrowest of this process's control groups, and of the groups around it, leaves."""
    found = []
    for folder, is_second in control_groups("memory"):
        limit, used, cache = _names(is_second)
        allowed, taken = _number(folder / limit), _number(folder / used)
        if allowed is not None and taken is not None:
            # The kernel gives file pages up first; they count as used although they are free.
            free_pages = read_meminfo(folder / "memory.stat").get(cache, 0)
            found.append(max(0, allowed - taken + free_pages))
    return min(found) if found else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def is_on_network(path: str | os.PathLike[str]) -> bool:
    """Whether a file lies on a file system that another machine serves; False where the system does not say."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    target, best = os.path.realpath(path), ("", "")
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])  # spaces come as \040
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        # Later lines cover earlier ones at the same place.
        if inside and len(point) >= len(best[0]):
            best = (point, after.split()[0])
    return best[1] in _NETWORK
