"""The page and the tables of an adaptation: honest, whole, offline, and safe with any text."""

import math
import re

import pytest
import rich.console
from tests.page_reading import HOSTILE, Page, contrast, hostile

from engram_lm.studies.adaptation.command import _last_words
from engram_lm.studies.adaptation.figures import trade_points
from engram_lm.studies.adaptation.finding import (
    COLUMNS,
    arm_rows,
    compare,
    headline,
    kept_columns,
    kept_rows,
    markdown_table,
    share_kept,
    terminal_table,
)
from engram_lm.studies.adaptation.report import render_report

ARMS = {
    # By arm: title, domain loss, rise of the loss on the old text, trainable outside tables, FLOPs per token.
    "memory": ("memory", 4.10, 0.03, 82_000, 2_900_000),
    "lora": ("LoRA", 4.25, 0.15, 80_000, 2_850_000),
    "memory_lora": ("memory + LoRA", 4.05, 0.14, 162_000, 3_300_000),
    "full": ("full fine-tuning", 3.98, 0.41, 1_310_000, 5_200_000),
    "random_table": ("random table", 4.39, 0.02, 82_000, 2_880_000),
    "permuted_hash": ("permuted hash", 4.47, 0.01, 82_000, 2_900_000),
    "transfer": ("memory, transferred", 4.09, 0.03, 82_000, 2_900_000),
}
BUDGET = 3e12


def evaluated(loss):
    return {"loss": loss, "perplexity": math.exp(loss), "num_tokens": 65_536, "bits_per_byte": loss / 2.4}


def scored(value):
    return {"measure": "acc", "value": value, "stderr": 0.02, "right": None}


