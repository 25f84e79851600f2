"""Canonical vocabularies: the published map, small tokenizers, files and refusals."""

import json

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import TokenError, TokenMapError
from engram_lm.hashing import TokenMap

DEEPSEEK_DIGEST = "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"


def test_deepseeks_tokenizer_gives_the_published_map(deepseek_map):
    assert (len(deepseek_map), deepseek_map.num_canonical, deepseek_map.num_tokens) == (99_092, 99_092, 129_280)
    assert deepseek_map.digest == DEEPSEEK_DIGEST
    assert deepseek_map.canonical[:3].tolist() == [0, 1, 2]
    assert deepseek_map.compression == pytest.approx(0.2335, abs=1e-4)
    assert not deepseek_map.is_identity


def test_deepseeks_largest_groups_are_those_of_the_papers_table(deepseek_map, deepseek_folder):
    groups = deepseek_map.largest_groups(5, deepseek_folder)
    assert [(text, count) for text, count, _ in groups] == [(" ", 163), ("a", 54), ("o", 40), ("e", 35), ("i", 30)]
    assert set(groups[1][2]) >= {"A", "a"}


def test_a_small_tokenizer_merges_case_accents_and_space_but_not_bytes(small_tokenizer):
    token_map = TokenMap.from_tokenizer(small_tokenizer)
    canonical = {
        text: token_map.canonical[small_tokenizer.token_to_id(text)] for text in ("a", "A", "Ġa", "b", "Ċ", "Ġ")
    }
    assert canonical["a"] == canonical["A"] == canonical["Ġa"] != canonical["b"]
    assert canonical["Ċ"] == canonical["Ġ"] != canonical["a"]
    # Pieces of UTF-8 decode to U+FFFD; they stay apart, as raw tokens.
    pieces = [small_tokenizer.token_to_id(piece) for piece in ("Ã", "Â", "â")]
    assert len({int(token_map.canonical[piece]) for piece in pieces}) == 3


def test_ids_are_numbered_by_first_appearance(small_tokenizer):
    canonical = TokenMap.from_tokenizer(small_tokenizer).canonical
    firsts = [c for t, c in enumerate(canonical.tolist()) if c not in canonical[:t]]
    assert firsts == list(range(len(firsts)))


def test_every_kind_of_fast_tokenizer_gives_the_same_map(small_tokenizer, tmp_path):
    small_tokenizer.save(str(tmp_path / "tokenizer.json"))
    maps = [
        TokenMap.from_tokenizer(tokenizer)
        for tokenizer in (
            small_tokenizer,
            PreTrainedTokenizerFast(tokenizer_object=small_tokenizer),
            tmp_path,
            str(tmp_path / "tokenizer.json"),
        )
    ]
    assert all(token_map == maps[0] and token_map.vocabulary_digest is not None for token_map in maps)


def test_added_tokens_are_mapped_too(small_tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer)
    before = TokenMap.from_tokenizer(wrapped)
    wrapped.add_tokens(["<image>"])
    after = TokenMap.from_tokenizer(wrapped)
    assert after.num_tokens == len(wrapped) == before.num_tokens + 1
    assert after.vocabulary_digest != before.vocabulary_digest


def test_a_slow_tokenizer_is_refused_with_what_to_do():
    with pytest.raises(TokenMapError, match="fast tokenizer"):
        TokenMap.from_tokenizer(object())


def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path):
    with pytest.raises(TokenMapError, match="no tokenizer at"):
        TokenMap.from_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(TokenMapError, match="not a readable tokenizer"):
        TokenMap.from_tokenizer(tmp_path)


def test_identity_maps_nothing_but_remembers_the_vocabulary(small_tokenizer):
    token_map = TokenMap.identity(500, small_tokenizer)
    assert token_map.is_identity
    assert (len(token_map), token_map.compression) == (500, 0.0)
    assert token_map.vocabulary_digest == TokenMap.from_tokenizer(small_tokenizer).vocabulary_digest
    assert TokenMap.identity(500).vocabulary_digest is None
    assert token_map.apply(np.array([0, 499])).tolist() == [0, 499]
    with pytest.raises(TokenMapError, match=r"has 283 tokens.*asked for 10"):
        TokenMap.identity(10, small_tokenizer)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_apply_maps_tokens_of_any_shape_and_integer_type(deepseek_map, kind):
    tokens = kind([[22898, 19737], [270, 16]])
    assert deepseek_map.apply(tokens).tolist() == [[1134, 15695], [237, 16]]
    small = tokens.astype(np.int32) if kind is np.array else tokens.to(torch.int32)
    assert deepseek_map.apply(small).tolist() == [[1134, 15695], [237, 16]]
    assert deepseek_map.apply(tokens[:, :0]).tolist() == [[], []]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize("token_map", [TokenMap.identity(40), TokenMap([0, 1, 1, 0] * 10)], ids=["identity", "merging"])
@pytest.mark.parametrize(("tokens", "worst"), [([1, 40, 77], "77"), ([-100, 3, 99], "-100"), ([39, 40], "40")])
def test_tokens_outside_the_vocabulary_are_refused_and_named(kind, token_map, tokens, worst):
    with pytest.raises(TokenError, match=rf"token id {worst} .*40 tokens \(0\.\.39\)"):
        token_map.apply(kind(tokens))


@pytest.mark.parametrize("tokens", [np.array([1.0]), torch.tensor([1.0]), torch.tensor([True]), np.array([True])])
def test_tokens_that_are_no_integers_are_refused(tokens):
    with pytest.raises(TokenError, match="integers"):
        TokenMap.identity(4).apply(tokens)


def test_the_map_cannot_be_changed(deepseek_map):
    with pytest.raises(ValueError, match="read-only"):
        deepseek_map.canonical[0] = 5


@pytest.mark.parametrize("canonical", [[], [[0]], [0.0], [-2, 0], [-1], [0, 2], [0, 2, 2], [5]])
def test_arrays_that_are_no_map_are_refused(canonical):
    with pytest.raises(TokenMapError):
        TokenMap(np.array(canonical))


def test_a_saved_map_is_loaded_back(small_tokenizer, tmp_path):
    token_map = TokenMap.from_tokenizer(small_tokenizer)
    token_map.save(tmp_path / "map.safetensors")
    assert TokenMap.load(tmp_path / "map.safetensors") == token_map
    assert [path.name for path in tmp_path.iterdir()] == ["map.safetensors"]


def test_any_flipped_byte_of_a_saved_map_is_refused(small_tokenizer, tmp_path):
    path = tmp_path / "map.safetensors"
    TokenMap.from_tokenizer(small_tokenizer).save(path)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + header].rstrip(b" ")
    for place in [*range(0, 8 + len(text)), *range(8 + header, len(data), 37)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(TokenMapError):
            TokenMap.load(path)


def test_files_that_are_no_map_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "map.safetensors"
    with pytest.raises(FileNotFoundError, match="no token map at"):
        TokenMap.load(path)
    for data in (b"", b"\xff" * 64, b"{}", json.dumps({}).encode() * 9):
        path.write_bytes(data)
        with pytest.raises(TokenMapError, match="not a readable token map"):
            TokenMap.load(path)
    save_file({"canonical": np.zeros(4, np.int32)}, path)
    with pytest.raises(TokenMapError, match=r"expected format engram\.token_map\.1"):
        TokenMap.load(path)
