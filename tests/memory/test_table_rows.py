"""The tables of a checkpoint are held against the hash that its configuration describes."""

import json

import pytest
from tests.raw_safetensors import write_raw

from engram_lm.cli import main
from engram_lm.errors import CheckpointError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory.formats.table_command import checked_spec
from engram_lm.tables import table_layouts

OWN = {"orders": (2, 3), "heads": 2, "rows_per_head": 97, "pad_token_id": 1}
QWEN = {
    "ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 100, "seed": 1234, "eos_token_id": 7,
    "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 4, "ple_layer_ids": [2], "vocab_size": 50,
    "ple_embed_dim": 64, "ple_conv_kernel_size": 4, "model_type": "qwen4_exp_text",
}  # fmt: skip


def ours(folder, shared=False, wrong=None):
    """A checkpoint of ours whose tables have the rows of its hash, or those of ``wrong``."""
    spec = HashSpec.build(TokenMap.identity(50), layers=(1, 2), shared_table=shared, **OWN)
    names = {"shared": spec.padded_rows[0]} if shared else dict(zip(map(str, spec.blocks), spec.padded_rows))
    tables = {
        f"memory_tables.{name}.weight": ("F32", (rows, 2), bytes(rows * 8))
        for name, rows in (names | (wrong or {})).items()
    }
    folder.mkdir()
    write_raw(folder / "model.safetensors", tables)
    (folder / "config.json").write_text(json.dumps({"hash_spec": spec.to_dict()}))
    return folder


@pytest.mark.parametrize("shared", [False, True])
def test_tables_with_the_rows_of_their_hash_are_accepted(tmp_path, shared):
    folder = ours(tmp_path / "m", shared)
    for source in (folder, folder / "model.safetensors"):
        assert len(checked_spec(source, table_layouts(folder))["spec_digest"]) == 64


@pytest.mark.parametrize(
    ("shared", "wrong", "message"),
    [
        (False, {"2": 5}, r"table of layer 2 has 5 rows, the hash in config.json addresses \d+"),
        (True, {"shared": 5}, "table of layer shared has 5 rows"),
        (False, {"7": 5}, r"holds a table of layer 7, config.json describes those of \[.1., .2.\]"),
    ],
)
def test_tables_that_their_hash_does_not_address_are_refused_by_every_verb(tmp_path, capsys, shared, wrong, message):
    folder = ours(tmp_path / "m", shared, wrong)
    with pytest.raises(CheckpointError, match=message):
        checked_spec(folder, table_layouts(folder))
    for arguments in (
        ["convert", str(folder), str(tmp_path / "packed")],
        ["build", str(tmp_path / "one"), "--source", str(folder), "--layer", next(iter(wrong))],
    ):
        assert main(["table", *arguments]) == 1
        assert "the folder holds weights of another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_published_table_is_held_against_the_primes_of_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (rows,) = HashSpec.from_config(tmp_path).padded_rows
    name = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.weight"
    for num_rows in (rows, rows - 1):
        write_raw(tmp_path / "model.safetensors", {name: ("BF16", (num_rows, 2), bytes(num_rows * 4))})
        if num_rows == rows:
            checked_spec(tmp_path, table_layouts(tmp_path))
    with pytest.raises(CheckpointError, match=f"layer 1 has {rows - 1} rows, the hash in config.json addresses {rows}"):
        checked_spec(tmp_path, table_layouts(tmp_path))


@pytest.mark.parametrize("text", [None, "{}"])
def test_without_a_configuration_of_a_hash_there_is_none_to_hold_them_against(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert checked_spec(tmp_path, {}) == {}


@pytest.mark.parametrize(("text", "message"), [("{", "not readable JSON"), ("[1]", "JSON list, not an object")])
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, capsys, text, message):
    folder = ours(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{message}.*download it again"):
        checked_spec(folder, table_layouts(folder))
    assert main(["table", "convert", str(folder), str(tmp_path / "packed")]) == 1
    assert "config.json" in capsys.readouterr().err.replace("\n", "") and not (tmp_path / "packed").exists()
