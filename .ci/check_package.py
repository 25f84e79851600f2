"""Check what sdist and wheel hold: ``python .ci/check_package.py dist``, called by ``make package``.

The wheel holds the package and nothing else, with ``py.typed`` and all that is no Python; the sdist holds what git
tracks.
"""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(folder: pathlib.Path) -> int:
    """Print what is wrong with the two archives in a folder, and return 1 if anything is."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tracked = tracked_files()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    own = {name for name in names if ".dist-info/" not in name}
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    problems = [f"the wheel lacks {name}" for name in sorted(package - own)]
    problems += [f"the wheel holds {name}, which is no part of the package" for name in sorted(own - package)]
    for name in ("engram_lm/py.typed",):
        problems += [] if name in own else [f"the wheel lacks {name}"]
    for ending in (".dist-info/entry_points.txt", ".dist-info/licenses/LICENSE"):
        problems += [] if any(name.endswith(ending) for name in names) else [f"the wheel lacks {ending}"]
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    problems += [f"the sdist lacks {name}" for name in sorted(tracked - held)]
    print("\n".join(problems) or f"{wheel.name}: {len(own)} files; {sdist.name}: {len(held)} files", file=sys.stderr)
    return int(bool(problems))


def tracked_files() -> set[str]:
    """What git tracks; in an unpacked sdist, which has no git, the files of the package."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    files = (path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files if ".egg-info" not in path.as_posix()}


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
