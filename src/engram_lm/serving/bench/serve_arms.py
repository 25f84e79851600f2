"""What ``engram-lm bench serve`` compares: one arm is one engine over one place of the tables."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is timed."""

    about: str
    """What it is, for people."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What generates."""
    tier: str | None = None
    """Where the tables are read from; None is the model without memory."""
    is_cold: bool = False
    """Whether the tables' files are dropped from memory before each pass."""

    @property
    def is_in_files(self) -> bool:
        """Whether rows are read from files of this machine while requests run."""
        return self.tier in ("mmap", "file")


ARMS: Mapping[str, Arm] = {
    "none": Arm(about="without memory"),
    "none_again": Arm(about="without memory, once more: what differs from the first is noise"),
    "device": Arm(about="tables with the model", tier="device"),
    "host": Arm(about="tables in this machine's memory", tier="host"),
    "mmap": Arm(about="tables mapped, their rows in the page cache", tier="mmap"),
    "mmap_cold": Arm(about="tables mapped, their files dropped before each pass", tier="mmap", is_cold=True),
    "file": Arm(about="tables in files with read-ahead, their rows in the page cache", tier="file"),
    "file_cold": Arm(about="tables in files with read-ahead, dropped before each pass", tier="file", is_cold=True),
    "remote": Arm(about="tables at an address", tier="remote"),
    "hf": Arm(about="transformers, batches sorted by length, tables mapped", engine="transformers", tier="mmap"),
    "hf_none": Arm(about="transformers, batches sorted by length, without memory", engine="transformers"),
}
"""All arms by name."""
