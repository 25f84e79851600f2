"""Lesson 3: a small model with memory beside its twin without, trained on the same batches.

    python examples/3_engram_beside_its_twin.py [STEPS]

Both models see the same text in the same order. The twin's feed-forward is wider, so that both spend the same
operations on a token. `engram-lm quickstart` does this with seeds, controls and a report; here is its core, to read.
The text is the Python standard library's own sources, so nothing is downloaded. The model is left in
runs/lessons/engram, where the next lessons find it.
"""

import sys

import torch

from engram_lm import EngramConfig, EngramForCausalLM, EngramLMConfig
from engram_lm.training.data.documents import read_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
BATCH, LENGTH = 8, 64

documents = read_documents(max_bytes=3_000_000).documents
text = "\n".join(document.text for document in documents)
tokenizer = train_tokenizer([text], 1024)
ids = torch.tensor(tokenizer(text).input_ids)
held_out, ids = ids[: 32 * LENGTH].view(-1, LENGTH), ids[32 * LENGTH :]

# %% The two models. Everything but the memory, and the width that makes up for it, is the same.

shape = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None,
    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,  # the usual 0.02 is for wider models, and attention would form late
}  # fmt: skip
memory = EngramConfig(hidden_size=64, layers=(1,), num_heads=4, memory_dim=64, rows_per_head=4_000)
feed_forward = 128
# Operations of the memory, as a width of one layer's feed-forward: three matrices, two operations for each number.
wider = feed_forward + round(memory.flops_per_token() / (3 * 2 * 64 * shape["num_hidden_layers"]))
models = {}
for name, config, width in (("memory", memory, feed_forward), ("twin", None, wider)):
    torch.manual_seed(0)
    models[name] = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, config, intermediate_size=width, **shape))
    print(f"{name:7} {models[name].num_parameters():9,} parameters")

# %% Training: the tables' gradients are the rows that were read, and a step costs those alone.

optimizers = {name: build_optimizer(model, OptimizerOptions(lr=5e-3)) for name, model in models.items()}
curves = {name: [] for name in models}
batches = torch.randint(len(ids) - LENGTH, (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
for step, starts in enumerate(batches):
    batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
    for name, model in models.items():
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        curves[name].append(loss.item())
    if (step + 1) % max(1, STEPS // 5) == 0:
        print(f"step {step + 1:4}  " + "  ".join(f"{name} {losses[-1]:.3f}" for name, losses in curves.items()))

# %% What each knows of text that neither has seen.

for name, model in models.items():
    with torch.no_grad():
        print(f"{name:7} held-out loss {model.eval()(input_ids=held_out, labels=held_out).loss:.3f} nats per token")
models["memory"].save_pretrained("runs/lessons/engram")
tokenizer.save_pretrained("runs/lessons/engram")
print("the model with memory is in runs/lessons/engram")
