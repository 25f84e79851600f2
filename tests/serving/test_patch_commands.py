"""Facts go into a model's folder and out of it by ``engram-lm patch``, and its table files keep their bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.adapt.patched_models import trained_model
from tests.adapt.small_models import TEXT, TOKENIZER, small_model

from engram_lm import EngramForCausalLM, MemoryAdapter, RowPatch
from engram_lm.adapt import FactEdit, attached_adapters
from engram_lm.adapt.edits.expressions import read_wordings
from engram_lm.adapt.edits.scoring import score_wordings
from engram_lm.adapt.fact_report import report_facts
from engram_lm.adapt.patch_folder import patch_files
from engram_lm.adapt.patchable import patchable_memory
from engram_lm.adapt.row_change import RowChange
from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.serving.join import join
from engram_lm.serving.load import ModelFlags, load_model

FACTS = [
    {"prompt": "saw the cat", "answer": " mat", "subject": "the cat", "paraphrases": ["to a mat ran the cat"]},
    {"prompt": "on a rat", "answer": " ran", "subject": "a rat"},
]
EDITS = [FactEdit.from_dict(fact) for fact in FACTS]
IDS = torch.tensor([TOKENIZER("saw the cat; on a rat the mat")["input_ids"]])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, an adapter, a reference model, facts, and a patch for each memory."""
    root = tmp_path_factory.mktemp("patch")
    model = small_model()
    model.save_pretrained(root / "model")
    TOKENIZER.save_pretrained(root / "model")
    attached_adapters(trained_model())["default"].save_pretrained(root / "adapter")
    trained_model("reference").save_pretrained(root / "own")
    TOKENIZER.save_pretrained(root / "own")
    (root / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (root / "text.txt").write_text(TEXT)
    fit = ["patch", "fit", "--max-steps", "40", "--margin", "0.5"]
    for model, adapter, out in (("model", ["--adapter", str(root / "adapter")], "patch"), ("own", [], "own-patch")):
        code = main([*fit, str(root / model), str(root / "facts.jsonl"), *adapter, "--out", str(root / out)])
        assert code == 0
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy of all that, to change."""
    shutil.copytree(made, tmp_path / "all")
    return tmp_path / "all"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def leads(model, edits=EDITS):
    return [score.lead for score in score_wordings(patchable_memory(model), read_wordings(TOKENIZER, edits))]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def load(folder, **options):
    adapter = folder / "adapter" if (folder / "adapter").exists() else None
    return load_model(folder / "model", tables=ModelFlags(**options), adapter=adapter)[0]


@pytest.mark.parametrize("tier", [None, "mmap", "file", "host"])
def test_an_applied_patch_is_read_by_every_load_and_reverted_to_the_bit(folder, tier):
    files, plain = contents(folder / "adapter"), logits(load(folder, table_tier=tier))
    assert main(["patch", "apply", str(folder / "adapter"), str(folder / "patch")]) == 0
    model = load(folder, table_tier=tier)
    assert min(leads(model)) > 0
    assert contents(folder / "adapter") == files
    # What is saved holds the changed rows, and no patch beside them.
    attached_adapters(model)["default"].save_pretrained(folder / "saved")
    again = small_model()
    MemoryAdapter.from_pretrained(again, folder / "saved")
    assert torch.equal(logits(again), logits(model)) and not patch_files(folder / "saved")
    assert main(["patch", "revert", str(folder / "adapter")]) == 0
    assert torch.equal(logits(load(folder, table_tier=tier)), plain)
    assert contents(folder / "adapter") == files


@pytest.mark.parametrize("tier", ["device", "mmap"])
def test_an_adapter_that_is_saved_without_tables_loses_no_facts(folder, tier):
    adapter, elsewhere = folder / "adapter", folder / "elsewhere"
    shutil.copytree(adapter, folder / "plain")
    main(["patch", "apply", str(adapter), str(folder / "patch")])
    elsewhere.mkdir()
    (adapter / "tables.safetensors").rename(elsewhere / "tables.safetensors")
    loaded = MemoryAdapter.from_pretrained(small_model(), adapter, table_source=elsewhere, table_tier=tier)
    for place in (adapter, folder / "new"):
        with pytest.raises(ConfigError, match="row patches change rows of the table 0"):
            loaded.save_pretrained(place, tables=False)
    assert len(patch_files(adapter)) == 1
    plain = MemoryAdapter.from_pretrained(small_model(), folder / "plain")
    with pytest.raises(FileExistsError, match="holds row patches"):
        plain.save_pretrained(adapter, tables=False)


def test_what_would_be_lost_is_refused_before_the_model_is_loaded(folder, capsys):
    files = contents(folder / "adapter")
    # There is no such model, so loading it would be another error.
    assert main(["patch", "new", str(folder / "absent"), str(folder / "adapter")]) == 1
    assert "not empty" in capsys.readouterr().err
    assert contents(folder / "adapter") == files
    for out in (folder, folder / "text.txt" / "patch"):
        assert main(["patch", "fit", str(folder / "absent"), str(folder / "facts.jsonl"), "--out", str(out)]) == 1
        assert "--out" in capsys.readouterr().err
    # Nor is what is read written over.
    for name in ("facts.jsonl", "text.txt"):
        before = (folder / name).read_bytes()
        fit = ["patch", "fit", str(folder / "absent"), str(folder / "facts.jsonl")]
        assert main([*fit, "--reference", str(folder / "text.txt"), "--out", str(folder / name)]) == 1
        assert "is read for the fit" in capsys.readouterr().err and (folder / name).read_bytes() == before
    for flags in (["--num-heads", "0"], ["--orders"]):
        assert main(["patch", "new", str(folder / "absent"), str(folder / "new"), *flags]) == 1
        assert flags[0] in capsys.readouterr().err


def test_of_several_patches_the_one_that_is_named_is_taken_out(folder, capsys):
    adapter = str(folder / "adapter")
    main(["patch", "apply", adapter, str(folder / "patch")])
    (first,) = patch_files(folder / "adapter")
    second = first.with_name("0002.safetensors")
    second.write_bytes(first.read_bytes())
    for flags in ([], ["--name", "0003.safetensors"], ["--name", first.name, "--all"]):
        assert main(["patch", "revert", adapter, *flags]) == 1
        assert "--name" in capsys.readouterr().err
    assert main(["patch", "revert", adapter, "--name", first.name]) == 0
    assert patch_files(folder / "adapter") == [second]
    assert main(["patch", "revert", adapter]) == 0
    assert not patch_files(folder / "adapter")


def test_one_fact_is_taken_out_of_an_applied_patch(folder, capsys):
    main(["patch", "apply", str(folder / "adapter"), str(folder / "patch")])
    assert main(["patch", "revert", str(folder / "adapter"), "--fact", "on a rat"]) == 0
    assert "1 facts remain" in capsys.readouterr().out
    # A flag without a prompt, as from an empty variable of a shell, takes nothing out.
    assert main(["patch", "revert", str(folder / "adapter"), "--fact"]) == 1
    assert "--fact needs" in capsys.readouterr().err and patch_files(folder / "adapter")
    found = leads(load(folder))
    assert found[0] > 0 and found[1] > 0 and found[2] < 0
    assert main(["patch", "revert", str(folder / "adapter"), "--fact", "on a rat"]) == 1
    assert "no patch of" in capsys.readouterr().err
    assert main(["patch", "revert", str(folder / "adapter"), "--fact", "saw the cat"]) == 0
    assert not patch_files(folder / "adapter")


def test_a_model_of_ours_takes_patches_too(folder):
    files = contents(folder / "own")
    plain = logits(load_model(folder / "own")[0])
    with_flag = load_model(folder / "own", tables=ModelFlags(patch=(folder / "own-patch",)))[0]
    assert min(leads(with_flag)) > 0
    assert main(["patch", "apply", str(folder / "own"), str(folder / "own-patch")]) == 0
    with pytest.warns(UserWarning, match=r"RowPatch.load\(file\).apply"):
        EngramForCausalLM.from_pretrained(folder / "own")
    mapped = load_model(folder / "own", tables=ModelFlags(table_tier="mmap"))[0]
    assert torch.equal(logits(mapped), logits(with_flag))
    assert contents(folder / "own") == files
    assert main(["patch", "revert", str(folder / "own"), "--all"]) == 0
    assert torch.equal(logits(load_model(folder / "own")[0]), plain)


@pytest.mark.parametrize("name", ["adapter", "own"])
def test_folding_writes_the_rows_into_the_tables_and_takes_the_patches_away(folder, name, capsys):
    target = folder / name
    main(["patch", "apply", str(target), str(folder / ("patch" if name == "adapter" else "own-patch"))])
    opened = load(folder) if name == "adapter" else load_model(target)[0]
    assert main(["patch", "merge", str(target), "--fold"]) == 0
    assert not (target / "patches").exists()
    folded = load(folder) if name == "adapter" else load_model(target)[0]
    assert torch.equal(logits(folded), logits(opened))
    assert main(["patch", "merge", str(target), "--fold"]) == 1
    assert "there are no patches" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_in_words(folder, capsys, tmp_path):
    adapter, patch = str(folder / "adapter"), str(folder / "patch")
    # The reference model has the same hash and other rows.
    assert main(["patch", "apply", adapter, str(folder / "own-patch")]) == 1
    assert "expects other rows in table" in capsys.readouterr().err
    other = RowPatch.load(patch)
    RowPatch("ab" * 32, other.tables, "other", other.facts, other.edit).save(tmp_path / "other")
    assert main(["patch", "apply", adapter, str(tmp_path / "other")]) == 1
    assert "made for the hash abab" in capsys.readouterr().err
    for name, file in (("adapter", "patch"), ("own", "own-patch")):
        one = RowPatch.load(folder / file)
        tables = {key: RowChange(had.rows, had.before.half(), had.after.half()) for key, had in one.tables.items()}
        RowPatch(one.spec_digest, tables, "half", one.facts, one.edit).save(tmp_path / "half")
        assert main(["patch", "apply", str(folder / name), str(tmp_path / "half")]) == 1
        assert "use the patch with --patch" in " ".join(capsys.readouterr().err.replace("│", "").split())
        assert not patch_files(folder / name)
    model = load(folder)
    hand = RowPatch.from_rows(model, {"0": (other.tables["0"].rows[:1], torch.ones(1, 6))}, title="hand")
    hand.save(tmp_path / "hand")
    main(["patch", "apply", adapter, patch])
    assert main(["patch", "apply", adapter, str(tmp_path / "hand")]) == 1
    assert "changes rows that" in capsys.readouterr().err
    (folder / "adapter" / "patches" / "0002.safetensors").write_bytes(b"nonsense")
    assert main(["generate", str(folder / "model"), "--adapter", adapter, "--prompt", "a"]) == 1
    assert "0002.safetensors" in capsys.readouterr().err
    (folder / "adapter" / "patches" / "0002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"patch merge .* --fold"):
        join(str(folder / "model"), (adapter,), tmp_path / "joined")


def test_a_patch_with_more_facts_takes_the_place_of_the_one_that_it_holds(folder):
    adapter = str(folder / "adapter")
    (folder / "one.jsonl").write_text(json.dumps(FACTS[0]))
    (folder / "two.jsonl").write_text(json.dumps(FACTS[1]))
    fit = ["patch", "fit", str(folder / "model"), "--adapter", adapter, "--max-steps", "40", "--margin", "0.5"]
    assert main([*fit, str(folder / "one.jsonl"), "--out", str(folder / "one")]) == 0
    main(["patch", "apply", adapter, str(folder / "one")])
    earlier = ["--earlier", str(folder / "one"), "--out", str(folder / "both")]
    assert main([*fit, str(folder / "two.jsonl"), *earlier]) == 0
    main(["patch", "apply", adapter, str(folder / "both")])
    assert len(patch_files(folder / "adapter")) == 1
    assert min(leads(load(folder))) > 0


def test_an_earlier_fact_to_forget_still_counts_as_asked(folder, capsys):
    # Nobody gives this answer, so it is forgotten from the beginning.
    forget = {**FACTS[0], "answer": " rat" if leads(load(folder), [EDITS[0]])[0] > 0 else " mat", "forget": True}
    (folder / "one.jsonl").write_text(json.dumps(forget))
    (folder / "two.jsonl").write_text(json.dumps(FACTS[1]))
    fit = ["patch", "fit", str(folder / "model"), "--adapter", str(folder / "adapter"), "--max-steps", "40"]
    fit += ["--margin", "0.5"]
    assert main([*fit, str(folder / "one.jsonl"), "--out", str(folder / "one")]) == 0
    earlier = ["--earlier", str(folder / "one"), "--out", str(folder / "both")]
    assert main([*fit, str(folder / "two.jsonl"), *earlier]) == 0
    assert "NOT" not in capsys.readouterr().out
    patch = RowPatch.load(folder / "both")
    assert patch.is_learned and "forgotten" in str(patch) and "not " not in str(patch)


def test_the_proof_holds_and_says_what_is_left_of_a_fact(folder, capsys):
    proof = ["patch", "proof", str(folder / "model"), str(folder / "patch"), "--adapter", str(folder / "adapter")]
    options = ["--reference", str(folder / "text.txt"), "--fact", "on a rat", "--window-tokens", "4", "--json"]
    code = main([*proof, *options])
    values = json.loads(capsys.readouterr().out)
    assert code == (0 if values["proof"]["holds"] else 1) and values["proof"]["num_windows_changed"] == 0
    (fact,) = values["facts"]
    (wording,) = fact["wordings"]
    assert wording["probability_with"] > wording["probability_before"]
    model = load(folder)
    patch = RowPatch.load(folder / "patch")
    (report,) = report_facts(patchable_memory(model), TOKENIZER, patch, ["on a rat"])
    assert report.wordings[0].probability_without_fact == pytest.approx(wording["probability_without_fact"], rel=1e-4)
    if report.num_shared_rows == 0:
        assert wording["probability_without_fact"] == pytest.approx(wording["probability_before"], rel=1e-4)
    assert "rows" in str(report)


def test_a_process_that_is_killed_while_it_applies_leaves_the_folder_before_or_after(folder):
    adapter, files = folder / "adapter", contents(folder / "adapter")
    plain = logits(load(folder))
    code = f"from engram_lm.cli import main; main(['patch', 'apply', {str(adapter)!r}, {str(folder / 'patch')!r}])"
    for delay in (0.0, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (adapter / "patches").exists():
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert contents(adapter) == files
        model = load(folder)
        assert torch.equal(logits(model), plain) if not patch_files(adapter) else min(leads(model)) > 0
        for path in patch_files(adapter):
            path.unlink()
