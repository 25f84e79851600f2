"""The tables that the shared suite opens: name → how a layout is opened on that tier. Add a tier here to test it."""

import atexit
import contextlib
import email.utils
import functools
import os
import socket
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.raw_safetensors import e4m3, e8m0, random_e4m3, write_raw
from tests.tables.mooncake_store import reason_to_skip, running

from engram_lm.tables import (
    FileTable,
    HostTable,
    MappedTable,
    RemoteTable,
    ResidentTable,
    open_table,
    publish_to_mooncake,
    table_layouts,
)
from engram_lm.tables.around.cache import CachedTable
from engram_lm.tables.around.read_ahead import ReadAheadTable
from engram_lm.tables.files.convert import build_packed
from engram_lm.tables.files.packed import packed_layout
from engram_lm.tables.files.safetensors_file import read_header
from engram_lm.tables.files.sources import choose_layout
from engram_lm.tables.layout import tensor_layout


class Files(BaseHTTPRequestHandler):
    """A static file server with ranges, as small as that goes. ``server.folder`` is what it serves."""

    protocol_version = "HTTP/1.1"
    # Without this an answer of head and body waits for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        path = self.server.folder / urllib.parse.unquote(self.path).lstrip("/")
        if not path.is_file():
            return self.answer(404, {}, b"none")
        return self.send_file(path)

    def do_HEAD(self):
        path = self.server.folder / urllib.parse.unquote(self.path).lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        if path.is_file():
            self.send_header("ETag", self.tag(path))
            self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def send_file(self, path):
        size, tag = path.stat().st_size, self.tag(path)
        span = self.headers.get("Range")
        if span is None or self.headers.get("If-Range", tag) != tag:
            return self.answer(200, {"ETag": tag}, path.read_bytes())
        first, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
        if first >= size:
            return self.answer(416, {"Content-Range": f"bytes */{size}"}, b"")
        last = min(last, size - 1)
        with open(path, "rb") as file:
            file.seek(first)
            body = file.read(last + 1 - first)
        return self.answer(206, {"ETag": tag, "Content-Range": f"bytes {first}-{last}/{size}"}, body)

    def tag(self, path):
        return f'"{path.stat().st_mtime_ns:x}-{path.stat().st_size:x}"'

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Date": email.utils.formatdate(), **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request, address):
        """Clients of these tests hang up in the middle."""


@contextlib.contextmanager
def serving(folder, handler=Files, port=0):
    """Serve a folder on loopback; yields the server, with ``address``, ``folder`` and the list ``requests``."""
    server = Server(("127.0.0.1", port), handler)
    server.folder, server.requests, server.connections = Path(folder), [], []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        for connection in server.connections:
            # Gone altogether, as when its process ends: kept connections would be served on.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()


