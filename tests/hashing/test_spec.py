"""The specification as a value: refusals, digests, files."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from engram_lm.errors import ConfigError, HistoryError, MismatchError, TokenError
from engram_lm.hashing import HashSpec, Segments, TokenHistory, TokenMap

RAW = TokenMap.identity(50)


def build(**changes):
    return HashSpec.build(**{"token_map": RAW, "layers": (1, 3), "rows_per_head": 20, "pad_token_id": 2} | changes)


def test_a_spec_comes_back_equal_from_json(spec):
    text = json.dumps(spec.to_dict())
    read = HashSpec.from_dict(json.loads(text))
    assert (read, read.digest, hash(read)) == (spec, spec.digest, hash(spec))
    assert all(isinstance(multiplier, str) for row in spec.to_dict()["multipliers"] for multiplier in row)


def test_integers_survive_readers_that_use_doubles(spec):
    text = json.dumps(spec.to_dict())
    assert HashSpec.from_dict(json.loads(text, parse_int=lambda digits: int(float(digits)))) == spec
    # Small vocabularies are where a double would lose digits.
    large = [m for row in build().multipliers for m in row if m >= 2**53]
    assert any(int(float(m)) != m for m in large)


def test_a_spec_is_saved_loaded_and_bound(spec, specs, tmp_path):
    spec.save(tmp_path / "spec.json")
    loaded = HashSpec.load(tmp_path / "spec.json", spec.token_map)
    assert loaded == spec
    assert loaded.rows([1, 2, 3], spec.layers[0]).tolist() == spec.rows([1, 2, 3], spec.layers[0]).tolist()
    other = TokenMap([0, 0, *range(1, 49)])
    with pytest.raises(MismatchError, match=f"{spec.token_map_digest}.*{other.digest}"):
        HashSpec.load(tmp_path / "spec.json", other)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_another_vocabulary_is_refused_even_under_the_identity_map(small_tokenizer, deepseek_folder):
    ours, theirs = TokenMap.identity(200_000, small_tokenizer), TokenMap.identity(200_000, deepseek_folder)
    spec = build(token_map=ours)
    assert ours.digest == theirs.digest
    assert spec.bind(TokenMap.identity(200_000)).vocabulary_digest == ours.vocabulary_digest
    with pytest.raises(MismatchError, match=f"{ours.vocabulary_digest}.*{theirs.vocabulary_digest}"):
        spec.bind(theirs)


def test_the_digest_covers_what_decides_rows_and_nothing_else():
    spec = build()
    same = [
        build(variant="deepseek_v41"),
        dataclasses.replace(spec, padded_rows=(10_000, 10_000)),
        dataclasses.replace(spec, seed=9),
        build(token_map=TokenMap(RAW.canonical, "ab" * 32)),
    ]
    different = [
        build(seed=1), build(heads=7), build(rows_per_head=90), build(pad_token_id=3), build(orders=(2,)),
        build(layers=(1, 4)), build(segments=Segments(end_tokens=(1,))), build(segments=Segments(positions=True)),
        build(segments=Segments(dead_tokens=(1,))), build(shared_table=True), build(variant="qwen_ple"),
        build(variant="longcat"), build(token_map=TokenMap([0, 0, *range(1, 49)])),
        dataclasses.replace(spec, fill=4),
    ]  # fmt: skip
    assert {other.digest for other in same} == {spec.digest}
    digests = [other.digest for other in different]
    assert spec.digest not in digests
    assert len(set(digests)) == len(digests)


def test_a_shared_table_has_equal_primes_and_own_multipliers():
    spec = build(shared_table=True)
    assert spec.primes[0] == spec.primes[1]
    assert spec.multipliers[0] != spec.multipliers[1]
    assert set(build().primes[0]).isdisjoint(build().primes[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads per order"),
        ({"orders": (0, 2)}, "orders are ascending integers from 1"),
        ({"orders": (3, 2)}, "orders are ascending"),
        ({"orders": ()}, "orders are ascending"),
        ({"layers": ()}, "one or more ids"),
        ({"layers": (1, 1)}, "layers must differ"),
        ({"layers": (-1,)}, "ids from 0"),
        ({"layers": (0,), "variant": "qwen_ple"}, "count from layer_base=1"),
        ({"rows_per_head": 0}, "rows_per_head is one positive number"),
        ({"rows_per_head": (5, 5, 5)}, "one per order"),
        ({"rows_per_head": 2**63}, "int64"),
        ({"rows_per_head": 2**62 + 1}, "row numbers are int64"),
        ({"rows_per_head": 2**60, "variant": "longcat"}, "row numbers are int64|leave int64"),
        ({"rows_per_head": (5, 6), "variant": "longcat"}, "one rows_per_head for all orders"),
        ({"variant": "mine"}, "variant is one of"),
        ({"segments": Segments(end_tokens=(50,))}, "names token 50, the vocabulary has 50"),
        ({"segments": (2,)}, "segments is a Segments"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_a_pad_outside_the_vocabulary_is_refused():
    with pytest.raises(TokenError, match="token id 50"):
        build(pad_token_id=50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": 50}, "fill=50 is outside the vocabulary of 50"),
        ({"fill": None}, "fill is needed"),
        ({"padded_rows": (10, 10)}, "needs .* rows and its table has 10"),
        ({"padded_rows": (2**63, 2**63)}, "row numbers are int64"),
        ({"multipliers": ((1, 1, 1),)}, "multipliers holds 3 numbers"),
        ({"multipliers": ((1, 2, 1),) * 2}, "odd positive"),
        ({"multipliers": ((2**58 + 1, 1, 1),) * 2}, "leaves int64"),
        ({"primes": ((7,),) * 2}, "primes holds 16 numbers"),
        ({"primes": ((0,) * 16,) * 2}, "primes are integers from 1"),
        ({"shared_table": True}, "one table"),
        ({"vocab_size": 49}, "the token map has"),
        ({"token_map_digest": "ab" * 32}, "the token map has"),
        ({"vocabulary_digest": "x"}, "SHA-256"),
        ({"layer_base": 2}, "layer_base=2"),
        ({"num_tokens": 0}, "num_tokens is a positive integer"),
    ],
)
def test_impossible_fields_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(build(), **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(num_head=8), "unknown key 'num_head'; did you mean 'num_heads'"),
        (lambda d: d["segments"].update(end_token=[1]), "unknown key 'end_token'; did you mean 'end_tokens'"),
        (lambda d: d.pop("primes"), "'primes' is missing"),
        (lambda d: d.update(format="other"), "expected format"),
        (lambda d: d.update(primes=3), "primes is a list"),
        (lambda d: d.update(primes=[[2.0] * 16] * 2), "primes holds integers"),
        (lambda d: d.update(fill="two"), "fill holds integers"),
        (lambda d: d.update(segments=[]), "segments is a dictionary"),
        (lambda d: d.update(shared_table=0), "shared_table is true or false"),
    ],
)
def test_dictionaries_that_are_no_spec_are_refused(change, message):
    values = build().to_dict()
    change(values)
    with pytest.raises(ConfigError, match=message):
        HashSpec.from_dict(values)


def test_unknown_layers_are_refused_with_the_known_ones():
    for call in (lambda: build().rows([1], 2), lambda: build().num_rows(0), lambda: build().offsets(5)):
        with pytest.raises(ConfigError, match="the layers with one are 1, 3"):
            call()


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_tokens_masks_and_histories_of_the_wrong_shape_are_refused(kind):
    spec = build()
    with pytest.raises(TokenError, match=r"\[batch, length\], got the shape \[1, 1, 2\]"):
        spec.rows(kind([[[1, 2]]]), 1)
    with pytest.raises(TokenError, match="token id 50"):
        spec.rows(kind([50]), 1)
    with pytest.raises(TokenError, match="token id -100"):
        spec.rows(kind([[1, -100]]), 1)
    with pytest.raises(MismatchError, match=r"attention_mask has the shape \[1, 3\], the tokens \[1, 2\]"):
        spec.rows(kind([[1, 2]]), 1, attention_mask=kind([[1, 1, 1]]))
    with pytest.raises(HistoryError, match=r"with a history, tokens are \[batch, length\]"):
        spec.rows(kind([1, 2]), 1, TokenHistory(spec, 1))
    with pytest.raises(HistoryError, match=r"holds \[2, 2\] codes, the tokens need \[3, 2\]"):
        spec.rows(kind([[1, 2]] * 3), 1, TokenHistory(spec, 2))
    with pytest.raises(MismatchError, match=f"{build(seed=1).digest}.*{spec.digest}"):
        spec.rows(kind([[1, 2]]), 1, TokenHistory(build(seed=1), 1))


def test_numpy_rows_and_from_config_import_neither_torch_nor_transformers():
    program = (
        "import sys, numpy as np\n"
        "from engram_lm.hashing import HashSpec, TokenMap, Segments\n"
        "s = HashSpec.build(TokenMap.identity(9), layers=(0,), rows_per_head=5, pad_token_id=0)\n"
        "s.rows_for_layers(s.encode(np.array([[1, 2]]))); s.rows([1, 2], 0)\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules), 'imported'\n"
        "import engram_lm.hashing\n"
        "assert 'TokenHistory' in dir(engram_lm.hashing)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
