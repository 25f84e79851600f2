"""What a folder or a published configuration is opened as."""

import json
import shutil

import numpy as np
import pytest
from tests.explore.conftest import make_llama, make_model
from tests.small_model import TEXT
from tests.training.test_loop import TOKENIZER

from engram_lm.adapt import attached_adapters
from engram_lm.errors import ConfigError, DataError
from engram_lm.explore.opening import open_explorer
from engram_lm.hashing import HashSpec

DEMO = {
    "layer_ids": [1, 3], "max_ngram_size": 3, "engram_vocab_size": [97, 97], "n_head_per_ngram": 2,
    "n_embed_per_ngram": 8,
    "pad_id": 0, "seed": 0, "tokenizer_name_or_path": "small",
}  # fmt: skip
QWEN = {
    "ple_layer_ids": [1, 3], "ngram_size": 3, "vocab_size": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 97,
    "eos_token_id": 7,
}  # fmt: skip


def test_a_published_config_shows_its_addresses(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "config.json").write_text(json.dumps(DEMO))
    explorer = open_explorer(tmp_path, tokenizer=tmp_path / "tokenizer", data=[tmp_path / "text.txt"])
    view = explorer.read("The cat saw the rat")
    spec = HashSpec.from_config(DEMO, TOKENIZER)
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        np.testing.assert_array_equal(view.addresses.rows[block], spec.rows(view.tokens, layer))
    assert any(lookup.num_positions for lookup in explorer.look(view, 2).lookups)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert open_explorer(tmp_path / "config.json").read("7, 8, 9").addresses is not None
    with pytest.raises(ConfigError, match="no weights"):
        open_explorer(tmp_path, adapters=["one"])


def test_a_config_that_hashes_canonical_tokens_asks_for_its_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_model().config.to_dict(), default=str))
    with pytest.raises(ConfigError, match="name the model's tokenizer with --tokenizer"):
        open_explorer(tmp_path)


def test_a_folder_with_several_adapters_is_opened_with_all_of_them(tmp_path):
    model = make_llama(2)
    for name, adapter in attached_adapters(model).items():
        adapter.save_pretrained(tmp_path / name)
    make_llama().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    explorer = open_explorer(
        tmp_path / "model", adapters=[str(tmp_path / "m0"), str(tmp_path / "m1")], data=[tmp_path / "text.txt"]
    )
    assert explorer.memories == ("m0", "m1")
    for name, folder in (("m0", "2-law/memory.v1"), ("m1", "medicine/memory.v1")):
        shutil.copytree(tmp_path / name, tmp_path / folder)
    folders = [str(tmp_path / folder) for folder in ("2-law/memory.v1", "medicine/memory.v1", "medicine/memory.v1")]
    names = ("memory_2_law_memory_v1", "medicine_memory_v1", "medicine_memory_v1_3")
    assert open_explorer(tmp_path / "model", adapters=folders).memories == names
    with pytest.raises(ConfigError, match="--tokenizer is for a configuration without weights"):
        open_explorer(tmp_path / "model", tokenizer=tmp_path / "model")


def test_the_config_beside_weights_opens_its_model_and_a_wrong_path_of_text_is_refused_at_once(tmp_path):
    make_model("plain").save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    assert open_explorer(tmp_path / "model/config.json").name == "model"
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_explorer(tmp_path / "model", data=[tmp_path / "nothing"])


def test_of_a_text_larger_than_memory_the_beginning_is_read(tmp_path, monkeypatch):
    make_llama().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    with (tmp_path / "huge.txt").open("w") as file:
        file.write(TEXT * 2_000)
        file.truncate(1 << 40)  # a hole: reading all of it would take hours, and end at bytes that are no text
    monkeypatch.setattr("engram_lm.explore.opening._REFERENCE_TOKENS", 5_000)
    explorer = open_explorer(tmp_path / "model", data=[tmp_path / "huge.txt"])
    expected = TOKENIZER(TEXT * 20).input_ids[:5_000]
    assert explorer.reference.tokens.tolist() == expected
    assert explorer.reference_name.endswith("huge.txt")

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/text.txt").write_text(TEXT)
    (tmp_path / "folder/scan.dat").write_bytes(bytes(3_000_000))  # passed over, as in training
    explorer = open_explorer(tmp_path / "model", data=[tmp_path / "folder"])
    assert explorer.reference.tokens.tolist() == TOKENIZER(TEXT).input_ids
