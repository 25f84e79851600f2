"""Lesson 5: serve a model whose tables stay in their files.

    python examples/3_engram_beside_its_twin.py && python examples/5_serve.py [MODEL]

A token reads the same few rows however large the table is, so generation works as well from a file as from memory, and
gives the same tokens. For many users at once there is vLLM, which one command starts.
"""

import subprocess
import sys
from pathlib import Path

import torch

from engram_lm.serving.load import ModelFlags, load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "runs/lessons/engram"
if not Path(MODEL).is_dir():
    sys.exit(f"{MODEL} is not there yet: run lesson 3 first, or name the folder of another model")
PROMPTS = ["def main(", "import os\n", "class "]

# %% The same model twice: its tables loaded with it, and left where they lie.

answers = {}
for tier in ("device", "mmap"):
    model, tokenizer = load_model(MODEL, tables=ModelFlags(table_tier=tier))
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        answers[tier] = model.generate(**batch, max_new_tokens=12, do_sample=False)
assert torch.equal(answers["device"], answers["mmap"]), "where a table lies changes no token"
for text in tokenizer.batch_decode(answers["mmap"], skip_special_tokens=True):
    print(repr(text))

# %% For a server: engram-lm serve. With --dry-run it prints the line that starts vLLM, and starts nothing.

call = [sys.executable, "-m", "engram_lm", "serve", MODEL, "--table-tier", "mmap", "--dry-run"]
done = subprocess.run(call, capture_output=True, text=True, check=False)
print(done.stdout or done.stderr)  # without vLLM it says which extra brings it
