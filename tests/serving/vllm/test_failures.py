"""A row that cannot be read fails the requests that need it, by name; the engine lives and answers the others."""

import contextlib
import os
import resource
import tempfile

import pytest
from tests.serving.vllm.adapted import save_adapted
from tests.serving.vllm.engines import GREEDY, engine
from tests.serving.vllm.models import prompts, save_checkpoint
from tests.serving.vllm.test_exact import CHUNKS, NGRAM
from tests.tables.mooncake_store import reason_to_skip, running
from tests.tables.tiers import serving

from engram_lm.serving.vllm.adapted_names import OPTION as ADAPTER
from engram_lm.serving.vllm.tables import OPTION as TABLES
from engram_lm.tables import table_layouts
from engram_lm.tables.tiers.mooncake_store import publish_to_mooncake

BLOCKS = {"enable_prefix_caching": True, "block_size": 32}


def asked(llm, given):
    """The answers to requests that are all scheduled together."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], GREEDY, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def tokens(answers):
    return [list(answer.token_ids) for answer in answers]


@contextlib.contextmanager
def full_disk():
    """Nothing can be written into any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with tempfile.TemporaryFile(buffering=0) as file, pytest.raises(OSError, match="File too large"):
            file.write(b"1")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["ours", "gemma3"])
def test_a_table_that_is_cut_fails_those_who_need_what_is_gone_until_it_is_back(kind, checkpoints, tmp_path):
    options = {TABLES: {"tier": "mmap"}}
    if kind == "ours":
        folder, (_, expected) = tmp_path, checkpoints("dense")
        save_checkpoint("dense", folder, max_shard_size="20kB")
        where = folder
    else:
        # Its layers lie in several groups of blocks.
        expected = save_adapted(kind, tmp_path)
        folder, where = tmp_path / "base", tmp_path / "adapter"
        options[ADAPTER] = str(where)
    right = [each.tokens for each in expected]
    table = list(table_layouts(where).values())[-1].parts[0].extents[0]
    with open(table.file, "rb") as file:
        content = file.read()
    with engine(folder, additional_config=options, **BLOCKS, **CHUNKS, **NGRAM) as llm:
        with full_disk():
            assert tokens(asked(llm, prompts())) == right
            llm.reset_prefix_cache()
            os.truncate(table.file, table.end_bytes - (table.end_bytes - table.start_bytes) // 200)
            answers = asked(llm, prompts())
        failed = [answer.finish_reason == "error" for answer in answers]
        assert 0 < sum(failed) < len(failed)
        for answer, whole, has_failed in zip(answers, right, failed):
            if has_failed:
                assert answer.stop_reason.startswith("CheckpointError: ") and table.file in answer.stop_reason
                assert list(answer.token_ids) == whole[: len(answer.token_ids)] != whole
            else:
                assert list(answer.token_ids) == whole
        with open(table.file, "r+b") as file:
            file.write(content)
        # Had the cache kept what was computed without rows, these would differ.
        assert tokens(asked(llm, prompts())) == right


def assert_lost(answers):
    """All requests failed by the name of what does not answer, and gave nothing."""
    for answer in answers:
        assert (answer.finish_reason, list(answer.token_ids)) == ("error", [])
        assert answer.stop_reason.startswith("RemoteError: ")


def test_a_file_server_that_dies_and_comes_back(checkpoints):
    folder, expected = checkpoints("dense")
    right = [each.tokens for each in expected]
    with contextlib.ExitStack() as first:
        server = first.enter_context(serving(folder))
        options = {"source": server.address, "tier": "remote"}
        with engine(folder, additional_config={TABLES: options}, **BLOCKS) as llm:
            assert tokens(asked(llm, prompts())) == right
            llm.reset_prefix_cache()
            first.close()
            assert_lost(asked(llm, prompts()[5:8]))
            with serving(folder, port=server.server_address[1]):
                assert tokens(asked(llm, prompts())) == right


def test_a_mooncake_store_that_dies(checkpoints):
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder, expected = checkpoints("dense")
    right = [each.tokens for each in expected]
    with running() as store:
        for name, layout in table_layouts(folder).items():
            publish_to_mooncake(layout, store.address, name=f"table-{name}")
        options = {"source": f"{store.address}/table-{{table}}", "tier": "remote"}
        with engine(folder, additional_config={TABLES: options}, **BLOCKS) as llm:
            assert tokens(asked(llm, prompts())) == right
            known = prompts()[9]
            store.kill("mooncake_master")
            assert_lost(asked(llm, prompts()[5:8]))
            assert_lost(asked(llm, [[*known, 7]]))
