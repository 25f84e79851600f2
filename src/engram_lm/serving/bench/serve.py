"""``engram-lm bench serve``: tokens a second of an engine, without memory and with tables in every place."""

import contextlib
import dataclasses
import json as json_module
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from transformers import AutoTokenizer

from engram_lm.errors import ConfigError, check_flags, suggestion
from engram_lm.files import new_folder
from engram_lm.progress import NOTHING, Progress
from engram_lm.serving.bench.bench_model import (
    SHAPES,
    copy_tables,
    copy_without_memory,
    disk_bytes,
    make_model,
    read_config,
    stored_tables,
)
from engram_lm.serving.bench.serve_arms import ARMS
from engram_lm.serving.bench.serve_price import Price, Work, price
from engram_lm.serving.bench.serve_process import ArmProcess, file_server, nursery
from engram_lm.serving.bench.serve_results import BASE, print_results, summarize
from engram_lm.serving.bench.tables import COLD_METHOD
from engram_lm.serving.bench.text_requests import cut_requests, draw_lengths
from engram_lm.serving.vllm.version import require_vllm
from engram_lm.tables.byte_size import byte_size
from engram_lm.threads import allowed_cores
from engram_lm.training.data.documents import Corpus, pack, read_documents
from engram_lm.training.run_folder import commit, machine, versions

