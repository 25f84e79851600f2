"""Two servers of one model with memory, by their adapter and as a joined folder: both right, over one mapped table."""

import json
import os
import re

import pytest
from tests.serving.vllm.adapted import save_adapter, save_base
from tests.serving.vllm.models import NEW_TOKENS, expect, prompts
from tests.serving.vllm.servers import CHAT, generated, running, streamed, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import engram_lm
from engram_lm.serving.join import join
from engram_lm.tables import table_layouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose tokenizer knows chats, an adapter of several megabytes, and both joined, in one folder."""
    path = tmp_path_factory.mktemp("adapted")
    save_base("llama", path / "base")
    tokenizer = AutoTokenizer.from_pretrained(path / "base")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path / "base")
    save_adapter("llama", path / "base", path / "adapter", layers=(0, 1), rows_per_head=40_000)
    join(str(path / "base"), (str(path / "adapter"),), path / "joined")
    return path


@pytest.fixture(scope="module")
def servers(folder, tmp_path_factory):
    """A server of the base with its adapter, and one of the joined folder."""
    common = ["--table-tier", "mmap", "--served-model-name", "model"]
    by_adapter = ["engram_lm", "serve", str(folder / "base"), "--adapter", str(folder / "adapter"), *common]
    joined = ["engram_lm", "serve", str(folder / "joined"), *common]
    with running(by_adapter, joined, logs=tmp_path_factory.mktemp("log")) as started:
        yield started


@pytest.fixture(scope="module")
def model(folder):
    """The model in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    engram_lm.MemoryAdapter.from_pretrained(model, folder / "adapter")
    return model


def test_completions_chats_and_streams_are_what_transformers_generates(servers, folder, model):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    messages = [{"role": "user", "content": "the dog"}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    to_text, to_chat = generated(model, tokenizer("the cat sat").input_ids), generated(model, given)
    usual = {"model": "model", "max_tokens": NEW_TOKENS, "temperature": 0}
    for server in servers:
        choice = server.choice("/v1/completions", **usual, prompt="the cat sat", return_token_ids=True)
        assert choice["token_ids"] == to_text
        assert text_of(choice["text"]) == text_of(tokenizer.decode(to_text, skip_special_tokens=True))
        choice = server.choice("/v1/chat/completions", **usual, messages=messages, return_token_ids=True)
        assert choice["token_ids"] == to_chat
        parts = streamed(server, **usual, messages=messages)
        assert len(list(filter(None, parts))) > 3
        assert "".join(parts) == choice["message"]["content"]


def mapped(process, file):
    """Bytes of a file in the memory of a process: all, its share where others hold the same, and copies of its own."""
    found = [0, 0, 0]
    with open(f"/proc/{process}/smaps") as smaps:
        for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read()):
            if part.split("\n", 1)[0].endswith(str(file)):
                for place, name in enumerate(("Rss", "Pss", "Anonymous")):
                    found[place] += int(re.search(rf"^{name}: +(\d+) kB", part, re.MULTILINE)[1]) << 10
    return found


def test_replicas_share_the_pages_of_a_mapped_table(servers, folder, model):
    right = [each.tokens for each in expect(model, prompts())]
    for server in servers:
        status, text = server.ask(
            "/v1/completions", model="model", prompt=prompts(), max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True,
            return_token_ids=True,
        )  # fmt: skip
        assert status == 200, text
        assert [choice["token_ids"] for choice in json.loads(text)["choices"]] == right
    file = os.path.realpath(next(iter(table_layouts(folder / "adapter").values())).parts[0].extents[0].file)
    held = [[mapped(process, file) for process in server.processes()] for server in servers]
    # One process of each server reads the table; no page of it is a copy.
    readers = [[each for each in processes if each[0]] for processes in held]
    assert [len(each) for each in readers] == [1, 1], held
    (one,), (other,) = readers
    assert one[2] == other[2] == 0
    # The kernel divides what several processes hold among them: together they hold what the larger one holds alone.
    assert min(one[0], other[0]) > 64 << 10
    assert one[1] + other[1] == pytest.approx(max(one[0], other[0]), rel=0.1)
