"""One pass over a long text for all analyses: seconds, forward passes, and peak memory beside the stated budget.

    python benchmarks/analysis.py --out benchmarks/results/analysis.json

The model is ``engram-nano`` with random weights: what is measured does not depend on what it learned. Each set of parts
runs in a process of its own, so that its peak is its own; the peak of the model's forward passes alone is measured too
(``none``), since the budget is for what comes on top of that. The text is the Python standard library, from the start
again where it ends.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import harness

PARTS = ("none", "gates", "gates,lens,cka,rows")
LENGTH = 256


def measure_parts(parts: str, num_tokens: int, memory_mib: int) -> dict[str, Any]:
    """Read the text with some parts, in this process."""
    import numpy as np
    import torch

    from engram_lm import EngramForCausalLM, EngramLMConfig
    from engram_lm.analysis import find_subject
    from engram_lm.analysis.part import AnalyzeOptions
    from engram_lm.analysis.run import analyze
    from engram_lm.training.data.documents import Document, pack, read_documents
    from engram_lm.training.data.tokenizer import train_tokenizer

    corpus = read_documents(max_bytes=3_000_000)
    tokenizer = train_tokenizer((document.text for document in corpus.documents[:40]), 4096)
    once = len(pack(corpus.documents, tokenizer))
    documents: list[Document] = list(corpus.documents) * -(-num_tokens // once)
    torch.manual_seed(0)
    config = EngramLMConfig.preset("engram-nano", tokenizer=tokenizer)
    model = EngramForCausalLM(config).eval()
    subject = find_subject(model, tokenizer, name="nano")
    passes: list[int] = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    before = _peak_bytes()
    started = time.perf_counter()
    if parts == "none":
        tokens = np.resize(pack(corpus.documents, tokenizer), num_tokens)
        with torch.no_grad():
            for start in range(0, num_tokens - LENGTH * 16 + 1, LENGTH * 16):
                piece = torch.from_numpy(tokens[start : start + LENGTH * 16].astype(np.int64))
                model(input_ids=piece.view(16, LENGTH), use_cache=False)
    else:
        options = AnalyzeOptions(
            parts=tuple(parts.split(",")), max_tokens=num_tokens, length=LENGTH, budget_bytes=memory_mib << 20
        )
        analyze([subject], documents, options)
    return {
        "parts": parts,
        "num_tokens": num_tokens,
        "window_tokens": LENGTH,
        "memory_mib": memory_mib,
        "seconds": time.perf_counter() - started,
        "num_forward_passes": len(passes),
        "num_tokens_forward": sum(passes),
        "peak_mib_before": before / 2**20,
        "peak_mib": _peak_bytes() / 2**20,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--parts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.parts:  # one of the processes
        print(json.dumps(measure_parts(arguments.parts, arguments.tokens, arguments.memory_mib)))
        return
    results = []
    for parts in PARTS:
        call = [sys.executable, __file__, "--parts", parts, "--tokens", str(arguments.tokens)]
        call += ["--memory-mib", str(arguments.memory_mib)]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ})
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1])
    if arguments.out:
        harness.write(arguments.out, "analysis", results)


if __name__ == "__main__":
    main()
