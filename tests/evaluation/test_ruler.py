"""RULER's samples hold their answers, fill their length, are the same everywhere, and are checked as published."""

import collections
import hashlib
import json
import re

import pytest
from tests.adapt.small_models import TEXT
from tests.beginnings import with_template

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluation.ruler.essay import Essay, default_essay
from engram_lm.evaluation.ruler.lists import common_words, frequent_words
from engram_lm.evaluation.ruler.needles import NEEDLES, variable_tracking
from engram_lm.evaluation.ruler.sample import Draft, fit, sample_chance
from engram_lm.evaluation.ruler.scoring import string_match_all, string_match_part
from engram_lm.evaluation.ruler.tasks import NAMES, RulerData, answer_tokens, make_samples, score
from engram_lm.evaluation.ruler.words import ADJECTIVES, NOUNS
from engram_lm.training.data.tokenizer import train_tokenizer

WITHOUT_DATA = NAMES[:-2]
WORDS = train_tokenizer(
    [" ".join((*NOUNS, *ADJECTIVES)), TEXT, "One of the special magic numbers for is: 1234567890."], 2048
)


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """Small files in the forms of SQuAD and HotpotQA, and an essay."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = [
        {
            "context": f"The river {name} flows through {place}. " * 3,
            "qas": [
                {"question": f"Where does {name} flow?", "is_impossible": False,
                 "answers": [{"text": place, "answer_start": 1}, {"text": f"through {place}", "answer_start": 1}]},
                {"question": "Who knows?", "is_impossible": True, "answers": []},
            ],
        }
        for name, place in zip(NOUNS[:60], NOUNS[60:120], strict=True)
    ]  # fmt: skip
    articles = [{"title": str(place), "paragraphs": paragraphs[place : place + 20]} for place in range(0, 60, 20)]
    (folder / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot = [
        {
            "question": f"What is {noun} made of?",
            "answer": ADJECTIVES[place],
            "context": [[f"{noun} {part}", [f"{noun} part {part} is", f" {ADJECTIVES[place]}."]] for part in range(10)],
        }
        for place, noun in enumerate(NOUNS[:30])
    ]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    (folder / "essays.txt").write_text("A brought sentence has exactly these seven words. " * 40)
    return RulerData(folder=folder)


def samples(task, data=None, **options):
    options = {"length": 4096, "num_samples": 4, **options}
    return list(make_samples(task, WORDS, data=data, **options))


def read_needles(sample):
    """Answer by looking every key up; also what is said about other keys."""
    told = collections.defaultdict(list)
    for key, value in re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", sample.text):
        told[key].append(value)
    question = re.search(r"for ([\w, -]+) mentioned in the provided text\?$", sample.text)[1]
    return [value for key in re.split(r", and |, ", question) for value in told[key]], told


@pytest.mark.parametrize("task", [name for name in NAMES if name.startswith("niah")])
@pytest.mark.parametrize("length", [1024, 4096])
def test_needles_can_be_read_from_the_text(task, length):
    kinds = {
        "niah_single_1": (1, 1), "niah_single_2": (1, 1), "niah_single_3": (1, 1), "niah_multikey_1": (4, 1),
        "niah_multivalue": (1, 4), "niah_multiquery": (4, 4),
    }  # fmt: skip
    for sample in samples(task, length=length):
        found, told = read_needles(sample)
        assert sorted(found) == sorted(sample.answers)
        assert len(found) == len(set(found))
        if task in kinds:
            num_keys, num_answers = kinds[task]
            assert (len(told), len(found)) == (num_keys, num_answers)
        else:
            assert len(told) > 5  # the haystack is made of needles
        assert ("uuids" in sample.text) == (task in ("niah_single_3", "niah_multikey_3"))


def test_a_chain_of_variables_can_be_followed():
    for sample in samples("vt"):
        value = re.search(r"assigned the value (\d+) in the text above\.$", sample.text)[1]
        values = {}
        for name, other, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", sample.text):
            values[name] = number or values[other]
        assert [name for name, known in values.items() if known == value] == list(sample.answers)
        assert len(sample.answers) == 5
        example = sample.text.split("\n\n")[2]
        assert f"{value}" not in example  # it asks about another chain


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (6000, 30, 3), (9000, 30, 3)])
def test_the_most_common_words_are_the_answer(length, often, seldom):
    for sample in samples("cwe", length=length, num_samples=2):
        example, asked = sample.text.split("Below is a numbered list of words.")[1:]
        counts = collections.Counter(re.findall(r"\d+\. (\w+)", asked))
        assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
        assert {counts[word] for word in sample.answers} == {often}
        assert {count for word, count in counts.items() if word not in sample.answers} == {seldom}
        assert not set(counts) & set(re.findall(r"\d+\. (\w+)", example))
        # An answer is not found by chance within another word of the list.
        assert all(sum(answer in word for word in counts) == 1 for answer in sample.answers)


@pytest.mark.parametrize("length", [1024, 4096])
def test_the_three_most_frequent_coded_words_are_the_answer(length):
    for sample in samples("fwe", length=length):
        coded = sample.text.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        (first, _), *others = collections.Counter(coded).most_common(5)
        assert first == "..."
        assert [word for word, _ in others[:3]] == list(sample.answers)
        assert others[2][1] > others[3][1]  # there is no draw


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_a_question_stands_among_the_documents_that_answer_it(task, brought):
    shown = set()
    for sample in samples(task, brought, length=1500):
        documents = re.findall(r"^Document \d+:\n(.+?)(?=\n\n)", sample.text, flags=re.DOTALL | re.MULTILINE)
        assert len(documents) == len(set(documents)) >= 11 if task == "qa_2" else len(documents) > 2
        question = sample.text.rpartition("Question: ")[2]
        about = re.search(r"(?:does|is) (\w+)", question)[1]
        assert any(about in document and sample.answers[0] in document for document in documents)
        shown.add(question)
    assert len(shown) == 4
    assert "Who knows?" not in str(shown)


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("tokenizer", ["words", "with a beginning"])
def test_a_sample_fills_its_length_and_never_exceeds_it(task, tokenizer, brought):
    chosen = WORDS if tokenizer == "words" else with_template(WORDS, "<s> $A")
    length = 2048
    for sample in make_samples(task, chosen, length=length, num_samples=3, data=brought):
        tokens = len(chosen(sample.prompt).input_ids) + answer_tokens(task)
        assert tokens == sample.num_tokens <= length
        if task == "qa_1" or task == "qa_2":  # all documents of the small set fit
            continue
        assert tokens > length - 130  # the longest line of a haystack
        if "single_2" in task:
            assert tokens > length - 8  # prose can be cut anywhere


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2", "vt", "cwe", "fwe"])
def test_a_sample_depends_on_neither_limit_nor_length_for_its_answer(task):
    few, many = samples(task, num_samples=2), samples(task, num_samples=3)
    assert few == many[:2]
    assert samples(task, num_samples=3, seed=1) != many
    if task != "cwe":  # short and long lists are of other words
        assert [one.answers for one in samples(task, num_samples=3, length=2048)] == [one.answers for one in many]
    assert len({one.answers for one in many}) == 3


def test_samples_are_the_same_on_every_machine():
    written = {
        "niah_multikey_3": NEEDLES["niah_multikey_3"].draft(sample_chance("niah_multikey_3", 0, 0), default_essay()),
        **{
            task: write(sample_chance(task, 0, 0), 4096)
            for task, write in {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}.items()
        },
    }
    texts = {task: f"{draft.write(200)} {draft.prefix} {draft.answers}" for task, draft in written.items()}
    assert {task: hashlib.sha256(text.encode()).hexdigest()[:12] for task, text in texts.items()} == {
        "niah_multikey_3": "d9cb3f9db3f9",
        "vt": "c4991a7b44e8",
        "cwe": "81f58da3e4de",
        "fwe": "3a1fd4392ec6",
    }


def test_a_brought_essay_is_the_haystack(brought):
    (sample,) = samples("niah_single_2", brought, num_samples=1, length=1024)
    assert "A brought sentence has exactly these seven words." in sample.text
    assert "__debug__" not in sample.text
    assert brought.essay().digest != default_essay().digest


def test_the_default_essay_is_prose_of_many_thousand_words():
    sentences = default_essay().sentences(20_000)
    assert len(sentences) > 500
    assert len(" ".join(sentences).split()) == 20_000
    with pytest.raises(DataError, match="has 3 words"):
        Essay("only three words")


@pytest.mark.parametrize("units_per_token", [0.2, 1.0, 3.0])
def test_the_haystack_is_the_largest_that_fits(units_per_token):
    def write(size):
        return "a" * int(size * units_per_token)

    class Letters:
        backend_tokenizer = None

        def get_vocab(self):
            return {"a": 0}

        def __call__(self, text, **_):
            return {"input_ids": [0] * len(text)}

    draft = Draft(write=write, prefix="", answers=("a",))
    for length in (40, 77, 1000):
        sample = fit(draft, Letters(), task="niah", index=0, length=length, answer_tokens=10)
        assert length - max(1, units_per_token) < sample.num_tokens <= length
    few = fit(
        Draft(write=write, prefix="", answers=("a",), most=5),
        Letters(),
        task="niah",
        index=0,
        length=99,
        answer_tokens=1,
    )
    assert few.text == write(5)


def test_answers_are_checked_as_published():
    cases = [
        ("The numbers are 12, 34 and 56.", ["12", "34", "99", "56"], 0.75, 1.0),
        ("  KARTH\x0band\tmirel ", ["Karth", "Mirel"], 1.0, 1.0),
        ("nothing", ["12", "34", "56"], 0.0, 0.0),
        ("in Paris", ["Paris", "the city of Paris", "PARIS, France"], 1 / 3, 1.0),
    ]
    for answer, references, share, part in cases:
        assert string_match_all(answer, references) == pytest.approx(share)
        assert string_match_part(answer, references) == part
    # A question with three references, one of them found: 1, where an average would give a third.
    assert score("qa_1", "in Paris", ["Paris", "x", "y"]) == 1.0
    assert score("niah_multivalue", "in Paris", ["Paris", "x", "y"]) == pytest.approx(1 / 3)


def test_what_cannot_be_made_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"no task 'niah_sinle_1'.*niah_single_1"):
        samples("niah_sinle_1")
    with pytest.raises(ConfigError, match=r"at least .* tokens with the 128 of its answer, and 128 were asked for"):
        samples("niah_single_1", length=128)
    with pytest.raises(DataError, match=r"ruler_qa_1 needs the published file dev-v2\.0\.json"):
        samples("qa_1")
    (tmp_path / "dev-v2.0.json").write_text('{"data": [{"paragraphs": 3}]}')
    with pytest.raises(DataError, match="is not a file of SQuAD"):
        samples("qa_1", RulerData(folder=tmp_path))
    (tmp_path / "dev-v2.0.json").write_text('{"data": []}')
    with pytest.raises(DataError, match="has no question with an answer"):
        samples("qa_1", RulerData(folder=tmp_path))
