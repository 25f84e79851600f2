"""A patch's file is small, gives the patch again bit for bit, and is believed in nothing."""

import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engram_lm import RowPatch
from engram_lm.adapt.row_change import Fact, RowChange, same_bits
from engram_lm.errors import CheckpointError

FACT = Fact(
    prompt="Größe: a", target=" b", prompt_tokens=(5, 6), target_tokens=(7,), loss_before=3.5, loss_after=0.125,
    is_greedy=True,
)  # fmt: skip
METADATA = {"format": "engram.row_patch.1", "hash_spec_digest": "ab" * 32, "title": "", "facts": "[]"}


def some_patch(dtype=torch.bfloat16):
    torch.manual_seed(0)
    tables = {
        "11": RowChange(torch.tensor([0, 2**40]), torch.randn(2, 6).to(dtype), torch.randn(2, 6).to(dtype)),
        "2": RowChange(torch.tensor([9]), -torch.zeros(1, 6).to(dtype), torch.randn(1, 6).to(dtype)),
    }
    return RowPatch("cd" * 32, tables, "a title", (FACT,))


def tensors():
    return {
        "0.rows": torch.tensor([3, 7]),
        "0.before": torch.zeros(2, 6),
        "0.after": torch.ones(2, 6),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_patch_comes_back_bit_for_bit_from_kilobytes(dtype, tmp_path):
    patch, path = some_patch(dtype), tmp_path / "patch.safetensors"
    patch.save(path)
    again = RowPatch.load(path)
    assert (again.digest, again.spec_digest, again.title, again.facts) == (patch.digest, "cd" * 32, "a title", (FACT,))
    for name, change in patch.tables.items():
        for part in ("rows", "before", "after"):
            assert same_bits(getattr(again.tables[name], part), getattr(change, part))
    assert patch.num_bytes < path.stat().st_size < patch.num_bytes + 1500
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    # Any reader of safetensors can look inside.
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "engram.row_patch.1"
        assert torch.equal(file.get_tensor("11.rows"), torch.tensor([0, 2**40]))


def test_the_digest_tells_changes_apart_and_leaves_out_what_is_only_said():
    patch = some_patch()
    assert RowPatch(patch.spec_digest, patch.tables, "another", ()).digest == patch.digest
    change = patch.tables["2"]
    other = RowChange(change.rows, change.before.abs(), change.after)  # 0 in place of -0
    assert RowPatch(patch.spec_digest, {**patch.tables, "2": other}).digest != patch.digest
    assert RowPatch("ab" * 32, patch.tables).digest != patch.digest


def test_numbers_that_are_equal_are_not_always_the_same_bits():
    zero, nothing = torch.zeros(1, 6), torch.full((1, 6), math.nan)
    assert not same_bits(zero, -zero)
    assert same_bits(nothing, nothing.clone())
    assert not same_bits(zero, zero.half())


def test_a_file_that_is_cut_or_grown_is_refused_at_every_length(tmp_path):
    path = tmp_path / "patch"
    some_patch().save(path)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 200, *range(len(whole) - 80, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            RowPatch.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="longer than its header"):
        RowPatch.load(path)


def changed(**parts):
    found = tensors()
    for name, tensor in parts.items():
        found[f"0.{name}"] = tensor
    return found


HOSTILE = {
    "descending rows": (changed(rows=torch.tensor([7, 3])), "ascend and differ"),
    "a row twice": (changed(rows=torch.tensor([3, 3])), "ascend and differ"),
    "a negative row": (changed(rows=torch.tensor([-1, 3])), "start from 0"),
    "int32 rows": (changed(rows=torch.tensor([3, 7], dtype=torch.int32)), "row numbers are int64"),
    "more rows than numbers": (changed(rows=torch.tensor([3, 7, 9])), "before are floating numbers"),
    "another width": (changed(after=torch.ones(2, 5)), "changes neither type nor width"),
    "another type": (changed(after=torch.ones(2, 6).half()), "changes neither type nor width"),
    "integers": (changed(before=torch.ones(2, 6).long(), after=torch.ones(2, 6).long()), "before are floating numbers"),
    "one dimension": (changed(before=torch.ones(2), after=torch.ones(2)), "before are floating numbers"),
    "not a number": (changed(after=torch.full((2, 6), math.nan)), "after hold numbers that are not finite"),
    "infinite before": (changed(before=torch.full((2, 6), math.inf)), "before hold numbers that are not finite"),
    "no rows": (
        changed(rows=torch.zeros(0, dtype=torch.int64), before=torch.ones(0, 6), after=torch.ones(0, 6)),
        "at least one",
    ),
    "no width": (changed(before=torch.ones(2, 0), after=torch.ones(2, 0)), "width"),
    "a part less": ({"0.rows": torch.tensor([3]), "0.after": torch.ones(1, 6)}, "rows, before and after"),
    "a part more": ({**tensors(), "0.weight": torch.ones(1)}, "rows, before and after"),
    "a name without a table": ({"rows": torch.tensor([3])}, "rows, before and after"),
    "another table name": ({f"../x.{n.split('.')[1]}": t for n, t in tensors().items()}, "rows, before and after"),
    "shared beside a block": (
        {**tensors(), **{f"shared.{n.split('.')[1]}": t for n, t in tensors().items()}},
        "rows, before and after",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tensors_that_are_no_patch_are_refused(case, tmp_path):
    found, message = HOSTILE[case]
    save_file(found, tmp_path / "patch", metadata=METADATA)
    with pytest.raises(CheckpointError, match=message):
        RowPatch.load(tmp_path / "patch")


def facts(**changes):
    value = {**json.loads(json.dumps(vars(FACT) | {"prompt_tokens": [5], "target_tokens": [7]})), **changes}
    return json.dumps([value])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"expected format 'engram.row_patch.1', found None"),
        ({**METADATA, "format": "pt"}, "found 'pt'"),
        ({**METADATA, "hash_spec_digest": "AB" * 32}, "names no hash"),
        ({key: value for key, value in METADATA.items() if key != "hash_spec_digest"}, "names no hash: .* None"),
        ({**METADATA, "facts": "{"}, "facts cannot be read"),
        ({**METADATA, "facts": "[" * 100_000}, "facts cannot be read"),
        ({**METADATA, "facts": "{}"}, "not a list"),
        ({**METADATA, "facts": "[3]"}, "has the keys"),
        ({**METADATA, "facts": facts(prompt=3)}, "prompt is 3, expected a text"),
        ({**METADATA, "facts": facts(target_tokens=[])}, "target_tokens is .*expected a list of tokens"),
        ({**METADATA, "facts": facts(target_tokens=[-1])}, "target_tokens is .*expected a list of tokens"),
        ({**METADATA, "facts": facts(target_tokens=[True])}, "target_tokens is .*expected a list of tokens"),
        ({**METADATA, "facts": facts(loss_after=math.nan)}, "loss_after is nan, expected a finite number"),
        ({**METADATA, "facts": facts(is_greedy=1)}, "is_greedy is 1, expected true or false"),
        ({**METADATA, "facts": facts(more=1)}, "has the keys"),
    ],
)
def test_metadata_that_is_of_no_patch_is_refused(metadata, message, tmp_path):
    save_file(tensors(), tmp_path / "patch", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        RowPatch.load(tmp_path / "patch")


def test_a_file_that_is_none_is_refused_without_reading_it(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        RowPatch.load(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="there is no file"):
        RowPatch.load(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        RowPatch.load(tmp_path / "large")
    (tmp_path / "long").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        RowPatch.load(tmp_path / "long")
