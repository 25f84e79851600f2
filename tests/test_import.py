"""``import engram_lm`` is fast and light, and transformers' Auto classes know the model in any order of imports."""

import importlib
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import engram_lm

PROMISED = [
    "EngramConfig",
    "EngramForCausalLM",
    "EngramLMConfig",
    "EngramLayer",
    "HashSpec",
    "MemoryAdapter",
    "RowPatch",
    "Table",
    "TokenHistory",
    "TokenMap",
    "attach",
    "open_table",
]

USE_AUTO_CLASSES = """
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(FOLDER)
assert type(config).__module__.startswith("engram_lm."), type(config)
assert type(AutoConfig.for_model("engram_lm")) is type(config)
assert type(config) in AutoModelForCausalLM._model_mapping
model_class = AutoModelForCausalLM._model_mapping[type(config)]

import engram_lm

assert type(config) is engram_lm.EngramLMConfig
assert model_class is engram_lm.EngramForCausalLM
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("engram_lm")]
"""


def run_fresh(script: str) -> None:
    """Run a script in an interpreter that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_the_promised_ones():
    assert engram_lm.__all__ == PROMISED
    assert list(engram_lm._MODULES) == PROMISED
    assert set(PROMISED) <= set(dir(engram_lm))


@pytest.mark.parametrize("name", PROMISED)
def test_public_name_is_exported_by_its_folder(name):
    folder = importlib.import_module(engram_lm._MODULES[name])
    assert name in folder.__all__
    assert getattr(engram_lm, name) is getattr(folder, name)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'HashSpek'.*HashSpec"):
        engram_lm.HashSpek  # noqa: B018


def test_installed_version_is_the_version_of_the_code():
    assert importlib.metadata.version("engram-lm") == engram_lm.__version__


def test_import_engram_loads_nothing_heavy():
    run_fresh(
        "import engram_lm, sys\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'matplotlib', 'tyro', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_transformers_alone_does_not_load_the_model():
    run_fresh(
        "import engram_lm, sys\n"
        "from transformers import AutoConfig\n"
        "assert 'engram_lm' in AutoConfig.for_model.__globals__['CONFIG_MAPPING']\n"
        "assert 'engram_lm.model' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import engram_lm, transformers",
        "import transformers, engram_lm",
        "import transformers.models.auto.configuration_auto, engram_lm",
        "import transformers.models.auto.modeling_auto, engram_lm",
        "import engram_lm, transformers.modeling_utils",
        "import engram_lm.registration, engram_lm; engram_lm.registration.prepare()",
        "import engram_lm.model",
    ],
)
def test_auto_classes_find_the_model_in_any_order_of_imports(imports, tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text('{"model_type": "engram_lm"}', encoding="utf-8")
    run_fresh(f"import sys\n{imports}\nFOLDER = {str(tmp_path)!r}\n{USE_AUTO_CLASSES}")


def test_import_of_the_model_alone_registers_it():
    run_fresh(
        "from engram_lm.model import EngramForCausalLM, EngramLMConfig\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "assert type(AutoConfig.for_model('engram_lm')) is EngramLMConfig\n"
        "assert AutoModelForCausalLM._model_mapping[EngramLMConfig] is EngramForCausalLM\n"
    )
