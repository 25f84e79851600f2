"""Rows that are read before a forward pass, as vLLM's runner of GPUs does it, are those that the pass would read.

That runner needs a GPU. Here its classes are given what vLLM's scheduler and the runner of CPUs have made of requests.
"""

import dataclasses
import os
import types

import pytest
import torch
from tests.serving.vllm.engines import assert_equal, count, engine, generate
from tests.serving.vllm.models import prompts, save_checkpoint
from tests.serving.vllm.test_exact import CHUNKS, FEW_BLOCKS, NGRAM
from tests.serving.vllm.test_failures import asked, tokens
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import init_model_state

from engram_lm.serving.vllm.lost_rows import Owners, read_or_note
from engram_lm.serving.vllm.staging import StagingModelState
from engram_lm.serving.vllm.tables import OPTION
from engram_lm.tables import table_layouts

DEVICE = torch.device("cpu")
NOT_A_TOKEN_OF_IT = 7


class Runner:
    """Prepares the inputs of the forward passes of an engine on CPUs as vLLM's runner of GPUs does."""

    def __init__(self, llm, *, compare=True):
        self.runner, self.compare = llm.llm_engine.model_executor.driver_worker.worker.model_runner, compare
        self.model = self.runner.model
        self.state = init_model_state(self.runner.vllm_config, self.model, None, DEVICE)
        self.buffers = InputBuffers(self.runner.max_num_reqs, self.state.max_num_tokens, DEVICE)
        self.addresses = self.find_addresses()
        self.num_passes = self.num_drafts = 0
        self.runner._model_forward = self.forward

    def find_addresses(self):
        staged = self.state.staged
        return [each.data_ptr() for each in (staged.active, staged.codes, *staged.vectors.values())]

    def forward(self, input_ids, positions, **more):
        """Run a forward pass over rows that were read before it."""
        runner, known = self.runner, self.runner.input_batch
        num_requests, num_tokens = known.num_reqs, len(input_ids)
        ends = runner.query_start_loc.np[: num_requests + 1]
        batch = InputBatch.make_dummy(num_requests, num_tokens, self.buffers)
        self.buffers.query_start_loc[: num_requests + 1] = torch.from_numpy(ends)
        self.buffers.input_ids[:num_tokens] = input_ids
        self.buffers.positions[:num_tokens] = positions
        # Other rows than those of the batch, as requests come and go; of what is not computed nothing is known.
        order = torch.arange(runner.max_num_reqs).flip(0)
        held = torch.from_numpy(known.token_ids_cpu).clone()
        for request in range(num_requests):
            held[request, known.num_computed_tokens_cpu[request] :] = NOT_A_TOKEN_OF_IT
        batch = dataclasses.replace(
            batch,
            idx_mapping=order[:num_requests],
            idx_mapping_np=order[:num_requests].numpy(),
            query_start_loc_np=ends.copy(),
            num_computed_tokens_np=known.num_computed_tokens_cpu[:num_requests],
        )
        tables = [known.block_table[group] for group in range(len(runner.kv_cache_config.kv_cache_groups))]
        self.state.prepare_attn(
            batch,
            CUDAGraphMode.NONE,
            tuple(table.get_device_tensor(num_requests) for table in tables),
            torch.stack([table.slot_mapping.gpu[:num_tokens] for table in tables]),
            runner.attn_groups,
            runner.kv_cache_config,
        )
        states = types.SimpleNamespace(all_token_ids=types.SimpleNamespace(gpu=held[order]))
        inputs = self.state.prepare_inputs(batch, states)
        assert self.find_addresses() == self.addresses
        if self.compare:
            self.assert_same(input_ids, positions, inputs["staged"])
        self.num_passes += 1
        return self.model(input_ids=input_ids, positions=positions, **more, **inputs)

    def assert_same(self, input_ids, positions, staged):
        """What was staged is what a pass would look up in the cache and read."""
        step = self.model.model.served.begin(input_ids, positions)
        nobody = Owners("", torch.empty(0), torch.empty(0))
        for block, layer in step.layers.items():
            assert torch.equal(staged.vectors[block][: len(input_ids)], read_or_note(layer, step.rows[block], nobody))
        assert torch.equal(staged.active[: len(input_ids)], step.active)


@pytest.mark.parametrize("name", ["quickstart", "experts_streams", "shared_signed"])
def test_staged_rows_are_those_that_the_pass_would_read(name, checkpoints):
    folder, expected = checkpoints(name)
    with engine(folder, enable_prefix_caching=True, **CHUNKS, **NGRAM, **FEW_BLOCKS) as llm:
        runner = Runner(llm)
        assert type(runner.state) is StagingModelState
        for _ in range(2):
            assert_equal(generate(llm, prompts()), expected)
        assert runner.num_passes > 24
        assert count(llm, "prefix_cache_hits") > 0
        assert count(llm, "num_preemptions") >= 1
        assert count(llm, "spec_decode_num_draft_tokens") > 0


def test_staged_rows_that_cannot_be_read_fail_those_who_need_them(checkpoints, tmp_path):
    save_checkpoint("dense", tmp_path, max_shard_size="20kB")
    right = [each.tokens for each in checkpoints("dense")[1]]
    table = list(table_layouts(tmp_path).values())[-1].parts[0].extents[0]
    with open(table.file, "rb") as file:
        content = file.read()
    option = {OPTION: {"tier": "mmap"}}
    with engine(tmp_path, additional_config=option, enable_prefix_caching=True, block_size=32, **CHUNKS) as llm:
        Runner(llm, compare=False)
        assert tokens(asked(llm, prompts())) == right
        llm.reset_prefix_cache()
        os.truncate(table.file, table.end_bytes - (table.end_bytes - table.start_bytes) // 200)
        answers = asked(llm, prompts())
        failed = [answer.finish_reason == "error" for answer in answers]
        assert 0 < sum(failed) < len(failed)
        for answer, whole, has_failed in zip(answers, right, failed):
            if has_failed:
                assert answer.stop_reason.startswith("CheckpointError: ") and table.file in answer.stop_reason
            assert list(answer.token_ids) == whole[: len(answer.token_ids)]
            assert (list(answer.token_ids) == whole) != has_failed
        with open(table.file, "r+b") as file:
            file.write(content)
        assert tokens(asked(llm, prompts())) == right


def test_passes_that_are_nobodys_get_the_same_buffers(checkpoints):
    folder, _ = checkpoints("dense")
    with engine(folder) as llm:
        state = Runner(llm).state
        assert state.prepare_dummy_inputs(1, 8)["staged"] is state.staged
        assert not state.staged.active.any()
