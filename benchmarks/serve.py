"""What memory costs an engine that serves: the committed numbers of ``engram-lm bench serve``, in vLLM's environment.

    make test-vllm ARGS=--version            # makes the environment
    .venv/vllm/bin/python benchmarks/serve.py --folder DISK --out benchmarks/results/serve.json
    .venv/vllm/bin/python benchmarks/serve.py --cases dense --out benchmarks/results/serve.json

Each case is one call of the command. With --cases only these are measured, and what the file says of the others is
kept. --folder holds the models, which are written once; the case "tiny" writes its table of 10 GB twice, because what
is read cold must not be mapped by the arms that are warm.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

CASES = {
    # A dense backbone, and one with experts and four streams: what memory costs where it is in memory.
    "dense": "bench-dense --dtype float32 --requests 24 --new-tokens 32 --passes 3 --remote-requests 1 "
    "--arms none,none_again,device,host,mmap,mmap_cold,file,remote",
    "streams": "bench-moe --dtype float32 --requests 16 --new-tokens 32 --passes 4 --arms none,none_again,device,mmap",
    # Batches of transformers take several times as long.
    "dense_hf": "bench-dense --dtype float32 --requests 16 --new-tokens 32 --passes 2 --arms none,mmap,hf,hf_none",
    "streams_hf": "bench-moe --dtype float32 --requests 16 --new-tokens 32 --passes 1 --arms none,mmap,hf,hf_none",
    # A table that is larger than what memory has to spare for it.
    "tiny": "tiny --table-gigabytes 10 --requests 16 --new-tokens 32 --passes 3 --remote-requests 1 "
    "--arms none,none_again,mmap,mmap_cold,file,file_cold,remote",
}
"""Name of a case → arguments of the command."""
FOLDERS = {"dense": "dense", "dense_hf": "dense", "streams": "streams", "streams_hf": "streams", "tiny": "tiny"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--folder", help="where models and tables are written and kept; on a disk, not in memory")
    arguments = parser.parse_args()
    out = None if arguments.out is None else Path(arguments.out)
    results = {}
    if out is not None and out.exists():
        results = {row["case"]: row for row in json.loads(out.read_text())["results"]}
    with tempfile.TemporaryDirectory() as temporary:
        for case in arguments.cases:
            folder = Path(arguments.folder or temporary) / FOLDERS[case]
            command = ["bench", "serve", *CASES[case].split(), "--folder", str(folder), "--json"]
            done = subprocess.run(
                [sys.executable, "-m", "engram_lm", *command], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout)
            results[case] = {"case": case, "command": f"engram-lm bench serve {CASES[case]}", **found}
            for arm in found["arms"]:
                print(json.dumps({"case": case, **arm}), flush=True)
            if out is not None:
                harness.write(out, "serve", [results[name] for name in CASES if name in results])


if __name__ == "__main__":
    main()
