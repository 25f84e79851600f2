"""What every test gets: no network, one thread, fixed seeds, properties that repeat."""

import os

# Read by the libraries when they are imported, so they stand before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import random
import shutil
import socket
import sys

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "engram",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("engram")


_CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class NetworkUsedError(AssertionError):
    """A test tried to reach another machine."""


def is_local(address: object) -> bool:
    """Whether a socket address stays on this machine: a Unix socket, or a loopback host."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    return host in {"localhost", "::1", "0.0.0.0", ""} or host.startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Refuse every connection that leaves this machine."""
    patch = pytest.MonkeyPatch()
    for method in ("connect", "connect_ex"):
        original = getattr(socket.socket, method)

        def local_only(self, address, original=original):
            if not is_local(address):
                raise NetworkUsedError(f"tests run without a network; this one connects to {address!r}")
            return original(self, address)

        patch.setattr(socket.socket, method, local_only)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Start every test from the same random state; torch only where the test's file loaded it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def rank_pools(tmp_path_factory):
    """Processes of one group by their number, started when a test first asks and shared by all files."""
    from tests.ranks import Processes

    made = {}

    def pool(world_size):
        if world_size not in made:
            made[world_size] = Processes(world_size, tmp_path_factory.mktemp("ranks"))
        return made[world_size]

    yield pool
    for processes in made.values():
        processes.close()


@pytest.fixture(scope="session")
def other_tokenizer():
    """A tokenizer of the same size as the small model's, trained on another text."""
    from engram_lm.training.data.tokenizer import train_tokenizer

    return train_tokenizer(["quite another text, 1234567890 " * 40], 300)


@pytest.fixture(scope="module")
def start_browser(tmp_path_factory):
    """Start Chromium with an empty profile and flags of its own; all that were started are closed at the end."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser; on Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:

        def start(*flags):
            context = playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("profile"),
                executable_path=chromium,
                args=[*_CHROMIUM_FLAGS, *flags],
                timeout=60_000,
            )
            started.append(context)
            return context

        started = []
        yield start
        for context in started:
            context.close()


@pytest.fixture(scope="module")
def browser(start_browser):
    """Chromium with an empty profile."""
    return start_browser()
