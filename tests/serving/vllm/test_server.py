"""A server in a process of its own answers as transformers does, and ends with all its processes when it is told to."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.serving.vllm.models import NEW_TOKENS, prompts, save_checkpoint
from tests.serving.vllm.servers import CHAT, SECONDS, generated, running, streamed, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

from engram_lm.tables import TensorFolder
from engram_lm.tables.available_memory import available_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokenizer knows chats."""
    path = tmp_path_factory.mktemp("served")
    save_checkpoint("dense", path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def servers(folder, checkpoints, tmp_path_factory):
    """Our command, and the line that documentation gives for a run folder without a flag; both start at once."""
    our_words = ["engram_lm", "serve", str(folder), "--api-key", "secret", "--table-tier", "file"]
    other_words = ["vllm.entrypoints.launchers.api_server.entry", "--model", str(checkpoints("dense")[0])]
    with running(our_words, other_words, logs=tmp_path_factory.mktemp("log")) as started:
        yield started


@pytest.fixture
def ours(servers):
    servers[0].key = "secret"
    return servers[0]


def greedy(folder, tokens):
    """What transformers generates, as ids."""
    return generated(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)


def test_a_completion_is_the_text_that_transformers_generates(ours, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = greedy(folder, tokenizer("the cat sat").input_ids)
    request = {"model": str(folder), "prompt": "the cat sat", "max_tokens": NEW_TOKENS, "temperature": 0}
    choice = ours.choice("/v1/completions", **request, return_token_ids=True)
    assert choice["token_ids"] == expected
    assert text_of(choice["text"]) == text_of(tokenizer.decode(expected, skip_special_tokens=True))


def test_prompts_of_tokens_are_answered_together(ours, folder, checkpoints):
    _, expected = checkpoints("dense")
    status, text = ours.ask(
        "/v1/completions", model=str(folder), prompt=prompts(), max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True,
        return_token_ids=True,
    )  # fmt: skip
    assert status == 200, text
    assert [choice["token_ids"] for choice in json.loads(text)["choices"]] == [one.tokens for one in expected]


def test_a_chat_and_its_stream_are_what_transformers_generates(ours, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "the dog"}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = greedy(folder, given)
    request = {"model": str(folder), "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    choice = ours.choice("/v1/chat/completions", **request, return_token_ids=True)
    assert choice["token_ids"] == expected
    content = choice["message"]["content"]
    assert text_of(content) == text_of(tokenizer.decode(expected, skip_special_tokens=True))
    parts = streamed(ours, **request)
    assert len(list(filter(None, parts))) > 3
    assert "".join(parts) == content


def test_a_request_that_cannot_be_answered_is_told_why_and_the_server_goes_on(ours, folder):
    request = {"model": str(folder), "max_tokens": 3, "temperature": 0}
    for wrong in (10**6, 2**31, -1):
        status, text = ours.ask("/v1/completions", **request, prompt=[5, wrong])
        assert status == 400, text
    ours.key = "another"
    assert ours.ask("/v1/completions", **request, prompt=[5])[0] == 401
    ours.key = "secret"
    assert ours.choice("/v1/completions", **request, prompt=[5])["text"]


def test_rows_that_cannot_be_read_are_named_to_whoever_needs_them_and_the_server_goes_on(ours, folder):
    request = {"model": str(folder), "prompt": [9, 8, 7], "max_tokens": 3, "temperature": 0}
    table = TensorFolder(folder).find("model.memory_tables.2.weight")
    content = Path(table.file).read_bytes()
    os.truncate(table.file, table.start_bytes)
    try:
        for stream in (False, True):
            status, text = ours.ask("/v1/completions", **request, stream=stream)
            assert "CheckpointError: <path> was cut" in text  # vLLM tells no paths
            assert (status, "choices" in text) == (200 if stream else 500, False)
    finally:
        with open(table.file, "r+b") as file:
            file.write(content)
    assert ours.choice("/v1/completions", **request)["finish_reason"] == "length"
    assert f"{table.file} was cut" in ours.log.read_text()


def test_a_folder_is_served_without_a_flag(servers, checkpoints):
    folder = str(checkpoints("dense")[0])
    choice = servers[1].choice("/v1/completions", model=folder, prompt="the cat sat", max_tokens=5, temperature=0)
    assert choice["text"]
    status, text = servers[1].ask("/v1/chat/completions", model=folder, messages=[{"role": "user", "content": "a"}])
    assert status == 400 and "chat template" in text


def test_servers_end_with_all_their_processes(servers):
    ours, other = servers
    words = ours.log.read_text().splitlines()[0]
    assert words.startswith("VLLM_API_KEY=... ") and "secret" not in words and "--dtype float32" in words
    assert len(ours.processes()) > 1 and len(other.processes()) > 1
    os.killpg(ours.process.pid, signal.SIGINT)  # as Ctrl-C does in a terminal
    other.process.terminate()  # as a supervisor does
    assert ours.ended() and other.ended()


def test_transformers_own_server_names_what_it_does_not_serve(checkpoints):
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(checkpoints("dense")[0])]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode != 0 and "model type `engram_lm`" in done.stderr, done.stderr[-2000:]


def test_the_cache_takes_a_part_of_the_free_memory_of_a_machine_without_a_gpu(checkpoints, monkeypatch):
    folder = str(checkpoints("dense")[0])
    settled = EngineArgs(model=folder).create_engine_config().cache_config.kv_cache_memory_bytes
    assert settled == 1 << 30  # as VLLM_CPU_KVCACHE_SPACE says
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    settled = EngineArgs(model=folder).create_engine_config().cache_config.kv_cache_memory_bytes
    assert 0.15 * available_bytes() < settled < 0.35 * available_bytes() or settled == 16 << 30
    given = EngineArgs(model=folder, gpu_memory_utilization=0.5).create_engine_config().cache_config
    assert given.kv_cache_memory_bytes is None
    given = EngineArgs(model=folder, kv_cache_memory_bytes=1 << 20).create_engine_config().cache_config
    assert given.kv_cache_memory_bytes == 1 << 20
