"""What passes of ``engram-lm bench serve`` come to: medians, ratios to the arm without memory, and the noise."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.planning.bars import print_bars
from engram_lm.serving.bench.serve_arms import ARMS
from engram_lm.serving.bench.tables import is_cold

BASE = "none"
"""The arm that others are compared with."""

Passes = Sequence[Mapping[str, Any]]


def summarize(name: str, passes: Passes, base: Passes | None) -> dict[str, Any]:
    """Summarize the passes of one arm, in the order of the rounds.

    Rates are medians over the passes. A ratio is the median over the rounds of this arm's rate to that of the base in
    the same round, with the lowest and the highest; they are left out where there is no base.
    """
    found: dict[str, Any] = {"arm": name, "about": ARMS[name].about, "passes": len(passes)}
    for rate, unit in (("tokens_per_second", "seconds"), ("tokens_per_cpu_second", "cpu_seconds")):
        rates = [_rate(each, unit) for each in passes]
        found[rate] = statistics.median(rates)
        found[f"{rate}_range"] = [min(rates), max(rates)]
        if base is not None and name != BASE:
            ratios = [_rate(mine, unit) / _rate(theirs, unit) for mine, theirs in zip(passes, base, strict=True)]
            found[f"{rate}_ratio"] = statistics.median(ratios)
            found[f"{rate}_ratio_range"] = [min(ratios), max(ratios)]
    found["generated_tokens_per_second"] = statistics.median(each["new_tokens"] / each["seconds"] for each in passes)
    found["tokens"] = passes[0]["prompt_tokens"] + passes[0]["new_tokens"]
    for value, key in (
        ("rows_per_token", "gathered_rows"),
        ("row_bytes_per_token", "gathered_bytes"),
        ("disk_bytes_per_token", "disk_bytes"),
        ("received_bytes_per_token", "received_bytes"),
    ):
        if passes[0].get(key) is not None:
            found[value] = statistics.median(each[key] / each["read_tokens"] for each in passes)
    if ARMS[name].is_in_files:
        before = [_largest(each["resident_shares_before"]) for each in passes]
        after = [_largest(each["resident_shares_after"]) for each in passes]
        found["resident_share_before"], found["resident_share_after"] = _median(before), _median(after)
        if ARMS[name].is_cold:
            found["cold_passes"] = sum(map(is_cold, before))
    return found


def _rate(one: Mapping[str, Any], unit: str) -> float:
    """Tokens, read and generated, in a second."""
    return float(one["prompt_tokens"] + one["new_tokens"]) / max(float(one[unit]), 1e-9)


def _largest(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return max(known) if known and len(known) == len(shares) else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def print_results(found: Mapping[str, Any]) -> None:
    """Print what was measured as a table."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    load = found["workload"]
    console.print(
        f"{found['model']}: {load['requests']} requests of {load['shortest']} to {load['longest']} tokens of "
        f"{load['text']}, {load['new_tokens']} more generated for each; {found['dtype']}; medians of {found['passes']} "
        f"interleaved passes"
    )
    if "rows_per_token" in load:
        console.print(
            f"tables: {found['tables']['bytes']:,} bytes, {found['tables']['parameters']:,} parameters; a token reads "
            f"{load['rows_per_token']:.0f} rows, of which {load['distinct_rows_per_token']:.1f} were not read before"
        )
    titles = ("tokens/s", "tokens/CPU-s", "of none", "bytes/token", "disk bytes/token", "in page cache")
    table = Table(Column("arm"), *(Column(title, justify="right") for title in titles))
    for arm in found["arms"]:
        ratio, spread = arm.get("tokens_per_cpu_second_ratio"), arm.get("tokens_per_cpu_second_ratio_range")
        before, after = arm.get("resident_share_before"), arm.get("resident_share_after")
        table.add_row(
            arm["arm"],
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['tokens_per_cpu_second']:,.0f}",
            "" if ratio is None else f"{ratio:.3f} ({spread[0]:.3f} to {spread[1]:.3f})",
            _number(arm.get("row_bytes_per_token")),
            _number(arm.get("disk_bytes_per_token")),
            "" if before is None or after is None else f"{before:.1%} → {after:.1%}",
        )
    console.print(table)
    rates = {arm["arm"]: arm["tokens_per_cpu_second"] for arm in found["arms"]}
    print_bars(console, "tokens in a second of CPU time", rates, "{:,.0f}".format, full=max(rates.values()))
    for note in found["notes"]:
        console.print(f"* {note}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
