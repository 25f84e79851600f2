"""A real Mooncake Store on loopback: one master and one storage process, killed at the end."""

import contextlib
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBRARIES = "apt-get install libibverbs1 libnuma1 libcurl4"


class Store:
    """A store under ``address``."""

    def __init__(self, folder):
        self.folder, self.processes, self.address = Path(folder), {}, None

    def open(self, *, lease="30000", storage_bytes=160 << 20, storage=True):
        port, metrics = free_ports(2)
        self.address = f"mooncake://127.0.0.1:{port}"
        self.start(
            "mooncake_master",
            "--rpc_address=127.0.0.1",
            f"--rpc_port={port}",
            f"--metrics_port={metrics}",
            f"--default_kv_lease_ttl={lease}",
        )
        until(lambda: answers(port), self.log("mooncake_master"))
        if storage:
            (service,) = free_ports(1)
            self.start(
                "mooncake_client",
                "--host=127.0.0.1",
                "--metadata_server=P2PHANDSHAKE",
                f"--master_server_address=127.0.0.1:{port}",
                f"--global_segment_size={storage_bytes}",
                f"--port={service}",
            )
            log = self.log("mooncake_client")
            until(lambda: "Starting real client service" in log.read_text(), log)

    def log(self, name):
        return self.folder / f"{name}.log"

    def start(self, name, *flags):
        with open(self.log(name), "wb") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [str(binary(name)), *flags]
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def close(self):
        for name in self.processes:
            self.kill(name)


def binary(name):
    """The program itself: what is on the PATH is a script that starts it as a child, which would outlive the script."""
    package = importlib.util.find_spec("mooncake")
    return Path(package.submodule_search_locations[0]) / name if package else None


@functools.cache
def reason_to_skip():
    """Why there can be no store here; None where there can."""
    if binary("mooncake_master") is None:
        return "Mooncake is not installed: pip install 'engram-lm[mooncake]'"
    tried = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True)
    if tried.returncode:
        return f"Mooncake cannot start ({tried.stderr.strip().splitlines()[-1]}): {LIBRARIES}"
    return None


@contextlib.contextmanager
def running(**options):
    folder = tempfile.mkdtemp(prefix="engram-store-")
    store = Store(folder)
    try:
        store.open(**options)
        yield store
    finally:
        store.close()
        shutil.rmtree(folder)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(true, log=None, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-2000:] if log else "waited in vain"
        time.sleep(0.05)
