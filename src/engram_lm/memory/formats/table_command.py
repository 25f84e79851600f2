"""``engram-lm table build`` and ``engram-lm table convert``: packed tables that know the hash of their checkpoint."""

import dataclasses
import json as json_module
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engram_lm.errors import CheckpointError, ConfigError, EngramError, check_flags
from engram_lm.files import read_json, user_path
from engram_lm.hashing import HashSpec
from engram_lm.progress import Progress
from engram_lm.tables import RowLayout
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import Converted, build_packed, build_random, convert, provenance_of
from engram_lm.tables.files.packed import PackedHeader
from engram_lm.tables.files.sources import choose_layout, find_tables

Dtype = Literal["float32", "bfloat16", "float16", "float8_e4m3", "int8", "int4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """Write one packed table: from a checkpoint's table, or of random rows for a geometry.

    Examples::

        engram-lm table build layer-1.safetensors --source RUN --layer 1
        engram-lm table build random.safetensors --rows 1000000 --width 256 --dtype float8_e4m3
        engram-lm table build random.safetensors --config config.json --layer 1 --width 256
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """The file to write; its name should end with .safetensors."""
    source: str | None = None
    """A checkpoint folder or file whose table is taken."""
    config: Path | None = None
    """A config.json, published or ours, whose hash says how many rows a random table has."""
    layer: str | None = None
    """Which table of the source or config, where there are several."""
    rows: int | None = None
    """Rows of a random table."""
    width: int | None = None
    """Numbers in each row of a random table."""
    std: float = 1.0
    """Standard deviation of random rows."""
    seed: int = 0
    """Seed of random rows."""
    dtype: Dtype | None = None
    """How numbers are stored; as in the source by default, bfloat16 for random rows."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.source, self.config, self.rows)) != 1:
            raise ConfigError("give exactly one of --source, --config and --rows")
        if (self.source is None) != (self.width is not None):
            raise ConfigError("--width belongs to random rows (--rows or --config), which need it")
        check_flags(self, "rows", "width")

    def run(self) -> int:
        """Write the table and print what it is."""
        with Progress().tasks("nothing: the file appears when it is whole", unit="bytes") as tasks:
            header = (self._random if self.source is None else self._copy)(
                lambda total: lambda done: tasks.show("building", done, total)
            )
        if self.json:
            print(json_module.dumps(header.describe()))
        else:
            print(
                f"{self.path}: {header.num_rows:,} rows of {header.codec.width} numbers, {header.codec}, "
                f"{header.file_bytes:,} bytes"
            )
        return 0

    def _copy(self, progress: Any) -> PackedHeader:
        assert self.source is not None
        layouts = find_tables(self.source)
        about = checked_spec(self.source, layouts)
        layout = choose_layout(layouts, self.layer, self.source)
        codec = layout.codec if self.dtype is None else RowCodec.named(self.dtype, layout.codec.width)
        return build_packed(
            self.path,
            layout,
            codec=codec,
            provenance=provenance_of(layout, self.source, "build"),
            on_progress=progress(layout.num_rows * codec.record_bytes),
            **about,
        )

    def _random(self, progress: Any) -> PackedHeader:
        assert self.width is not None
        rows, about = self.rows, dict[str, Any]()
        if self.config is not None:
            spec = HashSpec.from_config(self.config)
            rows, about = self._rows_of(spec), {"spec_digest": spec.digest, "hash_spec": spec.to_dict()}
        assert rows is not None
        codec = RowCodec.named(self.dtype or "bfloat16", self.width)
        on_progress = progress(rows * codec.record_bytes)
        return build_random(self.path, rows, codec, std=self.std, seed=self.seed, on_progress=on_progress, **about)

    def _rows_of(self, spec: HashSpec) -> int:
        layers = {str(layer): layer for layer in spec.layers}
        if self.layer is None and len(layers) > 1 and not spec.shared_table:
            raise ConfigError(f"the config has the layers {', '.join(layers)}; choose one with --layer")
        name = self.layer or next(iter(layers))
        if name not in layers:
            raise ConfigError(f"the config has the layers {', '.join(layers)}, not {name}")
        return spec.num_rows(layers[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Write the tables of a checkpoint as packed tables; `engram_lm.evaluation.rounding` adds what needs a model."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """The checkpoint: a folder, or one file of it."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """Folder for the packed tables, each named layer-L.safetensors."""
    layer: str | None = None
    """Convert this table only."""
    dtype: Dtype | None = None
    """How numbers are stored; unchanged by default. Types of 8 bits and less have a scale for every 32 numbers."""
    resume: Literal["yes", "no"] = "yes"
    """Whether to continue the work of an interrupted call, and to leave finished files alone."""
    error_rows: int = 131_072
    """Rows, drawn evenly, that the error is measured on; 0 for all (16,777,216 at most)."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.error_rows < 0:
            raise ConfigError(f"--error-rows must be at least 0, not {self.error_rows}")

    def run(self) -> int:
        """Convert, and print what was written and what it cost."""
        goes_on = "the rows that are written; the same command goes on from there"
        keeps = goes_on if self.resume == "yes" else "the tables that are whole, and nothing of this one"
        with Progress().tasks(keeps, unit="bytes") as tasks:
            results = convert(
                self.source,
                self.target,
                layer=self.layer,
                dtype=self.dtype,
                resume=self.resume == "yes",
                progress=lambda layer, done, total: tasks.show(f"layer {layer}", done, total),
                error_rows=self.error_rows or None,
                **checked_spec(self.source, find_tables(self.source)),
            )
        loss = self.loss_change(results)
        if self.json:
            print(json_module.dumps({"tables": [result.to_dict() for result in results], "loss": loss}))
            return 0
        for result in results:
            _print(result)
        if loss is not None:
            print(
                f"held-out loss     {loss['loss_before']:.5f} → {loss['loss_after']:.5f} nats per token, "
                f"{loss['change']:+.5f}, {loss['num_tokens']:,} tokens"
            )
        return 0

    def loss_change(self, results: Sequence[Converted]) -> dict[str, Any] | None:
        """Measure what the new tables do to a model's loss, as JSON values; None where no model is named."""
        return None


def _print(result: Converted) -> None:
    values = result.to_dict()
    print(f"layer {result.layer}: {result.path}{' (was there already)' if result.kept else ''}")
    print(f"  rows            {values['num_rows']:,} of {values['width']} numbers, {values['source_codec']} → "
          f"{values['codec']}")  # fmt: skip
    print(
        f"  bytes           {values['source_bytes']:,} → {values['stored_bytes']:,}, saved {values['bytes_saved']:,} "
        f"({values['bytes_saved'] / values['source_bytes']:.1%}); the file has {values['file_bytes']:,}"
    )
    if (error := result.error) is not None:
        rows = "all rows" if error.all_rows else f"{error.num_rows:,} rows drawn evenly"
        print(
            f"  relative error  mean {error.relative_error_mean:.3e}, median {error.relative_error_p50:.3e}, "
            f"99 % {error.relative_error_p99:.3e}, max {error.relative_error_max:.3e} ({rows})"
        )
        print(f"  cosine          mean {error.cosine_mean:.8f}, min {error.cosine_min:.8f}")


def checked_spec(source: str | os.PathLike[str], layouts: Mapping[int | str, RowLayout]) -> dict[str, Any]:
    """Compare the tables of a checkpoint with the hash in its ``config.json``, if it describes one.

    Returns what the header of a packed copy says of the hash: ``spec_digest`` and ``hash_spec``; empty without one.

    Raises:
        CheckpointError: The configuration is not a readable JSON object, or there is a table of a layer that it does
            not name, or one of another number of rows than the hash addresses.
    """
    path = user_path(source)
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return {}
    read_json(folder / "config.json", advice="download it again")
    try:
        spec = HashSpec.from_config(folder)
    except EngramError:
        return {}
    expected: dict[int | str, int] = dict(zip(spec.blocks, spec.padded_rows, strict=True))
    if spec.shared_table:
        expected = {"shared": spec.padded_rows[0]}
    for key, layout in layouts.items():
        if key not in expected:
            raise CheckpointError(
                f"{source} holds a table of layer {key}, config.json describes those of {sorted(map(str, expected))}; "
                "the folder holds weights of another model"
            )
        if layout.num_rows != expected[key]:
            raise CheckpointError(
                f"{source}: the table of layer {key} has {layout.num_rows} rows, the hash in config.json addresses "
                f"{expected[key]}; the folder holds weights of another geometry"
            )
    return {"spec_digest": spec.digest, "hash_spec": spec.to_dict()}
