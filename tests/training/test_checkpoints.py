"""Checkpoints: whole or not there, after kills and full disks; the same tensors on any number of ranks."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
import zlib

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from tests.small_model import BACKBONE, MEMORY, TEXT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.checkpoints import Checkpoints, latest_checkpoint, read_facts, storage, training_state
from engram_lm.training.checkpoints.saved_state import STATE_NAME, SavedState
from engram_lm.training.checkpoints.training_state import export_model, model_facts, training_tensors
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import LossModule, Ranks, wrap_backbone
from engram_lm.training.export import Export
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer
from engram_lm.training.shard_tables import shard_tables

FACTS = {"spec_digest": "abc", "seed": 3, "shape": (1, 2)}
MiB = 2**20


def fresh_processes():
    """Processes that begin where this file has been imported, which takes most of their time otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_checkpoints"])
    return context


@pytest.fixture(scope="module")
def ranks(rank_pools):
    """Runs a function of this file on that many ranks, at once; on one, here."""

    def run(world_size, function, *arguments):
        if world_size == 1:
            return [function(*arguments)]
        return rank_pools(world_size).run(function, *arguments, numbered=False)

    return run


def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def divided(whole, dim=0):
    """A tensor divided over the ranks as a table is; itself on one."""
    if not dist.is_initialized():
        return whole.clone()
    rank, world_size = rank_and_size()
    block = -(-whole.shape[dim] // world_size)
    first = min(rank * block, whole.shape[dim])
    local = whole.narrow(dim, first, min(block, whole.shape[dim] - first)).clone()
    mesh = init_device_mesh("cpu", (world_size,))
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_kinds(step=1):
    """Tensors of every kind that training has: uneven, empty on some ranks, scalars, all sorts of types."""
    rank, _ = rank_and_size()
    generator = torch.Generator().manual_seed(step)
    table = torch.randn(7, 3, generator=generator)
    tensors = {
        "model/table": divided(table),
        "optimizer/table/mean": divided(-table),
        "optimizer/table/scalar": divided(table[:, 0].contiguous()),
        "model/one_row": divided(table[:1]),
        "model/two_rows": divided(table[:2].bfloat16()),
        "model/columns": divided(table[:, :2].contiguous(), dim=1),
        "model/nothing": torch.empty(0, 3),
        "model/weight": torch.randn(5, 4, generator=generator).t(),
        "model/half": torch.randn(3, generator=generator).half(),
        "optimizer/weight/step": torch.tensor(float(step)),
        "model/counts": torch.arange(4) + step + 2**40,
        "model/flags": torch.tensor([True, False, True]),
        f"rng/rank{rank}/cpu": torch.full((8,), 17 * rank + step, dtype=torch.uint8),
    }
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        tensors["model/half"] = DTensor.from_local(tensors["model/half"], mesh, [Replicate()], run_check=False)
    return tensors


def zeroed(tensors):
    for tensor in tensors.values():
        local(tensor).zero_()
    return tensors


def in_small_pieces(function):
    """Read and write a row or two at a time, as large tensors are."""

    @functools.wraps(function)
    def wrapped(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "PIECE_BYTES", 24)
            return function(*arguments)

    return wrapped


@in_small_pieces
def save_all_kinds(folder, asynchronous, steps=(1,)):
    checkpoints = Checkpoints(folder)
    for step in steps:
        tensors = all_kinds(step)
        checkpoints.save(step, tensors, {**FACTS, "world_size": rank_and_size()[1]}, asynchronous=asynchronous)
        zeroed(tensors)  # training goes on
    checkpoints.wait()


@in_small_pieces
def load_all_kinds(path, step):
    """Load into zeros; the names that are not what was saved."""
    tensors, expected = zeroed(all_kinds(step)), all_kinds(step)
    facts = Checkpoints(path.parent).load(path, tensors, expected={"spec_digest": "abc"})
    return facts, [name for name in tensors if not torch.equal(local(tensors[name]), local(expected[name]))]


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (2, 3), (3, 2), (1, 3), (2, 2)])
def test_saved_on_any_number_of_ranks_it_loads_on_any_other_bit_for_bit(ranks, tmp_path, saved_on, loaded_on):
    ranks(saved_on, save_all_kinds, tmp_path, False)
    found = ranks(loaded_on, load_all_kinds, latest_checkpoint(tmp_path), 1)
    for rank, (facts, different) in enumerate(found):
        # A rank that there was not before keeps the random state it has.
        assert different == ([f"rng/rank{rank}/cpu"] if rank >= saved_on else [])
        assert facts == {**FACTS, "shape": [1, 2], "world_size": saved_on}


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_written_in_the_background_is_what_was_there_when_save_returned(ranks, tmp_path, world_size):
    ranks(world_size, save_all_kinds, tmp_path / "later", True, (1, 2, 3))
    ranks(world_size, save_all_kinds, tmp_path / "at_once", False, (1, 2, 3))
    for step in (2, 3):
        one, other = (tmp_path / name / f"step-{step:08d}" for name in ("later", "at_once"))
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in other.iterdir()
        }
    assert len(list(one.iterdir())) == world_size + 1


