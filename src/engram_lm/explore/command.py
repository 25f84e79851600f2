"""``engram-lm explore``: a page on this machine that shows what a memory reads, and what that changes."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from engram_lm.errors import ConfigError, check_flags
from engram_lm.explore.app import build_app
from engram_lm.serving.load import ModelFlags
from engram_lm.training.interrupts import Interrupt

_LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore(ModelFlags):
    """Open a page on this machine: see a text become tokens, N-grams and rows, and what the memory makes of them.

    Facts can be written into the memory and taken back; they last as long as the tab, and change no file. Only this
    machine reaches the page, and it asks nothing of the network. A published config.json without weights shows the
    addresses alone. Needs the extra "explore".

    Examples::

        engram-lm explore runs/quickstart
        engram-lm explore MODEL --adapter memories/law --more-adapters memories/medicine
        engram-lm explore config.json --tokenizer FOLDER
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A model folder, such as a quickstart run, or a published config.json without weights."""
    more_adapters: tuple[str, ...] = ()
    """Memories to attach besides --adapter; the page looks at one at a time, and all stay switched on."""
    data: tuple[Path, ...] = ()
    """Text files or folders whose frequent N-grams are compared, of a long one the first 200,000 tokens; the Python
    standard library's sources by default."""
    tokenizer: Path | None = None
    """For a config without weights: a folder with tokenizer.json, or that file. Without it token ids are typed."""
    text: str | None = None
    """The text that the page begins with."""
    max_tokens: int = 256
    """Tokens of a text that are read, at most."""
    port: int = 7860
    """Port to listen at; 0 takes one that is free."""
    browser: bool = False
    """Open the page in a browser."""
    device: str = "cpu"
    """Where to run, as torch names it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "max_tokens")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is a number from 1 to 65535, or 0, not {self.port}")
        if self.more_adapters and self.adapter is None:
            raise ConfigError("--more-adapters come after a first one: name it with --adapter")

    def run(self) -> int:
        """Serve the page until Ctrl-C."""
        app = build_app(
            self.model,
            adapters=(*(() if self.adapter is None else (self.adapter,)), *self.more_adapters),
            data=self.data,
            tokenizer=self.tokenizer,
            tables=self,
            device=self.device,
            max_tokens=self.max_tokens,
            text=self.text,
        )
        _reach_this_machine_without_a_proxy()
        port = free_port() if self.port == 0 else self.port
        try:
            _, address, _ = app.launch(
                server_name=_LOOPBACK, server_port=port, inbrowser=self.browser, prevent_thread_lock=True
            )
        except OSError as error:
            raise ConfigError(f"port {port} cannot be listened at; choose another with --port ({error})") from error
        print(f"explore {self.model} at {address} (Ctrl-C ends it)", flush=True)
        try:
            # SIGTERM ends the page as Ctrl-C does, and both are heard where a shell started it in the background.
            with Interrupt(silent=True) as interrupt:
                while not interrupt.asked:
                    time.sleep(0.2)
            print("the page is closed; facts that were not saved are gone", file=sys.stderr)
        finally:
            app.close(verbose=False)
        return 0


def free_port() -> int:
    """Find a port of this machine that nobody listens at."""
    import socket

    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _reach_this_machine_without_a_proxy() -> None:
    """Gradio calls its own server once, and would ask a proxy for it if the environment names one."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, _LOOPBACK, "localhost"]))
