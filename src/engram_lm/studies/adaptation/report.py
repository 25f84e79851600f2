"""The result of an adaptation as one page that opens offline and asks nothing of the network."""

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.frame import Html, escape, plain_text, render_page, section, table
from engram_lm.page.number_text import count_text, mean_of, number_text
from engram_lm.studies.adaptation.figures import curve_figures, trade_figures
from engram_lm.studies.adaptation.finding import (
    COLUMNS,
    RUN_COLUMNS,
    adapter_arm,
    arm_rows,
    arm_runs,
    arm_title,
    compare,
    finite_loss,
    headline,
    judged_arm,
    kept_columns,
    kept_rows,
    loss_before,
    losses,
    run_rows,
)
from engram_lm.studies.diagnostics import diagnostics_section
from engram_lm.studies.page import facts_section, page_footer

_ARM_COLORS = (
    *("memory", "lora", "memory_lora", "full", "random_table", "permuted_hash", "transfer"),
    *("memory-occupancy", "memory-sparse", "memory-retention", "lora-retention"),
)
_KEY_COLUMNS = {"Domain loss", "Change on old text"}

_CONTROLS = {
    "random_table": (
        "Random table",
        "The table stays as it was drawn; only the layers that read it are trained. If this does as well as memory, "
        "the gain comes from those layers, or from telling N-grams apart at all, and not from what rows have learned.",
    ),
    "permuted_hash": (
        "Permuted hash",
        "Rows are read in the same number and at the same cost, but an N-gram reads other rows at every position. If "
        "this does as well as memory, it does not matter which N-gram is looked up: memory is only more parameters.",
    ),
    "one_row": (
        "One row",
        "The same row is read everywhere. If this does as well, the gain comes from the layers that read, which see "
        "the hidden state, and needs no table.",
    ),
    "embeddings": (
        "No table",
        "Means of the model’s own token embeddings are gated and added, and nothing is looked up. What this gains "
        "needs no memory.",
    ),
    "lora": (
        "LoRA",
        "A low-rank change of the model’s own matrices; with <code>lora.rank = &quot;auto&quot;</code>, of the rank "
        "that costs as much trainable compute per token as the memory. If this does as well, memory is no better use "
        "of that compute; compare what both forget.",
    ),
    "full": (
        "Full fine-tuning",
        "All weights of the base are trained, under the same budget. What this forgets is what a frozen base avoids.",
    ),
    "transfer": (
        "Transfer",
        "The rows of frequent N-grams begin as the base’s own hidden states instead of at random. If this is no better "
        "than memory, how rows begin does not matter after this much training.",
    ),
}

_COLLISIONS = {
    "num_tokens": "Tokens counted",
    "rows_hit": "Rows read",
    "ngrams_per_row": "N-grams per row read",
    "shared": "Rows shared",
    "shared_positions": "Reads of shared rows",
}
_GATES = {
    "mean": "Mean",
    "p10": "10th percentile",
    "p50": "Median",
    "p90": "90th percentile",
    "share_above_half": "Above a half",
}


def render_report(result: Mapping[str, Any]) -> str:
    """Render the whole report as an HTML page with its styles and pictures inside, and without scripts.

    Args:
        result: A result in the format ``engram.adaptation.1``; arms, numbers and texts may be missing or not finite.
    """
    style = importlib.resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return render_page(
        title=f"{headline(result).title} · engram-lm adapt",
        header=_header(result),
        sections=[
            _forgetting(result),
            _arms(result),
            _curves(result),
            _controls(result),
            _inside(result),
            _bits(result),
            _use(result),
            _facts(result),
        ],
        footer=page_footer(result),
        colors=[_color(name) for name in _arms_of(result)],
        style=style,
    )


