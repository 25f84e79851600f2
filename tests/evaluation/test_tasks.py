"""Task files are read with care."""

import json

import pytest

from engram_lm.errors import DataError
from engram_lm.evaluation.tasks import TaskItem, read_tasks, write_tasks


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_questions_come_back_from_their_file(tmp_path):
    items = (
        TaskItem(id="a", family="cat", prompt="the cat sat on", answer=" the mat", choices=(" the mat", " a rat")),
        TaskItem(id="b", family="free", prompt="zo\u00eb\nran", answer=" \u2028 home"),
    )
    write_tasks(tmp_path / "tasks.jsonl", items)
    assert read_tasks(tmp_path / "tasks.jsonl") == items
    short = write_lines(tmp_path / "short.jsonl", "", {"prompt": "p", "answer": 1, "choices": [" a", " b"]})
    (item,) = read_tasks([short])
    assert item == TaskItem(id="short-2", family="short", prompt="p", answer=" b", choices=(" a", " b"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ([1], "line 2: a question is a JSON object"),
        ({"prompt": "p"}, "line 2: the question has no answer"),
        ({"prompt": "p", "answer": "a", "chioces": []}, "line 2: a question has no field 'chioces'"),
        ({"prompt": "p", "answer": 2, "choices": ["a", "b"]}, "line 2: the answer is choice 2, there are 2"),
        ({"prompt": "p", "answer": -1, "choices": ["a", "b"]}, "line 2: the answer is choice -1"),
        ({"prompt": "p", "answer": True, "choices": ["a", "b"]}, "line 2: answer of a task is a text"),
        ({"prompt": "p", "answer": "c", "choices": ["a", "b"]}, "line 2: the answer 'c' of task"),
        ({"prompt": "p", "answer": "a", "choices": ["a", "a"]}, "line 2: .* all different"),
        ({"prompt": "p", "answer": "a", "choices": ["a", ["b"]]}, "line 2: choices of task"),
        ({"prompt": "p", "answer": "a", "choices": "ab"}, "line 2: choices are a list"),
        ({"prompt": "p", "answer": ""}, "line 2: answer of a task is a text that is not empty"),
        ({"prompt": 3, "answer": "a"}, "line 2: prompt of a task"),
        ({"prompt": "p", "answer": "a", "id": "one"}, "line 2: there is a question 'one' before"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "t.jsonl", {"id": "one", "prompt": "p", "answer": "a"}, line)
    with pytest.raises(DataError, match=message):
        read_tasks(path)


def test_a_task_file_may_be_saved_by_any_editor(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "answer": "b\\u2028c"}\r\n\r\n' + '{"prompt": "d", "answer": "e\u2028"}'.encode()
    )
    assert [item.answer for item in read_tasks(path)] == ["b\u2028c", "e\u2028"]
    path.write_bytes(b'{"prompt": "\xe9", "answer": "b"}')
    with pytest.raises(DataError, match=r"a.jsonl: it is not UTF-8"):
        read_tasks(path)


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no questions"):
        read_tasks(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="cannot read the task file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no task file"):
        read_tasks([])
