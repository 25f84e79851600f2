"""Two processes share one model: tokens are the same, each opens its tables once, and their pages are the same ones."""

import os
import re

from tests.serving.vllm.engines import assert_equal, count, engine, generate
from tests.serving.vllm.models import prompts, save_checkpoint
from tests.serving.vllm.test_failures import asked

from engram_lm.serving.vllm.tables import OPTION
from engram_lm.tables import TensorFolder

TWO = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "enable_prefix_caching": True,
    "block_size": 32,
    "max_num_batched_tokens": 64,
}


def mappings(worker, folder):
    """The process, and of each mapping of a file of the folder its bytes in memory and those that are its own."""
    with open("/proc/self/smaps") as file:
        text = file.read()
    found = []
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        if folder in part.split("\n", 1)[0]:
            held = {name: int(size) << 10 for name, size in re.findall(r"^(\w+): +(\d+) kB", part, re.MULTILINE)}
            found.append((part.split("\n", 1)[0].split()[-1], held["Rss"], held["Anonymous"]))
    return os.getpid(), found


def cut_for_one_rank(worker, empty):
    """From now on rank 1 alone finds its table's file empty."""
    if worker.rank == 1:
        table = worker.model_runner.model.model.served.layers[2].table.table
        for descriptor in table._descriptors.values():
            with open(empty, "rb") as file:
                os.dup2(file.fileno(), descriptor.number)


def test_two_ranks(checkpoints, tmp_path):
    _, expected = checkpoints("dense")
    # In files of their own, so that what is mapped beside tables is not counted.
    save_checkpoint("dense", tmp_path, max_shard_size="20kB")
    tables = {TensorFolder(tmp_path).find(f"model.memory_tables.{block}.weight").file for block in (0, 2)}
    empty = tmp_path / "empty"
    empty.touch()
    with engine(tmp_path, additional_config={OPTION: {"tier": "mmap"}}, **TWO) as llm:
        for _ in range(2):
            assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "prefix_cache_hits") > 0
        (one, of_one), (other, of_other) = llm.collective_rpc(mappings, args=(str(tmp_path),))
        assert len({one, other, os.getpid()}) == 3
        for held in (of_one, of_other):
            assert sorted(file for file, _, _ in held) == sorted(tables)
            # Pages of the file itself, which all processes share, and no copies.
            assert all(resident > 0 and own == 0 for _, resident, own in held)
        # What one rank cannot read, no other may answer without.
        llm.collective_rpc(cut_for_one_rank, args=(str(empty),))
        for answer in asked(llm, prompts()[3:6]):
            assert (answer.finish_reason, answer.token_ids) == ("error", [])
            assert "was cut after its header was read" in answer.stop_reason
