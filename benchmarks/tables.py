"""Write the tables of README.md and docs/ from the committed results, or check that they are what the results say.

python benchmarks/tables.py          # rewrite them
python benchmarks/tables.py --check  # exit 1 if one says something else
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import findings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> Any:
    """Read one result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def quickstart() -> str:
    """The arms of the committed quickstart run."""
    runs = load("quickstart")["results"]
    result, default = runs["controls"], runs["default"]
    arms = result["arms"]
    lines = ["| model | parameters | of them in tables | FLOPs per token | held-out loss | gain over the twin |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    twin = {run["seed"]: run["loss"] for run in arms["twin"]["runs"]}
    for name, arm in arms.items():
        loss, gains = arm["loss"], [twin[run["seed"]] - run["loss"] for run in arm["runs"]]
        gain = "" if name == "twin" else f"{sum(gains) / len(gains):+.3f} ± {statistics.stdev(gains):.3f}"
        lines.append(
            f"| {arm['title']} | {arm['parameters']['total'] / 1e6:.2f} M | "
            f"{arm['parameters']['memory_tables'] / 1e6:.2f} M | {arm['flops_per_token'] / 1e6:.2f} M | "
            f"{loss['mean']:.3f} ± {loss['std']:.3f} | {gain} |"
        )
    data, settings = result["data"], result["settings"]
    machine, gain = result["machine"], default["difference"]["mean"]
    lines += [
        "",
        f"Nats per token, mean ± standard deviation over {len(result['seeds'])} seeds; {settings['num_steps']} steps "
        f"of {settings['batch_size']} × {settings['sequence_length']} tokens; {data['held_out_tokens']:,} tokens of "
        f"{data['held_out_files']} held-out files.",
        f"Made by `{result['command']}` at commit `{result['commit']}` on {machine['processor']}, {machine['cores']} "
        f"cores. The default, `{default['command']}`, took {default['seconds'] / 60:.1f} minutes there and gave "
        f"{gain:+.3f}.",
    ]
    return "\n".join(lines)


def speed() -> str:
    """What the three speed benchmarks found."""
    hashing, layer, optimizer = load("hashing"), load("layer"), load("optimizer")
    lines = ["| what | against | measured |", "|---|---|---|"]
    rows = {
        result["path"]: result
        for result in hashing["results"]
        if result["length_tokens"] == 2048 and result["batch_size"] == 8
    }
    for path, name in (("torch", "eager"), ("torch, compiled", "`torch.compile`d")):
        ours = rows[path]
        lines.append(
            f"| row numbers, two layers × 16 heads, {name} | the NumPy path; transformers' `qwen4_exp` | "
            f"{ours['rows_per_second'] / 1e6:.0f} M rows/s, {ours['times_numpy']:.1f}× and "
            f"{ours['times_transformers']:.1f}× |"
        )
    steps = {result["what"]: result for result in layer["results"] if result["case"] == "training step"}
    share, twin = steps["with memory"]["ratio_to_backbone_alone"], steps["without memory"]["ratio_to_backbone_alone"]
    lines.append(
        "| training step of the quickstart's model, memory in three blocks | the same backbone without memory | "
        f"{share - 1:+.0%} (its twin of equal FLOPs: {twin - 1:+.0%}) |"
    )
    pace = {r["what"]: r for r in layer["results"] if r["case"] == "forward and backward" and r["num_streams"] == 4}
    ratio = pace["plain twin"]["median_seconds"] / pace["layer"]["median_seconds"]
    lines.append(f"| Engram layer, four streams, forward and backward | its plain twin | {ratio:,.0f}× |")
    for size in (10_000_000, 100_000_000):
        found = {r["what"]: r for r in optimizer["results"] if r.get("table_parameters") == size}
        row, dense = found["row_adam"], found["dense AdamW"]
        lines.append(
            f"| table step, {size / 1e6:.0f} M parameters, {row['reads']:,} reads | dense AdamW; the same, fused | "
            f"{row['median_step_seconds'] * 1e3:.1f} ms, {row['dense_AdamW_over_this_step']:.0f}× and "
            f"{row['dense_AdamW_fused_over_this_step']:.1f}×; peak memory "
            f"{row['peak_process_bytes'] / 2**20:,.0f} against {dense['peak_process_bytes'] / 2**20:,.0f} MiB |"
        )
    reads = {r["what"]: r for r in load("table_reads")["results"] if r["requested_rows"] == 6144}
    mapped, plain = reads["MappedTable"], reads["plain mmap"]
    cold = plain["cold_median_seconds"] / mapped["cold_median_seconds"]
    lines.append(
        f"| 6,144 random rows of 256 bytes from a mapped file, page cache cold | a plain mapping; EngramDB 0.3.0 | "
        f"{mapped['cold_median_seconds'] * 1e3:.0f} ms, {cold:.1f}× and {mapped['engramdb_over_this_cold']:.1f}× |"
    )
    lines.append(
        "| the same, page cache warm | rows in RAM; EngramDB 0.3.0 | "
        f"{mapped['warm_again_median_seconds'] * 1e3:.1f} ms, "
        f"{1 / mapped['warm_again_times_ram']:.1f}× and {mapped['engramdb_over_this_warm_again']:.0f}× |"
    )
    machine = hashing["machine"]
    lines += ["", f"Medians on {machine['processor']}, {machine['cores']} cores, both sides in turn in one run."]
    return "\n".join(lines)


def models() -> str:
    """What memory costs the presets, against the same backbone without it."""
    record = load("model")
    results = record["results"]

    def cost(size: str, case: str, batch_size: int | None = None) -> str:
        found = [
            result
            for result in results
            if (result["size"], result["case"], result["what"]) == (size, case, "with memory")
            and result.get("batch_size") == batch_size
        ]
        return f"{found[0]['ratio'] - 1:+.0%}"

    def costs(size: str, case: str) -> str:
        return ", ".join(cost(size, case, batch_size) for batch_size in (1, 8, 32))

    lines = [
        "| preset | training step | decode step, batch 1, 8, 32 | `generate`, batch 1, 8, 32 |",
        "|---|---:|---:|---:|",
    ]
    for size in ("nano", "tiny"):
        row = [cost(size, "training step"), costs(size, "decode step"), costs(size, "generate")]
        lines.append(f"| `engram-{size}` | {' | '.join(row)} |")
    slower = {
        (result["size"], result["what"]): result["ratio"]
        for result in results
        if result["what"] in ("separate", "transformers", "loop")
    }
    machine = record["machine"]
    lines += [
        "",
        "Time added by memory, against the same backbone without it. In the same run, one projection for each key and "
        f"the value takes {slower['tiny', 'separate']:.2f}× the time of the fused one, transformers' hyper-connection "
        f"{slower['tiny', 'transformers']:.2f}× that of ours, and a loop over experts {slower['tiny', 'loop']:.2f}× "
        f"the training step of grouped products (`tiny`; {machine['processor']}, {machine['cores']} cores shared with "
        "other work). Training steps with memory are no slower here: the backbone's matrix products took less time "
        "beside it.",
    ]
    return "\n".join(lines)


def quantization() -> str:
    """What each stored type of a table does to the model's predictions, and the two controls."""
    record = load("quantization")
    results = record["results"]
    model = next(result for result in results if result["case"] == "model")
    rows = {result["stored"]: result for result in results if result.get("rows") == "all"}
    lines = [
        "| table | bytes per row | saved | change of loss, 10⁻³ nats | ± over files | % of memory's worth lost | "
        "KL, 10⁻³ nats | same top token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| float32 | {rows['float32']['row_bytes']} | | 0 | | 0 | 0 | 100% |",
    ]
    for result in (result for result in results if result["case"] == "predictions"):
        name, stored = result["tables"], rows.get(result["tables"])
        size = f"{stored['row_bytes']} | {stored['saved']:.0%}" if stored else "|"
        lost = "100" if name == "memory off" else spread(result["share_of_memory_lost"], 3, 100)
        lines.append(
            f"| {name} | {size} | {spread(result['loss_change'], 3, 1e3)} | "
            f"{result['loss_change_standard_error_over_documents'] * 1e3:.3f} | {lost} | "
            f"{result['divergence']['mean'] * 1e3:.2g} | {result['same_top_token']['mean']:.2%} |"
        )
    machine = record["machine"]
    losses = ", ".join(f"{loss:.3f}" for loss in model["loss_per_seed"])
    lines += [
        "",
        f"{len(model['seeds'])} trained models, with the table as trained at {losses} nats per token; "
        f"{model['held_out_tokens']:,} tokens of {model['held_out_documents']} held-out files, the same for all. Made "
        f"by `{record['command']}` at commit `{record['commit']}` on {machine['processor']}, "
        f"{machine['threads']} thread.",
    ]
    return "\n".join(lines)


def analysis() -> str:
    """One pass over a long text, by what is asked of it."""
    lines = ["| asked for | seconds | tokens/s | peak memory over that of the model alone |", "|---|---:|---:|---:|"]
    results = load("analysis")["results"]
    alone = next(result for result in results if result["parts"] == "none")
    for result in results:
        name = (
            "nothing: the model's forward passes, with logits"
            if result is alone
            else result["parts"].replace(",", ", ")
        )
        more = "" if result is alone else f"{result['peak_mib'] - alone['peak_mib']:+,.0f} MiB"
        lines.append(f"| {name} | {result['seconds']:.0f} | {result['num_tokens'] / result['seconds']:,.0f} | {more} |")
    one = results[0]
    return "\n".join(
        [
            *lines,
            "",
            f"`engram-nano`, {one['num_tokens']:,} tokens in windows of {one['window_tokens']}, a budget of "
            f"{one['memory_mib']} MiB, one thread; `python benchmarks/analysis.py`. Gates need no logits. Peaks are of "
            "the whole process, with the text being tokenized, and differ by hundreds of MiB from run to run.",
        ]
    )


def adaptation() -> str:
    """The arms of the committed adaptation."""
    from engram_lm.studies.adaptation.finding import markdown_table

    result = load("adaptation")["results"]
    machine, data = result["machine"], result["data"]
    lines = [
        markdown_table(result).strip(),
        "",
        f"{data['domain_tokens']:,} tokens of {data['domain']} to train on, {data['held_out_tokens']:,} held out; "
        f"{data['retained_tokens']:,} tokens of {data['retained']} that the base was not trained on either.",
        f"Made by `{result['command']}` at commit `{result['commit']}` on {machine['processor']}, "
        f"{machine['threads']} thread.",
    ]
    return "\n".join(lines)


def suppression() -> str:
    """What the committed study's models still know, and still read, with their memory suppressed."""
    from engram_lm.studies.suppression.summary import markdown_table

    (result,) = load("suppression")["results"]
    machine, families = result["machine"], result["settings"]["families"]
    seconds = [run["training"]["seconds"] for seed in result["seeds"] for run in (seed["run"], seed["twin"])]
    lines = [
        markdown_table(result).strip(),
        "",
        f"Right answers of greedy decoding, mean ± standard deviation over {len(result['seeds'])} seeds, "
        f"{families['num_questions']} questions of each family; retained: relative to memory on; without memory: seed "
        f"by seed. Copying any value of the context would give {result['reading_by_copying_any']:.0%} in reading.",
        f"Made by `{result['command']}` at commit `{result['commit']}` on {machine['processor']}, "
        f"{machine['threads']} thread; a model took {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes.",
    ]
    return "\n".join(lines)


def depth() -> str:
    """Where memory stood in the committed study, and what it gained there."""
    result = load("depth")["results"][0]

    def of(found: dict[str, Any] | None, form: str) -> str:
        return "" if found is None else f"{found['mean']:{form}} ± {found['std']:{form.lstrip('+')}}"

    lines = ["| model | held-out loss | gain | KL depth | prediction depth |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {arm['title']} | {of(arm['loss'], '.3f')} | {of(arm['gain'], '+.3f')} | "
        f"{of(arm['lens']['kl_depth'], '.2f')} | {of(arm['lens']['prediction_depth'], '.2f')} |"
        for arm in result["summary"]["arms"].values()
    ]
    return "\n".join(
        [
            *lines,
            "",
            "Nats per token and layers, mean ± standard deviation over seeds. KL depth: layers until half of the "
            "divergence from the model's own prediction is gone; prediction depth: until its most likely token stays.",
            f"Made by `{result['command']}` at commit `{result['commit']}` on {result['machine']['processor']}, "
            f"{result['machine']['threads']} thread; {result['seconds'] / 60:.0f} minutes.",
        ]
    )


def adaptation_rates() -> str:
    """What each learning rate gained and forgot, in the first seed."""
    result = load("adaptation")["results"]
    before = result["before"]["retained"]["loss"]
    lines = ["| what is trained | rate | domain loss | change on the old text |", "|---|---:|---:|---:|"]
    lines += [
        f"| {arm['title']} | {trial['lr']:g} | {trial['domain']['loss']:.3f} | "
        f"{trial['retained']['loss'] - before:+.3f} |"
        for arm in result["arms"].values()
        if len(arm["trials"]) > 1
        for trial in arm["trials"]
    ]
    return "\n".join(lines)


def adaptation_real() -> str:
    """What each arm and rate gained and lost on the real model."""
    result = load("adaptation_real")["results"]
    data, machine = result["data"], result["machine"]
    parts = [
        *adaptation_rows(result),
        "",
        "Nats per token, ± the standard deviation over seeds; of the old texts, changes. Measured on "
        f"{data['held_out_tokens']:,} tokens of the domain and {data['retained_tokens']:,} of the old texts. "
        f"Benchmarks: the first questions of {', '.join(result['before']['tasks'])}; the mean share of the base's "
        "score that is left, in percent, that of the benchmark with the least, and how many answers became right or "
        "wrong.",
    ]
    for title, other in result.get("other_domains", {}).items():
        parts += ["", f"**Another domain: {title}**", "", *adaptation_rows(other)]
    made = f"Made by `{result['command']}` at commit `{result['commit']}` on {machine['processor']}, "
    return "\n".join([*parts, "", f"{made}{machine['threads']} thread."])


def adaptation_rows(result: dict[str, Any]) -> list[str]:
    """A table of the arms and rates of one domain."""
    from engram_lm.studies.adaptation.finding import change_on_old_text, share_kept

    before = result["before"]
    texts, tasks = before["texts"], before["tasks"]
    heads = [
        "what is trained",
        "rate",
        "seeds",
        "steps",
        "domain loss",
        *texts,
        "their mean",
        "benchmarks kept",
        "the worst of them",
        "answers changed",
    ]
    base = [f"{text['loss']:.3f}" for text in texts.values()]
    number = num_answers(tasks)
    first = ["nothing (the base)", "", "", "", f"{before['domain']['loss']:.3f}", *base]
    rows = [[*first, f"{before['retained']['loss']:.3f}", "100", "100", f"0 of {number}"]]

    for arm in result["arms"].values():
        tried = [([trial], trial["lr"]) for trial in arm["trials"] if trial["lr"] != arm["lr"]]
        for runs, rate in sorted([*tried, (arm["runs"], arm["lr"])], key=lambda pair: pair[1]):
            changed = [answers_changed(tasks, run["tasks"]) if run["tasks"] else None for run in runs]
            asked = [run for run in runs if run["tasks"]]
            worst = [100 * min(share_kept(result, run, task) or 0.0 for task in tasks) for run in asked]
            rows.append(
                [
                    arm["title"],
                    f"{rate:g}",
                    f"{len(runs)}",
                    f"{arm['num_steps']}",
                    over_seeds([run["domain"]["loss"] for run in runs], ".3f"),
                ]
                + [over_seeds([change_on_old_text(result, run, text) for run in runs], "+.3f") for text in texts]
                + [over_seeds([change_on_old_text(result, run) for run in runs], "+.3f")]
                + [
                    over_seeds([100 * (share_kept(result, run) or 0.0) for run in asked], ".1f"),
                    over_seeds(worst, ".1f"),
                    over_seeds(changed, ".0f"),
                ]
            )
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def busy_machine() -> str:
    """How fast a training is alone and beside other work, by how its threads wait and how many there are."""
    record = load("busy_machine")
    shares: dict[str, dict[str, float]] = {}
    for result in record["results"]:
        shares.setdefault(result["setting"], {})[result["case"]] = result["ratio_to_own_setting_alone"]
    cases = list(next(iter(shares.values())))
    lines = [f"| setting | {' | '.join(cases)} |", "|---" + "|---:" * len(cases) + "|"]
    lines += [
        f"| {setting if ' ' in setting else f'`{setting}`'} | {' | '.join(f'{found[case]:.2f}' for case in cases)} |"
        for setting, found in shares.items()
    ]
    machine = record["machine"]
    lines += [
        "",
        f"Median speed of one training over interleaved rounds; {machine['processor']}, {machine['cores']} cores.",
    ]
    return "\n".join(lines)


DRAWN = {"normal": "normal", "Student t, 3 degrees of freedom": "Student's t₃"}
"""How a distribution is called in a table."""


def quantization_rows() -> str:
    """How far stored rows are from those they were made of."""
    results = load("quantization")["results"]
    columns: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["case"] == "trained rows" and result["rows"] != "all":
            columns.setdefault(f"{result['width']} numbers, {result['rows']}", {})[result["stored"]] = result
    for result in results:
        if result["case"] == "drawn rows" and result["width"] == 256:
            columns.setdefault(f"256 numbers, {DRAWN[result['numbers']]}", {})[result["stored"]] = result
    lines = [f"| median / p99 / largest, % | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for stored in next(iter(columns.values())):
        if stored != "float32":
            errors = [
                " / ".join(f"{column[stored][f'relative_error_{key}'] * 100:.3f}" for key in ("median", "p99", "max"))
                for column in columns.values()
            ]
            lines.append(f"| {stored} | {' | '.join(errors)} |")
    return "\n".join(lines)


def spread(found: dict[str, Any], digits: int, factor: float = 1) -> str:
    """Mean with its sign, and standard error over seeds where there are several."""
    error = found["standard_error_over_seeds"]
    mean = f"{found['mean'] * factor:+.{digits}f}".replace("-", "−")
    return mean + ("" if error is None else f" ± {error * factor:.{digits}f}")


def over_seeds(values: Sequence[float | None], form: str) -> str:
    """Mean, and standard deviation where there are several; a dash for nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):{form.lstrip('+')}}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{form}}{spread}"


def num_answers(tasks: dict[str, Any]) -> int:
    """Questions of benchmarks that are answered rightly or wrongly."""
    return sum(len(task["right"] or "") for task in tasks.values())


def answers_changed(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Answers that became right or wrong."""
    return sum(
        old != new
        for name, task in before.items()
        for old, new in zip(task["right"] or "", after[name]["right"] or "", strict=True)
    )


SERVED = {
    "dense": "dense, 8 blocks of width 512",
    "streams": "12 blocks with experts and four streams (`engram-tiny`)",
    "dense_hf": "dense, against transformers",
    "streams_hf": "experts and streams, against transformers",
    "tiny": "`engram-tiny`, larger tables",
}


def serving() -> str:
    """What memory costs vLLM: the cases of ``benchmarks/serve.py``."""
    record = load("serve")
    lines = ["| model | tables | arm | tokens per CPU second | of none | tokens/s | read from the disk per token |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for found in record["results"]:
        model = f"{SERVED[found['case']]} | {found['tables']['bytes'] / 1e9:.3g} GB"
        for arm in found["arms"]:
            ratio, disk = arm.get("tokens_per_cpu_second_ratio"), arm.get("disk_bytes_per_token")
            low, high = arm.get("tokens_per_cpu_second_ratio_range", (None, None))
            ratios = "" if ratio is None else f"{ratio:.3f} ({low:.3f} to {high:.3f})"
            read = "" if disk is None or disk < 1 else f"{disk / 1e3:,.1f} kB"
            cells = (f"{arm['tokens_per_cpu_second']:,.0f}", ratios, f"{arm['tokens_per_second']:,.0f}", read)
            lines.append(f"| {model} | `{arm['arm']}` | {' | '.join(cells)} |")
            model = " | "
    machine = record["machine"]
    lines += ["", f"Medians of interleaved passes, with the lowest and the highest ratio of a round to `none`; "
              f"{machine['processor']}, {machine['cores']} cores, one thread."]  # fmt: skip
    return "\n".join(lines)


FAMILIES = {
    "dense": "dense",
    "dense_engram": "dense, with memory",
    "moe": "one block of experts",
    "engram": "experts and memory",
}


def micro_speed() -> str:
    """How fast micro models train."""
    record = load("micro_speed")
    lines = ["| active parameters | model | plain | compiled | a minimal program | compiled, against it |"]
    lines.append("|---:|---|---:|---:|---:|---:|")
    for one in record["results"]:
        speeds = [
            f"{one[name]['tokens_per_cpu_second'] / 1e3:,.1f} k" if name in one else ""
            for name in ("plain", "compiled", "beside")
        ]
        ratio = f"{1 / one['beside']['speed_ratio']:.2f}×" if "beside" in one else ""
        lines.append(f"| {one['size']} | {FAMILIES[one['family']]} | {' | '.join(speeds)} | {ratio} |")
    machine = record["machine"]
    lines += ["", f"Tokens per second of the processor, one thread, medians of rounds in turn; {machine['processor']}."]
    return "\n".join(lines)


METHODS = {
    "unedited": "before",
    "joint": "joint edit",
    "single rows": "single-row patches",
    "lora": "LoRA, rank 8",
    "full": "full fine-tuning",
}
MEMORIES = {"empty": "empty memory with occupancy", "trained": "memory trained on Wikipedia, no occupancy"}


def facts() -> str:
    """Facts edited into a memory, and what they are compared with."""
    record = load("facts")
    groups: dict[tuple[str, int, str], list[Any]] = {}
    for one in record["results"]:
        groups.setdefault((one["memory"], one["num_facts"], one["method"]), []).append(one)
    lines = ["| memory | facts | method | efficacy (greedy) | unseen wordings (greedy) | in paragraphs (greedy) | "
             "generalization | specificity | loss change | answers changed | CPU seconds | seeds |"]  # fmt: skip
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    unedited = {
        one["memory"]: one["tasks"] for one in record["results"] if "tasks" in one and one["method"] == "unedited"
    }
    order = list(METHODS)
    for memory, number, method in sorted(
        groups, key=lambda key: (list(MEMORIES).index(key[0]), key[1], order.index(key[2]))
    ):
        found = groups[memory, number, method]

        def mean(name: str, found: list[Any] = found) -> float:
            return sum(one[name] for one in found) / len(found)

        pairs = (
            f"{100 * mean(name):.0f} ({100 * mean(f'{name}_greedy'):.0f})"
            for name in ("efficacy", "unseen", "paragraph")
        )
        changes = [sum(one["loss_change"].values()) / len(one["loss_change"]) for one in found if "loss_change" in one]
        specific = "" if not changes else over_seeds([100 * one["specificity"] for one in found], ".1f")
        general = over_seeds([100 * one["generalization"] for one in found], ".0f")
        change = "" if not changes else f"{sum(changes) / len(changes):+.4f}"
        seconds = "" if method == "unedited" else f"{mean('fit_seconds'):.0f}"
        answers = ""
        if tasks := next((one["tasks"] for one in found if "tasks" in one and method != "unedited"), None):
            answers = f"{answers_changed(unedited[memory], tasks)} of {num_answers(tasks)}"
        lines.append(
            f"| {MEMORIES[memory]} | {number} | {METHODS[method]} | {' | '.join(pairs)} | "
            f"{general} | {specific} | {change} | {answers} | {seconds} | {len(found)} |"
        )
    machine = record["machine"]
    asked = max(one["num_asked"] for one in record["results"])
    lines += ["", f"Percent; at most {asked} of the facts were asked. Made by `{record['command']}` at commit "
              f"`{record['commit']}` on {machine['processor']}, one thread."]  # fmt: skip
    return "\n".join(lines)


PAGES: dict[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"quickstart": quickstart, "findings": findings.three},
    "docs/speed.md": {"speed": speed, "models": models, "micro speed": micro_speed},
    "docs/adapt.md": {
        "adaptation real": adaptation_real,
        "adaptation": adaptation,
        "adaptation rates": adaptation_rates,
    },
    "docs/analysis.md": {"suppression": suppression, "depth": depth, "analysis": analysis},
    "docs/facts.md": {"facts": facts},
    "docs/findings.md": findings.TABLES,
    "docs/training.md": {"busy machine": busy_machine},
    "docs/quantization.md": {"quantization": quantization, "quantization rows": quantization_rows},
    "docs/serving.md": {"serving": serving},
}
"""Page to the tables on it, by the name in its marks."""


def rewritten(page: str, text: str) -> str:
    """A page with its tables made anew."""
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda found, make=make: f"{found[1]}\n{make()}\n\n{found[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{page} has {count} places for the table {name!r}, expected 1")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    arguments = parser.parse_args()
    status = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        made = rewritten(page, text)
        if made == text:
            continue
        if arguments.check:
            print(f"{page} does not say what benchmarks/results say; run: python benchmarks/tables.py", file=sys.stderr)
            status = 1
        else:
            (ROOT / page).write_text(made, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