def _header(result: Mapping[str, Any]) -> str:
    said, base, data = headline(result), result.get("base") or {}, result.get("data") or {}
    parts = []
    if base:
        size = count_text(base.get("num_parameters"))
        parts.append(
            f"The base is {base.get('name')} ({size} parameters, {plain_text(base.get('num_layers'))} layers)."
        )
    if data.get("domain_tokens") is not None:
        parts.append(
            f"The domain is {data.get('domain')}: {plain_text(data['domain_tokens'])} tokens to train on, "
            f"{plain_text(data.get('held_out_tokens'))} held out to judge."
        )
    if _has_old_text(result):
        parts.append(f"The old text is {data.get('retained')}: {plain_text(data.get('retained_tokens'))} tokens.")
    interrupted = (
        '<p class="notice">The run was interrupted. What follows is what was finished when it stopped, so arms may '
        "lack seeds; <code>engram-lm adapt --resume</code> goes on.</p>"
    )
    return (
        f'<p class="eyebrow">engram-lm adapt</p>\n<h1>{escape(said.title)}</h1>\n'
        f'<p class="lead">{escape(said.detail).replace(" ± ", "&nbsp;±&nbsp;")}</p>\n'
        f'<p class="muted">{escape(" ".join(parts))}</p>\n' + (interrupted if result.get("interrupted") else "")
    )


def _forgetting(result: Mapping[str, Any]) -> str:
    figures = trade_figures(result)
    if not _arms_of(result) or (not figures and _has_old_text(result)):
        return ""
    if figures:
        figures += (
            '<p class="note">Each point is one seed; a hollow one is a learning rate that was tried and not chosen. '
            "Lower is better on the domain; further left is better on the old text, and right of 0 something was "
            "forgotten. A dotted line marks +0.01 nats on the old text, or 99 % of the benchmarks’ scores.</p>"
        )
        if len(kept_columns(result)) > 2:
            figures += table(kept_columns(result), kept_rows(result), label="What was kept, a wide table", kind="arms")
            figures += (
                '<p class="note">Change of the loss on each old text, in nats per token, and score on each benchmark '
                "in percent, or as it is where a lower one is better; of the base, its loss and its scores with their "
                "standard errors.</p>"
            )
    else:
        figures = (
            '<p class="notice">No old text was given, so what was forgotten is not known. Name text like that which '
            "the base was trained on with <code>--data.retained</code> to measure it.</p>"
        )
    return section("forgetting", "What was learned, and what was forgotten", figures)


def _arms(result: Mapping[str, Any]) -> str:
    arms = _arms_of(result)
    if not arms and loss_before(result, "domain") is None:
        return ""
    about = ""
    for name, arm in arms.items():
        if arm.get("about"):
            rank = f"; LoRA of rank {escape(arm['lora_rank'])}" if arm.get("lora_rank") else ""
            about += f"<li><strong>{escape(arm_title(arm, name))}</strong>: {escape(arm['about'])}{rank}</li>\n"
    note = "Loss and change are in nats per token, on held-out text; a positive change is something forgotten."
    if max((len(arm.get("runs") or ()) for arm in arms.values()), default=0) > 1:
        note += " Values are means over seeds, ± the standard deviation."
    note += (
        " <em>Memory off</em> is the same model with its memory not read; <em>rows shuffled</em> reads rows of other "
        "N&#8209;grams in their place."
    )
    models = table(COLUMNS, arm_rows(result), label="The models, a wide table", kind="arms", key_columns=_KEY_COLUMNS)
    notes = f'<p class="note">{note}</p>' + (f'<ul class="note">{about}</ul>' if about else "")
    return section("arms", "The models", models + notes)


def _curves(result: Mapping[str, Any]) -> str:
    figures = curve_figures(result)
    if not figures:
        return ""
    return section(
        "curves",
        "While training",
        f'{figures}<p class="note">Loss on held-out text of the domain; each seed is a line. The vertical axis leaves '
        "out the first tenth, where the loss is far higher.</p>",
    )