def make_run(name, seed, loss, change, tokens, memory):
    # Seeds move all arms together, as their batches do, and each arm a little more in a way of its own.
    loss += 0.02 * (seed - 1) + 0.004 * math.cos(2.1 * seed + len(name))
    return {
        "seed": seed,
        "domain": evaluated(loss),
        "retained": evaluated(2.5 + change + 0.004 * seed),
        "texts": {"prose": evaluated(2.0 + 2 * change + 0.008 * seed), "code": evaluated(3.0)},
        "tasks": {"piqa": scored(0.6 - change / 2), "arc": scored(0.4)},
        "curve": [[tokens * step // 6, loss + (4.9 - loss) * 0.5**step] for step in range(7)],
        "seconds": 72.0,
        "memory_off": {"domain": evaluated(4.9), "retained": evaluated(2.5)} if memory else None,
        "rows_shuffled": {"domain": evaluated(4.77), "retained": evaluated(2.6)} if memory else None,
        "occupancy": {"1": 0.42, "10": 0.5} if memory else None,
        "collisions": {"1": {"num_tokens": 900_000, "rows_hit": 210_000, "ngrams_per_row": 1.87, "shared": 0.37}}
        if memory
        else None,
        "gates": {"1": {"mean": 0.31, "p10": 0.05, "p50": 0.24, "p90": 0.77, "share_above_half": 0.23}}
        if memory
        else None,
    }


def make_trial(rate, loss, change):
    return {
        "lr": rate,
        "validation": evaluated(loss),
        "domain": evaluated(loss),
        "retained": evaluated(2.45 + change),
    }


def make_result(*, arms=tuple(ARMS), num_seeds=3, losses=None, changes=None, **fields):
    """A result of these arms, made by hand; ``losses`` and ``changes`` put others in the place of those of `ARMS`."""
    made = {}
    for name in arms:
        title, loss, change, outside, flops = ARMS[name]
        loss, change = (losses or {}).get(name, loss), (changes or {}).get(name, change)
        memory, tokens = name not in {"lora", "full"}, int(BUDGET / flops)
        made[name] = {
            "title": title,
            "about": f"about {title}",
            "num_trainable": outside + memory * (name != "random_table") * 2_097_152,
            "num_trainable_outside_tables": outside,
            "flops_per_token": flops,
            "num_steps": tokens // 4096,
            "num_tokens": tokens,
            "preparation_flops": 1e11 * (name == "transfer"),
            "training_flops": tokens * flops + 1e11 * (name == "transfer"),
            "lora_rank": 9 if "lora" in name else None,
            "lr": 0.004,
            "trials": [make_trial(rate, loss + 0.2 - 50 * rate, change) for rate in (0.002, 0.004)]
            if name == "lora"
            else [],
            "runs": [make_run(name, seed, loss, change, tokens, memory) for seed in range(num_seeds)],
        }
    return {
        "format": "engram.adaptation.1",
        "recipe": {"base": {"model": "runs/base-cpu/model", "layer_list": None}, "train": {"seeds": num_seeds}},
        "base": {"name": "runs/base-cpu/model", "model_type": "llama", "num_parameters": 1_310_000, "num_layers": 4},
        "data": {
            "domain": "wikitext-2",
            "domain_tokens": 2_345_678,
            "held_out_tokens": 65_536,
            "retained": "the Python standard library",
            "retained_tokens": 65_535,
        },
        "memory": {"layers": [1], "orders": [2, 3], "num_rows": 262_144, "table_bytes": 8_388_608, "digest": "d1ce"},
        "before": {
            "domain": evaluated(4.9),
            "retained": evaluated(2.5),
            "texts": {"prose": evaluated(2.0), "code": evaluated(3.0)},
            "tasks": {"piqa": scored(0.6), "arc": scored(0.4)},
        },
        "arms": made,
        "seconds": 1500.0,
        "interrupted": False,
        "command": "engram-lm adapt recipe.toml --controls",
        "started": "2026-01-02T03:04:05+00:00",
        "machine": {"processor": "two cores"},
        "versions": {"torch": "2.13.0"},
        "commit": "3f2a91c",
        **fields,
    }


def test_page_answers_its_questions_from_top_to_bottom():
    result = make_result()
    page = Page(render_report(result))
    order = ["forgetting", "arms", "curves", "controls", "diagnostics", "use", "facts"]
    assert [name.removesuffix("-title") for name in page.ids if name.endswith("-title")] == order
    for said in (
        "Memory learns the domain better than LoRA, and forgets less",
        "Domain loss: before 4.900, Memory 4.10",
        "Loss on the old text: before 2.500, Memory 2.534 ± 0.004, LoRA 2.654 ± 0.004, Full fine-tuning 2.914 ± 0.004.",
        "Random table The table stays as it was drawn",
        "On the domain: worse than memory (+0.29",
        "about LoRA; LoRA of rank 9",
        "The domain loss rises by 0.67",
        "Memory 1 42.0 % 900 k 210 k 1.87 37.0 %",
        "Memory 1 0.31 0.05 0.24 0.77 23.0 %",
        'AutoModelForCausalLM.from_pretrained("runs/base-cpu/model")',
        "engram-lm adapt recipe.toml --controls",
        "2026-01-02 03:04 UTC",
        "minutes 25.0",
        "LoRA 0.002: 4.350, 0.004: 4.250",
    ):
        assert re.sub(r"\s", "", said) in re.sub(r"\s", "", page.text), said
    cells = re.sub(r"\s", "", page.text)
    assert all(re.sub(r"\s", "", cell) in cells for row in arm_rows(result) for cell in row)
    assert all(re.sub(r"\s", "", cell) in cells for row in kept_rows(result) for cell in row)
    assert page.tags.count("figure") == 4


def test_the_trade_shows_every_seed_and_every_rate():
    result = make_result(arms=("memory", "lora"))
    points = trade_points(result, "retained")
    assert [len(points[name]) for name in ("memory", "lora")] == [3, 4]  # LoRA has a rate that was not chosen
    assert points["lora"][3] == (pytest.approx(0.10), pytest.approx(4.35), False)
    assert points["memory"][0].kept == pytest.approx(0.03) and points["memory"][0].is_chosen
    # Of the benchmarks every one weighs the same: one kept 0.585 of 0.6, the other all.
    assert trade_points(result, "tasks")["memory"][1].kept == pytest.approx((0.585 / 0.6 + 1) / 2)
    rows = dict(zip(kept_columns(result), kept_rows(result)[1], strict=True))
    assert rows == {
        "Model": "Memory",
        "prose": "+0.068 ± 0.008",
        "code": "+0.000 ± 0.000",
        "piqa": "58.5",
        "arc": "40.0",
    }


def test_a_perplexity_is_neither_a_percentage_nor_a_share_that_is_kept():
    result = make_result(arms=("memory",))
    (before, *after) = (result["before"], *result["arms"]["memory"]["runs"])
    kept = [share_kept(result, run) for run in after]
    for entry, value in ((before, 20.0), *((run, 24.0) for run in after)):
        entry["tasks"]["pages"] = {**scored(value), "measure": "word_perplexity", "higher_is_better": False}
    assert [share_kept(result, run) for run in after] == kept and share_kept(result, after[0], "pages") is None
    base, memory = kept_rows(result)
    assert base[-1] == "20.0 ± 0.02" and memory[-1] == "24.0" and memory[-2] == "40.0"
    for entry in (before, *after):
        entry["tasks"] = {"pages": entry["tasks"]["pages"]}
    assert {row[COLUMNS.index("Benchmarks kept")] for row in arm_rows(result)} == {"–"}


@pytest.mark.parametrize("name", ["memory", "memory_lora", "memory_lora+retention"])
def test_the_matrices_that_belong_to_an_adapter_are_named(name, tmp_path):
    result = make_result(arms=("memory_lora" if "lora" in name else "memory", "lora"))
    result["arms"] = {name: next(iter(result["arms"].values())), "lora": result["arms"]["lora"]}
    (tmp_path / "adapter").mkdir()
    said = "The LoRA that was trained with it lies under"
    assert (said in render_report(result)) is (said in _last_words({**result, "out": str(tmp_path)})) is ("_" in name)


def test_page_asks_nothing_of_the_network_and_runs_no_script():
    source = render_report(make_result())
    page = Page(source)
    addresses = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "action", "srcset"}]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", source))
    assert not re.search(r"https?:|//\w|@import", source)
    assert "default-src 'none'" in source
    assert "script" not in source
    assert source == render_report(make_result())


