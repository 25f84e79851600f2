"""A patch on a table of any tier reads as on a table in memory, to the bit, and leaves the table's files alone."""

import pytest
import torch
from tests.adapt.patched_models import FACT, trained_model
from tests.adapt.small_models import TOKENIZER, small_model

from engram_lm import EngramForCausalLM, MemoryAdapter, RowPatch
from engram_lm.adapt import FitOptions, attached_adapters
from engram_lm.tables import OverlayTable, ResidentTable, RowCodec, open_table
from engram_lm.tables.files.convert import build_random

FAST = FitOptions(orders=(2, 3), learning_rate=0.3, margin=0.2)
TEXT = torch.tensor([TOKENIZER("the cat sat on the rat; the rat saw the mat.")["input_ids"]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT, use_cache=False).logits


def adapted(folder, **options):
    model = small_model()
    return model, MemoryAdapter.from_pretrained(model, folder, tokenizer=TOKENIZER, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("patched") / "adapter"
    attached_adapters(trained_model())["default"].save_pretrained(path)
    return path


@pytest.mark.parametrize("tier", ["host", "mmap", "file"])
def test_a_patch_on_any_tier_equals_an_edited_table_and_changes_no_file(folder, tier):
    resident, _ = adapted(folder)
    patch = RowPatch.fit(resident, TOKENIZER, [FACT], FAST)
    plain, before = logits(resident), contents(folder)
    patch.apply(resident)
    other, adapter = adapted(folder, table_tier=tier)
    tables = adapter.tables
    patch.apply(other)
    assert torch.equal(logits(other), logits(resident))
    assert not torch.equal(plain, logits(resident))
    everything = torch.arange(adapter.tables["0"].num_rows)
    edited = attached_adapters(resident)["default"].tables["0"].gather(everything)
    assert torch.equal(adapter.tables["0"].gather(everything), edited)
    assert contents(folder) == before
    patch.revert(other)
    assert torch.equal(logits(other), plain)
    # Nothing of the overlay is left.
    assert all(adapter.tables[name] is table for name, table in tables.items())
    adapter.close()


def test_a_fit_on_a_mapped_table_gives_the_rows_that_a_fit_in_memory_gives(folder):
    resident, _ = adapted(folder)
    mapped, adapter = adapted(folder, table_tier="mmap")
    one, other = (RowPatch.fit(model, TOKENIZER, [FACT], FAST) for model in (resident, mapped))
    assert one.digest == other.digest
    adapter.close()


@pytest.mark.parametrize("codec", ["int8", "float8_e4m3"])
def test_a_patch_on_a_quantized_table_reads_as_the_decoded_table_edited(codec, tmp_path):
    generator = torch.Generator().manual_seed(0)
    build_random(tmp_path / "packed.safetensors", 40, RowCodec.named(codec, 32))
    before = contents(tmp_path)
    decoded = open_table(tmp_path / "packed.safetensors", tier="host").gather(torch.arange(40))
    changed, values = torch.tensor([3, 17, 39]), torch.randn(3, 32, generator=generator).to(decoded.dtype)
    edited = decoded.clone()
    edited[changed] = values
    for tier in ("host", "mmap", "file"):
        table = OverlayTable(open_table(tmp_path / "packed.safetensors", tier=tier), changed, values)
        wanted = torch.tensor([[39, 0, 3], [3, 16, 17]])
        assert torch.equal(table.gather(wanted), ResidentTable(edited).gather(wanted))
        table.give_back(torch.tensor([17, 39]))
        table.replace(torch.tensor([5]), values[:1])
        assert table.rows.tolist() == [3, 5]
        assert torch.equal(table.gather(torch.tensor([17, 39])), decoded[[17, 39]])
        table.close()
    assert contents(tmp_path) == before


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_reference_model_with_mapped_tables_takes_a_patch_and_saves_it_with_its_rows(tmp_path):
    trained = trained_model("reference")
    trained.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    patch = RowPatch.fit(trained, TOKENIZER, [FACT], FAST)
    model = EngramForCausalLM.from_pretrained(tmp_path / "model", table_tier="mmap")
    plain = logits(model)
    patch.apply(trained)
    patch.apply(model)
    assert torch.equal(logits(model), logits(trained))
    model.save_pretrained(tmp_path / "patched")
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "patched")), logits(trained))
    patch.revert(model)
    assert torch.equal(logits(model), plain)
    assert contents(tmp_path / "model") == before
