"""``engram-lm table build`` and ``engram-lm table convert``: packed tables, and what rounding them costs."""

import dataclasses
import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.formats.table_rows import check_table_rows, spec_beside
from engram_lm.tables import RowLayout
from engram_lm.tables.files.progress import byte_progress

__all__ = ["Build", "Convert"]

Dtype = Literal["float32", "bfloat16", "float16", "float8_e4m3", "int8", "int4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """Write one packed table: of a checkpoint's table, or of random rows for a geometry.

    Examples::

        engram-lm table build layer-1.safetensors --source RUN --layer 1
        engram-lm table build random.safetensors --rows 1000000 --width 256 --dtype float8_e4m3
        engram-lm table build random.safetensors --config config.json --layer 1 --width 256
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """The file to write, which should end with .safetensors."""
    source: str | None = None
    """A checkpoint folder or file whose table is taken."""
    config: Path | None = None
    """A published config.json, or ours, whose hash says how many rows a random table has."""
    layer: str | None = None
    """Which table of the source or config, where there are several."""
    rows: int | None = None
    """Rows of a random table."""
    width: int | None = None
    """Numbers in each of its rows."""
    std: float = 1.0
    """Standard deviation of random rows."""
    seed: int = 0
    """Of random rows."""
    dtype: Dtype | None = None
    """How numbers are stored; as in the source unless given, bfloat16 for random rows."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.source, self.config, self.rows)) != 1:
            raise ConfigError("give exactly one of --source, --config and --rows")
        if (self.source is None) != (self.width is not None):
            raise ConfigError("--width belongs to random rows (--rows or --config), which need it")
        for name in ("rows", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")

    def run(self) -> int:
        """Write the table and print what it is."""
        from engram_lm.tables.codec import RowCodec
        from engram_lm.tables.files.build import build_packed, build_random, provenance_of
        from engram_lm.tables.files.packed import inspect_packed
        from engram_lm.tables.files.sources import choose_layout, find_tables

        with byte_progress() as advance:
            if self.source is not None:
                layouts = find_tables(self.source)
                about = _checked_spec(Path(self.source), layouts)
                layout = choose_layout(layouts, self.layer, self.source)
                codec = layout.codec if self.dtype is None else RowCodec.named(self.dtype, layout.codec.width)
                total = layout.num_rows * codec.record_bytes
                build_packed(
                    self.path,
                    layout,
                    codec=codec,
                    provenance=provenance_of(layout, self.source, "build"),
                    on_progress=lambda done: advance("building", done, total),
                    **about,
                )
            else:
                assert self.width is not None
                spec = None if self.config is None else HashSpec.from_config(self.config)
                about = {} if spec is None else {"spec_digest": spec.digest, "hash_spec": spec.to_dict()}
                rows = self.rows or self._rows_of(HashSpec.from_config(self.config or ""))
                codec = RowCodec.named(self.dtype or "bfloat16", self.width)
                total = rows * codec.record_bytes
                build_random(
                    self.path,
                    rows,
                    codec,
                    std=self.std,
                    seed=self.seed,
                    on_progress=lambda done: advance("building", done, total),
                    **about,
                )
        values = inspect_packed(self.path)
        if self.json:
            print(json_module.dumps(values))
        else:
            print(
                f"{self.path}: {values['num_rows']:,} rows of {values['width']} numbers, {codec}, "
                f"{values['file_bytes']:,} bytes"
            )
        return 0

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
    """Write the tables of a checkpoint as packed tables: as they are, or rounded to another type.

    Sources are this library's own checkpoints, DeepSeek-V4.1 and Qwen (qwen4_exp) folders, and packed tables. An
    interrupted conversion goes on where it was when it is called again. Where numbers are rounded, bytes saved and
    error are printed; with --model and --data also the change in held-out loss.

    Examples::

        engram-lm table convert DeepSeek-V4.1-Flash tables
        engram-lm table convert DeepSeek-V4.1-Flash tables --layer 1 --dtype int4
        engram-lm table convert RUN tables --dtype int8 --model RUN --data held-out.txt
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """The checkpoint: a folder, or one file of it."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """Folder for the packed tables, layer-L.safetensors each."""
    layer: str | None = None
    """Convert this table only."""
    dtype: Dtype | None = None
    """How numbers are stored; as they are unless given. 8 bits and less have scales by blocks of 32."""
    resume: Literal["yes", "no"] = "yes"
    """Whether to go on with the work of an interrupted call, and to leave finished files alone."""
    error_rows: int = 131_072
    """Rows, drawn evenly, that the error is measured on; 0 for all (16,777,216 at most)."""
    model: Path | None = None
    """A model of this library: measure its held-out loss with its own tables and with these."""
    data: tuple[Path, ...] = ()
    """Text files or folders for that."""
    sequence_length: int | None = None
    """Tokens in a sequence; what the model was trained with unless given, 1024 at most."""
    max_tokens: int | None = None
    """Measure the loss on so many tokens at most."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if (self.model is None) != (not self.data):
            raise ConfigError("--model and --data belong together: the loss of a model on text")
        if self.error_rows < 0:
            raise ConfigError(f"--error-rows must be at least 0, not {self.error_rows}")
        for name in ("sequence_length", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    def run(self) -> int:
        """Convert, and print what was written and what it cost."""
        from engram_lm.tables.files.convert import convert
        from engram_lm.tables.files.sources import find_tables

        with byte_progress() as advance:
            last: dict[int | str, int] = {}

            def show(layer: int | str, done: int, total: int) -> None:
                advance(f"layer {layer}", done - last.get(layer, 0), total)
                last[layer] = done

            results = convert(
                self.source,
                self.target,
                layer=self.layer,
                dtype=self.dtype,
                resume=self.resume == "yes",
                progress=show,
                error_rows=self.error_rows or None,
                **_checked_spec(Path(self.source), find_tables(self.source)),
            )
        loss = self._loss({result.layer: result.path for result in results}) if self.model is not None else None
        if self.json:
            tables = [result.to_dict() for result in results]
            print(json_module.dumps({"tables": tables, "loss": None if loss is None else dataclasses.asdict(loss)}))
            return 0
        for result in results:
            saved = result.source_bytes - result.stored_bytes
            print(f"layer {result.layer}: {result.path}{' (was there already)' if result.kept else ''}")
            print(
                f"  rows            {result.num_rows:,} of {result.width} numbers, "
                f"{result.source_codec} → {result.codec}"
            )
            print(
                f"  bytes           {result.source_bytes:,} → {result.stored_bytes:,}, saved {saved:,} "
                f"({saved / result.source_bytes:.1%}); the file has {result.file_bytes:,}"
            )
            if (error := result.error) is not None:
                rows = "all rows" if error.all_rows else f"{error.num_rows:,} rows drawn evenly"
                print(
                    f"  relative error  mean {error.relative_error_mean:.3e}, median {error.relative_error_p50:.3e}, "
                    f"99 % {error.relative_error_p99:.3e}, max {error.relative_error_max:.3e} ({rows})"
                )
                print(f"  cosine          mean {error.cosine_mean:.8f}, min {error.cosine_min:.8f}")
        if loss is not None:
            print(
                f"held-out loss     {loss.loss_before:.5f} → {loss.loss_after:.5f} nats per token, {loss.change:+.5f}, "
                f"{loss.num_tokens:,} tokens"
            )
        return 0

    def _loss(self, paths: dict[int | str, Path]) -> Any:
        from engram_lm.evaluation.rounding import loss_change
        from engram_lm.serving.load import load_model
        from engram_lm.tables.files.packed import packed_layout
        from engram_lm.training.data.batches import pack
        from engram_lm.training.data.corpus import read_corpus

        assert self.model is not None
        corpus = read_corpus(self.data)
        model, tokenizer = load_model(self.model, device="cpu")
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        tokens = pack(corpus.documents, tokenizer)
        if self.max_tokens is not None:
            tokens = tokens[: self.max_tokens + 1]
        layouts = {key: packed_layout(path) for key, path in paths.items()}
        return loss_change(model, layouts, tokens, length=self.sequence_length or min(longest, 1024))


def _checked_spec(source: Path, layouts: Mapping[int | str, RowLayout]) -> dict[str, Any]:
    """What the headers of packed tables say of the hash, after the tables were held against it."""
    spec = spec_beside(source)
    if spec is None:
        return {}
    check_table_rows(layouts, spec, source)
    return {"spec_digest": spec.digest, "hash_spec": spec.to_dict()}