def test_hostile_text_stays_text_everywhere():
    result = hostile(make_result())
    result["arms"][HOSTILE] = result["arms"]["memory"]
    result["recipe"][HOSTILE] = {HOSTILE: [HOSTILE]}
    result["recipe"]["base"]["layer_list"] = HOSTILE
    result["arms"]["memory"]["runs"][0]["gates"][HOSTILE] = {"mean": HOSTILE}
    result["arms"]["memory"]["runs"][0]["collisions"][HOSTILE] = {HOSTILE: HOSTILE, "shared": HOSTILE}
    source = render_report(result)
    page = Page(source)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    assert page.text.count("<img src=x onerror=") > 20
    source.encode()
    lines = markdown_table(hostile(make_result(arms=("memory",)))).splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(COLUMNS) + 1}
    assert "\\<img" in lines[-1]


@pytest.mark.parametrize(
    ("losses", "changes", "title"),
    [
        ({}, {}, "Memory learns the domain better than LoRA, and forgets less"),
        ({"memory": 4.4}, {}, "Memory learns the domain worse than LoRA, but forgets less"),
        ({"memory": 4.4}, {"memory": 0.3}, "Memory learns the domain worse than LoRA, and forgets more"),
        ({}, {"memory": 0.3}, "Memory learns the domain better than LoRA, but forgets more"),
        (
            {"memory": 4.251},
            {},
            "Memory and LoRA learn the domain equally well, within the spread over seeds; memory forgets less",
        ),
        ({}, {"memory": 0.15}, "Memory learns the domain better than LoRA, and forgets as much"),
        (
            {"memory": 5.2},
            {},
            "Memory did not help: it raises the domain loss by 0.300 nats per token, "
            "and raises that on the old text by 0.034",
        ),
        (
            {"memory": 4.9},
            {"memory": -0.004},
            "Memory made no difference to the domain loss, within the spread over seeds, "
            "and leaves that on the old text as it was",
        ),
    ],
)
def test_headline_is_honest_whatever_came_out(losses, changes, title):
    assert headline(make_result(arms=("memory", "lora"), losses=losses, changes=changes)).title == title