def test_what_all_ranks_hold_is_written_once(ranks, tmp_path):
    ranks(2, save_all_kinds, tmp_path, False)
    keys = []
    for file in latest_checkpoint(tmp_path).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys += opened.keys()
    assert len(keys) == len(set(keys))
    assert {"model/weight", "model/table@0,0", "model/table@4,0", "rng/rank0/cpu", "rng/rank1/cpu"} <= set(keys)


def test_staging_memory_is_used_again(tmp_path):
    checkpoints, tensors = Checkpoints(tmp_path), {"a": torch.ones(9), "b": torch.ones(2, 2)}
    checkpoints.save(1, tensors, {}, asynchronous=True)
    checkpoints.wait()
    places = {key: copy.data_ptr() for key, copy in checkpoints._staging.items()}
    checkpoints.save(2, {"a": torch.zeros(9), "b": torch.ones(2, 2)}, {}, asynchronous=True)
    checkpoints.wait()
    assert {key: copy.data_ptr() for key, copy in checkpoints._staging.items()} == places
    assert len(places) == 2


@contextlib.contextmanager
def full_disk(num_bytes):
    """Let no file of this process grow larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_on_a_full_disk(folder, full_on, asynchronous):
    """Save one that fits and one that does not; the error's words, and what is still there."""
    rank, _ = rank_and_size()
    checkpoints, large = Checkpoints(folder), {"large": divided(torch.arange(MiB))}
    checkpoints.save(1, large, FACTS)
    with full_disk(MiB) if rank == full_on else contextlib.nullcontext():
        if asynchronous:  # comes up later, on all ranks, whoever failed first
            checkpoints.save(2, large, FACTS, asynchronous=True)
            checkpoints._thread.join()
        try:
            checkpoints.wait() if asynchronous else checkpoints.save(2, large, FACTS)
            words = "no error"
        except CheckpointError as error:
            words = str(error)
    zeroed(large)
    checkpoints.load(checkpoints.latest(), large)
    assert torch.equal(local(large["large"]), local(divided(torch.arange(MiB))))
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    checkpoints.save(3, large, FACTS)  # nothing is left over that hinders the next
    return words, left


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at_once", "later"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_on_one_rank_fails_all_and_leaves_the_earlier_checkpoint_whole(
    ranks, tmp_path, world_size, asynchronous
):
    found = ranks(world_size, save_on_a_full_disk, tmp_path, world_size - 1, asynchronous)
    for words, left in found:
        assert words == found[0][0]
        assert f"step 2 was not saved, earlier checkpoints in {tmp_path} are as they were" in words
        assert f"rank {world_size - 1}: [Errno 27] File too large" in words
        assert left == ["step-00000001"]
    assert latest_checkpoint(tmp_path).name == "step-00000003"


