"""Main paths work where Linux's calls are missing: macOS and Windows, imitated by taking away what they lack."""

import ast
import pathlib
import subprocess
import sys

import pytest
from tests.other_systems import UNIX_ONLY

ROOT = pathlib.Path(__file__).parents[1]
BEGINNING = (
    "import sys; sys.path[:0] = [sys.argv.pop(1)]; from tests.other_systems import become; become(sys.argv.pop(1))\n"
)

TABLES = """
import threading, torch
from contextlib import closing
from pathlib import Path
from engram_lm.cli import main
from engram_lm.files import lock_file, new_folder, replacing_folder
from engram_lm.tables import open_table
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed_writer import write_packed

codec, values = RowCodec(64, torch.float32), torch.randn(5000, 64)
def records(first, last): return codec.encode(values[first:last])
write_packed("layer-1.safetensors", records, codec, len(values))
write_packed("again/layer-1.safetensors", records, codec, len(values), resume_key="once")
assert Path("again/layer-1.safetensors").read_bytes() == Path("layer-1.safetensors").read_bytes()
assert [path.name for path in Path("again").iterdir()] == ["layer-1.safetensors"]
rows = torch.randint(5000, (700,))
for tier in ("host", "mmap", "file", "auto"):
    with closing(open_table("layer-1.safetensors", tier=tier)) as table:
        assert torch.equal(table.gather(rows), values[rows]), tier
with closing(open_table("layer-1.safetensors", tier="file", num_threads=8, read_ahead=False)) as table:
    found = {}
    def read(number): found[number] = table.gather(rows)
    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
    assert all(torch.equal(found[number], values[rows]) for number in range(4))
assert main(["table", "verify", "layer-1.safetensors"]) == 0
assert main(["table", "convert", "layer-1.safetensors", "rounded", "--dtype", "int8"]) == 0

with open("held", "ab") as one, open("held", "ab") as other:
    one.write(b"data"), one.flush()
    lock_file(one, wait=False)
    try:
        lock_file(other, wait=False)
    except BlockingIOError:
        pass
    else:
        raise AssertionError("two hold one file")
    assert one.tell() == 4 and open("held", "rb").read() == b"data"

Path("empty").mkdir()
for _ in range(2):
    with replacing_folder("empty", lambda there: None) as aside:
        (aside / "file").write_text("text")
assert [path.name for path in Path("empty").iterdir()] == ["file"]
assert main(["doctor"]) == 0
"""

RUNS = """
from pathlib import Path
from engram_lm.cli import main
Path("text").mkdir()
for number in range(8):
    Path("text", f"{number}.txt").write_text("the cat sat on the mat and said nothing at all\\n" * 60)
small = "--vocab-size 280 --hidden-size 32 --blocks 2 --rows-per-head 100 --tokens 500 --batch-size 2"
for _ in range(2):  # the second moves the first aside
    assert main(["quickstart", "--data", "text", *small.split(), "--sequence-length", "64", "--dtype", "float32"]) == 0
assert main(["eval", "runs/quickstart", "--data", "text", "--table-tier", "mmap"]) == 0
Path("r.toml").write_text('''
[model]
preset = "engram-nano"
memory = {rows_per_head = 100}
[tokenizer]
vocab_size = 280
[data]
sources = ["text"]
cache = "cache"
sequence_length = 32
[train]
num_steps = 2
batch_size = 2
''')
assert main(["train", "r.toml", "--out", "run", "--max-steps", "1"]) == 0
assert main(["train", "r.toml", "--out", "run", "--resume"]) == 0
assert main(["export", "run", "model"]) == 0
"""


@pytest.mark.parametrize("system", ["macos", "windows"])
@pytest.mark.parametrize("script", [TABLES, RUNS], ids=["tables", "runs"])
def test_nothing_is_used_that_another_system_lacks(script, system, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + script, str(ROOT), system],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_modules_that_only_unix_has_are_imported_where_they_may_be_missing():
    """At the top of a file they would end its import; vLLM and its measurements are for Linux."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found |= {(alias.name, path.name) for alias in node.names if alias.name in UNIX_ONLY}
    assert found == {("resource", "serve_worker.py")}
