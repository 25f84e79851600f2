"""What storing a trained table in fewer bits does to its rows, and to the model that reads them.

python benchmarks/quantization.py      # 30 minutes on a core; writes benchmarks/results/quantization.json

Trains the quickstart's model with memory on the Python standard library, three seeds; converts its tables to every
type, as `engram-lm table convert` does; and compares the model that reads them with itself, token by token on held-out
files. Two controls say what the changes are to be measured against: the memory's update switched off, and rows that
changed places within their head. ``--heads 2`` puts as many numbers in rows of 32, a whole block of scales, not of 8.

Matrix products are float32 here, whatever they were in training: bfloat16 products would round the rows themselves,
and hide what is measured. Models and measurements stay in ``--folder``; what is there already is not made again.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

from engram_lm.evaluation.rounding import put_tables
from engram_lm.files import new_folder, write_atomically
from engram_lm.hashing import TokenMap
from engram_lm.model import EngramForCausalLM
from engram_lm.studies.quickstart.run import Quickstart
from engram_lm.tables import MappedTable, ResidentTable, RowCodec, RowLayout, Table, packed_layout
from engram_lm.tables.codec import CODEC_NAMES
from engram_lm.tables.files.convert import convert
from engram_lm.training.build import model_config
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.documents import pack, read_documents, split_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.loop import Trainer, TrainOptions, best_dtype
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.run_folder import commit

HELD_OUT = 0.06
BATCH = 4
SYNTHETIC_WIDTHS, SYNTHETIC_ROWS = (8, 32, 256), 2**15
OFF, SHUFFLED = "memory off", "rows shuffled"
Tables = Mapping[str, Table]


class Data:
    """The text, split by file, and its tokens."""

    def __init__(self) -> None:
        train_files, held_out_files = split_documents(read_documents(), HELD_OUT)
        self.tokenizer = train_tokenizer((file.text for file in train_files), Quickstart.vocab_size)
        self.train_tokens = pack(train_files, self.tokenizer)
        files = [pack([file], self.tokenizer) for file in held_out_files]
        # Windows of equal length that do not see each other; the rest, shorter than one, is left out.
        count = (sum(map(len, files)) - 1) // Quickstart.sequence_length * Quickstart.sequence_length
        tokens = torch.from_numpy(np.concatenate(files).astype(np.int64))
        self.inputs = tokens[:count].view(-1, Quickstart.sequence_length)
        self.targets = tokens[1 : count + 1].view(-1, Quickstart.sequence_length)
        self.documents = np.repeat(np.arange(len(files)), list(map(len, files)))[1 : count + 1]
        """File of every target."""
        self.digest = hashlib.sha256(self.train_tokens.tobytes() + tokens.numpy().tobytes()).hexdigest()


def new_model(data: Data, options: Quickstart, seed: int) -> Any:
    """The quickstart's model with memory as it is before training."""
    config = model_config(options.recipe(options.model(options.memory())), data.tokenizer)
    torch.manual_seed(seed)
    return EngramForCausalLM(config)


def batches(data: Data, seed: int) -> Batches:
    return Batches(data.train_tokens, Quickstart.batch_size, Quickstart.sequence_length, seed)


def train(folder: Path, data: Data, options: Quickstart, seed: int) -> None:
    """Train one model and keep it."""
    model, dtype, started = new_model(data, options, seed), best_dtype(torch.device("cpu")), time.perf_counter()
    at = commit()  # now: the tree may change under a long run
    optimizer = OptimizerOptions(backbone="adamw", lr=options.lr, table_lr_multiplier=options.table_lr_multiplier)
    steps = TrainOptions(num_steps=options.num_steps, dtype=dtype)
    trainer = Trainer(model, batches(data, seed), steps, optimizer)
    for _ in range(options.num_steps):
        record = trainer.step()
    facts = {"dtype": dtype, "num_steps": options.num_steps, "num_tokens": record.num_tokens, "commit": at}
    with new_folder(folder) as aside:
        model.save_pretrained(aside)
        data.tokenizer.save_pretrained(aside)
        (aside / "trained.json").write_text(json.dumps({**facts, "seconds": time.perf_counter() - started}))


