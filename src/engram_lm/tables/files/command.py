"""``engram-lm table inspect`` and ``engram-lm table verify``: what a packed table is, and whether it is whole."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated

import tyro

from engram_lm.errors import ConfigError
from engram_lm.progress import NOTHING, Progress
from engram_lm.tables.files.packed import read_packed_header
from engram_lm.tables.files.sources import choose_layout, find_tables
from engram_lm.tables.files.verify import verify_packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a packed table says of itself: geometry, codec, bytes, digest, provenance. Reads no rows.

    Examples::

        engram-lm table inspect tables/layer-1.safetensors
        engram-lm table inspect tables/layer-1.safetensors --json
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """The packed table."""
    json: bool = False
    """Print JSON, with the HashSpec where the file has it."""

    def run(self) -> int:
        """Print it."""
        header = read_packed_header(self.path)
        values = header.describe()
        if self.json:
            print(json_module.dumps(values))
            return 0
        print(f"rows            {values['num_rows']:,} of {values['width']} numbers")
        print(f"codec           {header.codec}, {values['bytes_per_number']:.3f} bytes per number")
        print(f"records         {values['record_bytes']} bytes each")
        print(f"file            {values['file_bytes']:,} bytes")
        print(f"checksums       CRC-32 of {values['num_chunks']:,} chunks of {values['chunk_rows']:,} rows")
        print(f"hash            {values['spec_digest'] or 'not known'}")
        for name, value in values["provenance"].items():
            print(f"{name.replace('_', ' '):15} {value}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a packed table against its checksums, and against the checkpoint it was made from where one is named.

    Where something is wrong, it names the first bad chunk and its rows and exits with 1.

    Examples::

        engram-lm table verify tables/layer-1.safetensors
        engram-lm table verify tables/layer-1.safetensors --sample 100
        engram-lm table verify tables/layer-1.safetensors --source DeepSeek-V4.1-Flash --layer 1
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """The packed table."""
    sample: int | None = None
    """Check this many chunks, drawn evenly; all by default."""
    seed: int = 0
    """Seed of that draw."""
    source: str | None = None
    """The checkpoint that the table was made from, to compare its rows too."""
    layer: str | None = None
    """Which of the source's tables, where it holds several."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"--sample must be at least 1, not {self.sample}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be at least 0, not {self.seed}")
        if self.layer is not None and self.source is None:
            raise ConfigError("--layer chooses a table of the --source; name that too")

    def run(self) -> int:
        """Print what was checked and what was found."""
        source = self.source
        layout = None if source is None else choose_layout(find_tables(source), self.layer, source)
        header = read_packed_header(self.path)
        share = 1.0 if self.sample is None else min(1.0, self.sample / header.num_chunks)
        with Progress().tasks(NOTHING, unit="bytes") as tasks:
            found = verify_packed(
                self.path,
                sample=self.sample,
                seed=self.seed,
                source=layout,
                on_progress=lambda done: tasks.show("verifying", done, int(share * header.records_bytes)),
            )
        bad = found.bad
        if self.json:
            print(json_module.dumps(dataclasses.asdict(found)))
            return int(bad is not None)
        if bad is not None:
            rows = f"rows {bad.first_row} to {bad.last_row}"
            print(f"bad             chunk {bad.index}, {rows}, at byte {bad.start_bytes}")
            print(f"because         {bad.reason}")
            print("what to do      copy the file again, or convert its source again")
        else:
            print(f"good            checksums{' and the source' if found.source_compared else ''} agree")
        print(f"checked         {found.chunks_checked:,} of {found.num_chunks:,} chunks, {found.rows_checked:,} rows")
        return int(bad is not None)
