"""``engram-lm join``: a model of others and its memory adapters as one folder, which vLLM serves like any model."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import tyro

from engram_lm.adapt.adapter import CONTAINER
from engram_lm.adapt.folder import FILES, BaseModel, LocalFiles, read_adapter
from engram_lm.adapt.hub import files_of
from engram_lm.adapt.patch_folder import refuse_patches
from engram_lm.errors import CheckpointError
from engram_lm.files import new_folder, read_json, user_path
from engram_lm.serving.vllm.adapted_names import ADAPTED
from engram_lm.training.assembly import locate

_CONFIG, _WEIGHTS, _INDEX, _CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
# Transformers looks for files of certain names, and would load these without the memory and without a word.
_RENAMED = "base-"
_MOST_BYTES = 1 << 50

_PAGE = """\
# {base} with conditional memory

`{base}` and {adapters}, for vLLM: with `engram-lm` installed beside it, `vllm serve THIS_FOLDER` serves the model
with the memory. For transformers, load the model and then the memory:

```python
model = AutoModelForCausalLM.from_pretrained("{base}")
adapter = engram_lm.MemoryAdapter.from_pretrained(model, "THIS_FOLDER/{first}")
```
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """Put a model and its memory adapters into one folder, which `vllm serve` serves without a flag.

    The weights of the model and the tables of the adapters are links to where they lie, unless --copy is given.

    Examples::

        engram-lm join Qwen/Qwen3-0.6B my-served-model --adapter runs/adapt-cpu/adapter
        vllm serve my-served-model
    """

    base: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model that the adapters were made for, or its repository on the Hugging Face Hub."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to make. It must be missing or empty."""
    adapter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER|REPOSITORY")]
    """The adapter; or several, whose updates are added in this order."""
    copy: bool = False
    """Copy all files, so that the folder can be moved to another machine."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Write the folder and say what is in it."""
        architecture = join(self.base, self.adapter, self.out, copy=self.copy)
        if self.json:
            print(json.dumps({"out": str(self.out), "architecture": architecture, "num_adapters": len(self.adapter)}))
            return 0
        print(f"model           {self.out}, {architecture}")
        print(f"serve           vllm serve {self.out}")
        return 0


def join(base: str, adapters: tuple[str, ...], out: Path, *, copy: bool = False) -> str:
    """Write a model of others and its adapters as one folder for vLLM; return its architecture.

    Args:
        base: Folder or repository of the model.
        adapters: Folders or repositories of adapters, in the order in which their updates are added.
        out: A new or empty folder.
        copy: Whether to copy files that are linked otherwise.

    Raises:
        CheckpointError: The model has no weights as safetensors or names no single architecture, or an adapter lacks
            a file or is malformed.
        MismatchError: An adapter was made for another model or tokenizer.
        OSError: The folder cannot be written, or holds something.
        RemoteError: The Hub cannot be reached.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = _folder(base)
    values = read_json(folder / _CONFIG, advice="name the folder of a Hugging Face model")
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CheckpointError(
            f"{folder / _CONFIG}: expected the name of one architecture, found {architectures!r:.100}"
        )
    if architectures[0].startswith(ADAPTED):
        raise CheckpointError(
            f"{folder} holds {architectures[0]}, which has memory already; join the model that the adapter was made for"
        )
    config: Any = AutoConfig.from_pretrained(folder)
    text = config.get_text_config(decoder=True)
    model = BaseModel(
        model_type=str(config.model_type),
        name=base,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with new_folder(out) as aside:
        for name, source in _files(folder).items():
            _put(source, aside / name, copy)
        names = [f"{CONTAINER}/{index:02d}" for index in range(len(adapters))]
        for name, adapter in zip(names, adapters, strict=True):
            files = files_of(adapter)
            if isinstance(files, LocalFiles):
                refuse_patches(files.folder, "vLLM")
            read_adapter(files, model).spec.bind(tokenizer)
            (aside / name).mkdir(parents=True)
            for part in FILES:
                path = files.fetch(part, _MOST_BYTES)
                if path is not None:
                    _put(path, aside / name / part, copy)
        adapted = ADAPTED + architectures[0]
        (aside / _CONFIG).write_text(json.dumps({**values, "architectures": [adapted]}, indent=2), encoding="utf-8")
        page = _PAGE.format(base=base, adapters=" and ".join(f"`{adapter}`" for adapter in adapters), first=names[0])
        (aside / _CARD).write_text(page, encoding="utf-8")
    return adapted


def _folder(base: str) -> Path:
    path = user_path(base)
    if path.is_dir() or isinstance(files_of(base), LocalFiles):
        return path
    from huggingface_hub import snapshot_download

    place, options = locate(base)
    return Path(
        snapshot_download(place, **options, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    )


def _files(folder: Path) -> dict[str, Path]:
    """Find the files of a model, by the names that they get beside its adapters."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        weights = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else {_WEIGHTS}
    else:
        weights = {_WEIGHTS}
    for name in sorted(weights):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}; vLLM reads the weights of a model from safetensors")
    found = {f"{_RENAMED}{name}": folder / name for name in sorted(weights)}
    for path in sorted(folder.iterdir()):
        own = path.name in (_CONFIG, _INDEX, _CARD) or path.name.startswith(".")
        if path.is_file() and not own and path.suffix not in _OTHER_WEIGHTS:
            found[path.name] = path
    return found


def _put(source: Path, place: Path, copy: bool) -> None:
    if copy:
        shutil.copyfile(source, place)
    else:
        os.symlink(source.resolve(), place)
