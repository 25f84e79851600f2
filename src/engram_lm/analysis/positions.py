"""Positions of a text at which hidden states are compared: ends of words, of names, or of recurring N-grams."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from engram_lm.analysis.protocol import Reading
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, check_whole
from engram_lm.evaluation.token_text import WORD, text_places, token_texts
from engram_lm.hashing.counting import ngram_keys, ngrams_of, scattered
from engram_lm.hashing.multipliers import splitmix64

# Dimension key: B windows at a time, L length.

Positions = Literal["all", "word_ends", "names", "ngrams"]

_BREAK = "\n"
"""Stands for special tokens, where words end."""
_NUM_COUNTERS = 1 << 20
_ORDER_WITHOUT_MEMORY = 3


def thinned(places: np.ndarray, one_in: int) -> np.ndarray:
    """Take one place out of each run of ``one_in`` places, at a position in the run that looks random.

    A regular step would be worse: if it had a common divisor with the length of a window, only some positions of the
    windows would be seen, at worst only their first tokens.

    Takes places in the text, integers ``[n]``, not negative, and returns whether each is taken, bool ``[n]``. This does
    not depend on the other places.
    """
    runs, within = np.divmod(places.astype(np.uint64), np.uint64(one_in))
    return np.asarray(within == splitmix64(runs) % np.uint64(one_in))


def word_ends(text: str) -> list[int]:
    """Find the place of the last character of each word; a word is a run of letters."""
    return [match.end() - 1 for match in WORD.finditer(text)]


def name_ends(text: str) -> list[int]:
    """Find the place of the last character of each name: a substitute for named entities that needs no other model.

    A name is a sequence of two or more words that begin with a capital and have one space or hyphen between them. A
    word that is capitalized because it begins a sentence counts as part of a name.
    """
    ends: list[int] = []
    words, last = 0, -2
    for match in WORD.finditer(text):
        capital = match.group()[0].isupper()
        joined = match.start() == last + 2 and text[last + 1] in " -\u00a0"
        last = match.end() - 1
        words = words + 1 if capital and joined else int(capital)
        if words > 2:
            ends.pop()
        if words > 1:
            ends.append(last)
    return ends


class PositionChoice:
    """Chooses positions, window by window; the choice does not depend on how many windows are read at once.

    Args:
        positions: ``"all"``; ``"word_ends"``: the token that completes a run of letters; ``"names"``: the token that
            completes a name, see `name_ends`; ``"ngrams"``: where the N-gram of the highest order has occurred at least
            ``min_count`` times so far (of canonical tokens if a model has memory, otherwise of three raw tokens; they
            share a million counters, so a rare one is sometimes taken for a frequent one); or a bool array
            ``[num_tokens]`` over the tokens of the text. Words and names that a window cuts are left out.
        min_count: See ``"ngrams"``.
        one_in: Take one of this many chosen positions; see `thinned`.

    Raises:
        ConfigError: There is no such choice, or a number is below 1.
    """

    def __init__(self, positions: Positions | Any = "all", *, min_count: int = 5, one_in: int = 1) -> None:
        check_whole(min_count=min_count, one_in=one_in)
        self.min_count, self.one_in = min_count, one_in
        self.mask: np.ndarray | None = None
        self.name = positions if isinstance(positions, str) else "given"
        if not isinstance(positions, str):
            self.mask = np.asarray(positions)
            if self.mask.dtype != np.bool_ or self.mask.ndim != 1:
                raise ConfigError(
                    "positions are given as a bool array [num_tokens], one value for each token of the text; got "
                    f"{self.mask.dtype} {list(self.mask.shape)}"
                )
        elif positions not in get_args(Positions):
            raise ConfigError(
                f"positions are {', '.join(get_args(Positions))} or a bool array [num_tokens], not {positions!r}"
            )

    def start(self, subjects: Sequence[Subject]) -> None:
        """Begin with a new text."""
        self._tokenizer = subjects[0].tokenizer
        self._place = next((place for place, subject in enumerate(subjects) if subject.spec is not None), None)
        self._seen = 0
        self._counters = np.zeros(_NUM_COUNTERS if self.name == "ngrams" else 0, np.int32)

    def choose(self, readings: Sequence[Reading]) -> np.ndarray:
        """Choose among the positions of some windows: places in ``B * L``, ascending, int64, the same for all models.

        Dead positions are never chosen, because memory is silent there. Raises `ConfigError` if the given array is
        shorter than the text.
        """
        chosen = self._chosen(readings).flatten()
        for reading in readings:
            chosen &= reading.active.flatten().cpu().numpy()
        places = np.flatnonzero(chosen)
        kept = places[thinned(self._seen + np.arange(len(places)), self.one_in)]
        self._seen += len(places)
        return kept

    def _chosen(self, readings: Sequence[Reading]) -> np.ndarray:
        """Bool ``[B, L]``."""
        reading = readings[0]
        shape = tuple(reading.tokens.shape)
        if self.mask is not None:
            if reading.places.max() >= len(self.mask):
                raise ConfigError(
                    f"positions were given for {len(self.mask)} tokens, and the text has more; give one for each token"
                )
            return self.mask[reading.places] & (reading.places >= 0)
        if self.name == "all":
            return np.ones(shape, bool)
        if self.name == "ngrams":
            return self._recurring(readings)
        windows = reading.tokens.cpu().numpy()
        chosen = np.zeros(shape, bool)
        for row, window in enumerate(windows):
            num_given = int((reading.places[row] < 0).sum())
            chosen[row, self._completed(window, num_given, reading.start == 0 and row == 0)] = True
        return chosen

    def _completed(self, window: np.ndarray, num_given: int, begins_text: bool) -> np.ndarray:
        """Find the tokens that complete a word or a name in a window whose first tokens may not be of the text."""
        texts = self._spelled(window.tolist())
        text = "".join(texts)
        if self.name == "word_ends":
            ends, closed = word_ends(text), len(text)
        else:
            ends, closed = name_ends(text), len(text.rstrip())  # the next word may belong to the name
        first = WORD.match(text, len("".join(texts[:num_given])))
        # The beginning or end of the window may have cut a word.
        low = first.end() if first is not None and not begins_text else 0
        ends = [end for end in ends if low <= end < closed - 1]
        return np.searchsorted(np.cumsum([len(piece) for piece in texts]), np.array(ends, np.int64), side="right")

    def _spelled(self, tokens: list[int]) -> list[str]:
        """Return what each token spells; special tokens, and ids that no tokenizer produces, break the text."""
        known = text_places(self._tokenizer, tokens)
        texts = [_BREAK] * len(tokens)
        for place, text in zip(known, token_texts(self._tokenizer, [tokens[place] for place in known]), strict=True):
            texts[place] = text
        return texts

    def _recurring(self, readings: Sequence[Reading]) -> np.ndarray:
        """Find the positions whose N-gram of the highest order has occurred often enough so far."""
        reading = readings[0 if self._place is None else self._place]
        spec, tokens = reading.subject.spec, reading.tokens.cpu().numpy()
        if spec is None or reading.codes is None:
            order = min(_ORDER_WITHOUT_MEMORY, tokens.shape[1])
            ngrams = np.stack([np.roll(tokens, distance, axis=1) for distance in range(order)], axis=-1)
            whole = np.broadcast_to(np.arange(tokens.shape[1]) + 1 >= _ORDER_WITHOUT_MEMORY, tokens.shape)
            vocab_size = reading.subject.vocab_size
        else:
            ngrams, vocab_size = ngrams_of(spec, reading.codes.cpu().numpy()), spec.num_canonical
            whole = reading.visible.cpu().numpy() >= spec.orders[-1]
        counters = (scattered(ngram_keys(ngrams[whole], vocab_size)) % np.uint64(_NUM_COUNTERS)).astype(np.int64)
        places = np.argsort(counters, kind="stable")
        ordered = counters[places]
        begins = np.searchsorted(ordered, ordered, side="left")
        counts = np.empty(len(counters), np.int64)
        counts[places] = self._counters[ordered] + np.arange(len(ordered)) - begins + 1
        np.add.at(self._counters, counters, 1)
        chosen = np.zeros(tokens.shape, bool)
        chosen[whole] = counts >= self.min_count
        return chosen
