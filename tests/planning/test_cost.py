"""The bill of a training step: counted against what models, tables and optimizers really have."""

import dataclasses
import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from engram_lm.errors import ConfigError
from engram_lm.hashing import TokenMap
from engram_lm.model import EngramForCausalLM
from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.bill import TableTraffic, activation_bytes_per_token, bill
from engram_lm.planning.deduplication import CURVES, distinct_rows
from engram_lm.planning.machines import MACHINES, predict
from engram_lm.planning.shape import TrainingShape
from engram_lm.planning.sizes import muon_parameters
from engram_lm.training.loss import language_model_loss
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer, sort_parameters

ROOT = pathlib.Path(__file__).parents[2]
NANO = EngramLMConfig.preset("engram-nano")
V41 = {"orders": (2, 3, 4), "memory_dim": 6144, "rows_per_head": 16_000_000}


def large(world_size, name="engram-27b", memory=None, **changes):
    values = {"batch_size": world_size, "sequence_length": 4096, "backbone": "fsdp2", "table_dtype": "bfloat16"}
    config = EngramLMConfig.preset(name, memory=memory)
    return bill(config, TrainingShape(world_size=world_size, **{**values, **changes}))


@pytest.mark.parametrize("name", ["dense-nano", "engram-nano", "engram-27b"])
def test_parameters_and_muon_s_share_are_those_of_the_model(name):
    config = EngramLMConfig.preset(name)
    with torch.device("meta"):
        model = EngramForCausalLM(config)
    found = bill(config, TrainingShape())
    assert found.parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
    matrices = sort_parameters(model).matrices.values()
    assert muon_parameters(config) == sum(one.numel() for one in matrices)


