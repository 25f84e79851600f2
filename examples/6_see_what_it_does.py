"""Lesson 6: see what a memory does with a text.

    python examples/3_engram_beside_its_twin.py && python examples/6_see_what_it_does.py [MODEL]

The gates say when the memory is heard, the N-grams say what opened them, and the model without its memory says what it
was good for. `engram-lm explore MODEL` shows all of it as a page to play with, `engram-lm analyze` as a report.
"""

import sys
from pathlib import Path

import numpy as np
import rich
import torch

from engram_lm.analysis import colored_gates, find_subject, gate_trace, nearest_ngrams, strongest
from engram_lm.evaluation.suppressing import suppressed
from engram_lm.serving.load import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "runs/lessons/engram"
if not Path(MODEL).is_dir():
    sys.exit(f"{MODEL} is not there yet: run lesson 3 first, or name the folder of another model")
TEXT = "def main(argv=None):\n    for name in sorted(names):\n        self.assertEqual(name, None)\n"
model, tokenizer = load_model(MODEL)

# %% When is the memory heard? Every token is colored by its gate.

trace = gate_trace(model, tokenizer, TEXT)
rich.print(colored_gates(trace))
block = trace.blocks[0]
for found in strongest(trace, block, k=5):
    print(f"gate {found.mean_gate:.2f}  {found.order}-gram {found.text!r}")

# %% What is it good for? The loss of each token with the memory, and with its update set to zero.

ids = torch.tensor([tokenizer(TEXT).input_ids])


def losses():
    """Compute the loss of each token, in nats."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


with_memory = losses()
with suppressed(model):
    without = losses()
gains = (without - with_memory).numpy()
for place in np.argsort(-gains)[:5]:
    print(f"memory saves {gains[place]:+.2f} nats on {trace.texts[place + 1]!r} after {trace.texts[place]!r}")

# %% What lies near what, and which tokens does it call for?

subject = find_subject(model, tokenizer)
rich.print(nearest_ngrams(subject, ids[0, -6:-4].tolist(), TEXT * 2, k=4))
print(f"play with it: engram-lm explore {MODEL}")
