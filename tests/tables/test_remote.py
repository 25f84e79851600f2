"""A table on a real server: what comes back is right, and whatever a server does wrong ends in a named error, soon."""

import contextlib
import importlib.util
import os
import pickle
import socket
import sys
import threading
import time

import fsspec
import pytest
import torch
from tests.raw_safetensors import write_raw
from tests.tables.tiers import Files, http_layout, serving

from engram_lm.errors import CheckpointError, ConfigError, EngramError, MissingExtraError, RemoteError
from engram_lm.tables import RemoteTable, open_table, table_layouts

NUM_ROWS, WIDTH = 500, 16
IMPATIENT = {"timeout_seconds": 0.3, "request_seconds": 0.6, "num_retries": 1}


@pytest.fixture
def folder(tmp_path):
    rows = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    data = rows.numpy().tobytes()
    write_raw(tmp_path / "model.safetensors", {"model.memory_tables.3.weight": ("F32", (NUM_ROWS, WIDTH), data)})
    torch.save(rows, tmp_path / "rows.pt")
    return tmp_path


def rows_of(folder):
    return torch.load(folder / "rows.pt")


def opened(server, **options):
    return RemoteTable(http_layout(server.address), **options)


def test_rows_near_each_other_come_in_one_request_over_one_connection(folder):
    connections = []

    class Counted(Files):
        def setup(self):
            connections.append(self.client_address)
            super().setup()

    with serving(folder, Counted) as server:
        table = opened(server, gap_bytes=2 * WIDTH * 4, num_connections=1)
        server.requests.clear()
        connections.clear()
        numbers = torch.tensor([103, 100, 100, 300, 102, 107])
        assert torch.equal(table.gather(numbers), rows_of(folder)[numbers])
        assert len(server.requests) == 3, server.requests
        table.gather(numbers)
        assert len(connections) == 0, "the connection of the opening is kept"
        assert table.stats()["num_requests"] == 6
        assert table.stats()["received_bytes"] == 2 * (4 + 1 + 1) * WIDTH * 4
        table.close()


def test_long_runs_are_cut_into_several_requests(folder):
    with serving(folder) as server:
        table = opened(server, longest_range_bytes=100 * WIDTH * 4)
        assert torch.equal(table.gather(torch.arange(NUM_ROWS)), rows_of(folder))
        assert table.stats()["num_requests"] == 5
        table.close()


def test_only_headers_are_read_when_a_table_is_found(folder):
    with serving(folder) as server:
        layout = http_layout(server.address, layer=3)
        assert layout.num_rows == NUM_ROWS
        spans = [span for _, span in server.requests if span]
        read = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in spans]
        assert max(last for _, last in read) < layout.parts[0].extents[0].start_bytes
        with pytest.raises(ConfigError, match=r"layer 4.*those of 3"):
            http_layout(server.address, layer=4)


def test_a_server_without_ranges_is_refused_before_it_sends_the_whole_file(folder):
    class Whole(Files):
        def do_GET(self):  # noqa: N802
            path = self.server.folder / self.path.lstrip("/")
            self.answer(200, {}, path.read_bytes()) if path.is_file() else self.answer(404, {}, b"")

    with serving(folder, Whole) as server, pytest.raises(RemoteError, match=r"ignores range requests.*206.*200"):
        http_layout(server.address)


def test_a_missing_file_is_refused_by_its_address_at_once(folder):
    with serving(folder) as server:
        with pytest.raises(RemoteError, match=r"/nothing/model\.safetensors cannot be read: .*404"):
            http_layout(f"{server.address}/nothing")
        assert len(server.requests) == 2, "the index, then the only other name; nothing is tried again"
        layout = http_layout(server.address)
        os.rename(folder / "model.safetensors", folder / "gone")
        with pytest.raises(RemoteError, match="404"):
            RemoteTable(layout)


def test_a_file_that_changes_is_noticed_before_opening_and_while_open(folder):
    with serving(folder) as server:
        layout = http_layout(server.address)
        table = RemoteTable(layout)
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-64] + bytes(64))
        with pytest.raises(RemoteError, match="changed since it was opened"):
            table.gather(torch.tensor([1]))
        table.close()
        with pytest.raises(RemoteError, match="changed since its header was read"):
            RemoteTable(layout)


def failing(times, fail):
    """A server that, once told to (``server.failing``), fails so many requests."""

    class Failing(Files):
        left = [times]

        def send_file(self, path):
            if getattr(self.server, "failing", False) and self.left[0] > 0:
                self.left[0] -= 1
                return fail(self, path)
            return super().send_file(path)

    return Failing


