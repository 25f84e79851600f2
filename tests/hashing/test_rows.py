"""Row numbers: the fast paths against plain loops and against transformers, and torch.compile."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hashing.conftest import encode_plainly, rows_plainly
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from engram_lm.hashing import HashSpec


def random_input(spec, seed, batch, length):
    """Tokens rich in ends and dead ones, masks and packed positions."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, spec.num_tokens, (batch, length))
    special = np.array([3, 7, 9, 2])
    tokens = np.where(generator.random((batch, length)) < 0.3, special[generator.integers(0, 4, tokens.shape)], tokens)
    mask = (generator.random((batch, length)) > 0.15).astype(np.int64)
    mask[:, : generator.integers(0, 4)] = 0
    positions = np.zeros_like(tokens)
    for t in range(1, length):
        positions[:, t] = np.where(generator.random(batch) < 0.2, 0, positions[:, t - 1] + 1)
    return tokens, mask, positions


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 37), (1, 130), (2, 0), (0, 3)])
@pytest.mark.parametrize("extras", ["bare", "mask", "mask and positions"])
def test_numpy_torch_and_plain_loops_agree(spec, batch, length, extras):
    tokens, mask, positions = random_input(spec, 11 * batch + length, batch, length)
    mask = None if extras == "bare" else mask
    positions = positions if extras == "mask and positions" else None
    numpy = spec.rows_for_layers(spec.encode(tokens, mask, positions))
    as_torch = [None if value is None else torch.from_numpy(value) for value in (tokens, mask, positions)]
    fast = spec.rows_for_layers(spec.encode(*as_torch))
    for layer in spec.layers:
        assert isinstance(numpy[layer], np.ndarray)
        assert numpy[layer].dtype == np.int64
        assert fast[layer].dtype == torch.int64
        assert fast[layer].is_contiguous()
        assert numpy[layer].shape == tuple(fast[layer].shape) == (batch, length, spec.num_heads_total)
        plain = [
            rows_plainly(
                spec,
                *encode_plainly(
                    spec,
                    tokens[b].tolist(),
                    None if mask is None else mask[b].tolist(),
                    None if positions is None else positions[b].tolist(),
                ),
                layer,
            )
            for b in range(batch)
        ]
        assert numpy[layer].tolist() == plain
        assert fast[layer].tolist() == plain
        one = spec.rows(as_torch[0], layer, attention_mask=as_torch[1], position_ids=as_torch[2])
        assert torch.equal(one, fast[layer])


def test_every_row_lies_in_its_own_column_of_the_table(spec):
    tokens, mask, positions = random_input(spec, 3, 4, 300)
    for layer, rows in spec.rows_for_layers(spec.encode(tokens, mask, positions)).items():
        offsets, sizes = np.array(spec.offsets(layer)), np.array(spec.primes[spec.layers.index(layer)])
        assert ((rows >= offsets) & (rows < offsets + sizes)).all()
        assert offsets[-1] + sizes[-1] <= spec.num_rows(layer)


def test_the_largest_tokens_and_multipliers_stay_in_the_table():
    from engram_lm.hashing import TokenMap

    for vocab_size in (1, 2, 3, 1000):
        spec = HashSpec.build(TokenMap.identity(vocab_size), layers=(0,), rows_per_head=2**40, pad_token_id=0)
        largest = spec.vocab_size - 1
        bound = (2**63 - 1) // max(largest, 1)
        multiplier = min(bound - 1 + bound % 2, 2**63 - 1)
        spec = dataclasses.replace(spec, multipliers=((multiplier, multiplier - 2, multiplier - 4),))
        tokens = [0, largest, largest, largest, 0]
        plain = rows_plainly(spec, *encode_plainly(spec, tokens), 0)
        assert spec.rows(tokens, 0).tolist() == plain
        assert spec.rows(torch.tensor(tokens), 0).tolist() == plain


def test_one_sequence_gives_rows_without_a_batch(spec):
    tokens, mask, positions = random_input(spec, 5, 1, 20)
    layer = spec.layers[-1]
    whole = spec.rows(tokens, layer, attention_mask=mask, position_ids=positions)[0]
    for kind in (np.asarray, torch.from_numpy, list):
        rows = spec.rows(kind(tokens[0]), layer, attention_mask=kind(mask[0]), position_ids=kind(positions[0]))
        assert rows.tolist() == whole.tolist()


def test_positions_shared_by_the_batch_may_be_given_once(specs):
    spec = specs["demo"]
    tokens, _, positions = random_input(spec, 8, 3, 25)
    shared = np.repeat(positions[:1], 3, axis=0)
    expected = spec.encode(tokens, None, shared)
    assert (spec.encode(tokens, None, positions[:1]) == expected).all()
    assert spec.encode(torch.from_numpy(tokens), None, torch.from_numpy(positions[:1])).tolist() == expected.tolist()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(padding=st.integers(0, 9), seed=st.integers(0, 2**16))