@pytest.mark.parametrize("backbone", ["muon", "adamw"])
@pytest.mark.parametrize("tables", ["row_adam", "row_wise_adam", "row_wise_adagrad", "sinkhorn"])
def test_optimizer_state_is_what_the_optimizers_allocate(backbone, tables):
    model = EngramForCausalLM(NANO)
    optimizer = build_optimizer(model, OptimizerOptions(backbone=backbone, tables=tables))
    optimizer.allocate_state()
    state = optimizer.named_state().values()
    held = bill(NANO, TrainingShape(backbone_optimizer=backbone, table_optimizer=tables, backbone="none")).memory
    kept = sum(value.numel() * value.element_size() for value in state if value.dim())
    assert held["optimizer"] + held["table_optimizer"] == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_near_what_autograd_keeps(dtype):
    model = EngramForCausalLM(NANO).train()
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}

    def kept(batch_size):
        seen = {}

        def keep(value):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = (storage.nbytes(), value)
            return value

        tokens = torch.randint(3, NANO.vocab_size, (batch_size, 64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            language_model_loss(model, tokens, tokens, dtype)
        return sum(size for size, _ in seen.values())

    shape = TrainingShape(sequence_length=64, dtype=dtype)
    assert activation_bytes_per_token(NANO, shape) == pytest.approx((kept(2) - kept(1)) / 64, rel=0.15)


def test_bytes_of_an_exchange_are_those_of_its_requests():
    requests = np.array([[5, 2, 0], [1, 7, 3], [4, 0, 9]])
    found = TableTraffic.of_requests(requests, row_bytes=32, num_gathers=2, rows_per_rank=100)
    # Ten rows leave their owners for three ranks; owner 0 sends five of them, its own five stay.
    assert (found.places, found.rows, found.gradients) == (round(10 / 3 * 4), round(10 / 3 * 32), round(10 / 3 * 32))
    assert found.counts == 2 * 2 * 4 * 8
    assert found.busiest_rows == 5 * 32
    wide = TableTraffic.of_requests(requests, row_bytes=32, num_gathers=2, rows_per_rank=2**31 + 1)
    assert wide.places == round(10 / 3 * 8)


def test_the_expected_traffic_is_near_that_of_real_rows_divided_by_blocks():
    config = EngramLMConfig.preset("engram-nano", memory={"rows_per_head": 400})
    spec, world, rng = config.spec, 3, np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (world, 1, 512))
    block, bound = -(-spec.num_rows(spec.layers[0]) // world), spec.bind(TokenMap.identity(spec.num_tokens))
    asked = [np.unique(bound.rows(one, spec.layers[0])) for one in tokens]
    requests = np.array([np.bincount(rows // block, minlength=world) for rows in asked])
    exact = TableTraffic.of_requests(requests, 32, 1, block)
    # Of random tokens all N-grams differ; rows meet in the heads alone.
    shape = TrainingShape(world_size=world, batch_size=world, sequence_length=512, distinct_share=1.0)
    expected = bill(config, shape).tables_sent
    met = distinct_rows(512, 401) / 512
    assert exact.rows == pytest.approx(expected.rows * met, rel=0.03)


def test_rows_of_higher_orders_make_their_owners_the_busiest():
    found = large(8)
    # Trigrams repeat less than bigrams, and half of the ranks own nothing but rows of trigrams.
    curve = CURVES["deepseek-v3"]
    bigrams, trigrams = (curve.ngrams(order, 4096, 4096) for order in (2, 3))
    assert found.tables_sent.busiest_rows / found.tables_sent.rows == pytest.approx(
        2 * trigrams / (bigrams + trigrams), rel=0.01
    )


def test_bytes_per_rank_tend_to_a_constant_and_memory_falls_with_the_ranks():
    bills = [large(world_size) for world_size in (2, 64, 4096)]
    sent = [found.tables_sent.rows for found in bills]
    ceiling = bills[0].rows["distinct_per_gather"] * 80 * 2
    assert sent == [pytest.approx(ceiling * (world - 1) / world, rel=1e-4) for world in (2, 64, 4096)]
    assert [found.memory["table_rows"] for found in bills[1:]] == [1_131_317 * 160, 17_677 * 160]
    single = large(1)
    assert single.tables_sent.total == single.backbone_sent["total"] == single.memory["exchange"] == 0


def test_tables_of_the_published_size_have_the_published_rows():
    config = EngramLMConfig.preset("engram-27b", memory=V41)
    assert config.memory_config.num_table_rows() == (384_006_168, 384_016_682)
    found = large(1, memory=V41)
    assert found.memory["table_rows"] == (384_006_168 + 384_016_682) * 256 * 2


def test_duplicates_cost_the_share_that_deduplication_saves():
    found = large(64, deduplicate=False)
    without = large(64).tables_sent
    assert found.tables_sent == found.tables_sent_with_duplicates
    assert without.rows / found.tables_sent.rows == pytest.approx(large(64).distinct_share, rel=1e-3)
    given = large(64, distinct_share=0.25)
    assert given.tables_sent.rows == pytest.approx(found.tables_sent.rows / 4, rel=1e-6)


def test_distinct_ngrams_are_bounded():
    curve = CURVES["deepseek-v3"]
    for order in (2, 3, 4):
        counts = [curve.ngrams(order, tokens) for tokens in np.geomspace(1, 1e11, 60)]
        assert all(a <= b for a, b in itertools.pairwise(counts))
        assert all(count <= tokens for count, tokens in zip(counts, np.geomspace(1, 1e11, 60)))
    assert curve.ngrams(2, curve.tokens_to) < curve.ngrams(2, 1_000_000_000)
    # Short sequences are of more documents.
    assert curve.ngrams(2, 65_536, 2048) < curve.ngrams(2, 65_536, 700) < curve.ngrams(2, 65_536, 256)
    assert curve.ngrams(7, 5000) == 5000  # an order that nobody measured


def test_distinct_rows_saturate_at_the_rows_there_are():
    assert distinct_rows(10, 10**9) == pytest.approx(10, rel=1e-6)
    assert distinct_rows(10**9, 1000) == pytest.approx(1000)
    thrown = np.mean([len(np.unique(np.random.default_rng(seed).integers(0, 97, 60))) for seed in range(400)])
    assert distinct_rows(60, 97) == pytest.approx(thrown, rel=0.01)


def test_accumulation_sends_tables_every_pass_and_the_backbone_once_unless_it_is_divided():
    once, four = (large(8, batch_size=32, micro_batch_size=size, backbone="ddp", distinct_share=0.5) for size in (4, 1))
    assert four.shape.num_micro_batches == 4
    assert four.backbone_sent == once.backbone_sent
    assert four.tables_sent.rows == once.tables_sent.rows
    assert four.tables_sent.counts == 4 * once.tables_sent.counts
    once, four = (large(8, batch_size=32, micro_batch_size=size, backbone="fsdp2") for size in (4, 1))
    assert four.backbone_sent["reduce_scatter"] == pytest.approx(4 * once.backbone_sent["reduce_scatter"])
    assert four.memory["gradients"] == once.memory["gradients"], "no rank keeps the gradient of the whole model"


def test_a_prediction_overlaps_rows_with_the_blocks_before_the_memory():
    found = large(64)
    machine = MACHINES["h200"]
    fast = predict(found, machine)
    assert fast.rows_exposed_seconds == 0 < fast.exchange_exposed_seconds < fast.exchange_seconds
    slow = predict(found, dataclasses.replace(machine, inter_bytes_per_second=1e8))
    assert slow.rows_exposed_seconds > 0
    assert slow.step_seconds <= slow.serial_seconds
    nothing = predict(bill(EngramLMConfig.preset("moe-27b"), found.shape), machine)
    assert nothing.exchange_seconds == nothing.exchange_share == 0
    assert math.isclose(fast.compute_seconds, found.flops["per_rank"] / (989e12 * 0.4))


def test_the_constants_are_those_of_the_committed_measurement():
    results = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text(encoding="utf-8"))["results"]
    fits = [one for one in results if one["case"] == "distinct" and one["curve"] in CURVES]
    assert len(fits) == 12
    for one in fits:
        constants = CURVES[one["curve"]].coefficients[one["sequence_length"]][one["order"]]
        assert list(constants) == pytest.approx(one["fit"], abs=1e-5)
    assert all(one["equal"] for one in results if one["case"] == "job")


def test_the_page_says_what_the_results_say():
    call = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--check"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bill_is_plain_json():
    found = large(8).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["memory"]["total"] == sum(value for key, value in found["memory"].items() if key != "total")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0}, "world_size is a whole number from 1"),
        ({"world_size": 2**21}, "world_size must be at most"),
        ({"batch_size": 1.5}, "batch_size is a whole number from 1"),
        ({"backbone": "zero3"}, "backbone must be one of 'ddp', 'fsdp2', 'none'"),
        ({"curve": "prose"}, "curve must be one of 'deepseek-v3'"),
        ({"distinct_share": 0}, "distinct_share is a share above 0"),
        ({"distinct_share": math.nan}, "distinct_share is a share above 0"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingShape(**changes)


def test_a_machine_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="inter_bytes_per_second must be a number from 0"):
        dataclasses.replace(MACHINES["h100"], inter_bytes_per_second=math.nan)
    with pytest.raises(ConfigError, match="inter_bytes_per_second must be above 0"):
        dataclasses.replace(MACHINES["h100"], inter_bytes_per_second=0)
    with pytest.raises(ConfigError, match="efficiency is a share"):
        dataclasses.replace(MACHINES["h100"], efficiency=1.5)