def rows_read(model: Any, data: Data, inputs: Tensor) -> dict[str, Tensor]:
    """How often these sequences read each row, by table."""
    spec = model.config.spec.bind(TokenMap.from_tokenizer(data.tokenizer))
    rows = spec.rows_for_layers(spec.encode(inputs))
    return {
        str(block): torch.bincount(rows[layer].flatten(), minlength=spec.num_rows(layer))
        for block, layer in zip(spec.blocks, spec.layers, strict=True)
    }


def read_in_training(model: Any, data: Data, seed: int, num_steps: int) -> dict[str, Tensor]:
    """Which rows a batch of the training run has read, by table."""
    found: dict[str, Tensor] = {}
    order = batches(data, seed)
    for step in range(num_steps):
        for name, counts in rows_read(model, data, order[step][0]).items():
            found[name] = found.get(name, False) | (counts > 0)
    return found


def row_errors(exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Relative error and cosine of every row, float64 ``[n]``."""
    exact, other = exact.double(), other.double()
    lengths = exact.norm(dim=1)
    cosine = (exact * other).sum(dim=1) / (lengths * other.norm(dim=1))
    return (exact - other).norm(dim=1) / lengths, cosine


def described(relative: Tensor, cosine: Tensor) -> dict[str, Any]:
    if not len(relative):
        return {"num_rows": 0}
    return {
        "num_rows": len(relative),
        "relative_error_median": float(np.quantile(relative, 0.5)),
        "relative_error_p99": float(np.quantile(relative, 0.99)),
        "relative_error_max": float(relative.max()),
        "cosine_median": float(np.quantile(cosine, 0.5)),
        "cosine_p1": float(np.quantile(cosine, 0.01)),
    }


def all_rows(layout: RowLayout) -> Tensor:
    return MappedTable(layout, torch.float32).gather(torch.arange(layout.num_rows))


def converted(folder: Path, model: Any, read: Mapping[str, Tensor]) -> tuple[dict[str, Tables], list[dict[str, Any]]]:
    """Convert a model's tables to every type: the tables to read from, and how far off their rows are."""
    tables: dict[str, Tables] = {}
    results = []
    for stored in CODEC_NAMES:
        done = convert(folder, folder / "packed" / stored, dtype=stored, error_rows=None)
        errors: dict[str, list[tuple[Tensor, Tensor]]] = {"read in training": [], "never read": [], "all": []}
        for table in done:
            mask, exact = read[str(table.layer)], model.tables[str(table.layer)].weight.detach()
            rows = all_rows(packed_layout(table.path))
            relative, cosine = row_errors(exact, rows)
            if table.error is None:
                assert torch.equal(rows, exact), "float32 is copied"
            else:
                # Two ways to the same number: the library's own, and this script's.
                assert abs(table.error.relative_error_max - float(relative.max())) < 1e-12
            for which, chosen in zip(errors, (mask, ~mask, torch.ones_like(mask)), strict=True):
                errors[which].append((relative[chosen], cosine[chosen]))
        codec = done[0].header.codec
        for which, parts in errors.items():
            joined = described(*(torch.cat(part) for part in zip(*parts, strict=True)))
            bytes_ = {"row_bytes": codec.record_bytes, "saved": 1 - codec.record_bytes / (4 * codec.width)}
            results.append({"stored": stored, "rows": which, **bytes_, **joined})
        put_tables(model, {table.layer: packed_layout(table.path) for table in done})
        tables[stored] = {name: model.base_model.layers[int(name)].memory.table for name in model.tables}
    return tables, results


def controls(model: Any, seed: int) -> dict[str, Tables]:
    """Tables that say nothing, and tables that say the wrong thing."""
    spec, generator = model.config.spec, torch.Generator().manual_seed(seed)
    shuffled = {}
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        assert model.base_model.layers[block].memory.key_value.bias is None, "rows of zeros make the update zero"
        weight = model.tables[str(block)].weight.detach()
        order = torch.arange(len(weight))
        for first, count in zip(spec.offsets(layer), spec.primes[spec.layers.index(layer)], strict=True):
            order[first : first + count] = first + torch.randperm(count, generator=generator)
        shuffled[str(block)] = ResidentTable(weight[order])
    off = {name: ResidentTable(torch.zeros_like(table.weight)) for name, table in model.tables.items()}
    return {OFF: off, SHUFFLED: shuffled}


def use(model: Any, tables: Tables) -> None:
    for name, table in tables.items():
        model.base_model.layers[int(name)].memory.table = table


def compared(exact: Tensor, p: Tensor, other: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What became of the predictions, for every token.

    With d the difference of the logits and m its mean under p, log E_p[exp(d - m)] is the KL divergence and, less
    d[target] - m, the change of the loss: no small number comes from two large ones.

    Args:
        exact: Logits before, ``[n, V]``.
        p: Their softmax.
        other: Logits after. Overwritten.
        targets: Tokens that follow, ``[n]``.

    Returns:
        Change of the loss and KL(before || after), both in nats.
    """
    difference = other.sub_(exact)
    centered = difference.sub_(torch.linalg.vecdot(p, difference).unsqueeze(1))
    divergence = torch.log1p(torch.linalg.vecdot(p, torch.expm1(centered).sub_(centered)))
    return divergence - centered.gather(1, targets.unsqueeze(1)).squeeze(1), divergence


@torch.no_grad()
def predictions(model: Any, data: Data, variants: Mapping[str, Tables]) -> dict[str, dict[str, list[float]]]:
    """Sums by held-out file: of the loss with the model's own tables, of what `compared` gives with all others."""
    model.eval()
    files = data.documents.max() + 1
    sums: dict[str, dict[str, np.ndarray]] = {}

    def add(name: str, start: int, **values: Tensor) -> None:
        place = data.documents[start : start + len(next(iter(values.values())))]
        for key, value in values.items():
            part = np.bincount(place, weights=value.double().numpy(), minlength=files)
            sums.setdefault(name, {}).setdefault(key, np.zeros(files))
            sums[name][key] += part

    for first in range(0, len(data.inputs), BATCH):
        inputs, targets = data.inputs[first : first + BATCH], data.targets[first : first + BATCH].flatten()
        start = first * inputs.shape[1]
        use(model, model.tables)
        exact = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        add("exact", start, loss=loss, tokens=torch.ones_like(loss))
        p, top = exact.softmax(dim=1), exact.argmax(dim=1)
        for name, tables in variants.items():
            use(model, tables)
            other = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            same = other.argmax(dim=1) == top
            change, divergence = compared(exact, p, other, targets)
            add(name, start, change=change, divergence=divergence, same=same)
    use(model, model.tables)
    return {name: {key: value.tolist() for key, value in found.items()} for name, found in sums.items()}


def measured(folder: Path, data: Data, options: Quickstart, seed: int) -> dict[str, Any]:
    """Everything about one trained model; kept in its folder."""
    path = folder / "measured.json"
    if path.exists() and (known := json.loads(path.read_text()))["data"] == data.digest:
        return known
    started = time.perf_counter()
    model, facts = EngramForCausalLM.from_pretrained(folder), json.loads((folder / "trained.json").read_text())
    model.check_tokenizer(data.tokenizer)
    read = read_in_training(model, data, seed, facts["num_steps"])
    for name, table in new_model(data, options, seed).tables.items():
        # What says that these are the rows, and this the model: the others are as they were drawn.
        assert torch.equal(table.weight[~read[name]], model.tables[name].weight[~read[name]]), "rows never read moved"
    held_out = rows_read(model, data, data.inputs)
    unread = sum(int(counts[~read[name]].sum()) for name, counts in held_out.items())
    tables, errors = converted(folder, model, read)
    del tables["float32"]  # the same bytes, so the same predictions
    found = {
        "data": data.digest,
        "training": facts,
        "share_of_rows_read": float(torch.cat(list(read.values())).double().mean()),
        "share_of_held_out_reads_of_rows_never_read": unread / sum(int(counts.sum()) for counts in held_out.values()),
        "errors": errors,
        "predictions": predictions(model, data, {**tables, **controls(model, seed)}),
    }
    found["seconds"] = time.perf_counter() - started
    write_atomically(path, json.dumps(found))
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error_over_seeds": error}


def error_over_documents(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of a mean per token whose documents were drawn, not its tokens (a ratio of two sums)."""
    rest = sums - sums.sum() / tokens.sum() * tokens
    return float((rest.var(ddof=1) * len(rest)) ** 0.5 / tokens.sum())


def summary(width: int, seeds: Mapping[int, dict[str, Any]], data: Data) -> list[dict[str, Any]]:
    """The results: what was trained, errors of rows, and predictions by type."""
    runs = list(seeds.values())
    tokens = np.array(runs[0]["predictions"]["exact"]["tokens"])
    losses = [sum(run["predictions"]["exact"]["loss"]) / tokens.sum() for run in runs]
    worth = [sum(run["predictions"][OFF]["change"]) / tokens.sum() for run in runs]
    results: list[dict[str, Any]] = [
        {
            "case": "model",
            "width": width,
            "seeds": list(seeds),
            "held_out_tokens": int(tokens.sum()),
            "held_out_documents": len(tokens),
            "train_tokens": len(data.train_tokens),
            "loss": spread(losses),
            "loss_per_seed": losses,
            "share_of_rows_read": [run["share_of_rows_read"] for run in runs],
            "share_of_held_out_reads_of_rows_never_read": [
                run["share_of_held_out_reads_of_rows_never_read"] for run in runs
            ],
            "training": [run["training"] for run in runs],
            "seconds": [run["seconds"] for run in runs],
        }
    ]
    for index, first in enumerate(runs[0]["errors"]):
        both = [run["errors"][index] for run in runs]
        figures = [key for key in first if key.startswith(("relative", "cosine"))]
        results.append(
            {
                "case": "trained rows",
                "width": width,
                **{key: first[key] for key in ("stored", "rows", "row_bytes", "saved")},
                "num_rows_per_seed": [error["num_rows"] for error in both],
                **{key: statistics.fmean(error[key] for error in both) for key in figures},
                "relative_error_max": max(error["relative_error_max"] for error in both),
            }
        )
    for name in runs[0]["predictions"]:
        if name == "exact":
            continue
        by_file = [{key: np.array(value) for key, value in run["predictions"][name].items()} for run in runs]
        changes = [float(found["change"].sum() / tokens.sum()) for found in by_file]
        mean_change = np.mean([found["change"] for found in by_file], axis=0)
        results.append(
            {
                "case": "predictions",
                "width": width,
                "tables": name,
                "loss_change": spread(changes),
                "loss_change_per_seed": changes,
                "loss_change_standard_error_over_documents": error_over_documents(mean_change, tokens),
                "loss_change_mean_of_documents": float((mean_change / tokens).mean()),
                "loss_change_mean_of_documents_standard_error": float(
                    (mean_change / tokens).std(ddof=1) / len(tokens) ** 0.5
                ),
                "documents_with_higher_loss": int((mean_change > 0).sum()),
                "share_of_memory_lost": spread([change / whole for change, whole in zip(changes, worth, strict=True)]),
                "divergence": spread([float(found["divergence"].sum() / tokens.sum()) for found in by_file]),
                "same_top_token": spread([float(found["same"].sum() / tokens.sum()) for found in by_file]),
            }
        )
    return results


def synthetic() -> list[dict[str, Any]]:
    """Row errors of numbers that no one has trained."""
    draws = {
        "normal": lambda generator, shape: generator.standard_normal(shape),
        "Student t, 3 degrees of freedom": lambda generator, shape: generator.standard_t(3, shape),
    }
    results = []
    for drawn, draw in draws.items():
        for width in SYNTHETIC_WIDTHS:
            exact = torch.from_numpy(draw(np.random.default_rng(0), (SYNTHETIC_ROWS, width)).astype(np.float32))
            for stored in CODEC_NAMES:
                codec = RowCodec.named(stored, width)
                rows = codec.decode(codec.encode(exact), torch.float32)
                about = {"case": "drawn rows", "numbers": drawn, "width": width, "stored": stored}
                results.append({**about, "row_bytes": codec.record_bytes, **described(*row_errors(exact, rows))})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quantization"), help="where models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", type=int, default=Quickstart.heads, help="hash heads per order; fewer, wider rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantization.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = Data()
    print(f"{data.inputs.numel():,} held-out tokens of {data.documents.max() + 1} files", flush=True)
    options, found = Quickstart(heads=arguments.heads), {}
    for seed in arguments.seeds:
        folder = arguments.folder / f"heads-{options.heads}" / f"seed-{seed}"
        if not folder.exists():
            train(folder, data, options, seed)
        found[seed] = measured(folder, data, options, seed)
        print(f"seed {seed}: measured in {found[seed]['seconds']:.0f} s", flush=True)
    results = summary(options.memory().head_dim, found, data) + synthetic()
    for result in results:
        if result["case"] == "predictions":
            print(
                f"{result['tables']:14} {result['loss_change']['mean']:+.6f} nats, "
                f"{result['share_of_memory_lost']['mean']:.2%} of the memory's worth"
            )
    harness.write(arguments.out, "quantization", results)


if __name__ == "__main__":
    main()