_FEW_CORES = 4
_BATCHED_TOKENS = 2048
_MADE = "made.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeBench:
    """Measure what memory costs an engine that serves: the paper's throughput table, on this machine.

    Requests are cut from real text, and all arms answer the same ones greedily, without a prefix cache, over the same
    backbone. Each arm is a process that loads once; the arms take their passes in turn, in a new order each round.
    What is printed is the median, in tokens read and generated per second, and per second of CPU time: the latter
    hardly depends on what else the machine does, the former does.

    Arms: none (without memory), none_again (the same once more: the difference is noise), device, host, mmap,
    mmap_cold, file, file_cold, remote, and hf and hf_none (batches of transformers). Cold means that the tables' files
    are dropped from memory before each pass, and mincore says how much of them was left.

    Examples::

        engram-lm bench serve bench-dense --requests 48 --new-tokens 32
        engram-lm bench serve tiny --table-gigabytes 10 --arms none,none_again,mmap,mmap_cold --folder /mnt/nvme/bench
        engram-lm bench serve runs/quickstart --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHAPE|FOLDER")]
    """A shape that is given random weights (bench-dense, bench-moe, nano, tiny, small, engram-27b, ...), or the folder
    of a checkpoint of ours."""
    arms: str | None = None
    """Arms to measure, separated by commas; all those that there is room for where left out."""
    requests: int = 512
    """Requests in a pass."""
    shortest: int = 100
    """Tokens of the shortest request."""
    longest: int = 1024
    """Tokens of the longest; all lengths between the two are equally likely."""
    new_tokens: int = 64
    """Tokens to generate for each request, whatever they are."""
    passes: int = 3
    """Passes of each arm."""
    table_gigabytes: float | None = None
    """Size of all tables of a shape in 10^9 bytes; that of the shape where left out."""
    holes: bool = False
    """Write no rows: files of any size then take no room. Their pages are zeros that the kernel makes without reading
    the disk, so such a table says what hashing, gathering and page faults cost, and nothing of the disk."""
    data: tuple[Path, ...] = ()
    """Text files or folders that requests are cut from; the Python standard library's own sources where left out."""
    tokenizer: Path | None = None
    """Folder of the tokenizer for a shape; one is trained on the text where left out."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the weights, of tables that are made, and of computing; bfloat16, or that of the checkpoint."""
    sequences: int = 16
    """Requests that the engine runs at the same time."""
    hf_batch_size: int = 16
    """Requests in a batch of transformers."""
    remote: str | None = None
    """Address of the tables for the arm remote; a file server on this machine is started where left out."""
    remote_requests: int = 16
    """Requests of the arm remote at most: reading row by row over a network takes long."""
    folder: Path | None = None
    """Where models and tables are written. A folder that is named is kept, and used again by a call with the same model
    and tables; without one, a temporary folder is removed in the end."""
    seed: int = 0
    """Decides the weights, the requests and the order of the arms."""
    dry_run: bool = False
    """Say what would be written, how much memory and about how many minutes it would take, and end."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_flags(
            self,
            "requests",
            "shortest",
            "longest",
            "new_tokens",
            "passes",
            "sequences",
            "hf_batch_size",
            "remote_requests",
        )
        if self.shortest > self.longest:
            raise ConfigError(f"--shortest {self.shortest} is longer than --longest {self.longest}")
        if self.table_gigabytes is not None and not 0 < self.table_gigabytes < 1e6:
            raise ConfigError(f"--table-gigabytes is a size above 0, not {self.table_gigabytes}")
        if not self._is_shape:
            for name in ("table_gigabytes", "tokenizer", "holes"):
                if getattr(self, name):
                    raise ConfigError(f"--{name.replace('_', '-')} is for shapes; {self.model} is a checkpoint")
        for name in self._asked or ():
            if name not in ARMS:
                raise ConfigError(f"there is no arm {name!r}; {suggestion(name, ARMS)}")

    @property
    def _is_shape(self) -> bool:
        return self.model in SHAPES or not Path(self.model).is_dir()

    @property
    def _asked(self) -> list[str] | None:
        return None if self.arms is None else list(dict.fromkeys(self.arms.replace(",", " ").split()))

    @property
    def _table_bytes(self) -> int | None:
        return None if self.table_gigabytes is None else round(self.table_gigabytes * 1e9)

    def run(self) -> int:
        """Measure and print."""
        lengths = draw_lengths(self.requests, self.shortest, self.longest, self.seed)
        priced = price(self._work(lengths), self._asked)
        if self.dry_run:
            print(json_module.dumps(priced.to_dict()) if self.json else priced.text())
            return 0
        priced.check()
        if any(ARMS[name].engine == "vllm" for name in priced.arms):
            require_vllm("this command measures", "--arms hf,hf_none needs neither")
        found = self._measure(priced, lengths)
        if self.json:
            print(json_module.dumps(found))
        else:
            print_results(found)
        return 0

    def _work(self, lengths: np.ndarray) -> Work:
        return Work(
            model=self.model,
            dtype=self.dtype,
            table_bytes=self._table_bytes,
            holes=self.holes,
            prompt_tokens=int(lengths.sum()),
            requests=self.requests,
            longest=self.longest + self.new_tokens,
            new_tokens=self.new_tokens,
            sequences=self.sequences,
            passes=self.passes,
            remote_requests=self.remote_requests,
        )

    def _measure(self, priced: Price, lengths: np.ndarray) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            base = self.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engram-bench-")))
            corpus = read_documents(self.data)
            folders = self._written(base, corpus, priced)
            tokenizer = AutoTokenizer.from_pretrained(folders["model"])
            requests = cut_requests(pack(corpus.documents, tokenizer), lengths, self.seed)
            found: dict[str, Any] = {
                "model": self.model,
                "dtype": priced.dtype,
                "passes": self.passes,
                "seed": self.seed,
                "workload": {
                    "text": corpus.source,
                    "requests": self.requests,
                    "prompt_tokens": int(lengths.sum()),
                    "shortest": self.shortest,
                    "longest": self.longest,
                    "new_tokens": self.new_tokens,
                    "sequences": self.sequences,
                    "hf_batch_size": self.hf_batch_size,
                },
                "tables": _describe(folders["model"]),
                "left_out": priced.left_out,
                "environment": _environment(),
                "machine": machine(),
                "versions": versions(),
                "commit": commit(),
            }
            passes = self._passes(priced, folders, requests, found)
            found["arms"] = [summarize(name, passes[name], passes.get(BASE)) for name in priced.arms]
            rates = {arm["arm"]: arm["tokens_per_cpu_second"] for arm in found["arms"]}
            found["times_transformers"] = {
                name: rates[name] / rates[theirs]
                for name, theirs in (("mmap", "hf"), ("none", "hf_none"))
                if name in rates and theirs in rates
            }
            found["notes"] = self._notes(priced, found["arms"])
            found["raw_passes"] = passes
        return found

    def _written(self, base: Path, corpus: Corpus, priced: Price) -> dict[str, Path]:
        """Write the model, its twin without memory and, for cold arms, its copy, or find what an earlier call wrote."""
        made = {
            name: str(getattr(self, name))
            for name in ("model", "table_gigabytes", "holes", "dtype", "seed", "tokenizer")
        }
        made["text"] = corpus.source
        if not self._is_shape:
            made["written"] = str((Path(self.model) / "config.json").stat().st_mtime_ns)
        base.mkdir(parents=True, exist_ok=True)
        noted = base / _MADE
        if noted.exists():
            earlier = json_module.loads(noted.read_text(encoding="utf-8"))
            if earlier != made:
                differing = ", ".join(name for name in made if earlier.get(name) != made[name])
                raise ConfigError(
                    f"{base} holds another model ({differing} differ); name another --folder, or remove it"
                )
        elif any(base.iterdir()):
            raise ConfigError(f"{base} is not empty and holds nothing of engram-lm bench serve; name another --folder")
        elif priced.disk_bytes > shutil.disk_usage(base).free:
            free = shutil.disk_usage(base).free
            raise ConfigError(
                f"{byte_size(priced.disk_bytes)} are to be written to {base}, {byte_size(free)} are free there; name "
                "another --folder, smaller tables, or --holes"
            )
        noted.write_text(json_module.dumps(made), encoding="utf-8")
        model = base / "model" if self._is_shape else Path(self.model)
        if self._is_shape and not model.exists():
            _say(f"writing {self.model} with its tables to {model}")
            with new_folder(model) as aside:
                make_model(
                    self.model,
                    aside,
                    (document.text for document in corpus.documents),
                    tokenizer=None if self.tokenizer is None else AutoTokenizer.from_pretrained(self.tokenizer),
                    table_bytes=self._table_bytes,
                    dtype=getattr(torch, self.dtype or "bfloat16"),
                    holes=self.holes,
                    seed=self.seed,
                )
        is_cold = any(ARMS[name].is_cold for name in priced.arms)
        folders = {"model": model, "none": base / "none", "cold": base / "cold"}
        for name, write in (("none", copy_without_memory), ("cold", copy_tables)):
            if not folders[name].exists() and (name == "none" or is_cold):
                _say(f"writing {folders[name]}")
                with new_folder(folders[name]) as aside:
                    write(model, aside)
        return folders

    def _passes(
        self, priced: Price, folders: dict[str, Path], requests: list[np.ndarray], found: dict[str, Any]
    ) -> dict[str, list[dict[str, Any]]]:
        """Start all arms and let them take their passes in turn; notes in ``found`` which rows a token reads."""
        passes: dict[str, list[dict[str, Any]]] = {name: [] for name in priced.arms}
        with contextlib.ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engram-bench-logs-")))
            arms = self._started(priced, folders, requests, logs, stack)
            found["load_seconds"] = {arm.name: arm.about["load_seconds"] for arm in arms}
            tasks = stack.enter_context(Progress().tasks(NOTHING))
            tasks.begin("passes", self.passes * len(arms))
            for round_ in range(self.passes):
                for place in np.random.default_rng((self.seed, round_)).permutation(len(arms)).tolist():
                    arm = arms[place]
                    taken = arm.take_pass()
                    passes[arm.name].append({**taken, "round": round_})
                    cpu = taken["cpu_seconds"]
                    tasks.advance("passes", 1, detail=f"{arm.name}: {taken['seconds']:.1f} s, {cpu:.1f} CPU s")
            counting = [arm for arm in arms if ARMS[arm.name].tier not in (None, "remote")]
            if counting:
                found["workload"].update(counting[0].count_rows())
        return passes

    def _started(
        self,
        priced: Price,
        folders: dict[str, Path],
        requests: list[np.ndarray],
        logs: Path,
        stack: contextlib.ExitStack,
    ) -> list[ArmProcess]:
        """Start one process for each arm, one after the other; the stack ends them."""
        environment = {**_environment(), **os.environ}
        nurseries: dict[str, Any] = {}
        arms = []
        for name in priced.arms:
            arm = ARMS[name]
            if arm.engine not in nurseries:
                _say(f"importing {arm.engine}")
                nurseries[arm.engine] = stack.enter_context(nursery(arm.engine, environment))
            folder = folders["none" if arm.tier is None else "cold" if arm.is_cold else "model"]
            tables: dict[str, Any] | None = None if arm.tier is None else {"tier": arm.tier}
            if arm.tier == "remote":
                tables = {"tier": "remote", "source": self.remote or stack.enter_context(file_server(folder))}
            mine = requests[: self.remote_requests] if arm.tier == "remote" else requests
            file = logs / f"{name}.npz"
            np.savez(file, lengths=list(map(len, mine)), tokens=np.concatenate(mine))
            settings = {
                "engine": arm.engine,
                "model": str(folder),
                "tables": tables,
                "dtype": priced.dtype,
                "requests": str(file),
                "new_tokens": self.new_tokens,
                "longest": self.longest + self.new_tokens,
                "sequences": self.sequences,
                "batched_tokens": max(_BATCHED_TOKENS, self.longest),
                "kv_cache_bytes": priced.kv_cache_bytes,
                "hf_batch_size": self.hf_batch_size,
                "warm": arm.is_in_files and not arm.is_cold,
                "cold": arm.is_cold,
                "files": sorted({str(each.file) for each in stored_tables(folder)}) if arm.is_in_files else [],
            }
            arms.append(ArmProcess(name, nurseries[arm.engine], settings, logs / f"{name}.log"))
            stack.callback(arms[-1].close)
            _say(f"{name} loaded in {arms[-1].about['load_seconds']:.1f} s")
        return arms

    def _notes(self, priced: Price, arms: list[dict[str, Any]]) -> list[str]:
        notes = [
            "tokens/CPU-s counts all threads of the arm's process and hardly depends on the machine's other work; "
            "tokens/s is wall time and does",
            f"cold: {COLD_METHOD}; caches of the disk itself, and of a virtual machine's host, stay",
            "environment of the engines: " + " ".join(f"{name}={value}" for name, value in _environment().items()),
        ]
        if "none_again" in priced.arms:
            notes.append("none_again differs from none by noise alone")
        if "remote" in priced.arms:
            many = min(self.remote_requests, self.requests)
            notes.append(f"remote ran the first {many} requests; the CPU time of the server is not in it")
        if self.holes:
            notes.append("the tables are holes: their pages are zeros that the kernel makes without reading the disk")
        notes += [
            f"{arm['arm']} was cold in {arm['cold_passes']} of {self.passes} passes: the system kept part of the files"
            for arm in arms
            if arm.get("cold_passes", self.passes) < self.passes
        ]
        notes += [f"{name} was left out: {why}" for name, why in priced.left_out.items()]
        return notes


def _environment() -> dict[str, str]:
    """Variables for the engines, where their owner has not said otherwise."""
    chosen = {
        # In the arm's own process, so that its CPU seconds are all counted.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not torch.cuda.is_available() and allowed_cores() <= _FEW_CORES:
        # vLLM would keep a core free, one of two; threads of one arm would wait for each other on a busy machine.
        chosen |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def _describe(model: Path) -> dict[str, Any]:
    """What the tables of a model are."""
    tables, memory = stored_tables(model), read_config(model).memory_config
    assert memory is not None
    return {
        "bytes": sum(table.num_bytes for table in tables),
        "parameters": sum(table.shape[0] * table.shape[1] for table in tables),
        "rows": [table.shape[0] for table in tables],
        "width": memory.head_dim,
        "disk_bytes": sum(disk_bytes(Path(file)) for file in {table.file for table in tables}),
    }


def _say(line: str) -> None:
    print(f"engram-lm bench serve: {line}", file=sys.stderr, flush=True)
