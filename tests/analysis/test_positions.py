"""Positions at which hidden states are compared: each is where a word, a name or an N-gram is complete."""

import numpy as np
import pytest
from tests.adapt.small_models import TOKENIZER, small_model
from tests.analysis.test_cka import own_model

from engram_lm.analysis import Analysis, find_subject, read_text
from engram_lm.analysis.positions import PositionChoice, name_ends, thinned, word_ends
from engram_lm.errors import ConfigError
from engram_lm.tokenizing import text_tokens

TEXT = "the cat Diana Spencer sat. The Cat Naïve-Æsop saw Müller 北京 x2 rat's end"


class Chosen(Analysis):
    """Keeps the places in the text that were chosen."""

    def __init__(self, positions, **options):
        self.choice, self.places = PositionChoice(positions, **options), []

    def start(self, subjects):
        self.choice.start(subjects)

    def update(self, readings):
        self.places += (readings[0].start + self.choice.choose(readings)).tolist()

    def result(self):
        return self.places


def chosen(positions, tokens, model=None, length=200, batch_size=16, **options):
    subject = find_subject(model or small_model(), TOKENIZER)
    analyses = {"it": Chosen(positions, **options)}
    return read_text([subject], tokens, analyses, length=length, max_batch_size=batch_size)["it"]


def before(tokens, places):
    """The text up to and with each place."""
    return [TOKENIZER.decode(tokens[: place + 1]) for place in places]


def test_words_are_runs_of_letters_and_names_are_capitalized_ones_in_a_row():
    def marked(find, text):
        return [text[: end + 1].split(" ")[-1] for end in find(text)]

    assert marked(word_ends, TEXT) == [
        "the", "cat", "Diana", "Spencer", "sat", "The", "Cat", "Naïve", "Naïve-Æsop", "saw", "Müller", "北京", "x",
        "rat's", "end",
    ]  # fmt: skip
    assert marked(name_ends, TEXT) == ["Spencer", "Naïve-Æsop"]
    assert name_ends("A New York") == [9] and name_ends("New  York, Mr. Smith") == [] and name_ends("") == []


def test_a_word_is_complete_at_the_token_that_has_its_last_letter():
    tokens = text_tokens(TOKENIZER, TEXT)
    assert any("\ufffd" in TOKENIZER.decode([token]) for token in tokens)  # letters that are split over tokens
    words = before(tokens, chosen("word_ends", tokens))
    expected = [TEXT[: end + 1] for end in word_ends(TEXT)][:-1]  # the window may have cut the last one
    assert words == expected
    assert before(tokens, chosen("names", tokens)) == [TEXT[: end + 1] for end in name_ends(TEXT)]


def test_words_that_a_window_cuts_are_left_out_and_special_tokens_end_them():
    tokens = text_tokens(TOKENIZER, "zq zq zq zq")
    singles = TOKENIZER.convert_tokens_to_ids(["z", "q"])
    assert tokens.tolist()[:2] == singles and len(tokens) == 11
    assert chosen("word_ends", tokens) == [1, 4, 7]
    assert chosen("word_ends", tokens, length=4) == [1]  # "zq z", "q zq", " zq"
    assert chosen("word_ends", [*singles, TOKENIZER.eos_token_id, *singles, *singles]) == [1]
    assert chosen("word_ends", [*singles, 319, *singles]) == [1]  # an id that no tokenizer makes


def test_ngrams_are_chosen_from_the_time_on_that_they_are_no_newcomers():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 12, 120)
    for model, order in ((small_model(), 3), (own_model(), 3)):
        spec = find_subject(model, TOKENIZER).spec
        canonical = tokens if spec is None else spec.token_map.canonical[tokens]
        expected, counts = [], {}
        for place in range(120):
            if place % 40 < order - 1:  # not all of it lies in the window
                continue
            ngram = tuple(canonical[place - order + 1 : place + 1].tolist())
            counts[ngram] = counts.get(ngram, 0) + 1
            if counts[ngram] >= 2:
                expected.append(place)
        for batch_size in (1, 16):
            assert chosen("ngrams", tokens, model, length=40, batch_size=batch_size, min_count=2) == expected
        assert 0 < len(expected) < 100


def test_one_of_each_run_is_taken_and_none_of_the_places_in_a_window_is_preferred():
    taken = np.flatnonzero(thinned(np.arange(64_000), 64))
    assert (taken // 64).tolist() == list(range(1000))
    np.testing.assert_allclose(np.bincount(taken % 64, minlength=64), 1000 / 64, atol=4.5 * (1000 / 64) ** 0.5)
    parts = [thinned(np.arange(begin, begin + 100), 64) for begin in range(0, 64_000, 100)]
    assert np.flatnonzero(np.concatenate(parts)).tolist() == taken.tolist()
    assert thinned(np.arange(5), 1).all()


def test_given_positions_and_every_so_many_th_of_them():
    tokens = np.arange(5, 55)
    mask = np.arange(50) % 7 == 3
    assert chosen(mask, tokens, length=20) == np.flatnonzero(mask).tolist()
    for batch_size in (1, 16):
        some = np.flatnonzero(mask)[thinned(np.arange(7), 3)].tolist()
        assert chosen(mask, tokens, length=8, batch_size=batch_size, one_in=3) == some
    with pytest.raises(ConfigError, match="given for 49 tokens, and the text has more"):
        chosen(mask[:49], tokens)


def test_dead_positions_are_never_chosen():
    from tests.small_model import BACKBONE, MEMORY

    import engram_lm
    from engram_lm.hashing import Segments

    dead = TOKENIZER.pad_token_id
    config = engram_lm.EngramLMConfig.for_tokenizer(
        TOKENIZER, engram_lm.EngramConfig(**MEMORY), segments=Segments(dead_tokens=(dead,)), **BACKBONE
    )
    assert chosen("all", [7, 8, dead, 9], engram_lm.EngramForCausalLM(config).eval()) == [0, 1, 3]


def test_impossible_choices_are_refused():
    with pytest.raises(ConfigError, match="positions are all, word_ends, names, ngrams or a bool array"):
        PositionChoice("verbs")
    with pytest.raises(ConfigError, match=r"got int64 \[3\]"):
        PositionChoice([1, 2, 3])
    for name in ("min_count", "one_in"):
        with pytest.raises(ConfigError, match=f"{name} is a whole number from 1, got 0"):
            PositionChoice("all", **{name: 0})
