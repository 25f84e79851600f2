"""Lesson 7: write a fact into a memory, prove what it touches, and take it back.

    python examples/3_engram_beside_its_twin.py && python examples/7_edit_a_fact.py [MODEL]

A fact lives in the rows of its own N-grams. Writing it changes those rows and nothing else, so text that does not read
them gets the same answer as before, bit for bit; and taking it back leaves no trace.
"""

import sys
from pathlib import Path

import torch

from engram_lm import RowPatch
from engram_lm.adapt import FactEdit
from engram_lm.serving.load import load_model
from engram_lm.training.data.documents import read_documents

MODEL = sys.argv[1] if len(sys.argv) > 1 else "runs/lessons/engram"
if not Path(MODEL).is_dir():
    sys.exit(f"{MODEL} is not there yet: run lesson 3 first, or name the folder of another model")
model, tokenizer = load_model(MODEL)
model.requires_grad_(False)
# A model this small passes little of a name on to later words, so the question ends with its subject.
fact = FactEdit(
    prompt="the language of Elbonia", answer=" Python", subject="Elbonia", paraphrases=("they speak in Elbonia",),
)  # fmt: skip
text = read_documents(max_bytes=100_000).documents[0].text


def next_token(prompt):
    """Name the likeliest next token."""
    with torch.no_grad():
        return tokenizer.decode(model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())


before = {name: value.clone() for name, value in model.state_dict().items()}
print(f"before: {fact.prompt!r} goes on with {next_token(fact.prompt)!r}")

# %% Fit the rows. The model is not changed yet; a patch is a file of a few kilobytes.

patch = RowPatch.fit_facts(model, tokenizer, [fact], reference=text, title="languages")
patch.save("runs/lessons/languages.safetensors")
patch.apply(model)
print(f"with the patch: it goes on with {next_token(fact.prompt)!r}")
print(patch.proof(model, text, tokenizer=tokenizer, max_windows=8))

# %% Take it back: all rows are the ones that were there before.

patch.revert(model)
print(f"taken back: it goes on with {next_token(fact.prompt)!r}")
assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
print(f"write facts by hand: engram-lm explore {MODEL}")