def test_difference_is_taken_seed_by_seed_and_must_exceed_twice_its_spread():
    result = make_result(arms=("memory", "lora"))
    for seed, (own, other) in enumerate([(4.0, 4.1), (4.3, 4.5), (4.5, 4.8)]):
        for name, loss in (("memory", own), ("lora", other)):
            result["arms"][name]["runs"][seed]["domain"] = evaluated(loss)
    difference = compare(result, "memory", "lora")
    assert (difference.mean, difference.spread, difference.num_seeds) == pytest.approx((-0.2, 0.1, 3))
    assert difference.verdict == "equal"
    result["arms"]["memory"]["runs"][2]["domain"] = evaluated(4.55)
    assert compare(result, "memory", "lora").verdict == "lower"
    assert compare(result, "lora", "memory").verdict == "higher"
    # Of an interrupted run, only the seeds that both arms have are compared.
    del result["arms"]["lora"]["runs"][1:]
    assert compare(result, "memory", "lora").num_seeds == 1
    assert compare(result, "memory", "lora").verdict == "unknown"
    assert headline(result).title.startswith("In one seed, memory ends with a lower domain loss than LoRA")


def test_one_seed_has_no_spread_to_speak_of():
    same = make_result(arms=("memory", "lora"), num_seeds=1, losses={"memory": 4.1, "lora": 4.1})
    same["arms"]["lora"]["runs"] = same["arms"]["memory"]["runs"]
    assert headline(same).title == "Memory and LoRA learn the domain equally well; memory forgets as much"
    assert "no difference to memory (+0.000)" in Page(render_report(same)).text
    useless = make_result(arms=("memory",), num_seeds=1)
    useless["arms"]["memory"]["runs"][0] |= useless["before"]
    assert headline(useless).title == (
        "Memory made no difference to the domain loss, and leaves that on the old text as it was"
    )


def test_control_that_does_as_well_is_said_beside_the_headline():
    assert "as well" not in headline(make_result()).detail
    said = headline(make_result(losses={"permuted_hash": 4.1})).detail
    assert "But a permuted hash does as well, so it is not the memory's content that helps." in said


def test_points_that_crowd_far_from_the_base_are_drawn_again_closer():
    assert "Closer" in Page(render_report(make_result(arms=("memory", "lora")))).text
    spread = Page(render_report(make_result(arms=("memory", "full", "permuted_hash"))))
    assert "From the base" in spread.text
    assert "Closer" not in spread.text
    label = next(value for name, value in spread.attributes if name == "aria-label" and "with the base at" in value)
    assert "with the base at 0 and 4.900. Memory: +0.030 and 4.084, +0.034 and 4.099" in label


def test_diverged_and_missing_runs_are_named_and_not_averaged():
    result = make_result(arms=("memory", "lora", "full"), interrupted=True)
    result["arms"]["memory"]["runs"][0]["domain"] = {"loss": float("nan"), "perplexity": None}
    result["arms"]["lora"]["runs"][1]["domain"]["loss"] = None
    result["arms"]["full"]["runs"] = []
    cells = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in arm_rows(result)}
    assert cells["Memory"]["Domain loss"].endswith("(2 of 3 seeds)")
    assert cells["Full fine-tuning"]["Domain loss"] == "not run"
    assert "1 of 3 seeds of Memory ended without a finite loss" in headline(result).detail
    page = Page(render_report(result))
    assert "engram-lm adapt --resume" in page.text
    assert "Use the adapter" not in page.text
    assert "nan" not in page.text.lower().split()

    for run in result["arms"]["memory"]["runs"]:
        run["domain"] = evaluated(4.0) | {"loss": float("inf")}
    assert headline(result).title == "Whether memory helped is not known: no seed ended with a finite loss"


