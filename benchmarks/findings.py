"""Tables of docs/findings.md: the numbers of studies, and each claim beside the evidence that the results hold."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engram_lm.page.number_text import count_text, signed_text
from engram_lm.studies import ablations as ablation_study
from engram_lm.studies import allocation as allocation_study
from engram_lm.studies import scaling as scaling_study
from engram_lm.studies.adaptation.finding import change_on_old_text
from engram_lm.studies.candidate_report import candidate_finding, differences
from engram_lm.studies.fits import estimate_text
from engram_lm.studies.layers.study import layers_finding
from engram_lm.studies.layers.verdict import setting_words
from engram_lm.studies.long_context.summary import long_context_finding
from engram_lm.studies.mechanism import summary as mechanism_summary
from engram_lm.studies.page import Finding
from engram_lm.studies.result import runs_of
from engram_lm.studies.writing import summary as writing_summary

RESULTS = Path(__file__).resolve().parent / "results"
NOT_YET = "No result was kept yet."
_KINDS = ("token frequency", "rare words", "2-gram before")
"""Kinds of tokens by which rivals are compared on the page."""


def load(name: str) -> Any:
    """Read the results of one file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def study(name: str) -> Any:
    """Read the first result of a study that ``benchmarks/study.py`` kept; None where none was."""
    return next(iter(kept(name)), None)


def kept(name: str) -> list[Any]:
    """Read all results of a study, one for each setting that it was made in."""
    found: list[Any] = load(f"study_{name}") if (RESULTS / f"study_{name}.json").is_file() else []
    return found


def made_by(result: Mapping[str, Any]) -> str:
    """How a result came about."""
    machine = result["machine"]
    types = sorted({run["dtype"] for run in runs_of(result) if run.get("dtype")})
    return (
        f"Made by `{result['command']}` at commit `{result['commit']}` on {machine['processor']}, {machine['threads']} "
        f"thread{', in ' * bool(types) + ' and '.join(types)}; {_seeds(result)}."
    )


def _budget(result: Mapping[str, Any], tokens: int) -> str:
    return f"0.1 M active, {count_text(tokens)} tokens, {_seeds(result)}"


def _seeds(result: Mapping[str, Any]) -> str:
    number = len(result["seeds"])
    return f"{number} seed{'s' * (number > 1)}"


def markdown(finding: Finding, result: Mapping[str, Any], *titles: str) -> str:
    """The tables of a finding, or those with some titles, as Markdown."""
    parts = []
    for table in finding.tables:
        if titles and table.title not in titles:
            continue
        parts += [f"**{table.title}**", ""]
        parts += [f"| {' | '.join(table.columns)} |", "|---" + "|---:" * (len(table.columns) - 1) + "|"]
        parts += [f"| {' | '.join(row)} |" for row in table.rows]
        parts += ["", table.note, ""]
    return "\n".join([*parts, made_by(result)])


def allocation() -> str:
    """Every sweep of the study of allocation, and where it is lowest."""
    result = study("allocation")
    return markdown(allocation_study.allocation_finding(result), result)


def scaling() -> str:
    """Slopes and losses of the study of scaling."""
    result = study("scaling")
    return markdown(scaling_study.scaling_finding(result), result)


def ranking(finding: Finding, result: Mapping[str, Any], setting: str, *more: str) -> str:
    """The ranking of candidates with the setting that it was made in, and other tables of a finding by their titles."""
    title = "From the lowest loss to the highest"
    return markdown(finding, result, title, *more).replace(f"**{title}**", f"**{title}: {setting}**")


def rival_layers() -> str:
    """Rivals of the paper's layer at equal bytes, with controls: each result, and of the first one also other texts."""
    kinds = ("Other texts, which nothing was trained on", *(f"Where the difference is: {name}" for name in _KINDS))
    parts = [
        ranking(
            candidate_finding(one),
            one,
            _seeds(one) + ", with twins of equal operations" * one["settings"]["equal_flops"],
            "What searching takes",
            *(kinds if number == 0 else ()),
        )
        for number, one in enumerate(kept("rivals"))
    ]
    return "\n\n".join(parts) or NOT_YET


