"""Memory of an attached model on a GPU: the same logits as on the CPU, exact decoding, patches, training.

These need an NVIDIA GPU and a CUDA build of torch, and are skipped elsewhere.
"""

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.patched_models import FACT, trained_model
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.analysis.looking import average_gates, layer_similarity, logit_lens

import engram_lm
from engram_lm import RowPatch
from engram_lm.adapt import FitOptions, transfer_rows
from engram_lm.analysis import suppressed
from engram_lm.tables.occupancy import FirstRows
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer, clip_gradients
from engram_lm.training.optimizers.rows import _rounded_at_random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")

IDS = torch.randint(2, 280, (2, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_are_the_cpu_s_and_decoding_is_the_whole_forward(name, config):
    model = small_model(name)
    adapter = engram_lm.attach(model, TOKENIZER, config())
    speak(adapter)
    expected = model(input_ids=IDS, use_cache=False).logits
    model.cuda()
    assert all(parameter.is_cuda for parameter in adapter.parameters())
    torch.testing.assert_close(
        model(input_ids=IDS.cuda(), use_cache=False).logits.cpu(), expected, atol=1e-3, rtol=1e-3
    )
    for table in adapter.tables.values():
        first, rows = FirstRows("test", 0.02), torch.arange(table.num_rows)
        ours = first.numbers(rows, table.width, torch.float32)
        assert torch.equal(first.numbers(rows.cuda(), table.width, torch.float32).cpu(), ours)
        values = table.weight * 1.001
        assert torch.equal(_rounded_at_random(values, 3).cpu(), _rounded_at_random(values.cpu(), 3))
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    found = model.generate(input_ids=IDS.cuda(), **asked)
    assert torch.equal(found, model.generate(input_ids=IDS.cuda(), **asked, use_cache=False))


def test_attaching_on_the_gpu_is_the_identity_and_rows_are_trained_there(config):
    model = small_model("llama").cuda().requires_grad_(False)
    before = model(input_ids=IDS.cuda()).logits.detach()
    adapter = engram_lm.attach(model, TOKENIZER, config())
    assert torch.equal(model(input_ids=IDS.cuda()).logits, before)
    optimizer = build_optimizer(model, OptimizerOptions(backbone="adamw", lr=1e-2))
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
        loss.backward()
        clip_gradients(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_patch_is_taken_back_bit_for_bit():
    model = trained_model().cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch = RowPatch.fit(model, TOKENIZER, [FACT], FitOptions(orders=(2, 3)))
    patch.apply(model)
    assert patch.is_learned
    patch.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_as_many_rows_are_transferred_as_on_the_cpu(config):
    rows = {}
    tokens = TOKENIZER(TEXT)["input_ids"]
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = small_model("llama").to(device)
        torch.manual_seed(1)
        adapter = engram_lm.attach(model, TOKENIZER, config())
        report = transfer_rows(adapter, torch.tensor(tokens).numpy(), num_ngrams=200, length=32)
        rows[device] = report.num_rows_written
    assert rows["cpu"] == rows["cuda"] and all(rows["cpu"].values())


def test_analyses_run_there():
    model = trained_model().cuda()
    assert average_gates(model, TOKENIZER, TEXT, length=32).mean.size
    assert logit_lens(model, TOKENIZER, TEXT, length=32).models
    assert layer_similarity(model, TOKENIZER, TEXT, length=32, positions="all").maps
    with torch.no_grad(), suppressed(model):
        model(input_ids=IDS.cuda())