def status_503(handler, path):
    handler.answer(503, {}, b"later")


def hang_up(handler, path):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def promise(handler, path):
    """Announce the range that was asked for, as a good server does, without sending it."""
    handler.send_response(206)
    first, last = (int(number) for number in handler.headers["Range"].removeprefix("bytes=").split("-"))
    handler.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
    handler.send_header("ETag", handler.tag(path))
    handler.send_header("Content-Length", str(last + 1 - first))
    handler.end_headers()
    return first, last


def short(handler, path):
    first, last = promise(handler, path)
    handler.wfile.write(b"x" * (last - first))
    handler.close_connection = True


@pytest.mark.parametrize("fail", [status_503, hang_up, short])
def test_what_passes_is_tried_again_and_what_stays_ends_in_an_error(folder, fail):
    with serving(folder, failing(2, fail)) as server:
        table = opened(server, num_connections=1, num_retries=2)
        server.failing = True
        assert torch.equal(table.gather(torch.tensor([5])), rows_of(folder)[[5]])
        table.close()
    with serving(folder, failing(99, fail)) as server:
        table = opened(server, **IMPATIENT)
        server.failing = True
        with pytest.raises(RemoteError, match=r"no usable answer in 2 attempts.*check the address"):
            table.gather(torch.tensor([5]))
        server.failing = False
        assert torch.equal(table.gather(torch.tensor([5])), rows_of(folder)[[5]]), "an error harms no later read"
        table.close()


def silent(handler, path):
    time.sleep(1)


def trickling_head(handler, path):
    for byte in b"HTTP/1.1 206 Partial Content\r\nX: " + b"y" * 100:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.03)


def trickling_body(handler, path):
    first, last = promise(handler, path)
    for _ in range(first, last):
        handler.wfile.write(b"x")
        time.sleep(0.03)


@pytest.mark.parametrize("fail", [silent, trickling_head, trickling_body])
def test_a_server_that_does_not_get_on_is_given_up(folder, fail):
    with serving(folder, failing(99, fail)) as server:
        table = opened(server, **IMPATIENT)
        server.failing = True
        start = time.monotonic()
        with pytest.raises(RemoteError, match="2 attempts"):
            table.gather(torch.tensor([5]))
        assert time.monotonic() - start < 2.5
        table.close()


def forbidden(handler, path):
    handler.answer(403, {}, b"no")


def not_http(handler, path):
    handler.wfile.write(b"220 mail.example ESMTP\r\n" * 3)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (forbidden, "403"),
        (not_http, "Bad status line"),
    ],
)
def test_other_bytes_than_those_asked_for_are_refused(folder, fail, message):
    with serving(folder, failing(99, fail)) as server:
        table = opened(server, **IMPATIENT)
        server.failing = True
        with pytest.raises(RemoteError, match=message):
            table.gather(torch.tensor([5]))
        table.close()


def test_an_address_nobody_answers_and_a_server_that_dies_are_errors_soon(folder):
    with serving(folder) as server:
        table = opened(server, **IMPATIENT)
        address = server.address
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1.*Cannot connect"):
        table.gather(torch.tensor([5]))
    with pytest.raises(RemoteError, match="check the address"):
        open_table(address, **IMPATIENT)
    table.close()
    # A socket that takes connections and never speaks.
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(RemoteError, match="TimeoutError"):
        open_table(f"http://127.0.0.1:{mute.getsockname()[1]}", **IMPATIENT)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("address", ["http://", "http://[::1", "http://h:port/x", "https:///x"])
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(RemoteError, match="address"):
        open_table(address)


def test_redirections_are_followed_and_forgotten_when_they_run_out(folder):
    class Moved(Files):
        def do_GET(self):  # noqa: N802
            place = f"/{self.server.token}"
            if self.path.startswith("/resolve/"):
                return self.answer(302, {"Location": self.path.replace("/resolve", place)}, b"there")
            if not self.path.startswith(f"{place}/"):
                return self.answer(403, {}, b"expired")
            self.path = self.path.removeprefix(place)
            return super().do_GET()

    class Endless(Files):
        def do_GET(self):  # noqa: N802
            self.answer(302, {"Location": self.path}, b"")

    with serving(folder, Moved) as server:
        server.token = "first"
        table = RemoteTable(http_layout(f"{server.address}/resolve"))
        server.token = "second"
        assert torch.equal(table.gather(torch.tensor([7])), rows_of(folder)[[7]])
        table.close()
    with serving(folder, Endless) as server, pytest.raises(RemoteError, match="TooManyRedirects"):
        http_layout(server.address)


