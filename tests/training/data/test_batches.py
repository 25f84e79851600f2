"""A step's samples depend on nothing but seed and step; documents in one sequence can be kept apart."""

import itertools

import numpy as np
import pytest
import torch
from tests.small_model import BACKBONE, MEMORY, TEXT

from engram_lm.errors import ConfigError, DataError
from engram_lm.hashing import Segments
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.data.batches import Batches, shuffled
from engram_lm.training.data.shards import TokenShards, token_dtype, write_index, write_shard
from engram_lm.training.data.tokenizer import train_tokenizer

LENGTHS = (40, 7, 0, 95, 61)


@pytest.fixture
def shards(tmp_path):
    """Tokens 0, 1, 2, … in files of odd sizes, documents of 1 to 9 tokens that do not care for the files."""
    generator, tokens = np.random.default_rng(0), np.arange(sum(LENGTHS), dtype=token_dtype(300))
    ends = np.cumsum(generator.integers(1, 10, len(tokens)))
    ends = np.append(ends[ends < len(tokens)], len(tokens))
    entries, first = [], 0
    for number, length in enumerate(LENGTHS):
        inside = ends[(ends > first) & (ends <= first + length)] - first
        piece = tokens[first : first + length]
        entries.append(write_shard(tmp_path / f"{number}.safetensors", [piece], inside.tolist(), piece.dtype))
        first += length
    write_index(tmp_path, {"vocab_size": 300, "tokenizer": "x", "end_token": None, "num_text_bytes": 0}, entries)
    return TokenShards.open(tmp_path)


@pytest.mark.parametrize("count", [*range(1, 20), 63, 64, 65, 1000, 4097])
def test_the_order_is_a_permutation(count):
    order = shuffled(np.arange(count), count, (3, 1))
    assert sorted(order.tolist()) == list(range(count))
    # Each place alone gives what all together give.
    assert [int(shuffled(np.array([place]), count, (3, 1))[0]) for place in range(0, count, 7)] == order[::7].tolist()


def test_orders_look_random_and_differ_by_seed_and_epoch():
    orders = np.stack([shuffled(np.arange(10), 10, (seed, epoch)) for seed in range(100) for epoch in range(20)])
    counts = np.array([np.bincount(orders[:, place], minlength=10) for place in range(10)])
    assert abs(counts - 200).max() < 80  # six standard deviations
    assert len({tuple(order) for order in orders.tolist()}) > 1990
    # In a large corpus neighbours do not stay together, and no place is slow.
    far = shuffled(np.arange(2000), 10**12, (0, 0))
    assert np.median(np.abs(np.diff(far))) > 10**11 and far.max() > 0.99 * 10**12


def test_an_epoch_visits_every_sequence_once_and_then_all_again(shards):
    batches = Batches(shards, batch_size=8, length=10, seed=0)
    assert batches.num_sequences == 20  # 203 tokens; the last two are the tail
    order = np.concatenate([batches.sequences(step) for step in range(5)])  # two epochs; step 2 lies in both
    assert sorted(order[:20].tolist()) == sorted(order[20:].tolist()) == list(range(20))
    assert order[:20].tolist() != order[20:].tolist()
    seen = torch.cat([batches[step][0] for step in range(5)])[:20]
    assert sorted(seen.flatten().tolist()) == list(range(200))
    assert torch.equal(batches[3][1], batches[3][0] + 1)


def test_the_tail_is_used_as_soon_as_it_makes_a_sequence():
    assert Batches(np.arange(201), 1, 10, 0).num_sequences == 20
    assert Batches(np.arange(200), 1, 10, 0).num_sequences == 19
    with pytest.raises(DataError, match=r"gives 10 tokens, one sequence needs 11"):
        Batches(np.arange(10), 1, 10, 0)


