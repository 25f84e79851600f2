"""``engram-lm plan --placement``: tiers that fit, times that follow from the rates, traps that are named."""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch
from tests.small_model import BACKBONE, MEMORY
from tests.tables.tiers import written

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.planning.command import plan, read_config
from engram_lm.planning.placement import GATHER_SECONDS, place
from engram_lm.planning.this_machine import DiskRate, ThisMachine, measure_disk, read_machine
from engram_lm.tables import open as opening
from engram_lm.tables import open_table
from engram_lm.tables.available_memory import read_meminfo

GIB = 1 << 30
DISK = DiskRate(10_000.0, 100_000.0, "told")
MACHINE = ThisMachine(
    ram_total_bytes=64 * GIB,
    ram_available_bytes=60 * GIB,
    ram_allowed_bytes=60 * GIB,
    bytes_per_second=20e9,
    flops_per_second=1e12,
    row_seconds=1e-7,
    disk=DISK,
)


@pytest.fixture(scope="module")
def paper():
    """The paper's 27B: 72,404,232 rows of 80 numbers, 32 rows a token from blocks 1 and 14 of 30."""
    config = read_config("engram-27b")
    return config, plan(config, context=1024)


def placed(paper, machine=MACHINE, **changes):
    config, found = paper
    return place(found, config, dataclasses.replace(machine, **changes))


def kinds(placement):
    return {warning["kind"] for warning in placement["warnings"]}


