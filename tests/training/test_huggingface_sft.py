"""TRL's SFTTrainer with memory: what it trains and saves, and documents packed into one row."""

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model
from tests.small_model import MEMORY
from tests.training.test_huggingface import IDS, adapted, arguments, weights

import engram_lm
from engram_lm import EngramConfig
from engram_lm.hashing.codes import Segments
from engram_lm.training.huggingface import MemoryTrainerMixin, train_memory

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

# peft, TRL and accelerate ask torch and transformers by names that those call deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
TEXTS = ("the cat sat on the mat.", "The Cat saw a rat; the rat ran.", "the rat ran to the mat.") * 4


class MemorySFTTrainer(MemoryTrainerMixin, trl.SFTTrainer):
    pass


def sft_trainer(model, folder, peft_config=None, **changes):
    usual = {key: value for key, value in arguments(folder, max_steps=3).to_dict().items() if key[0] != "_"}
    args = trl.SFTConfig(**{**usual, **changes})
    data = datasets.Dataset.from_dict({"text": list(TEXTS)})
    return MemorySFTTrainer(model, args, train_dataset=data, processing_class=TOKENIZER, peft_config=peft_config)


def test_it_trains_and_saves_memory_and_the_lora_that_it_makes_itself(tmp_path):
    model = adapted()
    before = weights(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = sft_trainer(model, tmp_path, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_model(str(tmp_path / "saved"))  # again, as at the end of many scripts
    moved = {name for name, value in model.state_dict().items() if name in before and value.ne(before[name]).any()}
    assert "engram_adapters.default.memory_tables.0.weight" in moved
    assert all("engram_adapters" in name for name in moved)
    again = peft.PeftModel.from_pretrained(small_model(), tmp_path / "saved")
    alone = logits(again)
    engram_lm.MemoryAdapter.from_pretrained(again, tmp_path / "saved/engram_adapters/default")
    torch.testing.assert_close(logits(again), logits(trainer.model))
    assert not torch.allclose(alone, logits(again), atol=1e-2)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor([IDS[:12]])).logits


@pytest.mark.parametrize("positions", [True, False])
def test_packed_documents_do_not_read_one_another_where_positions_begin_anew(positions, tmp_path):
    model = small_model()
    config = EngramConfig(**MEMORY, kernel_size=0)  # a convolution would see the end of the document before
    speak(engram_lm.attach(model, TOKENIZER, config, segments=Segments(positions=positions)))
    train_memory(model)
    trainer = sft_trainer(model, tmp_path, packing=True, max_length=32)
    batch = next(iter(trainer.get_train_dataloader()))
    tokens, places = batch["input_ids"], batch["position_ids"]
    starts = places[0].eq(0).nonzero()[:, 0].tolist()
    assert len(starts) > 2
    assert "attention_mask" not in batch
    stops = [*starts[1:], tokens.shape[1]]
    with torch.no_grad():
        packed = model.eval()(input_ids=tokens, position_ids=places).logits[0]
        alone = [model(input_ids=tokens[:, start:stop]).logits[0] for start, stop in zip(starts, stops)]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4) == positions
    trainer.train()
