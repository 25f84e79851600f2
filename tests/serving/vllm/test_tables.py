"""Where rows are read from changes no token, and a table is not read while the model is loaded."""

import pytest
from tests.serving.vllm.engines import assert_equal, engine, generate
from tests.serving.vllm.models import expect, prompts, save_checkpoint
from transformers import AutoModelForCausalLM

from engram_lm.errors import ConfigError
from engram_lm.serving.vllm.tables import OPTION, table_place
from engram_lm.tables.files.convert import convert
from engram_lm.tables.tiers.page_cache import drop_from_memory, resident_share


@pytest.mark.parametrize(
    "options",
    [
        {"tier": "device"},
        {"tier": "host"},
        {"tier": "mmap"},
        {"tier": "file", "cache_bytes": 4096, "cache_policy": "lru"},
        {"tier": "file", "read_ahead": False},
    ],
    ids=str,
)
def test_every_tier_gives_the_same_tokens(options, checkpoints):
    folder, expected = checkpoints("dense")
    with engine(folder, additional_config={OPTION: options}) as llm:
        assert_equal(generate(llm, prompts()), expected)


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8", "int4"])
def test_rounded_tables_give_the_tokens_that_transformers_gives_with_them(dtype, checkpoints, tmp_path):
    folder, exact = checkpoints("dense")
    convert(folder, tmp_path / "packed", dtype=dtype)
    source = str(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(folder, table_tier="mmap", table_source=source)
    expected = expect(model.eval(), prompts())
    if dtype == "int4":
        assert [each.tokens for each in expected] != [each.tokens for each in exact]
    with engine(folder, additional_config={OPTION: {"source": source, "tier": "mmap"}}) as llm:
        assert_equal(generate(llm, prompts()), expected)


def test_rows_are_asked_for_at_the_beginning_and_no_layer_reads_any_itself(checkpoints):
    folder, expected = checkpoints("dense")
    with engine(folder, additional_config={OPTION: {"tier": "file"}}) as llm:
        assert_equal(generate(llm, prompts()), expected)
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        for layer in model.model.served.layers.values():
            ahead = layer.table.stats()
            assert ahead["staged_rows"] == ahead["used_rows"] > 0
            # What came from the file came by asking ahead alone.
            assert layer.table.table.stats()["gathered_rows"] == ahead["staged_rows"]


@pytest.mark.parametrize("name", ["dense", "shared_signed"])
def test_packed_tables_of_another_folder(name, checkpoints, tmp_path):
    folder, expected = checkpoints(name)
    convert(folder, tmp_path / "packed")
    with engine(folder, additional_config={OPTION: {"source": str(tmp_path / "packed"), "tier": "mmap"}}) as llm:
        assert_equal(generate(llm, prompts()), expected)


def test_a_table_is_not_read_while_the_model_is_loaded(tmp_path):
    # In files of their own, since a kernel may read megabytes beside what was asked for.
    save_checkpoint("dense", tmp_path, {"memory_dim": 192, "rows_per_head": 40_000}, max_shard_size="4MB")
    files = [file for file in tmp_path.glob("*.safetensors") if file.stat().st_size > 8 << 20]
    assert len(files) == 2
    if any(drop_from_memory(file) is None for file in files):
        pytest.skip("this file system does not say what it holds in memory")
    with engine(tmp_path, additional_config={OPTION: {"tier": "file"}}) as llm:
        assert all(resident_share(file) < 0.1 for file in files)
        generate(llm, prompts())
        assert all(0 < resident_share(file) < 0.9 for file in files)


def test_options_that_do_not_exist_are_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"engram_tables has no field 'cache_byte'.*cache_bytes"):
        table_place({OPTION: {"cache_byte": 1}})
    with pytest.raises(ConfigError, match="is a dictionary, not 'mmap'"):
        table_place({OPTION: "mmap"})