def _controls(result: Mapping[str, Any]) -> str:
    arms, memory = _arms_of(result), judged_arm(result)
    if memory not in arms:
        return ""
    entries = []
    for name, (title, meaning) in _CONTROLS.items():
        if name in arms:
            found = _against_memory(result, name)
        elif name in {"random_table", "permuted_hash", "lora"}:
            found = "Not run here; <code>engram-lm adapt --controls</code> adds it."
        else:
            continue
        entries.append(f'<dt>{title}</dt><dd>{meaning}</dd><dd class="found">{found}</dd>')
    for kind, title, meaning in (
        ("memory_off", "Memory off", "The trained model with its memory switched off: how much depends on it."),
        (
            "rows_shuffled",
            "Rows shuffled",
            "The trained model reading other rows than it learned: what is lost is what the rows hold.",
        ),
    ):
        found = _without_memory(arms[memory], kind)
        if found:
            entries.append(f'<dt>{title}</dt><dd>{meaning}</dd><dd class="found">{found}</dd>')
    return section(
        "controls",
        "What could explain it instead",
        f'<dl class="controls">{"".join(entries)}</dl><p class="note">Better or worse is said of a difference of more '
        "than twice its standard deviation over the seeds. It is taken seed by seed: arms of one seed saw the same "
        "batches in the same order.</p>",
    )


def _against_memory(result: Mapping[str, Any], name: str) -> str:
    """What an arm showed beside memory, in a sentence."""
    sentences = []
    for text, what in (("domain", "On the domain"), ("retained", "On the old text")):
        difference = compare(result, name, judged_arm(result), text)
        if difference is not None:
            verdict = {
                "lower": "better than memory",
                "higher": "worse than memory",
                "equal": "no difference to memory" + (" beyond the spread" if difference.spread is not None else ""),
                "unknown": "loss minus memory’s, in one seed",
            }[difference.verdict]
            sentences.append(f"{what}: {verdict} ({difference.text}).")
    return escape(" ".join(sentences) or "No seed has a finite loss both here and with memory.")


def _without_memory(arm: Mapping[str, Any], kind: str) -> str:
    """How far the domain loss rises without what memory holds, seed by seed."""
    kept = losses(arm)
    mean = mean_of(loss - kept[seed] for seed, loss in losses(arm, kind=kind).items() if seed in kept)
    if mean is None:
        return ""
    return escape(f"The domain loss {'rises' if mean >= 0 else 'falls'} by {abs(mean):.3f} nats per token.")


def _inside(result: Mapping[str, Any]) -> str:
    """Occupancy, collisions and gates of every arm with memory, by block."""
    use, gates = [], []
    for name, arm in (result.get("arms") or {}).items():
        title, runs = arm_title(arm, name), arm_runs(arm)
        for block in _blocks(runs, "occupancy", "collisions"):
            share = mean_of(_number((run.get("occupancy") or {}).get(block)) for run in runs)
            counted = {key: _mean_in_block(runs, "collisions", block, key) for key in _COLLISIONS}
            cells = [_percent(value) if key.startswith("shared") else _amount(value) for key, value in counted.items()]
            use.append([title, block, _percent(share), *cells])
        for block in _blocks(runs, "gates"):
            gate = {key: _mean_in_block(runs, "gates", block, key) for key in _GATES}
            cells = [_percent(value) if key.startswith("share") else number_text(value) for key, value in gate.items()]
            gates.append([title, block, *cells, _gate_range(gate)])
    tables = []
    if use:
        columns = ("Rows", "Block", "Occupancy", *_COLLISIONS.values())
        tables.append(table(columns, use, label="Use of rows by block", kind="arms"))
    if gates:
        columns = ("Gates", "Block", *_GATES.values(), "From 0 to 1")
        tables.append(table(columns, gates, label="Gates by block", kind="arms"))
    if not tables:
        return ""
    return section(
        "diagnostics",
        "Inside the memory",
        "<p>Means over seeds. <em>Occupancy</em> is the share of rows that training has touched; rows are "
        "<em>shared</em> where two N&#8209;grams of the domain or more read them. A gate of 0 lets nothing of what was "
        "looked up into the model, 1 all of it; the bar goes from the 10th to the 90th percentile over held-out text, "
        "with a mark at the median. Blocks are counted from 0.</p>" + "\n".join(tables),
    )


def _bits(result: Mapping[str, Any]) -> str:
    """The bits by kind of token of the first arm with memory that was measured."""
    for name, arm in _arms_of(result).items():
        for run in arm_runs(arm):
            if run.get("bits"):
                subject = f"{arm_title(arm, name)}, the first seed, on held-out text of the domain."
                return diagnostics_section(run["bits"], subject)
    return ""


