"""Give memory to a causal language model and train the memory alone with transformers.Trainer.

Runs offline in seconds on a CPU, with a tiny random model in place of a downloaded one:
`model = AutoModelForCausalLM.from_pretrained(...)` and its tokenizer go there. Needs `pip install 'engram-lm[hf]'`.
On several GPUs: `torchrun --nproc-per-node 4 examples/adapt_with_trainer.py`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import engram_lm
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.huggingface import MemoryTrainer, train_memory

OUT = "runs/adapt_with_trainer"
TEXT = "The cat sat on the mat. The rat ran to the mat; the cat saw the rat. " * 60

tokenizer = train_tokenizer([TEXT], 300)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
)  # fmt: skip

adapter = engram_lm.attach(model, tokenizer, layers=(1,), num_heads=4, memory_dim=64, rows_per_head=1000)
train_memory(model)  # the backbone is frozen; train_memory(model, "full") trains it too, peft adds LoRA

ids = torch.tensor(tokenizer(TEXT).input_ids)
rows = ids[: len(ids) // 32 * 32].view(-1, 32).tolist()
dataset = [{"input_ids": row, "labels": row} for row in rows]

arguments = TrainingArguments(
    OUT, per_device_train_batch_size=4, max_steps=30, learning_rate=1e-2, warmup_steps=3, logging_steps=10,
    save_steps=15, report_to="none", disable_tqdm=True,
)  # fmt: skip
trainer = MemoryTrainer(model, arguments, train_dataset=dataset, eval_dataset=dataset[:8])
before = trainer.evaluate()["eval_loss"]
trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint
after = trainer.evaluate()["eval_loss"]
with adapter.disabled():
    without = trainer.evaluate()["eval_loss"]

if trainer.is_world_process_zero():
    adapter.save_pretrained(f"{OUT}/adapter")
    print(f"loss {before:.3f} before, {after:.3f} after, {without:.3f} with the memory switched off again")
