"""The example notebook runs as it is."""

import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / "examples" / "analysis.ipynb"
# In a process of its own: what Jupyter warns of is not ours.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
print(sum(output.output_type in ("execute_result", "display_data") for output in outputs))
assert not [output for output in outputs if output.output_type == "error"]
"""


@pytest.mark.timeout(300)
def test_example_notebook_runs_and_every_cell_shows_something(analyzed, tmp_path):
    pytest.importorskip("nbclient", reason="pip install engram-lm[dev]")
    # The machine's own settings of Jupyter and IPython stay out of it.
    own = {name: str(tmp_path) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = {
        **os.environ,
        **own,
        "ENGRAM_MODEL": str(analyzed.memory),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 8