def _use(result: Mapping[str, Any]) -> str:
    # The folder is written at the end of a whole run, of the first arm that is no control.
    useful = adapter_arm(result)
    if useful is None or result.get("interrupted"):
        return ""
    recipe = (result.get("recipe") or {}).get("base") or {}
    # JSON and Python write strings alike; the list of layers is only named where structure did not tell.
    base = json.dumps(str((result.get("base") or {}).get("name") or recipe.get("model") or "BASE"))
    layers = f", layer_list={json.dumps(str(recipe['layer_list']))}" if recipe.get("layer_list") else ""
    code = (
        "import engram_lm, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({base})\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({base})\n"
        f'adapter = engram_lm.MemoryAdapter.from_pretrained(model, "adapter", tokenizer=tokenizer{layers})\n'
        'print(tokenizer.decode(model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=40)[0]))'
    )
    lora = (
        "The LoRA that was trained with it lies under <code>runs/</code>, as peft writes it; load both. "
        if useful.partition("+")[0] == "memory_lora"
        else ""
    )
    return section(
        "use",
        "Use the adapter",
        f"<p>The folder <code>adapter</code> beside this page holds the memory of the first seed. {lora}"
        "<code>adapter.detach()</code> gives the base back exactly.</p>"
        f'<pre class="command" tabindex="0" aria-label="Python">{escape(code)}</pre>',
    )


def _facts(result: Mapping[str, Any]) -> str:
    recipe = result.get("recipe") or {}
    rates = {
        arm_title(arm, name): ", ".join(
            f"{plain_text(trial.get('lr'))}: {number_text(finite_loss(trial.get('validation')), 3)}" for trial in tried
        )
        for name, arm in _arms_of(result).items()
        if len(tried := arm.get("trials") or ()) > 1
    }
    minutes = {"minutes": number_text(result["seconds"] / 60)} if result.get("seconds") is not None else {}
    groups = {
        **{name.capitalize(): result.get(name) or {} for name in ("base", "data", "memory")},
        **{f"Recipe: {escape(name)}": values for name, values in recipe.items()},
        "Validation loss by learning rate": rates,
        "Time": minutes,
    }
    runs = run_rows(result)
    every = table(RUN_COLUMNS, runs, label="Every run", row_headings=False)
    return facts_section(result, groups, f"<details><summary>Every run</summary>{every}</details>" if runs else "")


def _color(arm: str) -> str:
    """The CSS variable with an arm's color."""
    name = arm.replace("+", "-")
    return name if name in _ARM_COLORS else "other"


def _arms_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result.get("arms") or {}


def _has_old_text(result: Mapping[str, Any]) -> bool:
    return bool((result.get("before") or {}).get("retained"))


def _gate_range(gate: Mapping[str, float | None]) -> Html:
    """A bar from the 10th to the 90th percentile of a gate, between 0 and 1, with a mark at the median."""
    low, middle, high = (min(1.0, max(0.0, gate.get(name) or 0.0)) * 100 for name in ("p10", "p50", "p90"))
    return Html(
        '<svg class="gate-range" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<path d="M0 5H100" stroke="var(--line)" stroke-width="2"/>'
        f'<path d="M{low:.1f} 5H{high:.1f}" stroke="currentColor" stroke-width="4"/>'
        f'<path d="M{middle:.1f} 0V10" stroke="var(--ink)" stroke-width="1"/></svg>'
    )


def _blocks(runs: Sequence[Mapping[str, Any]], *kinds: str) -> list[str]:
    found = {block for run in runs for kind in kinds for block in run.get(kind) or {}}
    return sorted(found, key=lambda block: (len(str(block)), str(block)))


def _mean_in_block(runs: Sequence[Mapping[str, Any]], kind: str, block: str, key: str) -> float | None:
    return mean_of(_number(((run.get(kind) or {}).get(block) or {}).get(key)) for run in runs)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _percent(share: float | None) -> str:
    return number_text(None) if share is None else f"{number_text(share * 100, 1)} %"


def _amount(value: float | None) -> str:
    return number_text(value) if isinstance(value, float) and value < 1000 and value % 1 else count_text(value)
