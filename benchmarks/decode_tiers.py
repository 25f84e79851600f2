"""What reading tables from a tier costs a model: decode steps and prefill, with tables resident, mapped and in files.

    python benchmarks/decode_tiers.py --out benchmarks/results/decode_tiers.json
    python benchmarks/decode_tiers.py --cases decode --tiers resident mmap file --repeats 60
    python benchmarks/decode_tiers.py --cases prefill --tiers resident mmap file "file, cache"

All variants take one step in turn, on the same tokens, which change from step to step: a step that reads the rows of
the step before would measure a cache. Each has its own copy of the tables' files, so that none warms another's. "Warm":
the files were read before. "Dropped": before every single step their pages are given back (posix_fadvise DONTNEED on
flushed files), and how much of them is still in memory is measured by mincore after the last round and reported:
pages that this process has mapped stay, so a mapped table keeps those that earlier rounds read, and reads others.
"""

import argparse
import functools
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from transformers.utils import logging

from engram_lm.model import EngramForCausalLM
from engram_lm.tables import ParameterTable
from engram_lm.tables.files.safetensors_file import INDEX_NAME
from engram_lm.tables.tiers.page_cache import drop_from_memory, resident_share
from model import build

PROMPT_TOKENS = 64
CACHE_BYTES = 1 << 20
VARIANTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"table_tier": "host", "table_read_ahead": False},
    "mmap": {"table_tier": "mmap", "table_read_ahead": False},
    "mmap, read ahead": {"table_tier": "mmap"},
    "mmap, cache": {"table_tier": "mmap", "table_read_ahead": False, "table_cache_bytes": CACHE_BYTES},
    "mmap, cache, read ahead": {"table_tier": "mmap", "table_cache_bytes": CACHE_BYTES},
    "file": {"table_tier": "file", "table_read_ahead": False},
    "file, read ahead": {"table_tier": "file"},
    "file, cache": {"table_tier": "file", "table_read_ahead": False, "table_cache_bytes": CACHE_BYTES},
    "file, cache, read ahead": {"table_tier": "file", "table_cache_bytes": CACHE_BYTES},
}


def checkpoints(size: str, folder: Path, names: list[str]) -> dict[str, Path]:
    """The preset, saved with random weights: a folder for each variant, with the backbone linked and tables copied."""
    # In bfloat16, so that reading rows converts nothing, as in a released checkpoint.
    build(size, True, "cpu").to(torch.bfloat16).save_pretrained(folder / "saved", max_shard_size="1MB")
    weights = json.loads((folder / "saved" / INDEX_NAME).read_text())["weight_map"]
    tables = {file for name, file in weights.items() if "memory_tables" in name}
    shared = {name for name, file in weights.items() if file in tables and "memory_tables" not in name}
    assert not shared, f"{shared} lie in the tables' files, whose pages they would keep in memory"
    found = {}
    for number, name in enumerate(names):
        found[name] = folder / str(number)
        found[name].mkdir()
        for path in (folder / "saved").iterdir():
            target = found[name] / path.name
            if path.name in tables:
                shutil.copyfile(path, target)
            else:
                target.symlink_to(path.resolve())
    return found


def table_files(model: EngramForCausalLM) -> list[Path]:
    """The files that the tables are read from; none where they are resident."""
    return sorted({Path(stored.file) for stored in model.model.tables_apart.stored.values()})


def drop(paths: list[Path]) -> None:
    """Give the files' pages back."""
    for path in paths:
        drop_from_memory(path)


def share_in_memory(paths: list[Path]) -> float | None:
    """Share of the files' bytes whose pages are in memory; None without files, or where the system does not say."""
    shares = [(resident_share(path), path.stat().st_size) for path in paths]
    if not shares or any(share is None for share, _ in shares):
        return None
    return sum(share * size for share, size in shares) / sum(size for _, size in shares)