def test_a_failure_in_the_background_comes_up_at_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with full_disk(MiB):
        checkpoints.save(1, {"large": torch.zeros(MiB)}, {}, asynchronous=True)
        checkpoints._thread.join()
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        checkpoints.save(2, {"small": torch.zeros(1)}, {})
    checkpoints.save(2, {"small": torch.zeros(1)}, {})
    assert checkpoints.latest().name == "step-00000002"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, append = threading.Event(), storage.TensorWriter.append
    monkeypatch.setattr(storage.TensorWriter, "append", lambda *given: (may_write.wait(20), append(*given))[1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": torch.ones(3)}, {}, asynchronous=True)
    assert checkpoints.latest() is None
    may_write.set()
    checkpoints.wait()
    assert checkpoints.latest().name == "step-00000001"


def save_until_killed(folder, done):
    """Save without end, every number being the step; tell each step that is on the disk."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder)
    latest = checkpoints.latest()
    step = 0 if latest is None else SavedState.read(latest).step
    while True:
        step += 1
        tensors = {name: torch.full((64, 1024), float(step)) for name in "abc"}
        checkpoints.save(step, tensors, {"step": step}, asynchronous=step % 3 == 0)
        done.send(step if step % 3 else step - 1)


def test_a_kill_at_any_moment_leaves_the_last_finished_checkpoint_whole(tmp_path):
    context = fresh_processes()
    draw, last, partials = random.Random(0), 0, 0
    for _ in range(12):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_until_killed, args=(tmp_path, sender))
        process.start()
        sender.close()
        last = max(last, receiver.recv())
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                last = max(last, receiver.recv())
        partials += any(tmp_path.glob("*.partial"))
        tensors = {name: torch.zeros(64, 1024) for name in "abc"}
        facts = Checkpoints(tmp_path).load(latest_checkpoint(tmp_path), tensors)
        assert facts["step"] >= last
        for tensor in tensors.values():
            assert torch.equal(tensor, torch.full_like(tensor, float(facts["step"])))
    assert partials > 0  # or the kills came when nothing was being written
    Checkpoints(tmp_path).save(facts["step"] + 1, tensors, {})
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert names == [f"step-{facts['step'] + 1 - back:08d}" for back in (1, 0)]


def save_until_a_rank_dies(rank, folder, meet, done):
    """Save without end; tell each step that is on the disk, and at last the error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    checkpoints = Checkpoints(folder)
    step = 0 if checkpoints.latest() is None else SavedState.read(checkpoints.latest()).step
    dist.barrier()
    try:
        while True:
            step += 1
            checkpoints.save(step, {"a": divided(torch.full((64, 1024), float(step)))}, {"step": step})
            done.send(step)
    except CheckpointError as error:
        done.send(str(error))
    os._exit(0)  # the group cannot be ended together any more


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_rank_is_killed_the_other_fails_soon_and_the_last_checkpoint_is_whole(tmp_path, killed):
    context, draw = fresh_processes(), random.Random(killed)
    for attempt in range(3):
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [
            context.Process(
                target=save_until_a_rank_dies, args=(rank, tmp_path / "run", tmp_path / f"meet{attempt}", sender)
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        last = pipes[0][0].recv()
        time.sleep(draw.uniform(0, 0.05))
        os.kill(processes[killed].pid, signal.SIGKILL)
        receiver, told = pipes[1 - killed][0], 0
        while not isinstance(told, str):
            assert receiver.poll(20), "the other rank hangs"
            last, told = max(last, told), receiver.recv()
        assert "was not saved, earlier checkpoints" in told
        for process in processes:
            process.join(20)
        value = torch.zeros(64, 1024)
        facts = Checkpoints(tmp_path / "run").load(latest_checkpoint(tmp_path / "run"), {"a": value})
        assert facts["step"] >= last
        assert torch.equal(value, torch.full_like(value, float(facts["step"])))


@pytest.fixture
def saved(tmp_path):
    """A run with two checkpoints; the newer one's folder, and tensors to load it into."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, FACTS)
    return checkpoints, tmp_path / "step-00000002", {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}


@pytest.mark.parametrize("file", ["rank-00000.safetensors", STATE_NAME])
@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_checkpoint_that_was_cut_is_passed_over_and_refused(saved, file, damage):
    checkpoints, path, tensors = saved
    if damage == "gone":
        (path / file).unlink()
    elif damage == "longer":
        (path / file).write_bytes((path / file).read_bytes() + b"x")
    else:
        os.truncate(path / file, (path / file).stat().st_size - 1)
    assert checkpoints.latest().name == "step-00000001"
    with pytest.raises(CheckpointError, match=file):
        checkpoints.load(path, tensors)
    assert not tensors["a"].any()


def test_a_flipped_bit_is_found_wherever_it_is_and_nothing_is_loaded(saved):
    checkpoints, path, tensors = saved
    for file in path.iterdir():
        good = file.read_bytes()
        # A remark of the format that nobody reads; everything else counts.
        remark = good.find(b'"format":"pt"')
        for position in set(range(0, len(good), 5)) - set(range(remark, remark + 13) if remark >= 0 else ()):
            bad = bytearray(good)
            bad[position] ^= 4
            file.write_bytes(bad)
            with pytest.raises(CheckpointError):
                checkpoints.load(path, tensors)
        file.write_bytes(good)
    assert not tensors["a"].any()
    assert not tensors["b"].any()
    checkpoints.load(path, tensors)
    assert tensors["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": torch.zeros(2, 4)}, r"a is float32 \[2, 3\], expected float32 \[2, 4\]"),
        ({"b": torch.zeros(4)}, r"b is int64 \[4\], expected float32 \[4\]"),
        ({"c": torch.zeros(1)}, "it lacks c"),
        ({"a": None}, "it has besides a"),
    ],
)
def test_tensors_of_another_geometry_are_refused_by_name_before_anything_changes(saved, change, words):
    checkpoints, path, tensors = saved
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(MismatchError, match=words):
        checkpoints.load(path, tensors)
    assert not any(tensor.any() for tensor in tensors.values())


def test_names_that_are_optional_may_be_missing_on_either_side(saved):
    checkpoints, path, tensors = saved
    new = torch.ones(2)
    checkpoints.load(path, {"a": tensors["a"], "new/c": new}, optional=("b", "new/"))
    assert tensors["a"].any()
    assert new.tolist() == [1, 1]


def test_a_checkpoint_of_another_hash_is_refused_with_both_digests(saved):
    checkpoints, path, tensors = saved
    with pytest.raises(MismatchError, match='spec_digest "abc", expected "def"'):
        checkpoints.load(path, tensors, expected={"spec_digest": "def"})
    assert not tensors["a"].any()


def load_what_differs(folder):
    """One rank's part has another shape there, or the ranks name different checkpoints: the words of both errors."""
    rank, _ = rank_and_size()
    checkpoints, words = Checkpoints(folder), []
    for path, width in [(latest_checkpoint(folder), 3 + rank), (folder / f"step-{1 + rank:08d}", 3)]:
        try:
            checkpoints.load(path, {"a": torch.zeros(2, width), "b": torch.zeros(4, dtype=torch.int64)})
        except (MismatchError, CheckpointError) as error:
            words.append((type(error).__name__, str(error)))
    return words


def test_a_mismatch_on_one_rank_is_the_same_error_on_all(ranks, saved):
    _, path, _ = saved
    one, other = ranks(2, load_what_differs, path.parent)
    assert one[0] == other[0]
    assert one[0][0] == "MismatchError"
    assert one[0][1].startswith("rank 1: ")
    assert [name for name, _ in one] == ["MismatchError", "CheckpointError"]
    assert "different checkpoints" in one[1][1]


def test_the_last_ones_stay_and_what_killed_saves_left_is_removed(tmp_path):
    (tmp_path / "step-00000001.partial").mkdir(parents=True)
    (tmp_path / "step-00000001.partial" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000007.replaced.partial").mkdir()
    for mine in ("notes.partial", "step-1"):
        (tmp_path / mine).mkdir()
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 9, 3, 4, 5):
        checkpoints.save(step, {"a": torch.full((2,), step)}, {})
    # Step 9 is of a run that was then resumed from step 2: not this save's to judge.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.partial", "step-00000003", "step-00000004", "step-00000005", "step-00000009",
        "step-1",
    ]  # fmt: skip


def test_a_step_saved_again_replaces_the_first_and_is_there_at_every_moment(tmp_path, monkeypatch):
    checkpoints, values = Checkpoints(tmp_path, keep_last=1), {"a": torch.ones(2)}
    checkpoints.save(5, values, {"try": 1})
    seen, rename = [], type(tmp_path).rename

    def watched(path, target):
        result = rename(path, target)
        seen.append(read_facts(latest_checkpoint(tmp_path))["try"])
        return result

    monkeypatch.setattr(type(tmp_path), "rename", watched)
    checkpoints.save(5, values, {"try": 2})
    assert seen == [1, 2, 2]
    assert [path.name for path in tmp_path.glob("step*")] == ["step-00000005"]


def test_what_no_rank_can_begin_to_write_fails_at_once_even_in_the_background(tmp_path):
    with pytest.raises(ConfigError, match="are JSON"):
        Checkpoints(tmp_path).save(1, {"a": torch.ones(2)}, {"path": object()}, asynchronous=True)


def save_and_wait(checkpoints, *what):
    checkpoints.save(*what, asynchronous=True)
    checkpoints.wait()


@pytest.mark.parametrize(
    ("tensors", "facts", "words"),
    [
        ({"a": torch.ones(2, dtype=torch.complex64)}, {}, "complex64, which cannot be saved"),
        ({"a": torch.ones(2, device="meta")}, {}, "a is on the meta device"),
        ({"a": [1, 2]}, {}, "a is not a tensor"),
        ({"a": torch.ones(2)}, {"loss": float("nan")}, "are JSON"),
        ({"a": torch.ones(2)}, {"path": object()}, "are JSON"),
    ],
)
def test_what_cannot_be_saved_is_said_before_anything_is_there(tmp_path, tensors, facts, words):
    with pytest.raises(ConfigError, match=words):
        Checkpoints(tmp_path).save(1, tensors, facts)
    with pytest.raises(ConfigError, match=words):
        save_and_wait(Checkpoints(tmp_path), 1, tensors, facts)
    assert not list(tmp_path.glob("step*"))


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "state.json", ""])
def test_a_state_that_names_other_files_is_refused(tmp_path, name):
    (tmp_path / STATE_NAME).write_text(SavedState(1, {}, {name: 0}, {}).to_json())
    with pytest.raises(CheckpointError, match="impossible file"):
        SavedState.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format":1,"sha256":2,"state":{"step":"x"}}', "[" * 99999, "\0"])
def test_a_state_that_is_anything_else_is_refused_in_words(tmp_path, text):
    (tmp_path / STATE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        SavedState.read(tmp_path)


def small_model(seed=0, **backbone):
    torch.manual_seed(seed)
    config = EngramLMConfig.for_tokenizer(
        train_tokenizer([TEXT], 300), EngramConfig(**MEMORY), **{**BACKBONE, **backbone}
    )
    return EngramForCausalLM(config).eval()


def trained(seed, tables="row_adam", backbone="none"):
    """A model and its optimizer's state, all of it random; divided over the ranks where there are some."""
    model = small_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, seed, parameter))
    sharded = {}
    if dist.is_initialized():
        sharded = {id(table.weight): table for table in shard_tables(model).values()}
        ranks = Ranks(*rank_and_size(), group=dist.group.WORLD)
        wrap_backbone(LossModule(model, lambda model: model), backbone, ranks)
    optimizer = build_optimizer(model, OptimizerOptions(tables=tables))
    optimizer.allocate_state()
    for key, tensor in optimizer.named_state().items():
        table = sharded.get(id(model.get_parameter(key.partition("/")[0])))
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(drawn(key, seed, tensor), tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(whole.to_local())
        elif table is not None and tensor.dim():
            whole = drawn(key, seed, torch.empty(table.num_rows, *tensor.shape[1:], dtype=tensor.dtype))
            tensor.copy_(whole[table.first_row : table.first_row + len(tensor)])
        else:
            tensor.copy_(drawn(key, seed, tensor))
    return model, training_tensors(model, optimizer)


def drawn(name, seed, like):
    """Numbers that belong to a name, of the shape and type of a tensor."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return (torch.randn(like.shape, generator=generator) * 9).to(like.dtype)


def save_trained(folder, *kind):
    model, tensors = trained(1, *kind)
    Checkpoints(folder).save(1, tensors, model_facts(model))


def load_trained(folder, *kind):
    """Load into other numbers; the names that then are not those saved."""
    (_, tensors), (_, expected) = trained(2, *kind), trained(1, *kind)
    Checkpoints(folder).load(latest_checkpoint(folder), tensors)
    return sorted(tensors), [name for name in tensors if not torch.equal(local(tensors[name]), local(expected[name]))]


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize(
    ("tables", "backbone"), [("row_adam", "ddp"), ("row_wise_adam", "fsdp2"), ("sinkhorn", "ddp")], ids=str
)
def test_a_model_with_its_optimizer_loads_on_any_number_of_ranks_bit_for_bit(
    ranks, tmp_path, saved_on, loaded_on, tables, backbone
):
    ranks(saved_on, save_trained, tmp_path, tables, backbone)
    found = ranks(loaded_on, load_trained, tmp_path, tables, backbone)
    for names, different in found:
        assert names == found[0][0]
        assert different == []
    names = set(found[0][0])
    moment = "momentum" if tables == "sinkhorn" else "exp_avg_sq"
    assert {"model/model.token_map", "model/model.memory_tables.0.weight"} <= names
    assert {f"optimizer/model.memory_tables.2.weight/{moment}", "optimizer/model.norm.weight/step"} <= names


def test_tied_weights_are_saved_once_and_what_is_loaded_is_what_the_model_has(tmp_path):
    model = small_model()
    tensors = training_tensors(model)
    assert "model/model.embed_tokens.weight" in tensors
    assert "model/lm_head.weight" not in tensors
    assert not any("inv_freq" in name for name in tensors)  # a buffer that follows from the configuration
    assert "model/lm_head.weight" in training_tensors(small_model(tie_word_embeddings=False))
    Checkpoints(tmp_path).save(1, tensors, {})
    saved = model.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    Checkpoints(tmp_path).load(latest_checkpoint(tmp_path), training_tensors(model))
    assert torch.equal(model.lm_head.weight, saved)


def test_an_optimizer_of_another_model_is_refused():
    other = build_optimizer(small_model(num_hidden_layers=4))
    with pytest.raises(ConfigError, match=r"has no parameter model\.layers\.3\."):
        training_tensors(small_model(), other)


@pytest.mark.parametrize("saved_on", [1, 3])
def test_an_exported_model_is_the_model(ranks, tmp_path, saved_on, monkeypatch):
    ranks(saved_on, save_trained, tmp_path / "run", "row_adam", "fsdp2")
    monkeypatch.setattr(storage, "PIECE_BYTES", 256)
    monkeypatch.setattr(training_state, "_LARGEST_FILE_BYTES", 40_000)
    tokenizer = train_tokenizer([TEXT], 300)
    out = export_model(latest_checkpoint(tmp_path / "run"), tmp_path / "model", tokenizer=tokenizer)
    loaded, (model, _) = AutoModelForCausalLM.from_pretrained(out), trained(1)
    tokens = torch.randint(0, 280, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    assert loaded.hash_spec.digest == model.hash_spec.digest
    assert loaded.config.memory == model.config.memory
    assert loaded.config.to_diff_dict().keys() >= model.config.to_diff_dict().keys()
    assert len(list(out.glob("*.safetensors"))) > 1
    assert (out / "tokenizer.json").exists()


def test_an_exported_model_may_have_another_type(tmp_path):
    save_trained(tmp_path / "run")
    out = export_model(latest_checkpoint(tmp_path / "run"), tmp_path / "model", dtype="bfloat16")
    loaded = EngramForCausalLM.from_pretrained(out)
    expected = trained(1)[0].model.memory_tables["2"].weight.bfloat16()
    assert torch.equal(loaded.model.memory_tables["2"].weight, expected)
    assert loaded.model.token_map.dtype == torch.int64


def test_the_command_exports_the_newest_checkpoint_of_a_run(tmp_path, capsys):
    save_trained(tmp_path / "run" / "checkpoints")
    train_tokenizer([TEXT], 300).save_pretrained(tmp_path / "run" / "tokenizer")
    assert Export(source=tmp_path / "run", out=tmp_path / "model", json=True).run() == 0
    values = json.loads(capsys.readouterr().out)
    assert values["checkpoint"].endswith("step-00000001")
    assert values["spec_digest"] == EngramForCausalLM.from_pretrained(tmp_path / "model").hash_spec.digest
    assert (tmp_path / "model" / "tokenizer.json").exists()
    with pytest.raises(FileExistsError, match="left alone"):
        Export(source=tmp_path / "run" / "checkpoints" / "step-00000001", out=tmp_path / "model").run()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        Export(source=tmp_path, out=tmp_path / "other").run()


def test_an_export_refuses_what_is_not_the_model(tmp_path, other_tokenizer):
    model = small_model()
    tensors, facts = training_tensors(model), model_facts(model)
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    checkpoints.save(1, tensors, facts)
    checkpoints.save(2, tensors, {})
    checkpoints.save(3, {**tensors, "model/model.norm.weight": torch.zeros(7)}, facts)
    checkpoints.save(4, tensors, {**facts, "model_config": {**facts["model_config"], "hidden_size": "many"}})
    for step, error, words, given in [
        (1, MismatchError, "token", other_tokenizer),
        (2, CheckpointError, "no model_config", None),
        (3, MismatchError, r"norm\.weight has the shape \(7,\), expected \(32,\)", None),
        (4, CheckpointError, "is not a configuration", None),
    ]:
        with pytest.raises(error, match=words):
            export_model(tmp_path / f"step-{step:08d}", tmp_path / "model", tokenizer=given)
    file = tmp_path / "step-00000001" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="CRC-32"):
        export_model(file.parent, tmp_path / "model")
    assert not (tmp_path / "model").exists()