def test_left_padding_does_not_change_the_rows_of_real_tokens(specs, padding, seed):
    for spec in specs.values():
        tokens, _, _ = random_input(spec, seed, 1, 12)
        padded = np.concatenate([np.full((1, padding), seed % 50), tokens], axis=1)
        mask = np.arange(padding + 12)[None] >= padding
        for layer in spec.layers:
            rows = spec.rows(padded, layer, attention_mask=mask)[:, padding:]
            assert rows.tolist() == spec.rows(tokens, layer).tolist()


def test_an_end_token_belongs_to_the_segment_it_ends(specs):
    spec = specs["demo"]
    with_end, without = spec.rows([10, 11, 7, 12], 1), spec.rows([10, 11, 13, 12], 1)
    assert spec.rows([14, 11, 7, 12], 1)[2].tolist() != with_end[2].tolist()
    assert with_end[3].tolist() == spec.rows([12], 1)[0].tolist()
    assert without[3].tolist() != spec.rows([12], 1)[0].tolist()


class Rows(torch.nn.Module):
    """Stands for the oracle's embedding table and gives back the row numbers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, rows):
        self.rows = rows.clone()
        return torch.zeros(*rows.shape, 1)


@pytest.mark.parametrize("ngram_size", [2, 3, 4])
def test_rows_equal_those_of_transformers_own_module(ngram_size):
    config = Qwen4ExpTextConfig(
        vocab_size=700, eos_token_id=5, ngram_size=ngram_size, heads_per_ngram=3, ngram_vocab_size_base=997, seed=77,
        make_ngram_vocab_size_divisible_by=64,
    )  # fmt: skip
    spec = HashSpec.from_config(
        {
            "ple_layer_ids": [4, 2], "ngram_size": ngram_size, "heads_per_ngram": 3, "ngram_vocab_size_base": 997,
            "seed": 77, "make_ngram_vocab_size_divisible_by": 64, "vocab_size": 700, "eos_token_id": [5, 6],
        }
    )  # fmt: skip
    assert spec.layers == (2, 4)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 700, (5, 61), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = 5
    mask = torch.arange(61) >= torch.tensor([[0], [1], [2], [17], [60]])
    for ordinal, layer in enumerate(spec.layers):
        oracle = Qwen4ExpTextNGramEmbedding(config, 3 * (ngram_size - 1), layer_idx=0, ple_layer_index=ordinal)
        assert oracle.ngram_embedding.num_embeddings == spec.num_rows(layer)
        oracle.ngram_embedding = Rows()
        oracle(tokens, None)
        assert torch.equal(spec.rows(tokens, layer), oracle.ngram_embedding.rows)
        # transformers writes EOS where the mask is 0, then hashes.
        oracle(torch.where(mask, tokens, 5), None)
        assert torch.equal(spec.rows(tokens, layer, attention_mask=mask), oracle.ngram_embedding.rows)


# Inductor's own imports warn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["deepseek_v41", "longcat"])
def test_torch_compile_gives_the_same_rows_in_one_graph_at_any_length(specs, name):
    spec = specs[name]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tokens, mask, positions, context: spec.rows_for_layers(spec.encode(tokens, mask, positions), context),
        fullgraph=True,
        dynamic=True,
    )
    for length in (5, 12, 33):
        tokens, mask, positions = (torch.from_numpy(value) for value in random_input(spec, length, 3, length))
        context = spec.encode(torch.from_numpy(random_input(spec, 99, 3, spec.context)[0]))
        expected = spec.rows_for_layers(spec.encode(tokens, mask, positions), context)
        for layer, rows in compiled(tokens, mask, positions, context).items():
            assert torch.equal(rows, expected[layer])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_refuses_tokens_outside_the_vocabulary_too(specs):
    spec = specs["demo"]
    torch._dynamo.reset()
    compiled = torch.compile(spec.encode, fullgraph=True)
    good = torch.tensor([[1, 2]])
    assert torch.equal(compiled(good), spec.encode(good))
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        compiled(torch.tensor([[1, -2]]))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_unchecked_codes_are_those_of_encode_and_unknown_ids_are_dead(spec, kind):
    tokens, mask, positions = random_input(spec, 21, 3, 40)
    for extras in ((), (mask,), (mask, positions)):
        expected = spec.encode(tokens, *extras)
        found = spec.encode_unchecked(kind(tokens), *map(kind, extras))
        assert found.tolist() == expected.tolist()
    unknown = np.random.default_rng(2).random(tokens.shape) < 0.2
    strange = np.where(unknown, np.array([-1, -(2**40), spec.num_tokens, 2**50])[tokens % 4], tokens)
    expected = spec.encode(tokens, np.where(unknown, 0, mask), positions)
    assert spec.encode_unchecked(kind(strange), kind(mask), kind(positions)).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unchecked_codes_compile_into_one_graph_and_refuse_nothing(specs):
    spec = dataclasses.replace(specs["deepseek_v41"])  # nothing of it is cached yet
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tokens, context: spec.rows_for_layers(spec.encode_unchecked(tokens), context), fullgraph=True
    )
    tokens, context = torch.tensor([[1, -2, 5], [10**6, 4, 4]]), torch.full((2, spec.context), -1)
    expected = spec.rows_for_layers(spec.encode_unchecked(tokens), context)
    for layer, rows in compiled(tokens, context).items():
        assert torch.equal(rows, expected[layer])
