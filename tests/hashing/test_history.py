"""Decoding in any chunks, forks and rollbacks gives the rows of the whole sequence."""

import random

import numpy as np
import pytest
import torch

from engram_lm.errors import HistoryError, MismatchError, TokenError
from engram_lm.hashing import HashSpec, TokenHistory, TokenMap


def draw_sequence(draw, length):
    """Tokens with ends (7, 9) and dead ones (3), a mask, and positions of packed documents."""
    tokens = [draw.choice([draw.randrange(50), draw.randrange(50), 3, 7, 9]) for _ in range(length)]
    mask = [int(draw.random() > 0.1) for _ in range(length)]
    positions, position = [], 0
    for _ in range(length):
        positions.append(position)
        position = 0 if draw.random() < 0.15 else position + 1
    return tokens, mask, positions


def part(sequences, starts, length):
    """The next tokens, masks and positions of each sequence, [batch, length] each."""
    return [np.array([s[field][i : i + length] for s, i in zip(sequences, starts, strict=True)]) for field in range(3)]


def whole_rows(spec, sequence, layer):
    tokens, mask, positions = (np.array(field) for field in sequence)
    return spec.rows(tokens, layer, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("max_rollback", [6, None])
@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_gives_the_rows_of_the_whole_sequence(spec, max_rollback, seed):
    draw = random.Random(f"{seed} {max_rollback}")
    sequences = [draw_sequence(draw, 200) for _ in range(3)]
    starts, held = [0, 0, 0], [0, 0, 0]
    history = TokenHistory(spec, 3, max_rollback=max_rollback)
    saved, checked = None, 0
    for _ in range(45):
        action = draw.choice(["read", "read", "read", "ragged", "rollback", "reorder", "fork", "save", "restore"])
        batch = len(sequences)
        if action in ("read", "ragged"):
            length = draw.choice([1, 1, 2, 3, 8])
            if max(starts) + length > 200:
                break
            tokens, mask, positions = part(sequences, starts, length)
            kind = draw.choice([np.asarray, torch.from_numpy])
            extras = {"attention_mask": kind(mask), "position_ids": kind(positions)}
            for layer in spec.layers:
                rows = spec.rows(kind(tokens), layer, history, **extras)
                for b in range(batch):
                    whole = whole_rows(spec, sequences[b], layer)
                    assert rows[b].tolist() == whole[starts[b] : starts[b] + length].tolist()
                    checked += 1
            lengths = [draw.randint(0, length) for _ in range(batch)] if action == "ragged" else [length] * batch
            history.advance(kind(tokens), lengths=lengths if action == "ragged" else None, **extras)
            starts = [start + count for start, count in zip(starts, lengths, strict=True)]
            held = [min(h + n, max_rollback) if max_rollback else h + n for h, n in zip(held, lengths, strict=True)]
        elif action == "rollback":
            counts = [draw.randint(0, available) for available in held]
            history.rollback(counts)
            starts = [start - count for start, count in zip(starts, counts, strict=True)]
            held = [available - count for available, count in zip(held, counts, strict=True)]
            # What was taken back comes again differently.
            sequences = [
                tuple(old[:start] + new[start:] for old, new in zip(sequence, draw_sequence(draw, 200), strict=True))
                for sequence, start in zip(sequences, starts, strict=True)
            ]
            sequences = [(t, m, continued(p, start)) for (t, m, p), start in zip(sequences, starts, strict=True)]
        elif action == "reorder":
            index = [draw.randrange(batch) for _ in range(batch)]
            history.reorder(torch.tensor(index))
            sequences, starts, held = ([values[i] for i in index] for values in (sequences, starts, held))
        elif action == "fork":
            forked = history.fork(2)
            history.advance(np.full((batch, 1), 7))
            index = [draw.randrange(2 * batch) for _ in range(3)]
            history = forked.select(index)
            sequences, starts, held = ([values[i // 2] for i in index] for values in (sequences, starts, held))
            saved = None
        elif action == "save":
            saved = (history.snapshot(), list(sequences), list(starts), list(held))
        elif action == "restore" and saved is not None:
            history.restore(saved[0])
            _, sequences, starts, held = (list(value) for value in saved)
    assert checked > 20


def continued(positions, start):
    """Let positions rise by one at the seam, unless a document starts there."""
    if start == 0 or positions[start] == 0:
        return [0, *positions[1:]] if start == 0 else positions
    shift = positions[start - 1] + 1 - positions[start]
    end = next((i for i in range(start, len(positions)) if positions[i] == 0), len(positions))
    return positions[:start] + [p + shift for p in positions[start:end]] + positions[end:]


def test_reading_does_not_advance_the_history_and_every_layer_sees_the_same(specs):
    spec = specs["deepseek_v41"]
    history = TokenHistory(spec, 1).advance([[10, 11, 12]])
    before = history.codes.clone()
    first = [spec.rows(np.array([[13]]), layer, history).tolist() for layer in spec.layers]
    second = spec.rows_for_layers(spec.encode(torch.tensor([[13]])), history)
    assert first == [second[layer].tolist() for layer in spec.layers]
    assert torch.equal(history.codes, before)
    with_codes = spec.rows_for_layers(spec.encode(np.array([[13]])), before.numpy())
    assert first == [with_codes[layer].tolist() for layer in spec.layers]


def test_a_history_starts_empty_and_holds_the_last_codes(specs):
    spec = specs["deepseek_v41"]
    history = TokenHistory(spec, 2)
    assert history.codes.tolist() == [[-1, -1, -1]] * 2
    history.advance(torch.tensor([[10, 7], [3, 11]]))
    # An end token carries the 2, a dead one is -1.
    assert history.codes.tolist() == [[-1, 40, 30], [-1, -1, 44]]
    assert history.reset().codes.tolist() == [[-1, -1, -1]] * 2


def test_a_later_chunk_starts_a_segment_where_its_positions_start_at_zero(specs):
    spec = specs["demo"]
    history = TokenHistory(spec, 1).advance([[10, 11]], position_ids=[[0, 1]])
    new = spec.rows(np.array([[12]]), 1, history, position_ids=np.array([[0]]))
    old = spec.rows(np.array([[12]]), 1, history, position_ids=np.array([[2]]))
    assert new.tolist() == spec.rows(np.array([[12]]), 1).tolist()
    assert old.tolist() != new.tolist()


def test_what_does_not_belong_to_a_history_is_refused(specs):
    spec = specs["demo"]
    history = TokenHistory(spec, 2)
    with pytest.raises(HistoryError, match=r"holds 2 sequences, got codes of shape \[3, 1\]"):
        history.advance(np.array([[1], [2], [3]]))
    with pytest.raises(TokenError, match=r"\[batch, length\]"):
        history.advance(np.array([1, 2]))
    with pytest.raises(TokenError, match="token id 99"):
        history.advance(torch.tensor([[99], [1]]))
    with pytest.raises(HistoryError, match="0 are held"):
        history.rollback(1)
    with pytest.raises(HistoryError, match=f"{specs['longcat'].digest}.*{spec.digest}"):
        history.restore(TokenHistory(specs["longcat"], 2).snapshot())
    with pytest.raises(MismatchError, match="make the TokenHistory with the same spec"):
        specs["qwen_ple"].rows(np.array([[1], [2]]), 2, history)
    equal = HashSpec.from_dict(spec.to_dict()).bind(TokenMap(spec.token_map.canonical))
    assert equal.rows(np.array([[1], [2]]), 1, history).shape == (2, 1, 6)