def test_what_was_not_measured_leaves_a_shorter_page():
    result = make_result(arms=("memory",), num_seeds=1)
    result["data"]["retained"] = None
    result["before"].update(dict.fromkeys(("retained", "texts", "tasks")))
    for run in result["arms"]["memory"]["runs"]:
        run.update(
            dict.fromkeys(
                ("retained", "texts", "tasks", "memory_off", "rows_shuffled", "occupancy", "collisions", "gates")
            )
        )
    page = Page(render_report(result))
    assert "One seed, so how much of this is chance is not known." in page.text
    assert "No old text was given" in page.text
    assert "Not run here; engram-lm adapt --controls adds it." in page.text
    assert "diagnostics-title" not in page.ids
    assert page.tags.count("figure") == 1
    assert "±" not in headline(result).detail

    nothing = {"format": "engram.adaptation.1", "arms": {}, "interrupted": True}
    page = Page(render_report(nothing))
    assert "No memory was trained" in page.text
    assert not {"figure", "table"} & set(page.tags)
    assert len(markdown_table(nothing).splitlines()) == 3

    page = Page(render_report(make_result(arms=("lora", "full"))))
    assert "No memory was trained" in page.text
    assert "LoRA 4.2" in page.text
    assert "controls-title" not in page.ids


def test_tables_hold_the_same_numbers_in_the_terminal_and_in_markdown(capsys):
    result = make_result()
    result["arms"]["lora"]["title"] = "[red]LoRA"
    rich.console.Console(width=80, color_system=None).print(terminal_table(result))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "[red]LoRA" in shown
    for row in arm_rows(result):
        for column in ("Domain loss", "Change on old text", "Trainable in tables"):
            cell = row[COLUMNS.index(column)]
            assert any(cell in line for line in shown.splitlines()), (column, cell)
    lines = markdown_table(make_result()).splitlines()
    assert lines[1] == "|" + " :-- |" + " --: |" * 9
    assert lines[3].startswith(
        "| Memory | 4.100 ± 0.017 | +0.034 ± 0.004 | 98.8 % | 4.900 ± 0.000 | 4.770 ± 0.000 | 82.0 k |"
    )
    assert lines[3].endswith("| 2.10 M | 1.03 M | 3.00 T |")
    assert lines[-1].startswith("| Memory, transferred") and lines[-1].endswith("| 3.10 T |")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser_loads_alone_fits_a_phone_and_takes_the_keyboard(browser, tmp_path, scheme):
    path = tmp_path / "report.html"
    path.write_text(render_report(make_result()), encoding="utf-8")
    page = browser.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.goto(path.as_uri())
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.set_viewport_size({"width": 390, "height": 800})
    # What is wider than a phone is reached with Tab and moved with the arrow keys.
    for label in ("The models, a wide table", "Gates by block", "Python"):
        assert page.get_by_label(label).first.evaluate("element => element.tabIndex") == 0
    region = page.get_by_label("The models, a wide table")
    region.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    scrolled = "document.querySelector('[aria-label^=\"The models\"]').scrollLeft"
    # The page's policy forbids waiting inside it, and scrolling is smooth.
    for _ in range(100):
        if page.evaluate(scrolled) > 0:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(scrolled) > 0
    # Every arm is drawn in a color of its own that stands out from the page.
    colors = page.evaluate("[...document.querySelectorAll('.marker path')].map(path => getComputedStyle(path).fill)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len(set(colors)) == len(ARMS)
    assert min(contrast(color, ground) for color in colors) >= 3
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