def test_malformed_files_on_a_server_are_refused_like_those_on_a_disk(folder):
    data = (folder / "model.safetensors").read_bytes()
    with serving(folder) as server:
        for bad in (data[:-1], data + b"x", b"\xff" * 50, data[:5], data[:8] + b"[" + data[9:]):
            (folder / "model.safetensors").write_bytes(bad)
            with pytest.raises(CheckpointError, match=r"model\.safetensors"):
                http_layout(server.address)
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(EngramError, match="0 bytes"):
            http_layout(server.address)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
        with pytest.raises(CheckpointError, match="not a file inside the folder"):
            http_layout(server.address)


def test_impossible_options_are_refused():
    for options, message in (
        ({"num_connections": 0}, "num_connections"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"gap_bytes": -1}, "gap_bytes"),
        ({"patience": 3}, "unknown options patience"),
    ):
        with pytest.raises(ConfigError, match=message):
            http_layout("http://127.0.0.1:9", **options)


def test_no_thread_stays_after_a_table_is_closed(folder):
    with serving(folder) as server:
        opened(server).close()  # fsspec's own thread, one for the whole process, stays
    before = threading.active_count()
    with serving(folder) as server:
        table = opened(server, num_connections=4)
        table.gather(torch.arange(0, NUM_ROWS, 5))
        table.close()
    deadline = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_credentials_and_headers_travel_as_fsspec_takes_them(folder):
    class Locked(Files):
        def do_GET(self):  # noqa: N802
            if self.headers.get("Authorization") != "Bearer mine":
                return self.answer(401, {}, b"who are you?")
            return super().do_GET()

    options = {"storage_options": {"client_kwargs": {"headers": {"Authorization": "Bearer mine"}}}}
    with serving(folder, Locked) as server:
        with pytest.raises(RemoteError, match="401"):
            open_table(server.address)
        for tier in ("auto", "host"):
            with contextlib.closing(open_table(server.address, tier=tier, **options)) as table:
                assert torch.equal(table.gather(torch.arange(NUM_ROWS)), rows_of(folder))
                other = pickle.loads(pickle.dumps(table)) if tier == "auto" else table
                assert torch.equal(other.gather(torch.tensor([3])), rows_of(folder)[[3]])
                other.close()
        with pytest.raises(ConfigError, match="storage_options is a mapping"):
            open_table(server.address, storage_options=["token"])


@pytest.fixture(params=["file", "memory"])
def address(request, folder):
    """Addresses whose file systems know neither coroutines nor http."""
    if request.param == "file":
        return f"file://{folder}"
    system = fsspec.filesystem("memory")
    system.pipe("/there/model.safetensors", (folder / "model.safetensors").read_bytes())
    return "memory://there"


def test_any_file_system_of_fsspec_serves_tables(folder, address):
    with contextlib.closing(open_table(address, gap_bytes=0, num_connections=3)) as table:
        numbers = torch.randint(NUM_ROWS, (300,), generator=torch.Generator().manual_seed(1))
        assert torch.equal(table.gather(numbers), rows_of(folder)[numbers])
        assert (table.stats()["tier"], table.stats()["tier_reason"]) == ("remote", "the source is an address")
    with contextlib.closing(open_table(f"{address}/model.safetensors", tier="host")) as table:
        assert torch.equal(table.gather(numbers), rows_of(folder)[numbers])
    with pytest.raises(RemoteError, match=r"nothing/model\.safetensors.*FileNotFoundError"):
        open_table(f"{address}/nothing")


def test_a_file_that_shrinks_on_any_file_system_is_noticed(folder, address):
    name = f"{address}/model.safetensors"
    layout = table_layouts(address)[3]
    with contextlib.closing(RemoteTable(layout)) as table:
        with fsspec.open(name, "wb") as file:
            file.write((folder / "rows.pt").read_bytes()[:500])
        with pytest.raises(RemoteError, match=r"changed since it was opened.*open it again"):
            table.gather(torch.arange(NUM_ROWS))
    with pytest.raises(RemoteError, match=r"changed since its header was read|too short"):
        RemoteTable(layout)


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("nowhere://bucket/model", RemoteError, "not an address that can be opened.*nowhere"),
        ("s3://bucket/model", MissingExtraError, r"engram-lm\[remote\].*s3fs"),
    ],
)
def test_protocols_that_are_unknown_or_not_installed_are_refused(address, kind, message):
    if kind is MissingExtraError and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(kind, match=message):
        open_table(address)


def test_without_fsspec_or_aiohttp_the_extra_is_named(monkeypatch):
    for module in ("fsspec", "aiohttp"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtraError, match=r"pip install 'engram-lm\[remote\]'"):
                open_table("https://127.0.0.1:9/model")