def http_layout(address, layer=None, **options):
    """The layout of a table on a server."""
    return choose_layout(table_layouts(address, **options), layer, address)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def written(folder, kind, num_rows=101, width=70):
    """Write a table of one kind (F32, F16, BF16, FP8 with blocks or one scale); returns its layout and its rows.

    The rows are computed by definition, not by the library. Tables of 16 bits and more lie in three shards of
    different sizes, in two files and at odd addresses.
    """
    generator = torch.Generator().manual_seed(3)
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        rows = torch.randn(num_rows, width, generator=generator).to(dtype)
        cut = (num_rows // 2, 1, num_rows - num_rows // 2 - 1)
        parts = [(kind, (len(part), width), raw(part)) for part in rows.split(cut)]
        files = {"a": {"pad": ("F8_E4M3", (3,), b"abc"), "0": parts[0], "2": parts[2]}, "b": {"1": parts[1]}}
        for name, tensors in files.items():
            write_raw(folder / f"{name}.safetensors", tensors, align=1)
        a, b = read_header(folder / "a.safetensors"), read_header(folder / "b.safetensors")
        return tensor_layout([a["0"], b["1"], a["2"]]), rows
    values = random_e4m3(num_rows * width, 5)
    numbers = torch.from_numpy(e4m3(values).reshape(num_rows, width))
    if kind == "FP8 with one scale":
        write_raw(folder / "c.safetensors", {"w": ("F8_E4M3", (num_rows, width), values)}, align=1)
        layout = tensor_layout([read_header(folder / "c.safetensors")["w"]], scales=0.0137)
        return layout, (numbers.float() * 0.0137).bfloat16()
    if kind in _SCALED:
        dtype, numpy_dtype, scale_shape, block, tall = _SCALED[kind]
        if dtype == "I8":
            numbers = torch.from_numpy(np.frombuffer(values, np.int8).reshape(num_rows, width).copy())
        shape = scale_shape(num_rows, width)
        scales = np.random.default_rng(4).uniform(0.01, 0.1, shape).astype(numpy_dtype)
        stored = {
            "w": (dtype, (num_rows, width), values),
            "s": ("F32" if numpy_dtype == "f4" else "F16", shape, scales.tobytes()),
        }
        write_raw(folder / "c.safetensors", stored, align=1)
        header = read_header(folder / "c.safetensors")
        wide = torch.from_numpy(scales.astype("f4")).view(-(-num_rows // tall), -1)
        wide = wide.repeat_interleave(block, dim=1)[:, :width].repeat_interleave(tall, dim=0)[:num_rows]
        layout = tensor_layout([header["w"]], scales=[header["s"]])
        return layout, (numbers.float() * wide).to(torch.float32 if dtype == "I8" else torch.bfloat16)
    blocks = -(-width // 32)
    scales = np.random.default_rng(4).integers(110, 140, num_rows * blocks, dtype=np.uint8).tobytes()
    write_raw(folder / "c.safetensors", {"w": ("F8_E4M3", (num_rows, width), values)}, align=1)
    write_raw(folder / "d.safetensors", {"s": ("F8_E8M0", (num_rows, blocks), scales)}, align=1)
    wide = torch.from_numpy(e8m0(scales).reshape(num_rows, blocks).repeat(32, axis=1)[:, :width])
    weight, scale = read_header(folder / "c.safetensors")["w"], read_header(folder / "d.safetensors")["s"]
    return tensor_layout([weight], scales=[scale]), (numbers * wide).bfloat16()


# Type of the numbers and of the scales, their shape, and how many columns and rows share a scale.
_SCALED = {
    "FP8 with a scale for each row": ("F8_E4M3", "f2", lambda rows, width: (rows, 1), 10**6, 1),
    "INT8 with block scales": ("I8", "f4", lambda rows, width: (rows, -(-width // 64)), 64, 1),
    "FP8 with square blocks": ("F8_E4M3", "f4", lambda rows, width: (-(-rows // 16), -(-width // 16)), 16, 16),
}
KINDS = ("F32", "F16", "BF16", "FP8 with block scales", "FP8 with one scale", *_SCALED)


@contextlib.contextmanager
def _opened(table):
    try:
        yield table
    finally:
        table.close()


def _direct(layout, dtype):
    return _opened(FileTable(layout, dtype, direct=True, num_threads=4))


def _one_by_one(layout, dtype):
    return _opened(FileTable(layout, dtype, read_ahead=False, num_threads=3))


@contextlib.contextmanager
def _remote(layout, dtype):
    """The layout's files through a server; the layout itself is carried over, its files are addresses now."""
    import dataclasses

    folder = Path(layout.files[0]).parent
    with serving(folder) as server:
        parts = tuple(
            dataclasses.replace(part, extents=tuple(
                dataclasses.replace(extent, file=f"{server.address}/{os.path.basename(extent.file)}")
                for extent in part.extents
            ))
            for part in layout.parts
        )  # fmt: skip
        there = dataclasses.replace(layout, parts=parts, tensors=())
        with _opened(RemoteTable(there, dtype, gap_bytes=50, longest_range_bytes=2000, num_connections=3)) as table:
            yield table


@functools.cache
def _store():
    """One store for all tests, killed when they end."""
    store = contextlib.ExitStack()
    atexit.register(store.close)
    return store.enter_context(running())


@contextlib.contextmanager
def _mooncake(layout, dtype):
    if reason := reason_to_skip():
        pytest.skip(reason)
    address = _store().address
    name = publish_to_mooncake(layout, address, block_rows=30)
    with _opened(open_table(f"{address}/{name}", dtype=dtype)) as table:
        yield table


def _packed(layout):
    path = Path(layout.files[0]).parent / "packed.safetensors"
    build_packed(path, layout)
    return packed_layout(path)


class AskedAhead(ReadAheadTable):
    """Every request is asked for ahead, as a model does."""

    def gather(self, rows, out=None):
        if not self._closed:
            self.prefetch(rows)
        return super().gather(rows, out)


# Each is called with a layout of local files and a dtype or None, and gives a context manager around a table.
TIERS = {
    "device": lambda layout, dtype: _opened(open_table(layout, tier="device", dtype=dtype, device="cpu")),
    "host": lambda layout, dtype: _opened(HostTable(layout, dtype)),
    "mmap": lambda layout, dtype: _opened(MappedTable(layout, dtype)),
    "file": lambda layout, dtype: _opened(FileTable(layout, dtype)),
    "file, row by row": _one_by_one,
    "file, direct": _direct,
    "remote": _remote,
    "mooncake": _mooncake,
    "mmap, packed": lambda layout, dtype: _opened(MappedTable(_packed(layout), dtype)),
    "file, packed": lambda layout, dtype: _opened(FileTable(_packed(layout), dtype)),
    "file, packed, direct": lambda layout, dtype: _direct(_packed(layout), dtype),
    "mmap, clock cache": lambda layout, dtype: _opened(CachedTable(MappedTable(layout, dtype), 90_000)),
    "file, small lru cache": lambda layout, dtype: _opened(
        CachedTable(FileTable(layout, dtype), 60_000, policy="lru", pinned_rows=[1, 30])
    ),
    "file, read ahead": lambda layout, dtype: _opened(AskedAhead(FileTable(layout, dtype))),
    "mmap, cache, read ahead": lambda layout, dtype: _opened(
        AskedAhead(CachedTable(MappedTable(layout, dtype), 60_000), max_bytes=40_000)
    ),
}

# Those that read a file anew for every gather, so that a file cut in the meantime must be noticed.
READS_FILES = ("file", "file, row by row", "file, direct", "remote", "file, read ahead")

__all__ = ["KINDS", "READS_FILES", "TIERS", "Files", "ResidentTable", "http_layout", "serving", "written"]
