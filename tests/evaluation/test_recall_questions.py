"""Questions made of a text: recall gives the beginning of a sentence, reading also another word for its end."""

import pytest

from engram_lm.errors import DataError
from engram_lm.evaluation.recall_questions import FAMILIES, NUM_CHOICES, recall_questions

NAMES = ["Karth", "Mirel", "Tolna", "Brevik", "Sundry", "Ostin", "Velmo", "Harrow", "Lindum", "Pesaro"]
TEXTS = [f"The place of number {n} is called {name}. It is one of the many towns." for n, name in enumerate(NAMES)]
AMBIGUOUS = "Nobody can tell who lives in Quint\nNobody can tell who lives in Rovigo\n"


def test_the_answer_of_recall_is_in_the_text_and_that_of_reading_in_the_question():
    items = recall_questions([*TEXTS, AMBIGUOUS])
    recall, reading = ([item for item in items if item.family == family] for family in FAMILIES)
    assert len(recall) == len(reading) > 5
    for known, read in zip(recall, reading, strict=True):
        assert any(known.prompt + known.answer in text for text in TEXTS)
        assert known.choices == read.choices and len(known.choices) == NUM_CHOICES
        assert read.prompt.startswith(f"{known.prompt}{read.answer}.\n") and read.prompt.endswith(known.prompt)
        assert read.answer != known.answer and known.answer not in read.prompt
        # Nothing but the statement holds one of the choices.
        rest = read.prompt.removeprefix(f"{known.prompt}{read.answer}.")
        assert not any(choice in rest for choice in read.choices if choice != read.answer)
    assert not any("Nobody can tell" in item.prompt for item in recall)


def test_a_seed_decides_and_answers_are_rare_words():
    assert recall_questions(TEXTS, seed=3) == recall_questions(TEXTS, seed=3) != recall_questions(TEXTS, seed=4)
    assert len(recall_questions(TEXTS, num_questions=4)) == 8
    common = recall_questions([*TEXTS, "towns " * 20])
    assert {item.answer for item in common if item.family == "recall"} == {f" {name}" for name in NAMES}
    with pytest.raises(DataError, match="the text has 0 rare words"):
        recall_questions(["too short a text", ""])
