"""Row numbers are the hash's, and whoever is said to share a row does."""

import numpy as np
from tests.small_model import TEXT
from tests.training.test_loop import TOKENIZER

from engram_lm.analysis.rows.collisions import TextNgrams
from engram_lm.explore.addresses import FREQUENT_POSITIONS, find_addresses, merged_with
from engram_lm.hashing import HashSpec, Segments, TokenMap

SPEC = HashSpec.build(
    TokenMap.from_tokenizer(TOKENIZER), layers=(0, 2), orders=(2, 3), heads=2, rows_per_head=11, pad_token_id=0
)
TOKENS = np.array(TOKENIZER("The cat saw the rat; THE cat").input_ids)
# Its last words occur once.
REFERENCE = np.array(TOKENIZER(TEXT + "a mat, Rat? mat the on; sat! cat a saw to ran").input_ids)


def test_rows_are_those_of_the_hash_and_ngrams_end_at_their_position():
    found = find_addresses(SPEC, TOKENS)
    for position in range(len(TOKENS)):
        for block, layer in zip(SPEC.blocks, SPEC.layers, strict=True):
            lookups = found.lookups(position, block, TOKENIZER)
            rows = SPEC.rows(TOKENS, layer)[position]
            assert [row for lookup in lookups for row in lookup.rows] == rows.tolist()
            for lookup in lookups:
                start = max(0, position + 1 - lookup.order)
                assert lookup.tokens == tuple(TOKENS[start : position + 1].tolist())
                assert lookup.is_cut == (position + 1 < lookup.order)


def test_sharers_are_all_other_ngrams_of_the_reference_that_read_one_of_the_rows():
    found, layer = find_addresses(SPEC, TOKENS), SPEC.layers[0]
    canonical, rows = SPEC.token_map.apply(REFERENCE), SPEC.rows(REFERENCE, layer)
    own = SPEC.token_map.apply(TOKENS)
    for position in (2, len(TOKENS) - 1):
        lookups = found.lookups(position, SPEC.blocks[0], TOKENIZER, TextNgrams(REFERENCE), num_sharers=10_000)
        assert all(sharer.num_positions >= FREQUENT_POSITIONS for lookup in lookups for sharer in lookup.sharers)
        for place, lookup in enumerate(lookups):
            order, columns = lookup.order, slice(2 * place, 2 * place + 2)
            wanted = tuple(own[position + 1 - order : position + 1])
            places = {}
            for end in range(order - 1, len(REFERENCE)):
                places.setdefault(tuple(canonical[end + 1 - order : end + 1]), []).append(end)
            assert lookup.num_positions == len(places.pop(wanted, []))
            heads = {
                ngram: int((rows[ends[0], columns] == np.array(lookup.rows)).sum()) for ngram, ends in places.items()
            }
            meeting = {
                ngram: number for ngram, number in heads.items() if number and len(places[ngram]) >= FREQUENT_POSITIONS
            }
            cut = sum(1 for one in lookup.sharers if one.text == "")
            assert lookup.num_sharers - len(meeting) <= order - 1 + cut  # N-grams that see the start of the text
            listed = sorted((one.num_positions, one.num_heads) for one in lookup.sharers)
            for ngram, number in meeting.items():
                assert (len(places[ngram]), number) in listed
            assert [one.num_heads for one in lookup.sharers] == sorted(
                (one.num_heads for one in lookup.sharers), reverse=True
            )


def test_nothing_is_looked_up_at_a_dead_token_and_tokens_that_mean_the_same_are_named():
    dead = int(TOKENS[1])
    spec = HashSpec.build(
        TokenMap.from_tokenizer(TOKENIZER), layers=(0,), orders=(2,), heads=2, rows_per_head=11, pad_token_id=0,
        segments=Segments(dead_tokens=(dead,)),
    )  # fmt: skip
    found = find_addresses(spec, TOKENS)
    assert found.lookups(1, 0, TOKENIZER) == ()
    assert len(found.lookups(2, 0, TOKENIZER)) == 1
    the, capital = (TOKENIZER(text).input_ids[0] for text in (" the", "The"))
    others, number = merged_with(SPEC, the)
    canonical = SPEC.token_map.canonical
    assert set(others) == set(np.flatnonzero(canonical == canonical[the]).tolist()) - {the}
    assert number == len(others)
    assert (canonical[capital] == canonical[the]) == (capital in others)
