"""Servers in processes of their own, as a shell starts them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from tests.serving.vllm.models import NEW_TOKENS

SECONDS = 400
"""How long a server may take to start on a busy machine."""
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
"""A chat template."""
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"


class Server:
    """A server that was started, as a shell would start it."""

    def __init__(self, words, log):
        self.log, self.key = log, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words, "--port", str(self.port)], stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            )  # fmt: skip

    def ask(self, path, **request):
        """The status of an answer, and its text."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = json.dumps(request).encode() if request else None
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def choice(self, path, **request):
        """The first choice of an answer."""
        status, text = self.ask(path, **request)
        assert status == 200, text
        return json.loads(text)["choices"][0]

    def wait(self):
        """Return when it answers."""
        until = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                if self.ask("/health")[0] == 200:
                    return self
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-4000:])

    def processes(self):
        """Processes of its session that are alive."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found

    def ended(self):
        """Wait until no process is left; those that are left after a minute."""
        until = time.monotonic() + 60
        while (self.process.poll() is None or self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return self.processes() == []


@contextlib.contextmanager
def running(*commands, logs):
    """Servers that start at once, one for each list of words after ``python -m``, when all of them answer."""
    started = []
    try:
        for place, words in enumerate(commands):
            started.append(Server(words, logs / f"{place}.log"))
        yield [server.wait() for server in started]
    finally:
        for server in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def text_of(text):
    """A text without the half of a character at its end, which a server keeps back."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def streamed(server, **request):
    """The parts of an answer to a chat, as they come."""
    status, text = server.ask("/v1/chat/completions", **request, stream=True)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and lines[-1] == "[DONE]", text
    return [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]


@torch.no_grad()
def generated(model, tokens):
    """What transformers generates, as ids."""
    given = torch.tensor([tokens])
    output = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1
    )
    return output[0, len(tokens) :].tolist()