def better_layer() -> str:
    """Candidates for a better layer, with the verdict on each."""
    results = kept("layers")
    if not results:
        return NOT_YET
    findings = [layers_finding(results[0]), *map(candidate_finding, results[1:])]
    return "\n\n".join(
        ranking(finding, one, setting_words(one), "Verdict") for finding, one in zip(findings, results, strict=True)
    )


def layers_of(size: str) -> Any:
    """The result on layers that has the most seeds at a size."""
    return max((one for one in kept("layers") if one["setting"]["size"] == size), key=lambda one: len(one["seeds"]))


def ablations() -> str:
    """What each part of the memory is worth."""
    result = study("ablations")
    return (
        NOT_YET if result is None else markdown(ablation_study.ablation_finding(result), result, "What a change costs")
    )


def mechanism() -> str:
    """Layers that memory saves, and answers without it."""
    result = study("mechanism")
    return NOT_YET if result is None else markdown(mechanism_summary.mechanism_finding(result), result)


def long_context() -> str:
    """Notes that are found again in long texts, and what answers cost."""
    result = study("long_context")
    return NOT_YET if result is None else markdown(long_context_finding(result), result)


def writing() -> str:
    """What rows that are written while a model runs gain beside a cache of counts."""
    result = study("writing")
    return NOT_YET if result is None else markdown(writing_summary.writing_finding(result), result)


# Each claim ---------------------------------------------------------------------------------------------------------


def _found(of: Mapping[str, Any] | None, form: str = "+.3f") -> str:
    """A mean with its spread."""
    if of is None or of["mean"] is None:
        return "–"
    return f"{of['mean']:{form}}" + (f" ± {of['std']:{form.lstrip('+')}}" if of.get("std") is not None else "")


def u_shape() -> tuple[str, str]:
    """Memory and experts against experts alone."""
    result = study("allocation")
    found = []
    for group, sweep in result["sweeps"].items():
        arm = result["arms"][sweep["best"]]
        gain = arm["summary"]["loss"].get("difference")
        fewest = min((one for one in result["arms"].values() if one["group"] == group), key=lambda one: one["x"])
        last = fewest["summary"]["loss"].get("difference")
        found.append(f"{group}: {_found(gain)} at ρ = {arm['x']:.2f}, {_found(last)} at the fewest experts")
    return "; ".join(found), _seeds(result)


def optimum() -> tuple[str, str]:
    """Where the loss is lowest."""
    result = study("allocation")
    found = [
        f"{group}: {estimate_text(sweep['parabola'])} by a parabola, {estimate_text(sweep['logarithms'])} by logarithms"
        for group, sweep in result["sweeps"].items()
    ]
    return "; ".join(found), _seeds(result)


def log_linear() -> tuple[str, str]:
    """What ten times the bytes are worth."""
    result = study("scaling")
    line = result["lines"]["engram"]
    sizes = [result["arms"][f"engram-{rows}"]["x"] for rows in line["rows"]]
    steps = ", ".join(estimate_text(step, "+.3f") for step in line["steps"])
    return (
        f"{estimate_text(line['slope'], '+.4f')} nats for each decade from {sizes[0] / 1e6:.1f} to "
        f"{sizes[-1] / 1e6:,.0f} MB; from size to size {steps}",
        _budget(result, result["tokens"]),
    )


