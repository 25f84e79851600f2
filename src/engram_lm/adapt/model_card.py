"""The page that a shared adapter shows of itself: what it is, what it was made for, and how to load it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig

__all__ = ["REPOSITORY", "SavedTable", "check_license", "model_card"]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
"""What the Hugging Face Hub takes for a repository; nothing in it means anything to YAML, Markdown or Python."""
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}", re.ASCII)


class SavedTable(NamedTuple):
    """A table as the page lists it."""

    blocks: tuple[int, ...]
    """Decoder layers that read it."""
    num_rows: int
    """Its rows."""
    width: int
    """Numbers in a row."""
    dtype: torch.dtype
    """Type of the numbers."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole table."""
        return self.num_rows * self.width * self.dtype.itemsize


def check_license(license: str | None) -> None:
    """Refuse what is no identifier of a license.

    Raises:
        ConfigError: As said.
    """
    if license is not None and not _WORD.fullmatch(license):
        raise ConfigError(f"license is an identifier such as 'apache-2.0' or 'other', not {license!r:.100}")


def model_card(
    *,
    config: EngramConfig,
    spec: HashSpec,
    base_name: str,
    model_type: str,
    tables: Mapping[str, SavedTable],
    tables_inside: bool,
    license: str | None = None,
    extra: str = "",
) -> str:
    """Write the page of an adapter, Markdown with the header that the Hugging Face Hub reads.

    Names that were read from somebody's files are shown only where they look like names: a path on the author's
    machine, or what would be markup, is left out.

    Args:
        config: Geometry and options.
        spec: The hash, with its token map.
        base_name: Where the model it was made for was loaded from.
        model_type: That model's architecture.
        tables: The tables by name.
        tables_inside: Whether they are in the folder.
        license: Identifier of the license; left out where None.
        extra: The author's own Markdown, such as results; put at the end as it is.

    Raises:
        ConfigError: The license is no identifier.
    """
    check_license(license)
    base = base_name if REPOSITORY.fullmatch(base_name) and not Path(base_name).exists() else None
    kind = model_type if _WORD.fullmatch(model_type) else "transformers"
    header = ["library_name: engram-lm"]
    # Quoted: a repository may be called 1e3 or null.
    header += [f'base_model: "{base}"'] if base else []
    header += [f'license: "{license}"'] if license else []
    header += ["tags:", "- engram", "- conditional-memory"]
    orders = ", ".join(map(str, config.orders))
    lines = [
        "---",
        *header,
        "---",
        "",
        f"# Conditional memory for {f'`{base}`' if base else f'a {kind} model'}",
        "",
        f"An adapter made with `engram-lm`. Before {_listed(config.layers)} of the model, hashed N-grams of the text "
        "(suffixes of canonical tokens) look up rows of a table; a gate weighs them by the context, and the result is "
        "added to the hidden state. The model's own weights are not part of it.",
        "",
        "## Load",
        "",
        "```python",
        "import engram_lm",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = "{base or "BASE_MODEL"}"',
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)",
        'adapter = engram_lm.MemoryAdapter.from_pretrained(model, "THIS_FOLDER_OR_REPOSITORY", tokenizer=tokenizer'
        + ("" if tables_inside else ', table_source="..."')
        + ")",
        "```",
        "",
        _where(tables_inside),
        "",
        "## Geometry",
        "",
        f"Orders {orders}; {config.num_heads} hash heads per order; memory vectors of {config.memory_dim}; hidden "
        f"size {config.hidden_size}; {len(config.layers) * config.layer_parameters():,} parameters besides the tables.",
        "",
        "| table | read before | rows | row width | type | bytes |",
        "|---|---|---:|---:|---|---:|",
        *(
            f"| {name} | {_listed(table.blocks)} | {table.num_rows:,} | {table.width} | "
            f"{str(table.dtype).removeprefix('torch.')} | {table.num_bytes:,} |"
            for name, table in tables.items()
        ),
        "",
        "## Digests",
        "",
        "An adapter only works with the tokenizer and the hash that it was trained with; loading compares them.",
        "",
        f"* HashSpec: `{spec.digest}`",
        f"* token map: `{spec.token_map_digest}`",
        "",
    ]
    if extra:
        lines += [extra.rstrip("\n"), ""]
    return "\n".join(lines)


def _listed(blocks: tuple[int, ...]) -> str:
    return f"layer {blocks[0]}" if len(blocks) == 1 else f"layers {', '.join(map(str, blocks))}"


def _where(tables_inside: bool) -> str:
    if not tables_inside:
        return (
            "The tables are not here. Name them with `table_source`: a folder or file of tables, or an address "
            "(`https://`, `mooncake://`); they are compared with the HashSpec below."
        )
    return (
        'The tables are in `tables.safetensors`. They are loaded as parameters; with `table_tier="mmap"`, `"file"` or '
        '`"host"` rows are read where they lie, with the same logits to the bit.'
    )