def test_shards_and_an_array_give_the_same_batches(shards):
    memory, disk = (Batches(tokens, 6, 9, seed=5) for tokens in (shards[:].astype(np.int32), shards))
    for step in range(8):
        for one, other in zip(memory[step], disk[step]):
            assert torch.equal(one, other) and one.dtype == other.dtype == torch.int64


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_any_division_over_ranks_sees_the_same_samples(shards, world):
    batches = Batches(shards, 6, 9, seed=5, restart_documents=True)
    for step in (0, 3, 4):
        whole = batches.part(step, 0, 6)
        borders = [6 * rank // world for rank in range(world + 1)]
        parts = [batches.part(step, start, stop) for start, stop in itertools.pairwise(borders)]
        for name in ("inputs", "targets", "position_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert torch.equal(whole.inputs, batches[step][0])
    with pytest.raises(IndexError, match=r"samples 0 to 7 of step 0: a step has 6"):
        batches.part(0, 0, 7)


def test_positions_restart_with_documents_and_sequences(shards):
    batches = Batches(shards, 22, 9, seed=0, restart_documents=True)
    batch = batches.part(0, 0, 22)
    starts = {0, *shards.document_ends(0, len(shards)).tolist()}
    for inputs, positions in zip(batch.inputs.tolist(), batch.position_ids.tolist()):
        expected = -1
        for place, (token, position) in enumerate(zip(inputs, positions)):  # the token is its own place in the corpus
            expected = 0 if place == 0 or token in starts else expected + 1
            assert position == expected
    assert Batches(shards, 1, 9, seed=0).part(0, 0, 1).position_ids is None


def test_restarting_documents_needs_to_know_where_they_end():
    with pytest.raises(ConfigError, match=r"pack_to_shards"):
        Batches(np.arange(100), 1, 10, 0, restart_documents=True)


@pytest.mark.parametrize("segments", [Segments(positions=True), Segments(end_tokens=(0,))], ids=["positions", "end"])
def test_a_document_in_a_sequence_gives_the_logits_of_the_document_alone(tmp_path, segments):
    tokenizer = train_tokenizer([TEXT], 300)
    assert tokenizer.eos_token_id == 0
    config = EngramLMConfig.for_tokenizer(
        tokenizer, EngramConfig(**MEMORY, kernel_size=0), segments=segments, **BACKBONE
    )
    model = EngramForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    generator = np.random.default_rng(1)
    lengths = [5, 1, 9, 2, 2, 13]
    documents = [np.append(generator.integers(2, 280, length), 0).astype(np.uint16) for length in lengths]
    ends = np.cumsum([len(document) for document in documents])
    entry = write_shard(tmp_path / "0.safetensors", documents, ends.tolist(), token_dtype(300))
    write_index(tmp_path, {"vocab_size": 300, "tokenizer": "x", "end_token": 0, "num_text_bytes": 0}, [entry])
    length = int(ends[-1]) - 1
    batch = Batches(TokenShards.open(tmp_path), 1, length, 0, restart_documents=True).part(0, 0, 1)

    def logits(tokens, positions=None):
        with torch.no_grad():
            return model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]

    apart, mixed = logits(batch.inputs, batch.position_ids), logits(batch.inputs)
    for start, stop in zip([0, *ends], ends):
        alone = logits(batch.inputs[:, start:stop])
        torch.testing.assert_close(apart[start:stop], alone, atol=1e-5, rtol=1e-4)
        assert start == 0 or not torch.allclose(mixed[start:stop], alone, atol=1e-2)


@pytest.mark.parametrize("beginning", [(290,), (290, 291)])
def test_a_sequence_that_starts_inside_a_document_begins_like_one_that_starts_with_it(beginning):
    given = len(beginning)
    tokens = np.concatenate([[*beginning, *range(11 * n, 11 * n + 11)] for n in range(19)])
    batches = Batches(tokens, batch_size=1, length=7, seed=0, beginning=beginning)
    parts = [batches.part(step, 0, 1) for step in range(batches.num_sequences)]
    for part in parts:
        assert part.inputs.shape == part.targets.shape == (1, 7)
        assert part.inputs[0, :given].tolist() == list(beginning)
        assert part.inputs[0, given:].tolist() != [*beginning, *part.inputs[0, 2 * given :].tolist()]
        assert part.inputs[0, 1:].tolist() == part.targets[0, :-1].tolist()
    targets = np.concatenate([part.targets[0, given - 1 :] for part in parts])
    told, counts = np.unique(targets[targets < 290], return_counts=True)
    # The last tokens do not fill a sequence. What follows a skipped beginning is seen twice.
    assert told.tolist() == list(range(told.max() + 1)) and told.max() > 190
    assert counts.max() <= 2 and (counts == 2).sum() < 20
    with pytest.raises(ConfigError, match="length must be at least 2"):
        Batches(tokens, 1, 1, 0, beginning=(290, 291))


def test_positions_restart_behind_a_beginning(tmp_path):
    tokens, ends = np.array([9, 1, 2, 3, 9, 4, 5, 6, 7, 8], dtype=np.uint16), [4, 10]
    entry = write_shard(tmp_path / "0.safetensors", [tokens], ends, tokens.dtype)
    write_index(tmp_path, {"vocab_size": 10, "tokenizer": "x", "end_token": None, "num_text_bytes": 0}, [entry])
    batches = Batches(TokenShards.open(tmp_path), 3, 3, 0, restart_documents=True, beginning=(9,))
    part = batches.part(0, 0, 3)
    rows = {tuple(row): places for row, places in zip(part.inputs.tolist(), part.position_ids.tolist(), strict=True)}
    assert rows == {(9, 1, 2): [0, 1, 2], (9, 3, 9): [0, 1, 0], (9, 5, 6): [0, 1, 2]}
