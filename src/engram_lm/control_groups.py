"""The control groups that a process is in, where containers and schedulers of clusters set their limits."""

from pathlib import Path


def control_groups(controller: str) -> list[tuple[Path, bool]]:
    """Find the folders that may limit this process: its own control group's and those around it, innermost first.

    Args:
        controller: What is limited, such as ``memory`` or ``cpu``.

    Returns:
        Each folder, with whether it belongs to version 2 of control groups, whose files have other names; empty where
        the system has no control groups.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, name = line.partition(":")
        controllers, _, path = name.partition(":")
        is_second = number == "0" and not controllers
        if not is_second and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") if is_second else Path("/sys/fs/cgroup", controller)
        inside = Path(f"{root}{path}")
        found += [(folder, is_second) for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
    return found