def test_tables_go_to_the_first_tier_that_has_room_beside_the_model(paper):
    table, backbone = placed(paper)["table_bytes"], placed(paper)["backbone_and_state_bytes"]
    assert table == 72_404_232 * 160
    assert placed(paper)["recommended"]["tier"] == "host" and not kinds(placed(paper))
    # The last byte: the tables may take 90 % of what the model leaves.
    enough = -(-table * 10 // 9) + backbone
    assert placed(paper, ram_allowed_bytes=enough)["recommended"]["tier"] == "host"
    short = placed(paper, ram_allowed_bytes=enough - 10)["recommended"]
    assert short["tier"] == "mmap" and 0 < short["cache_bytes"] <= table // 2
    network = dataclasses.replace(DISK, is_on_network=True)
    assert placed(paper, ram_allowed_bytes=enough - 10, disk=network)["recommended"]["tier"] == "file"
    assert placed(paper, device_bytes=enough)["recommended"] == {
        "tier": "device", "cache_bytes": 0, "prefetch": False,
        "reason": "the tables' 11.58 GB fit into the 11.58 GB left on the device",
    }  # fmt: skip
    # The model is on the device, so the host has room for the tables alone.
    host = placed(paper, device_bytes=enough - 10, ram_allowed_bytes=-(-table * 10 // 9))
    assert host["recommended"]["tier"] == "host" and host["tiers"]["device"]["fits"] is False


@pytest.mark.parametrize("extra", [-20, 20])
@pytest.mark.parametrize("on_network", [False, True])
def test_the_plan_and_an_opened_table_never_choose_differently(paper, tmp_path, monkeypatch, extra, on_network):
    backbone, table_bytes = placed(paper)["backbone_and_state_bytes"], placed(paper)["table_bytes"]
    left = round(table_bytes / 0.9) + extra
    disk = dataclasses.replace(DISK, is_on_network=on_network)
    recommended = placed(paper, ram_allowed_bytes=backbone + left, disk=disk)["recommended"]
    # The same table, scaled down, where the model has been loaded and this much memory is left.
    layout, _ = written(tmp_path, "F32", num_rows=1000, width=100)
    monkeypatch.setattr(opening, "available_bytes", lambda: round(layout.stored_bytes / 0.9) + extra)
    monkeypatch.setattr(opening, "is_on_network", lambda path: on_network)
    with contextlib.closing(open_table(layout)) as table:
        assert (
            table.stats()["tier"] == recommended["tier"] == ("host" if extra > 0 else "file" if on_network else "mmap")
        )
        assert recommended["reason"].split(" GB")[-1] == table.tier_reason.split(" GB")[-1]


def test_time_per_token_follows_from_the_rates(paper):
    config, found = paper
    backbone = placed(paper)["backbone_and_state_bytes"]
    machine = dataclasses.replace(MACHINE, ram_allowed_bytes=round(backbone + 72_404_232 * 80 / 0.9))
    placement = placed(paper, machine)
    parameters = found["parameters"]
    dense = parameters["total"] - parameters["memory"] - parameters["routed_experts"]
    visited = parameters["routed_experts"] * config.num_experts_per_tok / config.n_routed_experts
    weights = 2 * (dense + visited) + found["decode"]["bytes_of_batch"]
    compute = weights / 20e9
    assert placement["compute_seconds_per_step"] == pytest.approx(compute)
    # Half of the table has room; the other half is read from disk, some rows over the end of a page.
    row = 1e-7 + 0.5 * (1 + 159 / 4096) / 100_000
    mapped = placement["tiers"]["mmap"]
    assert mapped["seconds_per_row"] == pytest.approx(row, rel=1e-6)
    assert mapped["read_seconds_per_step"] == pytest.approx(32 * row + 2 * GATHER_SECONDS, rel=1e-6)
    assert mapped["seconds_per_token"] == pytest.approx(compute + 32 * row + 2 * GATHER_SECONDS, rel=1e-6)
    # Block 1 starts after a thirtieth of the compute; by then its 16 rows are there, as are the others by block 14.
    assert 16 * row + GATHER_SECONDS < compute / 30
    assert mapped["waited_seconds_per_step_with_prefetch"] == 0
    assert placement["tiers"]["host"]["seconds_per_row"] == 1e-7
    assert placement["tiers"]["device"]["seconds_per_row"] is None
    # Ten thousand times slower, block 1 waits for its own rows; block 14's, read behind them, come later still.
    slow = placed(paper, machine, disk=DiskRate(1.0, 10.0, "told"))["tiers"]["mmap"]
    row = 1e-7 + 0.5 * (1 + 159 / 4096) / 10
    first = 16 * row + GATHER_SECONDS - compute / 30
    second = 32 * row + 2 * GATHER_SECONDS - (14 / 30 * compute + first)
    assert first > 0 and second > 0
    assert slow["waited_seconds_per_step_with_prefetch"] == pytest.approx(first + second, rel=1e-6)
    assert slow["seconds_per_token_with_prefetch"] == pytest.approx(compute + first + second, rel=1e-6)


def test_a_batch_shares_weights_visits_more_experts_and_is_bound_by_arithmetic_in_the_end(paper):
    config, _ = paper
    found = plan(config, context=1024, batch_size=8)
    parameters, share = found["parameters"], config.num_experts_per_tok / config.n_routed_experts
    dense = parameters["total"] - parameters["memory"] - parameters["routed_experts"]
    touched = parameters["routed_experts"] * (1 - (1 - share) ** 8)
    weights = 2 * (dense + touched) + found["decode"]["bytes_of_batch"]
    batch = placed((config, found))
    assert batch["compute_seconds_per_step"] == pytest.approx(weights / 20e9)
    assert batch["rows_per_step"] == 8 * 32
    host = batch["tiers"]["host"]
    assert host["seconds_per_token"] == pytest.approx(
        (batch["compute_seconds_per_step"] + 8 * 32 * 1e-7 + 2 * GATHER_SECONDS) / 8
    )
    slow = placed((config, found), flops_per_second=1e9)["compute_seconds_per_step"]
    assert slow == pytest.approx(8 * found["flops_per_token"]["inference"] / 1e9)


def test_rows_for_a_device_travel_over_its_link(paper):
    tiers = placed(paper, device_bytes=200 * GIB)["tiers"]
    assert tiers["host"]["seconds_per_row"] == pytest.approx(1e-7 + 160 / 12e9)
    assert tiers["host"]["read_seconds_per_step"] == pytest.approx(
        32 * (1e-7 + 160 / 12e9) + 2 * (GATHER_SECONDS + 20e-6)
    )
    assert tiers["device"]["seconds_per_row"] == pytest.approx(2 * 160 / 20e9)
    integrated = placed(paper, device_bytes=60 * GIB, device_is_integrated=True)["tiers"]
    assert integrated["host"]["seconds_per_row"] == 1e-7


def test_traps_are_named(paper):
    assert kinds(placed(paper, ram_allowed_bytes=GIB)) == {
        "container_limit", "table_larger_than_free_ram", "model_does_not_fit"}  # fmt: skip
    small = {"ram_total_bytes": 8 * GIB, "ram_available_bytes": 7 * GIB, "ram_allowed_bytes": 7 * GIB}
    assert kinds(placed(paper, **small, device_bytes=80 * GIB)) == {"table_larger_than_ram"}
    assert kinds(placed(paper, swap_bytes=GIB)) == {"swap"}
    assert "unified_memory" in kinds(placed(paper, device_bytes=60 * GIB, device_is_integrated=True))
    unknown = placed(paper, ram_allowed_bytes=50 * GIB, disk=None)
    assert kinds(unknown) >= {"disk_unknown"} and "seconds_per_token" not in unknown["tiers"]["mmap"]


def test_unified_memory_is_counted_once(paper):
    backbone, table = placed(paper)["backbone_and_state_bytes"], placed(paper)["table_bytes"]
    both = round(backbone + table / 2 / 0.9)
    placement = placed(paper, device_bytes=both, ram_allowed_bytes=both, device_is_integrated=True)
    assert not placement["tiers"]["host"]["fits"] and not placement["tiers"]["device"]["fits"]
    # Whichever of the two is said to be smaller holds both.
    for sizes in ((both, 200 * GIB), (200 * GIB, both)):
        sizes = dict(zip(("device_bytes", "ram_allowed_bytes"), sizes))
        assert not placed(paper, **sizes, device_is_integrated=True)["tiers"]["host"]["fits"]


def test_the_kernel_s_memory_file_is_read(tmp_path):
    (tmp_path / "meminfo").write_text(
        "MemTotal:       24684084 kB\nHugePages_Total:       3\nSwapTotal: 8 kB\nbad line\n"
    )
    found = read_meminfo(tmp_path / "meminfo")
    assert found == {"MemTotal": 24684084 * 1024, "HugePages_Total": 3, "SwapTotal": 8192}
    assert read_meminfo(tmp_path / "nothing") == {}
    machine = read_machine()
    assert 0 < machine.ram_allowed_bytes <= machine.ram_available_bytes <= machine.ram_total_bytes
    assert 1e8 < machine.bytes_per_second < 1e13 and 1e-9 < machine.row_seconds < 1e-4
    assert read_machine(ram_gib=2, device_gib=3).ram_allowed_bytes == 2 * GIB
    assert read_machine(device_gib=3).device_bytes == 3 * GIB


def test_a_disk_is_measured_by_reading_its_largest_file(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 5000)
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="no file of 16 MiB or more"):
        measure_disk(tmp_path)
    (tmp_path / "table").write_bytes(os.urandom(20 << 20))
    os.sync()
    started = time.perf_counter()
    rate = measure_disk(tmp_path, seconds=0.3)
    assert time.perf_counter() - started < 1.5
    assert 10 < rate.serial_reads_per_second <= rate.parallel_reads_per_second < 1e8
    assert str(tmp_path / "table") in rate.method and "holes" not in rate.method


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no memory file system")
def test_a_file_in_memory_is_not_taken_for_a_disk():
    path = Path("/dev/shm") / f"engram-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(17 << 20))
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            with pytest.raises(ConfigError, match="--disk-iops"):
                measure_disk(path)
        else:
            assert "O_DIRECT" in measure_disk(path, seconds=0.1).method  # this kernel allows it; it says so
    finally:
        path.unlink()


def test_the_plan_of_a_model_holds_its_placement(capsys, tmp_path):
    sizes = {**BACKBONE, "vocab_size": 300, "memory": EngramConfig(**MEMORY).to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    arguments = ["plan", str(tmp_path), "--placement", "--ram-gib", "1", "--device-gib", "0", "--disk-iops", "50000"]
    assert main([*arguments, "--table-dtype", "float8_e4m3", "--batch-size", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    placement = found["placement"]
    assert placement["recommended"]["tier"] == "host"
    assert placement["table_bytes"] == found["table"]["bytes"]["float8_e4m3"]
    assert placement["rows_per_step"] == 3 * found["reads_per_token"]["rows"]
    assert placement["machine"]["disk"]["parallel_reads_per_second"] == 50_000
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("placement of the tables", "host", "mmap", "50,000 in parallel"):
        assert words in printed


def test_flags_that_say_nothing_are_refused(capsys, tmp_path):
    assert main(["plan", "engram-nano", "--ram-gib", "3"]) == 2
    assert main(["plan", "engram-nano", "--placement", "--ram-gib", "-1"]) == 2
    assert main(["plan", "engram-nano", "--placement", "--disk", str(tmp_path), "--disk-iops", "9"]) == 2
    assert main(["plan", "dense-nano", "--placement"]) == 1
    assert "no tables to place" in capsys.readouterr().err
    assert main(["plan", "engram-nano", "--placement", "--disk", str(tmp_path)]) == 1
    assert "no file of 16 MiB" in capsys.readouterr().err


def test_nothing_of_the_model_is_allocated():
    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Counter.largest = max(Counter.largest, result.numel())
            return result

    with Counter():
        read_machine()
    assert 0 < Counter.largest <= 1 << 20
