"""Vocabularies that have holes, that have grown since a memory was made, and that a user expects to be certain ones."""

import copy
import logging

import numpy as np
import pytest
import torch
from tests.hashing.conftest import SPECS, encode_plainly, rows_plainly
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engram_lm.errors import MismatchError, TokenError, TokenMapError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.hashing.token_map import find_beginning, read_vocabulary


def with_holes(**more):
    """Bytes and three tokens far behind them, as Kimi's tokenizer has its special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: token for token, text in enumerate(alphabet)}
    vocabulary |= {"[EOS]": 300, "<|user|>": 310, "[PAD]": 511, **more}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[EOS]", "<|user|>", "[PAD]"])
    return tokenizer


def with_byte_fallback():
    """Pieces of words and a token for each byte, as SentencePiece has them."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "T", "t", "▁T", "▁t", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: token for token, text in enumerate(pieces)},
            merges=[("▁", "T"), ("▁", "t")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def grown(tokenizer, *tokens):
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens([AddedToken(token) for token in tokens])
    return larger


def spec_of(tokenizer, token_map=None, **more):
    token_map = TokenMap.from_tokenizer(tokenizer) if token_map is None else token_map
    return HashSpec.build(token_map, layers=(0, 1), heads=2, rows_per_head=101, pad_token_id=1, **more)


def test_every_token_is_mapped_however_large_its_id_and_ids_in_between_are_not():
    tokenizer = with_holes()
    token_map = TokenMap.from_tokenizer(tokenizer)
    assert (token_map.num_tokens, token_map.num_canonical) == (512, 230)
    assert [token_map.canonical[token] for token in (299, 300, 309, 310, 510, 511)] == [-1, 227, -1, 228, -1, 229]
    assert token_map.compression == 1 - 230 / 259
    assert len(read_vocabulary(tokenizer)) == 512 and tokenizer.get_vocab_size() == 259
    letters = tokenizer.encode("aA<|user|>").ids
    assert token_map.apply(np.array(letters)).tolist() == [*[token_map.canonical[letters[0]]] * 2, 228]
    assert token_map.largest_groups(1, tokenizer)[0][1] > 1


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_an_id_that_no_token_has_is_refused_and_named(kind):
    token_map = TokenMap.from_tokenizer(with_holes())
    spec = spec_of(None, token_map)
    with pytest.raises(TokenError, match="no token of the id 305"):
        token_map.apply(kind([300, 305]))
    with pytest.raises(TokenError, match="no token of the id 305"):
        spec.encode(kind([[300, 305]]))
    assert spec.encode_unchecked(kind([[300, 305]])).tolist() == [[227 * 4, -1]]


def test_a_map_with_holes_is_saved_and_bound_again(tmp_path):
    tokenizer = with_holes()
    spec, token_map = spec_of(tokenizer), TokenMap.from_tokenizer(tokenizer)
    token_map.covering(600).save(tmp_path / "map.safetensors")
    assert TokenMap.load(tmp_path / "map.safetensors") == token_map
    unbound = HashSpec.from_dict(spec.to_dict())
    assert unbound.token_map is None
    assert unbound.bind(tokenizer) == unbound.bind(token_map) == spec


def test_each_id_that_a_model_embeds_without_a_token_is_hashed_as_a_token_of_its_own():
    made = TokenMap([0, -1, 1, 0])
    covering = made.covering(6)
    assert covering.canonical.tolist() == [0, 2, 1, 0, 3, 4]
    assert (covering.num_tokens, covering.num_canonical, covering.digest) == (6, 5, made.digest)
    assert covering.made is made and covering != made
    assert covering.covering(6) == covering
    # What an id is hashed as does not depend on how many others there are.
    assert covering.covering(9).canonical[:6].tolist() == covering.canonical.tolist()
    assert covering.covering(2).canonical.tolist() == [0, 2, 1, 0]
    assert TokenMap.identity(4).covering(4).made.covering(9).is_identity


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_rows_of_old_tokens_stay_and_those_of_new_ones_follow_the_plain_rule(name, kind):
    spec = SPECS[name]
    larger = spec.covering(400)
    assert (larger.digest, larger.to_dict(), larger) == (spec.digest, spec.to_dict(), spec)
    assert larger.num_canonical == spec.vocab_size + 350
    old = kind(np.random.default_rng(0).integers(0, 50, (2, 30)))
    for layer in spec.layers:
        assert larger.rows(old, layer).tolist() == spec.rows(old, layer).tolist()
    tokens = np.random.default_rng(1).integers(0, 400, (1, 60))
    codes = larger.encode(tokens)
    canonical, starts = encode_plainly(larger, tokens[0].tolist())
    assert codes.max() >> 2 >= spec.vocab_size
    for layer in spec.layers:
        rows = larger.rows(kind(tokens), layer)
        assert rows[0].tolist() == rows_plainly(larger, canonical, starts, layer)
        assert int(rows.min()) >= 0 and int(rows.max()) < spec.num_rows(layer)
    with pytest.raises(TokenError, match="token id 400"):
        larger.encode(kind([[400]]))


@pytest.mark.parametrize("make", [with_holes, with_byte_fallback])
@pytest.mark.parametrize("raw", [False, True])
def test_a_tokenizer_that_only_grew_is_accepted_and_its_new_tokens_are_named(make, raw, caplog):
    tokenizer = make()
    larger = grown(tokenizer, "<|tool|>", "<|think|>")
    token_map = TokenMap.identity(600, tokenizer) if raw else None
    spec = spec_of(tokenizer, token_map)
    for known in (spec, HashSpec.from_dict(spec.to_dict())):
        caplog.clear()
        assert known.bind(tokenizer) == spec and not caplog.records
        assert known.bind(larger) == spec and known.bind(larger).token_map == spec.token_map
        assert caplog.messages[0].startswith("the tokenizer has 2 more tokens")
        assert "'<|tool|>', '<|think|>'" in caplog.messages[0] and caplog.records[0].levelno == logging.WARNING


def test_a_token_that_fills_a_hole_is_a_new_one_too(caplog):
    spec = spec_of(with_holes())
    assert spec.bind(with_holes(**{"<|tool|>": 305})) == spec
    assert "1 more tokens" in caplog.messages[0] and "'<|tool|>'" in caplog.messages[0]


def test_a_tokenizer_with_another_old_token_is_refused_and_the_first_one_is_named(small_tokenizer, caplog):
    spec, saved = spec_of(with_holes()), HashSpec.from_dict(spec_of(with_holes()).to_dict())
    other = Tokenizer.from_str(with_holes().to_str().replace('"a":', '"\\u0000":').replace('"b":', '"a":'))
    with pytest.raises(MismatchError, match=f"{spec.token_map_digest}.*token 64 .* is the first that differs"):
        spec.bind(grown(other, "<|tool|>"))
    for known in (spec, saved):
        with pytest.raises(MismatchError, match=spec.token_map_digest):
            known.bind(small_tokenizer)
    raw = spec_of(None, TokenMap.identity(600, with_holes()))
    with pytest.raises(MismatchError, match=raw.vocabulary_digest):
        raw.bind(grown(other, "<|tool|>"))
    assert not caplog.records


def test_the_beginning_of_a_vocabulary_is_found_by_its_digest(small_tokenizer):
    tokens = read_vocabulary(small_tokenizer)
    for size in (1, 200, len(tokens)):
        digest = TokenMap.of_tokens(small_tokenizer, tokens[:size]).vocabulary_digest
        assert find_beginning(tokens, digest) == size
    assert find_beginning(tokens[1:], digest) is None


def test_the_map_of_byte_pieces_merges_case_and_keeps_bytes_apart():
    tokenizer = with_byte_fallback()
    token_map, ids = TokenMap.from_tokenizer(tokenizer), tokenizer.get_vocab()
    assert token_map.canonical[ids["T"]] == token_map.canonical[ids["t"]] == token_map.canonical[ids["▁t"]]
    assert token_map.canonical[ids["<0xC3>"]] != token_map.canonical[ids["<0xA9>"]]
    assert tokenizer.encode("Ž").ids == [ids["▁"], ids["<0xC5>"], ids["<0xBD>"]]


def test_an_expected_digest_is_compared_at_once_or_when_the_tokenizer_comes(golden, deepseek_map):
    config = golden["deepseek_v41"]["config"]
    own, other = deepseek_map.digest, "0" * 64
    assert HashSpec.from_config(config, deepseek_map, token_map_digest=own).token_map_digest == own
    with pytest.raises(MismatchError, match=f"{other} is expected, this one is {own}"):
        HashSpec.from_config(config, deepseek_map, token_map_digest=other)
    expecting = HashSpec.from_config(config, token_map_digest=own)
    assert expecting.bind(deepseek_map).token_map == deepseek_map
    with pytest.raises(MismatchError, match=f"{other}, the given map is {own}"):
        HashSpec.from_config(config, token_map_digest=other).bind(deepseek_map)
    # Another map of the very same sizes, which the published configuration cannot tell apart.
    swapped = deepseek_map.canonical.copy()
    swapped[[500, 600]] = swapped[[600, 500]]
    assert HashSpec.from_config(config, TokenMap(swapped)).token_map_digest != own
    with pytest.raises(MismatchError, match=f"{own} is expected"):
        HashSpec.from_config(config, TokenMap(swapped), token_map_digest=own)


def test_an_identity_map_takes_a_tokenizer_with_a_few_ids_more_but_not_another_one_s(small_tokenizer):
    assert TokenMap.identity(282, small_tokenizer).num_tokens == 282
    with pytest.raises(TokenMapError, match="has 283 tokens"):
        TokenMap.identity(141, small_tokenizer)