class Steps:
    """One model on one tier, which takes the same steps as all the others."""

    def __init__(self, folder: Path, options: dict[str, Any], batch_size: int, prefill: int) -> None:
        self.model = EngramForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
        self.random = torch.Generator().manual_seed(0)
        self.batch_size, self.prefill = batch_size, prefill
        self.high = self.model.config.vocab_size
        prompt = self.tokens(PROMPT_TOKENS)
        self.cache = None if prefill else self.model(prompt, use_cache=True).past_key_values
        # Rolled back after each step, so that every step attends to as many tokens as every other.
        if self.cache is not None:
            self.cache.activate_past_recording()

    def tokens(self, length: int) -> torch.Tensor:
        return torch.randint(3, self.high, (self.batch_size, length), generator=self.random)

    def step(self) -> None:
        if self.cache is None:
            self.model(self.tokens(self.prefill), use_cache=False, logits_to_keep=1)
            return
        self.model(self.tokens(1), past_key_values=self.cache, use_cache=True)

    def rewind(self) -> None:
        if self.cache is not None:
            self.cache.crop(-1)

    def close(self) -> None:
        for table in self.model.tables.values():
            if not isinstance(table, ParameterTable):
                table.close()


@torch.no_grad()
def compare(folders: dict[str, Path], batch_size: int, prefill: int, dropped: bool, repeats: int) -> list[Any]:
    """Interleaved steps of all variants: medians, and the median of each round's ratio to resident tables.

    ``prefill`` is the tokens of a prefill, or 0 for decode steps.
    """
    # Before anything maps them: pages read by copying lie in large folios, of which one mapped page keeps all.
    drop([path for folder in folders.values() for path in folder.glob("*.safetensors") if not path.is_symlink()])
    running = {name: Steps(folder, VARIANTS[name], batch_size, prefill) for name, folder in folders.items()}
    files = {name: table_files(steps.model) for name, steps in running.items()}
    for path in [path for paths in files.values() for path in paths]:
        if not dropped:
            path.read_bytes()

    calls: dict[str, Callable[[], None]] = {}
    for name, steps in running.items():
        if dropped:
            calls[f"{name} (drop)"] = functools.partial(drop, files[name])
        calls[name] = steps.step
        calls[f"{name} (rewind)"] = steps.rewind
    seconds = harness.measure(calls, repeats)
    shares = {}
    for name in running:
        drop(files[name] if dropped else [])
        shares[name] = share_in_memory(files[name])
    rows = []
    for name, steps in running.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["resident"], strict=True))
        tables = [table.stats() for table in steps.model.tables.values()]
        kept = ("hits", "misses", "staged_rows", "used_rows", "wasted_rows", "skipped")
        rows.append(
            {
                "case": "prefill" if prefill else "decode step",
                "tables": name,
                "page_cache": "dropped" if dropped else "warm",
                "share_of_files_in_memory": shares[name],
                "batch_size": batch_size,
                "tokens": batch_size * (prefill or 1),
                "table_bytes": sum(table["table_bytes"] for table in tables),
                "median_seconds": statistics.median(seconds[name]),
                "best_seconds": min(seconds[name]),
                "ratio_to_resident": ratio,
                "seconds": seconds[name],
                "repeats": repeats,
                **{key: sum(table[key] for table in tables) for key in kept if key in tables[0]},
            }
        )
        steps.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--size", default="tiny", choices=["nano", "tiny", "small"])
    parser.add_argument("--tiers", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--cases", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--prefill-tokens", nargs="+", type=int, default=[512, 2048], help="of one sequence each")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--folder", help="where the checkpoint is written for the run; on a disk, not in memory")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(["resident", *arguments.tiers]))
    results: list[dict[str, Any]] = []
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd()) as made:
        folders = checkpoints(arguments.size, Path(made), names)
        steps = [(batch_size, 0) for batch_size in arguments.batch_sizes] if "decode" in arguments.cases else []
        if "prefill" in arguments.cases:
            steps += [(1, tokens) for tokens in arguments.prefill_tokens]
        for batch_size, prefill in steps:
            for dropped in (False, True):
                repeats = max(5, arguments.repeats // 5) if prefill else arguments.repeats
                for row in compare(folders, batch_size, prefill, dropped, repeats):
                    results.append({"size": arguments.size, "dtype": "bfloat16", **row})
                    shown = {key: value for key, value in results[-1].items() if key != "seconds"}
                    print(json.dumps(shown), flush=True)
    if arguments.out:
        harness.write(arguments.out, "decode_tiers", results)


if __name__ == "__main__":
    main()
