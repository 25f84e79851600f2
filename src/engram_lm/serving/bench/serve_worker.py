"""The process that runs the arms of ``engram-lm bench serve``: it imports an engine once and forks for each arm.

Lines of JSON come over sockets, one for each arm, whose engine is loaded once and takes passes when it is told to. An
arm is one process with everything in it, so its CPU seconds are all counted.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engram_lm.tables.tiers.page_cache import drop_from_memory, resident_share

_ROWS_AT_ONCE = 1 << 16


class Engine(Protocol):
    """What generates."""

    def generate(self, requests: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Generate `new_tokens` tokens for each request, greedily; end-of-text does not stop them."""

    def tables(self) -> list[Any]:
        """The open tables, each once."""

    def spec(self) -> Any:
        """The `HashSpec` of the memory, bound to its token map; None without memory."""

    def open_tables(self) -> None:
        """Open the tables again after they were closed."""


class VllmEngine:
    """vLLM inside this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        place = {"engram_tables": settings["tables"]} if settings["tables"] else {}
        self._llm = LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["longest"],
            max_num_seqs=settings["sequences"],
            max_num_batched_tokens=settings["batched_tokens"],
            kv_cache_memory_bytes=settings["kv_cache_bytes"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            additional_config=place,
        )
        self._llm.apply_model(self._keep)

    def _keep(self, model: Any) -> None:
        self._model = model

    def generate(self, requests: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See `Engine`."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in requests], greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def tables(self) -> list[Any]:
        """See `Engine`."""
        served = self._model.model.served
        return [] if served is None else list({id(each.table): each.table for each in served.layers.values()}.values())

    def spec(self) -> Any:
        """See `Engine`."""
        return None if self._model.model.served is None else self._model.model.served.spec

    def open_tables(self) -> None:
        """See `Engine`."""
        served = self._model.model.served
        served.bind(served.spec, self._model.open_tables(served.spec))


class TransformersEngine:
    """``generate`` of transformers on padded batches of requests sorted by their length."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from engram_lm.model.modeling import EngramForCausalLM

        tables = settings["tables"]
        options = {} if tables is None else {"table_tier": tables["tier"]}
        dtype = getattr(torch, settings["dtype"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = EngramForCausalLM.from_pretrained(settings["model"], dtype=dtype, **options).to(device).eval()
        self._model.generation_config.eos_token_id = None
        self._batch_size = settings["hf_batch_size"]

    def generate(self, requests: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See `Engine`."""
        import torch

        order = sorted(range(len(requests)), key=lambda place: len(requests[place]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            longest = max(len(requests[place]) for place in places)
            tokens = torch.zeros(len(places), longest, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for row, place in enumerate(places):
                length = len(requests[place])
                tokens[row, longest - length :] = torch.tensor(requests[place])
                mask[row, longest - length :] = 1
            with torch.no_grad():
                output = self._model.generate(
                    tokens.to(self._model.device),
                    attention_mask=mask.to(self._model.device),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            found.update(zip(places, output[:, longest:].tolist(), strict=True))
        return [found[place] for place in range(len(requests))]

    def tables(self) -> list[Any]:
        """See `Engine`."""
        return list(self._model.tables.values())

    def spec(self) -> Any:
        """See `Engine`."""
        return self._model.model.bound_spec  # since the first forward pass

    def open_tables(self) -> None:
        """See `Engine`."""
        raise NotImplementedError("no arm of transformers is cold")


class ArmRunner:
    """One arm: its engine, the requests, and what a pass of them took."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        with np.load(settings["requests"]) as found:
            ends, tokens = np.cumsum(found["lengths"]), found["tokens"]
        self._requests = [part.tolist() for part in np.split(tokens, ends[:-1])]
        started, cpu = time.perf_counter(), time.process_time()
        engines: dict[str, Any] = {"vllm": VllmEngine, "transformers": TransformersEngine}
        self._engine: Engine = engines[settings["engine"]](settings)
        self.about = {"load_seconds": time.perf_counter() - started, "load_cpu_seconds": time.process_time() - cpu}
        # Kernels are chosen and memory is taken in the first requests.
        self._engine.generate(self._requests[:2], 4)
        if settings["warm"]:
            self._touch_rows()
        if settings["cold"]:
            self._close_tables()
        self._answers: list[list[int]] = []

    def _close_tables(self) -> None:
        for table in self._engine.tables():
            table.close()

    def _touch_rows(self) -> None:
        """Read the rows of all prompts once, so that they are in the page cache."""
        import torch

        spec, tables = self._engine.spec(), self._engine.tables()
        for number, layer in enumerate(spec.layers):
            table = tables[0 if spec.shared_table else number]
            for request in self._requests:
                table.gather(torch.from_numpy(spec.rows(np.array(request), layer)))

    def take_pass(self) -> dict[str, Any]:
        """Run all requests once; cold where that is asked for."""
        settings, files = self._settings, [Path(file) for file in self._settings["files"]]
        for file in files if settings["cold"] else ():
            drop_from_memory(file)
        shares = [resident_share(file) for file in files]
        if settings["cold"]:
            self._engine.open_tables()
        before, read = self._counted(), _read_from_disk()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        started, cpu = time.perf_counter(), time.process_time()
        self._answers = self._engine.generate(self._requests, settings["new_tokens"])
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        after, read_after = self._counted(), _read_from_disk()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
        if settings["cold"]:
            # Pages that are mapped cannot be dropped, by this arm or by another one that reads the same files.
            self._close_tables()
        prompt = sum(map(len, self._requests))
        new = sum(map(len, self._answers))
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "prompt_tokens": prompt,
            "new_tokens": new,
            # The last token of an answer is not read any more.
            "read_tokens": prompt + new - len(self._answers),
            **{name: after[name] - before[name] for name in after},
            "disk_bytes": None if read is None or read_after is None else read_after - read,
            "major_faults": faults,
            "resident_shares_before": shares,
            "resident_shares_after": [resident_share(file) for file in files],
        }

    def _counted(self) -> dict[str, int]:
        """What the tables have counted; nothing where they are parameters, which count nothing."""
        stats = [table.stats() for table in self._engine.tables()]
        names = ("gathered_rows", "received_bytes", "num_requests", "staged_rows", "used_rows")
        found = {name: sum(each[name] for each in stats) for name in names if stats and name in stats[0]}
        if "gathered_rows" in found:
            found["gathered_bytes"] = sum(each["gathered_rows"] * each["record_bytes"] for each in stats)
        return found

    def count_rows(self) -> dict[str, Any]:
        """Count the rows of the last pass by hashing it anew: all of them, and those that differ."""
        spec = self._engine.spec()
        whole = [np.array(a + b[:-1]) for a, b in zip(self._requests, self._answers, strict=True)]
        tokens, rows, distinct = sum(map(len, whole)), 0, 0
        for layer in spec.layers:
            numbers = [spec.rows(sequence, layer).reshape(-1) for sequence in whole]
            rows += sum(map(len, numbers))
            distinct += len(np.unique(np.concatenate(numbers)))
        return {"rows_per_token": rows / tokens, "distinct_rows_per_token": distinct / tokens}


def _read_from_disk() -> int | None:
    """Bytes that this process had read from disks so far, by mapped pages too; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def run_arm(lines: Any) -> None:
    """Answer the commands of one arm, lines of JSON, until they end."""

    def answer(**values: Any) -> None:
        lines.write(json.dumps(values) + "\n")
        lines.flush()

    settings = json.loads(lines.readline())
    try:
        runner = ArmRunner(settings)
        answer(pid=os.getpid(), **runner.about)
        for line in lines:
            answer(**(runner.count_rows() if json.loads(line)["do"] == "count" else runner.take_pass()))
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Fork an arm for every socket that comes, until no more can come."""
    nursery = socket.socket(fileno=int(sys.argv[1]))
    if sys.argv[2] == "vllm":
        import vllm  # noqa: F401
        from vllm import LLM, SamplingParams  # noqa: F401 - imports nearly everything, once for all arms
    else:
        import engram_lm.model.modeling  # noqa: F401 - the same
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(nursery, 1 << 12, 1)
        if not message:
            return
        if os.fork() == 0:
            nursery.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(message.decode(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            with socket.socket(fileno=descriptors[0]) as own:
                run_arm(own.makefile("rw", encoding="utf-8"))
            sys.stdout.flush()
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    main()
