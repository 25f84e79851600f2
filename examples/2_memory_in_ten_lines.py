"""Lesson 2: memory for a pretrained model, in ten lines.

    python examples/2_memory_in_ten_lines.py MODEL

MODEL is the folder or name of any causal language model of transformers; `examples/model_from_gguf.py` makes a folder
of a real one (135 million parameters) from a package. Without MODEL a tiny random model takes its place, so that the
lesson runs anywhere in seconds.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engram_lm
from engram_lm.training.optimizers import build_optimizer

TEXT = "The horse of Alexander the Great was called Bucephalus. " * 40


def tiny_model():
    """Make a small stand-in for a pretrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from engram_lm.training.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([TEXT], 300)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), tokenizer


torch.manual_seed(0)
if len(sys.argv) > 1:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
else:
    model, tokenizer = tiny_model()
ids = torch.tensor([tokenizer(TEXT).input_ids[:128]])
before = model(ids, labels=ids)

# The ten lines: attach, freeze the model, train the memory alone, save it.
adapter = engram_lm.attach(model, tokenizer, layers=(1,), num_heads=4, memory_dim=64, rows_per_head=5_000)
assert torch.equal(model(ids).logits, before.logits)  # a new memory changes nothing, bit for bit
model.requires_grad_(False)
adapter.requires_grad_(True)
optimizer = build_optimizer(adapter)
for _ in range(20):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
adapter.save_pretrained("runs/lessons/memory")

print(f"loss {before.loss:.3f} before, {loss:.3f} after 20 steps of the memory alone")
with adapter.disabled():  # the model itself was never touched
    assert torch.equal(model(ids).logits, before.logits)
print("switched off, the model is the one it was; the memory is in runs/lessons/memory")
