"""Rows from a real Mooncake Store on loopback equal those in the files, or there is an error in time; never a hang."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tests.raw_safetensors import random_e4m3, write_raw
from tests.tables.mooncake_store import reason_to_skip, running, until

from engram_lm.errors import ConfigError, MismatchError, MissingExtraError, RemoteError, TableClosedError
from engram_lm.tables import MappedTable, RowCodec, tensor_layout
from engram_lm.tables.files.safetensors_file import read_header
from engram_lm.tables.tiers.mooncake import MooncakeTable
from engram_lm.tables.tiers.mooncake_client import MooncakeClient
from engram_lm.tables.tiers.mooncake_store import Manifest, publish_to_mooncake

ROWS, BLOCK_ROWS = 3001, 500
SPAWN = multiprocessing.get_context("spawn")
WHOLE = torch.arange(ROWS)


@pytest.fixture(scope="session")
def possible():
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def store(possible):
    with running() as opened:
        yield opened


@pytest.fixture
def own_store(possible):
    with running() as opened:
        yield opened


def float8(folder, seed=1):
    scales = np.random.default_rng(seed).integers(100, 150, ROWS * 3, dtype=np.uint8).tobytes()
    write_raw(
        folder / f"eight{seed}",
        {"w": ("F8_E4M3", (ROWS, 70), random_e4m3(ROWS * 70, seed)), "s": ("F8_E8M0", (ROWS, 3), scales)},
    )
    header = read_header(folder / f"eight{seed}")
    return tensor_layout([header["w"]], scales=[header["s"]])


def bfloat16(folder):
    numbers = torch.randn(ROWS, 33, generator=torch.Generator().manual_seed(2)).bfloat16()
    data = numbers.view(torch.uint8).numpy().tobytes()
    write_raw(folder / "half", {"w": ("BF16", (ROWS, 33), data)})
    return tensor_layout([read_header(folder / "half")["w"]])


def bits(rows):
    return rows.contiguous().view(torch.uint8)


def read_elsewhere(address, names, answers):
    rows = torch.randint(ROWS, (3, 400), generator=torch.Generator().manual_seed(3))
    rows[0, :3] = torch.tensor([0, ROWS - 1, ROWS - 1])
    for name in names:
        table = MooncakeTable(address, name)
        answers.put((rows.tolist(), bits(table.gather(rows)).numpy().tobytes()))
    answers.put(table._held._process.pid)
    time.sleep(600)


def publish_and_stop(layout, address, answers):
    def stop(done_bytes, num_bytes):
        answers.put((done_bytes, num_bytes))
        time.sleep(600)

    publish_to_mooncake(layout, address, name="killed", block_rows=16_000, progress=stop)


@contextlib.contextmanager
def within(seconds):
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def test_another_process_reads_the_rows_to_the_bit_and_its_client_ends_when_it_is_killed(store, tmp_path):
    layouts, answers = [float8(tmp_path), bfloat16(tmp_path)], SPAWN.Queue()
    names = [publish_to_mooncake(layout, store.address, block_rows=BLOCK_ROWS) for layout in layouts]
    assert names == [layout.identity for layout in layouts]
    process = SPAWN.Process(target=read_elsewhere, args=(store.address, names, answers))
    process.start()
    for layout in layouts:
        rows, found = answers.get(timeout=60)
        expected = bits(MappedTable(layout).gather(torch.tensor(rows)))
        assert found == expected.numpy().tobytes()
    client = answers.get(timeout=60)
    process.kill()
    process.join()
    until(lambda: not os.path.exists(f"/proc/{client}"))


@pytest.mark.parametrize("verify", [False, True])
def test_any_rows_in_any_order_come_in_few_requests(store, tmp_path, verify):
    layout = float8(tmp_path)
    name = publish_to_mooncake(layout, store.address, block_rows=BLOCK_ROWS)
    table, twin = MooncakeTable(store.address, name, verify=verify), MappedTable(layout)
    assert (table.num_rows, table.width, table.dtype) == (ROWS, 70, torch.bfloat16)
    for rows in (
        torch.tensor(7),
        torch.empty(0, 2, dtype=torch.long),
        WHOLE.flip(0),
        torch.tensor([[3, 3], [499, 500]]),
    ):
        assert torch.equal(bits(table.gather(rows)), bits(twin.gather(rows)))
    before = table.stats()["requests"]
    table.gather(torch.tensor([0, 0, ROWS - 1, 5]))
    stats = table.stats()
    assert stats["requests"] == before + 1, "all blocks are asked for at once"
    assert stats["tier"] == "remote"
    again = pickle.loads(pickle.dumps(table))
    pid = table._held._process.pid
    table.close()
    table.close()
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(TableClosedError):
        table.gather(WHOLE)
    assert torch.equal(bits(again.gather(WHOLE)), bits(twin.gather(WHOLE)))
    again.close()


def test_a_request_larger_than_the_buffer_is_divided(store, tmp_path):
    write_raw(tmp_path / "long", {"w": ("F32", (40_000, 16), np.arange(640_000, dtype="<f4").tobytes())})
    layout = tensor_layout([read_header(tmp_path / "long")["w"]])
    name = publish_to_mooncake(layout, store.address)
    table = MooncakeTable(store.address, name, buffer_bytes=1 << 20)
    rows = torch.randperm(40_000, generator=torch.Generator().manual_seed(4))
    assert torch.equal(table.gather(rows)[:, 0], rows * 16.0)
    assert table.stats()["requests"] >= 3
    table.close()


def test_a_master_that_dies_while_rows_are_read_is_an_error_in_time_and_the_process_lives(own_store, tmp_path):
    name = publish_to_mooncake(float8(tmp_path), own_store.address, block_rows=20)
    table = MooncakeTable(own_store.address, name, timeout_seconds=4)
    good = threading.Event()

    def kill():
        good.wait(20)
        own_store.kill("mooncake_master")

    killer = threading.Thread(target=kill)
    killer.start()
    rows = torch.randint(ROWS, (300,), generator=torch.Generator().manual_seed(5))
    begins = []

    def read_on():
        while len(begins) < 5000:
            begins.append(time.monotonic())
            table.gather(rows)
            good.set()

    with pytest.raises(RemoteError, match=r"master|Mooncake"):
        read_on()
    assert time.monotonic() - begins[-1] < 6
    killer.join()
    with within(6), pytest.raises(RemoteError):
        table.gather(rows)
    with within(6):
        table.close()


def test_a_storage_process_that_dies_is_an_error_in_time(own_store, tmp_path):
    name = publish_to_mooncake(float8(tmp_path), own_store.address)
    table = MooncakeTable(own_store.address, name, timeout_seconds=4)
    table.gather(WHOLE)
    own_store.kill("mooncake_client")
    with within(6), pytest.raises(RemoteError):
        table.gather(WHOLE)
    table.close()


def test_a_client_that_is_killed_or_frozen_is_an_error_and_the_next_read_connects_anew(store, tmp_path):
    layout = float8(tmp_path)
    table = MooncakeTable(store.address, publish_to_mooncake(layout, store.address), timeout_seconds=2)
    os.kill(table._held._process.pid, signal.SIGKILL)
    with pytest.raises(RemoteError, match=r"ended"):
        table.gather(WHOLE)
    expected = bits(MappedTable(layout).gather(WHOLE))
    assert torch.equal(bits(table.gather(WHOLE)), expected)
    os.kill(table._held._process.pid, signal.SIGSTOP)
    with within(4), pytest.raises(RemoteError, match="did not answer within 2 seconds"):
        table.gather(WHOLE)
    assert torch.equal(bits(table.gather(WHOLE)), expected)
    table.close()


def test_without_mooncake_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(MissingExtraError, match=r"engram-lm\[mooncake\].*apt-get install"):
        MooncakeTable("127.0.0.1:1", "name")


def test_addresses_and_names_that_lead_nowhere_are_refused_at_once(store):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with within(2), pytest.raises(RemoteError, match=rf"nobody answers at {address}.*mooncake_master"):
            MooncakeTable(address, "name")
        silent.listen()
        with within(4), pytest.raises(RemoteError, match=r"did not answer within 2 seconds"):
            MooncakeTable(address, "name", timeout_seconds=2)
    with pytest.raises(RemoteError, match=r"no table of the name 'nowhere'.*publish_to_mooncake"):
        MooncakeTable(store.address, "nowhere")
    for address in ("localhost", "http://127.0.0.1:80", "a:b", "a:99999"):
        with pytest.raises(ConfigError, match="mooncake://host:50051"):
            MooncakeTable(address, "name")
    with pytest.raises(ConfigError, match="letters"):
        MooncakeTable(store.address, "../name")


def test_a_publisher_that_was_killed_is_resumed_and_keeps_what_is_right(store, tmp_path, monkeypatch):
    numbers = np.arange(150_000 * 64, dtype="<f4")
    write_raw(tmp_path / "long", {"w": ("F32", (150_000, 64), numbers.tobytes())})
    layout, answers = tensor_layout([read_header(tmp_path / "long")["w"]]), SPAWN.Queue()
    with pytest.raises(ConfigError, match="blocks of 100000 rows"):
        publish_to_mooncake(layout, store.address, block_rows=100_000)
    process = SPAWN.Process(target=publish_and_stop, args=(layout, store.address, answers))
    process.start()
    done_bytes, num_bytes = answers.get(timeout=60)
    assert 0 < done_bytes < num_bytes
    process.kill()
    process.join()
    with pytest.raises(RemoteError, match="or not the whole of it"):
        MooncakeTable(store.address, "killed")
    client = MooncakeClient(store.address)
    client.buffer[:9] = 7
    assert client.call("remove", keys=["engram/killed/1"]) == [0]
    assert client.call("put", keys=["engram/killed/1"], starts=[0], sizes=[9]) == [0]
    put, call = [], MooncakeClient.call

    def recording(self, what, **arguments):
        put.extend(arguments["keys"] if what == "put" else [])
        return call(self, what, **arguments)

    monkeypatch.setattr(MooncakeClient, "call", recording)
    assert publish_to_mooncake(layout, store.address, name="killed", block_rows=16_000) == "killed"
    assert put == [f"engram/killed/{what}" for what in (1, *range(4, 10), "checksums", "manifest")]
    table = MooncakeTable(store.address, "killed", verify=True)
    rows = torch.arange(0, 150_000, 321)
    assert torch.equal(table.gather(rows)[:, 5], rows * 64.0 + 5)
    table.close()
    put.clear()
    publish_to_mooncake(layout, store.address, name="killed", block_rows=16_000)
    assert put == []
    with pytest.raises(MismatchError, match="another table of the name 'killed'"):
        publish_to_mooncake(float8(tmp_path), store.address, name="killed")
    client.close()


def test_blocks_that_are_missing_short_or_changed_are_named(store, tmp_path):
    publish_to_mooncake(float8(tmp_path), store.address, name="broken", block_rows=BLOCK_ROWS)
    table, checked = (MooncakeTable(store.address, "broken", verify=verify) for verify in (False, True))
    checked.gather(WHOLE)
    client = MooncakeClient(store.address)
    key, rows = "engram/broken/2", torch.tensor([2 * BLOCK_ROWS])
    assert client.call("get", keys=[key], starts=[0], sizes=[BLOCK_ROWS * 73]) == [BLOCK_ROWS * 73]
    client.buffer[100] ^= 1

    def replace(size):
        assert client.call("remove", keys=[key]) == [0]
        if size:
            assert client.call("put", keys=[key], starts=[0], sizes=[size]) == [0]

    replace(BLOCK_ROWS * 73)
    with pytest.raises(RemoteError, match=rf"{key} is not what was published: its checksum differs"):
        checked.gather(rows)
    assert table.gather(rows).shape == (1, 70)
    replace(10)
    for one in (table, checked):
        with pytest.raises(RemoteError, match=key):
            one.gather(rows)
    replace(0)
    with pytest.raises(RemoteError, match=rf"{key} .*does not hold it"):
        table.gather(rows)
    for one in (table, checked, client):
        one.close()


def test_a_manifest_is_not_believed():
    codec = RowCodec(70, torch.float8_e4m3fn, "blocks")
    good = Manifest("id", codec, ROWS, BLOCK_ROWS, "digest")
    assert Manifest.from_bytes(good.to_bytes(), "here") == good
    text = good.to_bytes().decode()
    for old, new in (
        ('"num_rows": 3001', '"num_rows": -1'),
        ('"num_rows": 3001', '"num_rows": true'),
        ("float8_e4m3fn", "nn"),
        ("float8_e4m3fn", "float32"),
        ("engram-mooncake-1", "engram-mooncake-2"),
        ('"block_rows": 500', '"block_rows": 1000000'),
        (text, "[" * 100_000),
        (text, "[]"),
    ):
        assert old in text
        with pytest.raises(RemoteError, match=r"here (is not a manifest|has blocks of)"):
            Manifest.from_bytes(text.replace(old, new).encode(), "here")


def test_a_store_without_room_says_what_to_start(possible, tmp_path):
    complaint = pytest.raises(RemoteError, match=r"mooncake_client .*--global_segment_size")
    with running(storage=False) as empty, within(20), complaint:
        publish_to_mooncake(float8(tmp_path), empty.address, timeout_seconds=15)


def test_a_read_that_outlives_the_lease_is_divided(possible, tmp_path):
    rows, width = 60_000, 64
    numbers = np.arange(rows * width, dtype="<f4")
    write_raw(tmp_path / "long", {"w": ("F32", (rows, width), numbers.tobytes())})
    layout = tensor_layout([read_header(tmp_path / "long")["w"]])
    with running(lease="10") as hasty:
        name = publish_to_mooncake(layout, hasty.address)
        table = MooncakeTable(hasty.address, name)
        wanted = torch.randperm(rows, generator=torch.Generator().manual_seed(6))
        assert torch.equal(table.gather(wanted)[:, 0], wanted * float(width))
        assert table.stats()["requests"] > 1
        table.close()


def _read_in_a_fork(table, answers):
    try:
        table.gather(torch.arange(3))
    except RemoteError as error:
        answers.send(str(error))
    table.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_to_open_the_table_itself_and_leaves_its_parent_s_client_alone(store, tmp_path):
    name = publish_to_mooncake(float8(tmp_path), store.address, block_rows=BLOCK_ROWS)
    with contextlib.closing(MooncakeTable(store.address, name)) as table:
        expected = table.gather(torch.arange(5))
        context = multiprocessing.get_context("fork")
        answers, child_answers = context.Pipe()
        child = context.Process(target=_read_in_a_fork, args=(table, child_answers))
        child.start()
        assert answers.poll(60) and "open the table in this process" in answers.recv()
        child.join(30)
        assert torch.equal(table.gather(torch.arange(5)), expected)