def rivals(layer: str) -> tuple[str, str]:
    """Another layer against Engram at equal bytes."""
    result, beside = study("scaling"), study("rivals")
    if layer not in result["lines"]:
        found = {} if beside is None else differences(beside)
        if layer not in found:
            return NOT_YET, ""
        return (
            f"{estimate_text(found[layer], '+.3f')} nats at {beside['arms'][layer]['cost']['bytes'] / 1e6:,.1f} MB; no "
            f"memory {estimate_text(found['none'], '+.3f')}",
            _budget(beside, beside["settings"]["tokens"]),
        )
    found = {
        arm["x"]: arm["summary"]["loss"]["difference"] for name, arm in result["arms"].items() if name.startswith(layer)
    }
    ends = sorted(found)
    return (
        "; ".join(f"{_found(found[x])} nats at {x / 1e6:,.1f} MB" for x in (ends[0], ends[len(ends) // 2], ends[-1]))
        + f"; slope {estimate_text(result['lines'][layer]['slope'], '+.4f')}",
        _budget(result, result["tokens"]),
    )


def single_tokens() -> tuple[str, str]:
    """Rows for single tokens against the paper's layer and bigrams alone."""
    result = study("layers")
    if result is None:
        return NOT_YET, ""
    words = []
    for found in result["verdict"]["candidates"]["orders_1_2"]["settings"]:
        to = {name: f"{one['difference']:+.3f} ± {one['standard_error']:.3f}" for name, one in found.items()}
        words.append(f"{to['to_engram']} nats to the paper's orders and {to['to_bigrams']} to bigrams alone")
    return f"unigrams and bigrams {'; '.join(words)} (± one standard error)", "; ".join(result["verdict"]["settings"])


def other_reads() -> tuple[str, str]:
    """Published memories at equal bytes."""
    result = study("rivals")
    if result is None:
        return NOT_YET, ""
    found = differences(result)
    names = ("orders_1_2", "unigrams", "factor_engram", "per_token", "mome", "none")
    return (
        "; ".join(f"{result['arms'][name]['title']} {estimate_text(found[name], '+.3f')}" for name in names),
        _budget(result, result["settings"]["tokens"]),
    )


def far_reads() -> tuple[str, str]:
    """Notes that are found again far back, with memory and without."""
    result = study("long_context")
    if result is None:
        return NOT_YET, ""
    words, length = [], str(result["lengths"][-1])
    for name, title in (("equal_steps", "equal steps"), ("equal_loss", "equal loss")):
        found = result["summary"]["differences"][name]["recall"]["single"]
        means = [found[str(one)]["mean"] for one in result["lengths"]]
        words.append(
            f"at {title} {sum(means) / len(means):+.0%} ({found[length]['mean']:+.0%} in {int(length):,} tokens)"
        )
    told = result["num_values"]
    return (
        f"of single notes, found again in {result['lengths'][0]} to {int(length):,} tokens, memory minus experts: "
        f"{'; '.join(words)}; with eight notes neither kind tells keys apart",
        f"{count_text(result['settings']['tokens'])} tokens, {told} values, {_seeds(result)}",
    )


def written() -> tuple[str, str]:
    """Rows written while running against a cache of counts."""
    result = study("writing")
    if result is None:
        return NOT_YET, ""
    ways = result["summary"]["engram"]
    titles = {"none": "no update", "rows": "rows", "cache": "a count cache", "rows_and_cache": "both"}
    words = [f"{title} {ways[way]['loss']['mean']:.2f}" for way, title in titles.items()]
    return f"loss along new text: {', '.join(words)}", f"0.1 M active, {_seeds(result)}, two kinds of text"


def parts() -> tuple[str, str]:
    """What the memory loses without its parts."""
    result = study("ablations")
    if result is None:
        return NOT_YET, ""
    names = {arm["title"]: name for name, arm in result["arms"].items()}
    wanted = (
        "fused once",
        "raw tokens",
        "no gate",
        "no convolution",
        "orders 2, 3, 4",
        "orders 1, 2, 3",
        "few rows",
        "random rows",
    )
    found = {title: result["differences"].get(names.get(title)) for title in wanted}
    words = [f"{title} {estimate_text(one, '+.3f')}" for title, one in found.items() if one is not None]
    return "; ".join(words), f"0.1 M active, {len(result['seeds'])} seed{'s' * (len(result['seeds']) > 1)}"


def deeper() -> tuple[str, str]:
    """The logit lens where the paper's claim could hold."""
    result = study("mechanism")
    if result is None:
        return NOT_YET, ""
    found = result["summary"]["arms"]
    words = [f"{arm['title']} {_found(arm['lens']['kl_depth'], '.2f')}" for arm in found.values() if arm["lens"]]
    seeds = len(result["seeds"])
    return "layers until half of the divergence is gone: " + ", ".join(
        words
    ), f"four streams, {seeds} seed{'s' * (seeds > 1)}"


def equal_flops() -> tuple[str, str]:
    """The quickstart and its controls."""
    result = load("quickstart")["controls"]
    twin = {run["seed"]: run["loss"] for run in result["arms"]["twin"]["runs"]}

    def gain(name: str) -> str:
        gains = [twin[run["seed"]] - run["loss"] for run in result["arms"][name]["runs"]]
        return f"{sum(gains) / len(gains):+.3f}"

    wider = result["arms"]["wide"]["flops_per_token"] / result["arms"]["twin"]["flops_per_token"]
    return (
        f"{gain('memory')} nats; {gain('random_table')} with a table that is not trained; a feed-forward of "
        f"{wider:.1f} times the operations gains {gain('wide')}",
        f"1.3 M backbone, 0.6 M tokens, {_seeds(result)}",
    )


def placement() -> tuple[str, str]:
    """The layer sweep."""
    (result,) = load("depth")
    arms = result["summary"]["arms"]
    return (
        f"the last of {result['settings']['blocks']} blocks gains most ({_found(arms['block-3']['gain'])}), the first "
        f"least ({_found(arms['block-0']['gain'])}, {result['summary']['kept_by_worst']:.0%} of it)",
        f"{result['settings']['hidden_size']} wide, {count_text(result['settings']['tokens'])} tokens, "
        f"{_seeds(result)}",
    )


def effective_depth() -> tuple[str, str]:
    """The logit lens."""
    (result,) = load("depth")
    arms = result["summary"]["arms"]
    depth = {name: _found(arms[name]["lens"]["kl_depth"], ".2f") for name in ("baseline", "block-1", "block-3")}
    return (
        f"layers until half of the divergence is gone: {depth['baseline']} without memory, {depth['block-1']} with it "
        f"in block 1, {depth['block-3']} in block 3",
        f"{result['settings']['blocks']} blocks, one stream, {len(result['seeds'])} seeds",
    )


def suppressed() -> tuple[str, str]:
    """Facts and reading without memory."""
    (result,) = load("suppression")
    off = result["summary"]["conditions"]["zero in blocks 1, 2"]
    kept = {name: off[name]["retained"] for name in ("recall", "reading")}
    return (
        f"recall keeps {kept['recall']['mean']:.0%} ± {kept['recall']['std']:.0%}, reading "
        f"{kept['reading']['mean']:.0%} ± {kept['reading']['std']:.0%}",
        f"invented facts, {len(result['seeds'])} seeds",
    )


def keeps_the_base() -> tuple[str, str]:
    """Adaptation of a real model."""
    result = load("adaptation_real")
    base = result["before"]["domain"]["loss"]

    def trade(name: str) -> str:
        runs = result["arms"][name]["runs"]
        gain = sum(base - run["domain"]["loss"] for run in runs) / len(runs)
        lost = sum(change_on_old_text(result, run) for run in runs) / len(runs)
        return f"{result['arms'][name]['title']} gains {gain:.2f} nats and changes old texts by {signed_text(lost)}"

    names = [
        name
        for name in ("memory+occupancy", "lora", "memory+occupancy+retention", "lora+retention")
        if name in result["arms"]
    ]
    seeds = min(len(result["arms"][name]["runs"]) for name in names)
    return "; ".join(map(trade, names)), f"SmolLM2-135M, {seeds} seed{'s' * (seeds > 1)}"


def one_row() -> tuple[str, str]:
    """The control without a table."""
    result = load("adaptation_real")
    loss = {name: result["arms"][name]["runs"][0]["domain"]["loss"] for name in ("memory", "one_row")}
    base = result["before"]["domain"]["loss"]
    return (
        f"it gains {base - loss['one_row']:.2f} nats of the {base - loss['memory']:.2f} that the table gains",
        "adaptation of SmolLM2-135M, 1 seed",
    )


def edits() -> tuple[str, str]:
    """Facts edited together."""
    words = []
    for number in (10, 500):
        found = [
            one
            for one in load("facts")
            if (one["memory"], one["method"], one["num_facts"]) == ("empty", "joint", number)
        ]
        efficacy, unseen, paragraph, specificity = (
            100 * sum(one[name] for one in found) / len(found)
            for name in ("efficacy", "unseen", "paragraph", "specificity")
        )
        words.append(
            f"{number} facts, {len(found)} seed{'s' * (len(found) > 1)}: {efficacy:.0f} % right as edited, "
            f"{unseen:.0f} % in unseen wordings, {paragraph:.0f} % inside paragraphs, "
            f"{specificity:.0f} % of neighbors unchanged"
        )
    return "; ".join(words), "SmolLM2-135M"


def rounding() -> tuple[str, str]:
    """Quantized tables."""
    found = {one["tables"]: one for one in load("quantization") if one["case"] == "predictions"}
    change = {name: found[name]["loss_change"]["mean"] for name in ("int8", "int4", "memory off")}
    return (
        f"int8 rows cost {change['int8']:+.5f} nats, 4-bit rows {change['int4']:+.5f}; the whole memory is worth "
        f"{change['memory off']:.2f}",
        "quickstart's model, 3 seeds",
    )


def offloading() -> tuple[str, str]:
    """Tables on the host or on disk in vLLM."""
    cases = {
        case["case"]: {arm["arm"]: arm.get("tokens_per_cpu_second_ratio") for arm in case["arms"]}
        for case in load("serve")
    }
    dense, tiny = cases["dense"], cases["tiny"]
    return (
        f"tokens per CPU second, to no memory: {dense['host']:.2f} from the host and {dense['mmap']:.2f} mapped (0.1 "
        f"GB), {tiny['mmap']:.2f} mapped and {tiny['mmap_cold']:.2f} from a cold disk (10 GB); the same engine again: "
        f"{dense['none_again']:.2f} and {tiny['none_again']:.2f}",
        "vLLM on one CPU core",
    )


CLAIMS: tuple[tuple[str, str, str, Callable[[], tuple[str, str]], str], ...] = (
    (
        "Part of a sparse budget is better spent on memory than on experts (§3.1)",
        "paper",
        "seen",
        u_shape,
        "[allocation](#allocation)",
    ),
    (
        "The best share of experts is 75 to 80 % at every scale (§3.1)",
        "paper",
        "not at this size",
        optimum,
        "[allocation](#allocation)",
    ),
    (
        "Loss falls by a constant for every tenfold table (§3.2)",
        "paper",
        "it falls, but ever less",
        log_linear,
        "[scaling](#scaling)",
    ),
    (
        "Engram is better than OverEncoding at equal memory (§3.2)",
        "paper",
        "seen; OverEncoding is worse than no memory here",
        lambda: rivals("over_encoding"),
        "[rivals](#rivals)",
    ),
    (
        "A plain hashed bigram is as good (nanochat, MoME)",
        "critics",
        "in small tables; in large ones Engram is better",
        lambda: rivals("bigrams"),
        "[scaling](#scaling)",
    ),
    (
        "Streams, token map and gate matter most, the convolution least; 4-grams do not pay (§6.2)",
        "paper",
        "token map and 4-grams as there; gate not told from noise",
        parts,
        "[ablations](#ablations)",
    ),
    (
        "Orders 2 and 3 are the best use of the bytes (§6.2)",
        "paper",
        "no: rows for single tokens come first",
        single_tokens,
        "[a better layer](#a-better-layer)",
    ),
    (
        "Other published memories make more of the same bytes (FactorEngram, MoME, per-layer embeddings)",
        "critics",
        "FactorEngram does, by its unigrams; rows for single tokens and bigrams do more",
        other_reads,
        "[rivals](#rivals)",
    ),
    (
        "Memory frees attention for long contexts, at equal loss too (§5)",
        "paper",
        "not seen; single notes alone are found, and two seeds differ",
        far_reads,
        "[long contexts](#long-contexts)",
    ),
    (
        "A memory that is written while the model runs adapts it",
        "articles",
        "it does, and a cache of counts does more for less",
        written,
        "[writing](#rows-written-while-a-model-runs)",
    ),
    (
        "Memory gains at equal operations",
        "paper",
        "seen, and a wider feed-forward gains as much",
        equal_flops,
        "README, “What it shows”",
    ),
    (
        "The second block is the best place, the last ones the worst (§6.2)",
        "paper",
        "opposite, in four blocks",
        placement,
        "[analysis](analysis.md)",
    ),
    (
        "Memory makes a network effectively deeper (§6.1)",
        "paper",
        "not seen",
        effective_depth,
        "[analysis](analysis.md)",
    ),
    (
        "The same with at least six blocks and four streams",
        "paper",
        "by CKA, not by the lens; one seed",
        deeper,
        "[mechanism](#mechanism)",
    ),
    (
        "Without memory facts are lost and reading is kept (§6.3)",
        "paper",
        "seen, more extreme",
        suppressed,
        "[analysis](analysis.md)",
    ),
    (
        "Adding memory damages what a model knows",
        "critics",
        "true of what is trained plainly, not with retention",
        keeps_the_base,
        "[adapt](adapt.md)",
    ),
    ("A table of one row works as well (deepseek-ai/Engram#24)", "critics", "not seen", one_row, "[adapt](adapt.md)"),
    (
        "Edits fail in other wordings and inside paragraphs",
        "critics",
        "refuted up to 500 facts, but for some neighbors",
        edits,
        "[facts](facts.md)",
    ),
    ("Tables may be stored in few bits", "production variant", "seen", rounding, "[quantization](quantization.md)"),
    (
        "Tables off the accelerator cost 2 to 3 % of throughput (§6.4)",
        "paper",
        "more on a CPU",
        offloading,
        "[serving](serving.md)",
    ),
)
"""A claim, whose it is, what became of it here, the evidence, and where the whole result is."""


def claims() -> str:
    """Each claim, what was found here, and at what size."""
    lines = ["| claim | by | here | evidence | size | whole result |", "|---|---|---|---|---|---|"]
    for claim, whose, verdict, evidence, place in CLAIMS:
        found, size = evidence()
        verdict = "not yet" if found == NOT_YET else verdict
        lines.append(f"| {claim} | {whose} | {verdict} | {found} | {size} | {place} |")
    return "\n".join(
        [
            *lines,
            "",
            "Losses are in nats per token, ± the standard deviation over seeds; in parentheses intervals of 95 %.",
        ]
    )


def three() -> str:
    """Three numbers for the README."""
    shares, sizes = study("allocation"), study("scaling")
    best = shares["arms"][next(iter(shares["sweeps"].values()))["best"]]
    gain, slope = best["summary"]["loss"]["difference"], sizes["lines"]["engram"]["slope"]
    bigrams = rivals("bigrams")[0].rpartition("; slope")[0]
    first, second = (layers_of(size)["arms"]["orders_1_2"]["summary"]["loss"] for size in ("100k", "500k"))
    return (
        f"Of models with 0.1 M active parameters, in nats per token: {best['x']:.0%} of the sparse budget for experts "
        f"and the rest for memory changes the loss of experts alone by {_found(gain)}, at equal total and active "
        f"parameters ({_seeds(shares)}); every tenfold table changes it by {estimate_text(slope, '+.3f')}, and bigrams "
        f"alone change that of bigrams and trigrams by {bigrams} ({_seeds(sizes)}). Rows for single tokens and bigrams "
        f"(`orders=(1, 2)`) change it by {_found(first['difference'])}, and by {_found(second['difference'])} with "
        "five times the parameters: at this size, begin with these. The claims of the paper and of its critics beside "
        "our evidence and its limits: [docs/findings.md](docs/findings.md)."
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "claims": claims,
    "allocation": allocation,
    "scaling": scaling,
    "rivals": rival_layers,
    "better layer": better_layer,
    "ablations": ablations,
    "mechanism": mechanism,
    "writing": writing,
    "long context": long_context,
}
"""Name of a table on the page, and what makes it."""
