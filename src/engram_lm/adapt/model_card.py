"""The page of a shared adapter: what it is, what it was made for, and how to load it."""

import re
from collections.abc import Mapping
from pathlib import Path

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.tables import Table

REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$|[-.](/|$)))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
"""Names that the Hugging Face Hub accepts for a repository; none of them means anything to YAML, Markdown or Python."""
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}", re.ASCII)

_PAGE = """\
---
library_name: engram-lm
{header}tags:
- engram
- conditional-memory
---

# Conditional memory for {subject}

An adapter made with `engram-lm`. Before {layers} of the model, hashed N-grams of the text (suffixes of canonical \
tokens) look up rows of a table; a gate weighs them by the context, and the result is added to the hidden state. The \
model's own weights are not part of it.

## Load

```python
import engram_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
adapter = engram_lm.MemoryAdapter.from_pretrained(model, "THIS_FOLDER_OR_REPOSITORY", tokenizer=tokenizer{source})
```

{where}

## Geometry

Orders {orders}; {config.num_heads} hash heads per order; memory vectors of {config.memory_dim}; hidden size \
{config.hidden_size}; {num_parameters:,} parameters besides the tables.

| table | read before | rows | row width | type | bytes |
|---|---|---:|---:|---|---:|
{tables}

## Digests

An adapter only works with the tokenizer and the hash that it was trained with; loading compares them.

* HashSpec: `{spec.digest}`
* token map: `{spec.token_map_digest}`
"""
_TABLES_INSIDE = (
    'The tables are in `tables.safetensors`. They are loaded as parameters; with `table_tier="mmap"`, `"file"` or '
    '`"host"` rows are read where they lie, with the same logits to the bit.'
)
_TABLES_ELSEWHERE = (
    "The tables are not here. Name them with `table_source`: a folder or file of tables, or an address "
    "(`https://`, `mooncake://`); they are compared with the HashSpec below."
)
_UNITS = {"rows": "", "ngrams": ", and nor do the other rows of its N-gram"}
_OCCUPANCY = """
## Occupancy

A row of zeros was never written, and adds nothing{unit}. Where a token reads none that counts, the memory adds \
nothing to its hidden state, bit for bit.{rows}
"""


def model_card(
    *,
    config: EngramConfig,
    spec: HashSpec,
    base_name: str,
    model_type: str,
    tables: Mapping[str, Table],
    tables_inside: bool,
    num_written: Mapping[str, int] | None = None,
    license: str | None = None,
    extra: str = "",
) -> str:
    """Write the page of an adapter: Markdown with the header that the Hugging Face Hub reads.

    Names that come from other people's files are shown only if they look like names; a path on the author's machine, or
    a text that would act as markup, is left out. ``num_written`` counts the written rows of each table, where there is
    occupancy and they are known. ``extra`` is the author's own Markdown and is put at the end as it is.
    """
    if license is not None and not _WORD.fullmatch(license):
        raise ConfigError(f"license is an identifier such as 'apache-2.0' or 'other', not {license!r:.100}")
    base = base_name if REPOSITORY.fullmatch(base_name) and not Path(base_name).exists() else None
    kind = model_type if _WORD.fullmatch(model_type) else "transformers"
    # Quoted: a repository may be called 1e3 or null.
    header = {"base_model": base, "license": license}
    page = _PAGE.format(
        header="".join(f'{name}: "{value}"\n' for name, value in header.items() if value),
        subject=f"`{base}`" if base else f"a {kind} model",
        layers=_listed(config.layers),
        base=base or "BASE_MODEL",
        source="" if tables_inside else ', table_source="..."',
        where=_TABLES_INSIDE if tables_inside else _TABLES_ELSEWHERE,
        orders=", ".join(map(str, config.orders)),
        config=config,
        spec=spec,
        num_parameters=len(config.layers) * config.layer_parameters(),
        tables="\n".join(
            f"| {name} | {_listed(spec.blocks if name == 'shared' else (int(name),))} | {table.num_rows:,} | "
            f"{table.width} | {str(table.dtype).removeprefix('torch.')} | "
            f"{table.num_rows * table.width * table.dtype.itemsize:,} |"
            for name, table in tables.items()
        ),
    )
    if config.occupancy != "none":
        known = [f"{rows:,} of {tables[name].num_rows:,} in table {name}" for name, rows in (num_written or {}).items()]
        rows = f" Written rows: {', '.join(known)}." if known else ""
        page += _OCCUPANCY.format(unit=_UNITS[config.occupancy], rows=rows)
    return page + (f"\n{extra.rstrip(chr(10))}\n" if extra else "")


def _listed(blocks: tuple[int, ...]) -> str:
    return f"layer {blocks[0]}" if len(blocks) == 1 else f"layers {', '.join(map(str, blocks))}"
