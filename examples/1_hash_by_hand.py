"""Lesson 1: the hash, by hand and then the real one, and what happens when two N-grams meet.

    python examples/1_hash_by_hand.py

A memory looks up the last two or three tokens of a text. It has no dictionary of them: it computes a number. Here we
compute it with NumPy alone, compare it with the library's, row by row, and draw how often N-grams meet.
Needs no model and no network, and takes seconds.
"""

import unicodedata
from pathlib import Path

import numpy as np

from engram_lm import HashSpec, TokenMap
from engram_lm.analysis import collision_study
from engram_lm.training.data.documents import read_documents
from engram_lm.training.data.tokenizer import train_tokenizer

OUT = Path("runs/lessons")
TEXT = "Only Alexander the Great could tame the horse Bucephalus. The great horse ran; only the king rode it. " * 20
ORDERS, HEADS, ROWS_PER_HEAD, LAYER, SEED, PAD = (2, 3), 2, 50, 1, 0, 0
tokenizer = train_tokenizer([TEXT], 350)

# %% 1. Tokens that look alike become one: "The", " the" and "THE" mean the same to a table of facts.

vocabulary = [tokenizer.decode([token]) for token in range(len(tokenizer))]


def folded(text: str) -> str:
    """Fold a token's text: no accents, no capitals, no spaces around it."""
    letters = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).lower().strip() or " "


tokens = np.array(tokenizer("Alexander the Great").input_ids)
print("tokens          ", [vocabulary[token] for token in tokens])
print("folded          ", [folded(vocabulary[token]) for token in tokens])

# The library's map does the same, with the published rule for every odd case, and numbers the groups from 0.
token_map = TokenMap.from_tokenizer(tokenizer)
canonical = token_map.apply(tokens)
print("canonical tokens", canonical.tolist(), f"({token_map.num_tokens} tokens become {len(token_map)})")

# %% 2. An N-gram becomes a number: each token times an odd number of its own place, joined by XOR.

bound = (2**63 - 1) // len(token_map) // 2  # so that no product leaves 64 bits
draws = np.random.default_rng(SEED + 10007 * LAYER).integers(0, bound, size=max(ORDERS), dtype=np.int64)
multipliers = 2 * draws + 1


def next_primes(start: int, count: int, taken: set[int]) -> list[int]:
    """Find the next primes that nobody has taken: each head divides by another one."""
    found: list[int] = []
    while len(found) < count:
        if start not in taken and all(start % divisor for divisor in range(2, int(start**0.5) + 1)):
            found.append(start)
            taken.add(start)
        start += 1
    return found


taken: set[int] = set()
primes = [next_primes(ROWS_PER_HEAD, HEADS, taken) for _ in ORDERS]
rows_by_hand = np.zeros((len(tokens), len(ORDERS) * HEADS), np.int64)
pad = token_map.apply(np.array([PAD]))[0]
for position in range(len(tokens)):
    column, offset = 0, 0
    for order, order_primes in zip(ORDERS, primes):
        mix = 0
        for distance in range(order):  # the current token first, then the ones before it
            seen = canonical[position - distance] if position >= distance else pad
            mix ^= int(seen) * int(multipliers[distance])
        for prime in order_primes:  # one row for each head; every head has rows of its own
            rows_by_hand[position, column] = mix % prime + offset
            column, offset = column + 1, offset + prime

# %% 3. The real one, side by side.

spec = HashSpec.build(
    token_map, layers=(LAYER,), orders=ORDERS, heads=HEADS, rows_per_head=ROWS_PER_HEAD, seed=SEED, pad_token_id=PAD
)
rows = spec.rows(tokens, LAYER)
for token, own, real in zip(tokens, rows_by_hand, rows):
    print(f"{vocabulary[token]!r:>12}  by hand {own.tolist()}  library {real.tolist()}")
assert np.array_equal(rows_by_hand, rows), "both are the same rule"

# %% 4. Collisions: in a real text there are as many N-grams as rows, or more, so some share one. Two N-grams that meet
# in one head hardly ever meet in another one too, so several heads tell them apart.

code = "".join(document.text for document in read_documents(max_bytes=100_000).documents)[:100_000]
study = collision_study(tokenizer, code, rows_per_order=2_048, heads=(1, 2, 4), min_count=1)
print(f"{study.num_ngrams[0, 0]:,} different 2-grams of Python's own sources, and 2,048 rows for all heads together:")
print("heads   N-grams that meet another in one head   in all heads")
for place, heads in enumerate(study.heads):
    print(f"{heads:5}   {study.one_head[0, place, 0]:39.0%}   {study.all_heads[0, place, 0]:12.1%}")

import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
axes.plot(study.heads, study.one_head[0, :, 0], "o-", label="share a row with another N-gram in a head")
axes.plot(study.heads, study.all_heads[0, :, 0], "s-", label="cannot be told from it in any head")
axes.plot(study.heads, study.expected_all_heads[0, :, 0], "k:", label="the latter, for a perfectly even hash")
axes.set(xlabel="heads, with 2,048 rows for all of them together", ylabel="share of the text's 2-grams", ylim=(0, 1))
axes.set_xticks(study.heads)
axes.legend(frameon=False)
OUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUT / "collisions.png", dpi=120)
print(f"drawn: {OUT / 'collisions.png'}")
