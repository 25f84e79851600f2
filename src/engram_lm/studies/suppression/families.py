"""Two families of questions about invented people, and a text that teaches both: facts recalled and facts read.

Every person has two names, each of which many people share: only the pair says who is meant. Four things are known of
everybody: a home, a trade, a color and an instrument.

*Recall*: some people have facts that the text states again and again, in several wordings. A question asks for one of
these facts and gives nothing else, so the answer is in the weights or nowhere.

*Reading*: a passage states the four facts of somebody on whom no two passages agree, then states them again in other
wordings. A question is such a passage up to the first word stated again, about a person who occurs in the text nowhere,
so the answer is in the context and nowhere else; the context holds three more values, which answer other questions.

Both families ask for the same words in the same wordings. What differs is where the answer is.

Reading here is to find what is asked for, not about whom. A passage of several people (``people_per_passage``) asks for
both, which takes attention that looks up a name and then what followed it. Models of this size did not learn that in
some hundred steps: with four people they were right about once in four.

Wordings, the shares of both families and the length of training were chosen on seed 100 (its people, facts, questions
and weights); learning rate and first weights on seed 0 of an earlier text, with other wordings. No number was chosen on
the questions that results are reported of.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engram_lm.errors import ConfigError, check_whole
from engram_lm.evaluation.tasks import TaskItem


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Alda Bero Cimra Dovan Elsin Farro Gilda Hesper Ibran Jolan Kesta Lumir Morwen Nadir Orla Petra "
    "Quill Rosam Sorin Talia Ulric Vesna Wystan Xenia Yoric Zelda Arvid Brisa Corin Delia Evard Fiora"
)
LAST_NAMES = _words(
    "Ashdown Birch Calder Dusk Ember Fenn Garrow Holt Irving Jarrow Kestrel Lark Marsh North Oakley Pell "
    "Quarry Rook Stone Thorne Umber Vale Wick Yarrow Zane Arden Brook Crane Drake Elm Frost Gale"
)


class _Attribute(NamedTuple):
    """Something that is true of a person."""

    wordings: tuple[str, ...]
    """Sentences without their last word; ``{name}`` stands for the person."""
    values: tuple[str, ...]
    """What the last word may be."""


ATTRIBUTES = {
    "home": _Attribute(
        ("Home {name}", "Town {name}", "Birthplace {name}", "Address {name}"),
        _words(
            "Karth Mirel Tolna Brevik Sundry Ostin Velmo Harrow Lindum Pesaro Quint Rovigo Tarsk Ulmar Wexley Zadar"
        ),
    ),
    "trade": _Attribute(
        ("Trade {name}", "Work {name}", "Craft {name}", "Job {name}"),
        _words(
            "baking weaving pottery tanning masonry carving milling sewing "
            "brewing dyeing fishing mining joinery cooking farming trading"
        ),
    ),
    "color": _Attribute(
        ("Color {name}", "Coat {name}", "Flag {name}", "House {name}"),
        _words("red blue green yellow brown black white purple orange pink gray golden silver crimson violet scarlet"),
    ),
    "instrument": _Attribute(
        ("Instrument {name}", "Lessons {name}", "Concert {name}", "Band {name}"),
        _words("lute flute harp drum fiddle horn organ cello trumpet bassoon guitar piano banjo viola zither gong"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyOptions:
    """How much there is to know and to read."""

    num_people: int = 64
    """People with facts that the text states again and again, from 1; each has a fact of every attribute."""
    num_documents: int = 7_500
    """Documents of the text."""
    passages: float = 0.6
    """Share of the documents that are passages, above 0 and below 1."""
    facts_per_document: int = 24
    """Facts that a document of the recall family states."""
    people_per_passage: int = 1
    """People that a passage of the reading family is about, from 1; of several, the name says which is asked about."""
    rounds: int = 6
    """Times that a passage states its facts, each time in another order and wording, from 2."""
    num_questions: int = 256
    """Questions of each family."""
    seed: int = 0
    """Decides everything."""

    def __post_init__(self) -> None:
        if not 0 < self.passages < 1:
            raise ConfigError(f"FamilyOptions.passages is a share above 0 and below 1, not {self.passages!r}")
        check_whole(at_least=0, seed=self.seed)
        check_whole(at_least=2, rounds=self.rounds)
        counts = ("num_people", "num_documents", "facts_per_document", "people_per_passage", "num_questions")
        check_whole(**{name: getattr(self, name) for name in counts})
        num_pairs = len(FIRST_NAMES) * len(LAST_NAMES)
        if self.num_people > num_pairs // 2:
            raise ConfigError(
                f"num_people is {self.num_people}; there are {num_pairs} names, and half of them are for passages: ask "
                f"for {num_pairs // 2} at most"
            )
        if self.people_per_passage > len(FIRST_NAMES) // 2:
            raise ConfigError(
                f"people_per_passage is {self.people_per_passage}; the people of a passage have different first names, "
                f"so ask for {len(FIRST_NAMES) // 2} at most"
            )

    @property
    def facts_per_passage(self) -> int:
        """Facts that the context of a question of the reading family states, one of which is asked for."""
        return self.people_per_passage * len(ATTRIBUTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Families:
    """A text and the questions about it. Made by `make_families`."""

    documents: tuple[str, ...]
    """The text, both families mixed."""
    items: tuple[TaskItem, ...]
    """Questions of the families ``recall`` (in wordings in which the text states the fact), ``recall-reworded`` (in a
    wording in which it states that fact of other people only) and ``reading``."""


def make_families(options: FamilyOptions | None = None) -> Families:
    """Invent people, facts, a text and questions; the same for the same options."""
    options = options or FamilyOptions()
    chance = random.Random(options.seed)
    names = list(itertools.product(FIRST_NAMES, LAST_NAMES))
    chance.shuffle(names)
    known, others = names[: options.num_people], names[options.num_people :]
    # A third of the rest is for questions alone: nobody in them occurs in the text.
    asked, told = others[: len(others) // 3], others[len(others) // 3 :]
    facts = [
        _Fact(" ".join(name), attribute, chance.choice(about.values), withheld=(index + offset) % len(about.wordings))
        for index, name in enumerate(known)
        for offset, (attribute, about) in enumerate(ATTRIBUTES.items())
    ]
    documents = []
    deck = _deck(facts, chance)
    for _ in range(options.num_documents):
        if chance.random() >= options.passages:
            stated = (next(deck) for _ in range(options.facts_per_document))
            documents.append(" ".join(fact.sentence(chance.choice(fact.wordings)) for fact in stated))
        else:
            documents.append(" ".join(_passage(told, options.people_per_passage, options.rounds, chance)))
    items = [*_recall_items(facts, options.num_questions, chance)]
    for index in range(options.num_questions):
        # Up to the first word that is stated again: later ones could be told from what is left.
        sentences = _passage(asked, options.people_per_passage, 2, chance)
        *context, last = itertools.islice(sentences, options.facts_per_passage + 1)
        question, _, answer = last.removesuffix(".").rpartition(" ")
        choices = next(about.values for about in ATTRIBUTES.values() if answer in about.values)
        items.append(_item("reading", index, " ".join([*context, question]), answer, choices))
    return Families(documents=tuple(documents), items=tuple(items))


class _Fact(NamedTuple):
    """Something that the text states about somebody."""

    name: str
    attribute: str
    value: str
    withheld: int
    """The wording in which the text never states it."""

    @property
    def wordings(self) -> tuple[int, ...]:
        """Those in which the text states it."""
        return tuple(index for index in range(len(ATTRIBUTES[self.attribute].wordings)) if index != self.withheld)

    def question(self, wording: int) -> str:
        return ATTRIBUTES[self.attribute].wordings[wording].format(name=self.name)

    def sentence(self, wording: int) -> str:
        return f"{self.question(wording)} {self.value}."


def _deck(facts: Sequence[_Fact], chance: random.Random) -> Iterator[_Fact]:
    """All facts, shuffled, again and again: each is stated as often as every other."""
    while True:
        yield from chance.sample(facts, len(facts))


def _passage(names: Sequence[tuple[str, str]], num_people: int, rounds: int, chance: random.Random) -> Iterator[str]:
    """Sentences that state all facts of some people, then all of them again, in another order and other wordings."""
    people: dict[str, str] = {}
    while len(people) < num_people:
        first, last = chance.choice(names)
        people.setdefault(first, last)
    values = {attribute: chance.sample(about.values, num_people) for attribute, about in ATTRIBUTES.items()}
    facts = [
        _Fact(f"{first} {last}", attribute, values[attribute][index], -1)
        for index, (first, last) in enumerate(people.items())
        for attribute in ATTRIBUTES
    ]
    stated: dict[_Fact, int] = {}
    for _ in range(rounds):
        for fact in chance.sample(facts, len(facts)):
            stated[fact] = chance.choice([wording for wording in fact.wordings if wording != stated.get(fact)])
            yield fact.sentence(stated[fact])


def _recall_items(facts: Sequence[_Fact], num_questions: int, chance: random.Random) -> Iterator[TaskItem]:
    for family in ("recall", "recall-reworded"):
        deck = _deck(facts, chance)
        for index in range(num_questions):
            fact = next(deck)
            wording = chance.choice(fact.wordings) if family == "recall" else fact.withheld
            yield _item(family, index, fact.question(wording), fact.value, ATTRIBUTES[fact.attribute].values)


def _item(family: str, index: int, prompt: str, answer: str, choices: tuple[str, ...]) -> TaskItem:
    spaced = tuple(f" {choice}" for choice in choices)
    return TaskItem(id=f"{family}-{index}", family=family, prompt=prompt, answer=f" {answer}", choices=spaced)
