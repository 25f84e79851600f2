"""Published configs and the rows they give; docs/paper.md, "Published variants", names the source of each."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engram_lm.errors import ConfigError, MismatchError, TokenMapError
from engram_lm.hashing import HashSpec, Segments, TokenHistory, TokenMap

LONGCAT = {
    "model_type": "longcat_flash_ngram", "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4,
    "vocab_size": 131072, "hidden_size": 3072, "eos_token_id": 2,
}  # fmt: skip
QWEN = {
    "model_type": "qwen4_exp",
    "text_config": {
        "model_type": "qwen4_exp_text", "ple_layer_ids": [2], "ngram_size": 3, "heads_per_ngram": 8, "seed": 1234,
        "ngram_vocab_size_base": 20_000_000, "make_ngram_vocab_size_divisible_by": 128, "vocab_size": 248_320,
        "eos_token_id": [248_044, 248_046],
    },
}  # fmt: skip
SEQUENCE = [0, 1000, 2000, 3000, 99091]


def columns(rows, *wanted):
    return [tuple(int(row[c]) for c in wanted) for row in rows]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize("name", ["demo", "deepseek_v41", "qwen_ple"])
def test_golden_files_are_reproduced_bit_for_bit(golden, deepseek_map, name, kind):
    file = golden[name]
    spec = HashSpec.from_config(file["config"], None if name == "qwen_ple" else deepseek_map)
    assert [str(layer) for layer in spec.layers] == list(file["layers"])
    for layer, expected in file["layers"].items():
        index = spec.layers.index(int(layer))
        assert list(spec.primes[index]) == expected["primes"]
        assert list(spec.multipliers[index]) == [int(multiplier) for multiplier in expected["multipliers"]]
        rows = spec.rows(kind(file["ids"]), int(layer))
        assert rows.tolist() == expected["rows"]
        if "rows_per_head" in expected:
            assert (rows - kind(spec.offsets(int(layer)))).tolist() == expected["rows_per_head"]


def test_the_text_of_the_golden_files_becomes_their_rows(golden, deepseek_folder):
    tokenizer = Tokenizer.from_file(str(deepseek_folder / "tokenizer.json"))
    file = golden["deepseek_v41"]
    ids = tokenizer.encode(file["text"], add_special_tokens=False).ids
    spec = HashSpec.from_config(file["config"], tokenizer)
    assert spec.rows(ids, 1).tolist() == file["layers"]["1"]["rows"][0]
    assert columns(spec.rows(ids, 14), 0, 8, 16)[12] == (9430611, 134768031, 270688164)


def v41(layers=(1, 14), **more):
    return HashSpec.build(
        TokenMap.identity(99_092), layers=layers, orders=(2, 3, 4), rows_per_head=16_000_000, pad_token_id=2,
        variant="deepseek_v41", **more,
    )  # fmt: skip


def test_deepseek_v41_rows_of_canonical_tokens_are_the_published_ones():
    spec = v41()
    assert columns(spec.rows(SEQUENCE, 1), 0, 8, 16) == [
        (5702652, 131476717, 257520185),
        (5375420, 134150085, 268365510),
        (1677522, 141943127, 260549859),
        (4092044, 128488902, 266189895),
        (9269172, 139254896, 267192101),
    ]
    assert columns(spec.rows(SEQUENCE, 14), 0, 8, 16) == [
        (14361964, 132225184, 261362261),
        (8024977, 130574332, 259958122),
        (1525027, 136995992, 263440977),
        (3263753, 139029325, 262375991),
        (15375077, 138792741, 269839604),
    ]
    assert spec.rows(SEQUENCE, 1)[4].tolist() == [
        9269172, 16218591, 35727946, 56339801, 75716397, 95097708, 98211247, 113170070, 139254896, 157950772,
        173611983, 179519064, 193438420, 213247854, 227023583, 249285847, 267192101, 285560978, 298470861, 316107739,
        334377548, 339549287, 357559764, 369543647,
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["masked", "listed"])
def test_deepseek_v41_rows_around_a_dead_position_are_the_published_ones(how):
    spec = v41(segments=Segments(dead_tokens=(2000,)) if how == "listed" else None)
    mask = None if how == "listed" else [1, 1, 0, 1, 1]
    assert columns(spec.rows(SEQUENCE, 1, attention_mask=mask), 0, 8, 16)[2:] == [
        (4299726, 129401291, 264341430),
        (9785197, 132414663, 264145882),
        (9269172, 132400538, 257399629),
    ]
    assert columns(spec.rows(SEQUENCE, 14, attention_mask=mask), 0, 8, 16)[2:] == [
        (6788701, 131862336, 261869729),
        (7297435, 140226488, 264295542),
        (15375077, 131189124, 270286347),
    ]


def test_demo_rows_of_canonical_tokens_are_the_published_ones():
    spec = HashSpec.build(TokenMap.identity(99_092), layers=(1, 15), rows_per_head=(646_400, 646_400), pad_token_id=2)
    assert columns(spec.rows(SEQUENCE, 1), 0, 8) == [
        (420644, 5268153), (629275, 5649801), (78627, 5234127), (116530, 5548597), (375613, 5515747),
    ]  # fmt: skip
    assert columns(spec.rows(SEQUENCE, 15), 0, 8) == [
        (25847, 5570921), (64845, 5472173), (474106, 5486555), (330374, 5547055), (498779, 5722686),
    ]  # fmt: skip


def test_qwen_rows_and_tables_are_the_published_ones():
    spec = HashSpec.from_config(QWEN)
    assert (spec.layers, spec.blocks, spec.num_heads_total) == ((2,), (1,), 16)
    assert spec.multipliers == ((23703573157769, 20109073645365, 8052911324071),)
    assert (sum(spec.primes[0]), spec.num_rows(2)) == (320_001_446, 320_001_536)
    assert spec.rows([100, 101], 2)[0].tolist() == [
        5727835, 21884476, 43702108, 66434789, 84094509, 104112171, 134886528, 157314943, 162363667, 189466439,
        200618315, 232121522, 258547276, 266199001, 289022207, 305180972,
    ]  # fmt: skip
    assert columns(spec.rows([0, 1000, 248044, 2000, 248319], 2), 0, 8) == [
        (768795, 173280301), (2233560, 179396584), (19479715, 176663948), (10043113, 163549294), (15586355, 172655660),
    ]  # fmt: skip


def test_longcat_rows_are_the_published_ones():
    spec = HashSpec.from_config(LONGCAT)
    assert (spec.num_heads_total, spec.num_rows(0), spec.multipliers) == (12, 122_683_536, ())
    local = spec.rows([1, 1000, 2, 2000, 131071], 0) - np.array(spec.offsets(0))
    assert local[0].tolist() == [1] * 12
    assert local[1].tolist() == [132072] * 12
    assert local[2].tolist() == [
        8388598, 8388574, 8388550, 8388526, 2344061, 2340675, 2337289, 2333903, 2330517, 2327131, 2323745, 2320359,
    ]  # fmt: skip
    assert local[3].tolist() == [2000] * 12
    assert local[4].tolist() == [
        6684646, 6684596, 6684546, 6684496, 6684446, 6684396, 6684346, 6684296, 6684246, 6684196, 6684146, 6684096,
    ]  # fmt: skip
    local = spec.rows(torch.tensor([1, 101, 103, 107, 109]), 0) - torch.tensor(spec.offsets(0))
    assert local[4].tolist() == [
        3801196, 3801194, 3801192, 3801190, 4864890, 4518724, 4172558, 3826392, 7987459, 9518703, 843718, 2409776,
    ]  # fmt: skip


def test_longcat_ratios_with_a_fraction_are_cut():
    spec = HashSpec.from_config({
        "oe_neighbor_num": 5, "oe_split_num": 4, "ngram_vocab_size_ratio": 100.567, "vocab_size": 163_840,
        "eos_token_id": 1,
    })  # fmt: skip
    assert (spec.primes[0][0], spec.orders) == (16_476_897 + 1, (2, 3, 4, 5))


def test_without_a_tokenizer_a_v41_spec_knows_its_tables_and_says_what_it_needs_to_hash(golden, deepseek_map):
    config = golden["deepseek_v41"]["config"]
    spec = HashSpec.from_config(config)
    assert (spec.num_rows(1), spec.num_rows(14)) == (384_006_168, 384_016_682)
    assert spec.offsets(1)[:2] == (0, 16_000_057)
    for call in (
        lambda: spec.rows([1], 1), lambda: spec.encode(np.array([[1]])), lambda: spec.rows_for_layers(np.array([[4]])),
    ):  # fmt: skip
        with pytest.raises(TokenMapError, match=r"spec.bind"):
            call()
    bound = spec.bind(deepseek_map)
    assert bound == HashSpec.from_config(config, deepseek_map)
    with pytest.raises(TokenMapError, match=r"99092 canonical tokens, the tokenizer gives 98000"):
        spec.bind(TokenMap.identity(98_000))


def test_v41_image_tokens_are_dead(golden, deepseek_map):
    config = golden["deepseek_v41"]["config"]
    config = {**config, "image_token_id": 129_264}
    assert HashSpec.from_config(config, deepseek_map).segments == Segments(dead_tokens=(129_264,))


def test_a_v41_config_is_read_with_either_name_of_its_pad_and_refused_with_two_that_differ(golden, deepseek_map):
    text = dict(golden["deepseek_v41"]["config"]["text_config"])
    spec = HashSpec.from_config({"text_config": text}, deepseek_map)
    text["engram_pad_id"] = text.pop("engram_pad_token_id")
    assert HashSpec.from_config(text, deepseek_map) == spec
    with pytest.raises(ConfigError, match=r"engram_pad_token_id = 5, engram_pad_id = 2"):
        HashSpec.from_config(text | {"engram_pad_token_id": 5})
    del text["engram_pad_id"]
    with pytest.raises(ConfigError, match="'engram_pad_token_id' or 'engram_pad_id' is missing"):
        HashSpec.from_config(text)


def test_contradictory_v41_row_and_token_counts_are_refused_with_both_numbers(golden, small_tokenizer):
    text = golden["deepseek_v41"]["config"]["text_config"]
    with pytest.raises(ConfigError, match=r"384006169 rows for layer 1, .* 384006168"):
        HashSpec.from_config(text | {"engram_num_embeddings": [384006169, 384016682]})
    with pytest.raises(ConfigError, match="1 numbers, 'engram_layer_ids' has 2"):
        HashSpec.from_config(text | {"engram_num_embeddings": [384006168]})
    with pytest.raises(TokenMapError, match=r"promises 99092 canonical tokens, the tokenizer gives \d+ \(of 283\)"):
        HashSpec.from_config(text, small_tokenizer)


def test_the_demo_needs_a_tokenizer(golden):
    with pytest.raises(TokenMapError, match="deepseek-ai/DeepSeek-V3"):
        HashSpec.from_config(golden["demo"]["config"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("demo", key) for key in ("engram_vocab_size", "max_ngram_size", "layer_ids", "pad_id", "seed")),
        *(
            ("deepseek_v41", f"engram_{key}")
            for key in (
                "layer_ids",
                "num_embeddings",
                "max_ngram_size",
                "vocab_size",
                "n_heads",
                "compressed_vocab_size",
            )
        ),
        ("qwen", "eos_token_id"),
        *(("longcat", key) for key in ("ngram_vocab_size_ratio", "emb_split_num", "vocab_size", "eos_token_id")),
    ],
)
def test_a_missing_or_impossible_key_is_named(golden, deepseek_map, name, key):
    configs = {
        "demo": golden["demo"]["config"],
        "deepseek_v41": golden["deepseek_v41"]["config"]["text_config"],
        "qwen": QWEN["text_config"],
        "longcat": LONGCAT,
    }
    tokenizer = deepseek_map if name in ("demo", "deepseek_v41") else None
    config = dict(configs[name])
    with pytest.raises(ConfigError, match=f"'{key}'"):
        HashSpec.from_config(config | {key: -7}, tokenizer)
    del config[key]
    with pytest.raises(ConfigError, match=f"'{key}'.* is missing"):
        HashSpec.from_config(config, tokenizer)


def test_a_demo_list_of_the_wrong_length_is_refused(golden, deepseek_map):
    with pytest.raises(ConfigError, match="'engram_vocab_size' has 1 numbers, 'max_ngram_size' = 3 asks for 2"):
        HashSpec.from_config(golden["demo"]["config"] | {"engram_vocab_size": [646_400]}, deepseek_map)


def test_longcat_next_is_refused_because_its_rules_differ():
    with pytest.raises(ConfigError, match="text_vocab_size"):
        HashSpec.from_config(LONGCAT | {"text_vocab_size": 131_072})


def test_unknown_configs_are_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"'engram_layer_ids'.*'ple_layer_ids'.*'emb_neighbor_num'.*'hash_spec'"):
        HashSpec.from_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match="no config at"):
        HashSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{,", encoding="utf-8")
    with pytest.raises(ConfigError, match="not readable JSON"):
        HashSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a JSON list, not an object"):
        HashSpec.from_config(tmp_path)


def test_a_config_is_read_from_a_folder_a_file_and_our_own_key(tmp_path):
    spec = HashSpec.from_config(QWEN)
    (tmp_path / "config.json").write_text(json.dumps(QWEN), encoding="utf-8")
    assert HashSpec.from_config(tmp_path) == HashSpec.from_config(str(tmp_path / "config.json")) == spec
    assert HashSpec.from_config({"hash_spec": spec.to_dict()}) == spec


def test_our_own_config_refuses_another_tokenizer(small_tokenizer, deepseek_folder):
    token_map = TokenMap.from_tokenizer(small_tokenizer)
    spec = HashSpec.build(token_map, layers=(1,), rows_per_head=100, pad_token_id=0)
    config = {"hash_spec": spec.to_dict()}
    assert HashSpec.from_config(config, small_tokenizer).rows([5], 1).tolist() == spec.rows([5], 1).tolist()
    with pytest.raises(MismatchError, match=f"{token_map.digest}.*c60a8632"):
        HashSpec.from_config(config, deepseek_folder)


def test_models_of_raw_ids_refuse_maps_that_merge_and_tokenizers_that_do_not_fit(deepseek_map, small_tokenizer):
    with pytest.raises(MismatchError, match="raw ids"):
        HashSpec.from_config(QWEN, deepseek_map)
    with pytest.raises(TokenMapError, match="has 283 tokens"):
        HashSpec.from_config(LONGCAT | {"vocab_size": 100}, small_tokenizer)
    spec = HashSpec.from_config(LONGCAT, small_tokenizer)
    assert spec == HashSpec.from_config({"hash_spec": spec.to_dict()}, small_tokenizer)
    history = TokenHistory(spec, 1)
    assert history.codes.tolist() == [[-1, -1, -1]]
