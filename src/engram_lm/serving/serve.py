"""``engram-lm serve``: a model behind the protocol of OpenAI, by vLLM's own server."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tyro

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import read_json, user_path
from engram_lm.serving.load import ModelFlags, model_folder
from engram_lm.serving.vllm.adapted_names import ADAPTED, OPTION
from engram_lm.serving.vllm.version import InstalledVllm, require_vllm
from engram_lm.threads import allowed_cores

_SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""vLLM's server as a module, which starts where the ``vllm`` command does not; it takes the model as ``--model``."""
_COMMAND = "vllm.entrypoints.cli.main"
"""What the ``vllm`` command is."""
_TABLES, _MORE = "engram_tables", "--additional-config"
"""A key of vLLM's additional configuration that our models read, and its flag."""
_CONFIG_BYTES = 16 << 20
"""The largest config.json that is downloaded."""
_FEW_CORES = 4
"""Up to this many cores, all compute. With more, vLLM binds threads to cores and keeps one for its scheduler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(ModelFlags):
    """Serve a model to programs that speak the protocol of OpenAI: completions, chats, streams.

    The server is vLLM's own, and takes the place of this process. The line that starts it is printed first, and does
    the same without this command. What follows -- on the command line is given to vLLM as it stands.

    Examples::

        engram-lm serve runs/quickstart
        engram-lm serve runs/quickstart --table-tier mmap --port 8001 -- --max-num-seqs 64
        engram-lm serve Qwen/Qwen3-0.6B --adapter runs/adapt-cpu/memory
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, such as a quickstart run, or a repository of the Hugging Face Hub."""
    host: str | None = None
    """Address to listen at; all addresses of this machine unless given."""
    port: int = 8000
    """Port to listen at."""
    served_model_name: str | None = None
    """What requests call the model; MODEL as it was written unless given."""
    api_key: str | None = None
    """A key that every request must carry. Other users of this machine may see it in the list of processes; they do
    not see the variable VLLM_API_KEY."""
    chat_template: Path | None = None
    """File of a chat template, for a tokenizer without one. Without any, only completions are answered."""
    table_tier: Annotated[str | None, tyro.conf.arg(metavar="device|host|mmap|file|remote|auto")] = None
    """Where the memory tables are read from: loaded with the model (device), loaded as they are stored (host), left in
    their files (mmap, file), on the machine of a --table-source (remote), or what suits the machine (auto, the
    default)."""
    dry_run: bool = False
    """Print the line that starts the server, and start nothing."""
    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What is given to vLLM as it stands."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch:
            raise ConfigError(
                "vLLM reads the tables of files alone, so --patch is not for this command; put the patches into the "
                "folder (engram-lm patch apply) and write them into its tables (engram-lm patch merge FOLDER --fold)"
            )
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port is a number from 1 to 65535, not {self.port}")
        if self.additional_config() and any(_names(word, _MORE, "-ac") for word in self.arguments):
            raise ConfigError(
                f"{_MORE} after -- would replace what --adapter and the table flags say; put "
                f"{json.dumps(self.additional_config())} into it and leave them out"
            )

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        """Parse a command line, up to ``--``."""
        own, rest = list(arguments), list[str]()
        if "--" in own:
            own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
        chosen = tyro.cli(cls, prog=prog, args=own, config=(tyro.conf.FlagCreatePairsOff,))
        return dataclasses.replace(chosen, arguments=tuple(rest))

    def run(self) -> int:
        """Become the server, or print how it is started.

        Raises:
            MissingExtraError: vLLM is not installed.
            ConfigError: It has another version, or there is no such model.
        """
        vllm = require_vllm("this command starts the server of", "engram-lm generate needs neither")
        words = self.words(vllm)
        variables = self.variables(vllm, os.environ)
        shown = {name: "..." if name == "VLLM_API_KEY" else value for name, value in variables.items()}
        print(
            " ".join([*(f"{name}={value}" for name, value in shown.items()), shlex.join(words)]),
            file=sys.stdout if self.dry_run else sys.stderr,
            flush=True,
        )
        if self.dry_run:
            return 0
        # The command "vllm" need not be on the path of a shell that did not activate this environment.
        module = [_COMMAND, *words[1:]] if words[0] == "vllm" else words[2:]
        os.execve(sys.executable, [sys.executable, "-m", *module], os.environ | variables)

    def words(self, vllm: InstalledVllm) -> list[str]:
        """Return the command line that starts the server, word by word, with the vLLM that is installed."""
        from engram_lm.adapt.patch_folder import refuse_patches

        model, config = self._find()
        for folder in (model, self.adapter):
            if folder is not None:
                refuse_patches(folder, "vLLM")
        architectures = config.get("architectures") or []
        has_memory = any(str(name).startswith(ADAPTED) for name in architectures) or _holds_adapters(model)
        self.check_places(model, has_memory=has_memory)
        words = ["vllm", "serve", model] if vllm.name == "vllm" else ["python", "-m", _SERVER, "--model", model]
        if model != self.model or self.served_model_name:
            words += ["--served-model-name", self.served_model_name or self.model]
        # vLLM would round such a model to 16 bits, and give other tokens than transformers does.
        if (config.get("dtype") or config.get("torch_dtype")) == "float32":
            words += ["--dtype", "float32"]
        if self.host is not None:
            words += ["--host", self.host]
        if self.port != 8000:
            words += ["--port", str(self.port)]
        if self.chat_template is not None:
            words += ["--chat-template", str(self.chat_template)]
        more = self.additional_config()
        if more:
            words += [_MORE, json.dumps(more)]
        return [*words, *self.arguments]

    def variables(self, vllm: InstalledVllm, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that the server gets beside those of ``environment``."""
        found = {} if self.api_key is None else {"VLLM_API_KEY": self.api_key}
        bind = "VLLM_CPU_OMP_THREADS_BIND"
        # Where vLLM binds threads to cores, it also decides how many there are.
        is_own_number = "OMP_NUM_THREADS" in environment or allowed_cores() <= _FEW_CORES
        if vllm.is_for_cpus and bind not in environment and is_own_number:
            found[bind] = "nobind"
        return found

    def additional_config(self) -> dict[str, Any]:
        """What vLLM is told of the memory: an adapter, and where tables are read from; empty where nothing is said."""
        usual = {"table_cache_bytes": 0, "table_cache_policy": "clock"}
        options = {"table_tier": self.table_tier, **self.table_options()}
        tables = {
            name.removeprefix("table_"): str(value) if isinstance(value, Path) else value
            for name, value in options.items()
            if value not in (None, usual.get(name))
        }
        more: dict[str, Any] = {} if self.adapter is None else {OPTION: self.adapter}
        return more | ({_TABLES: tables} if tables else {})

    def _find(self) -> tuple[str, dict[str, Any]]:
        """The model as vLLM is given it, and what its ``config.json`` says."""
        path = user_path(self.model)
        if path.is_dir():
            return str(path), read_json(model_folder(path) / "config.json")
        from engram_lm.adapt.hub import files_of

        config = files_of(self.model).fetch("config.json", _CONFIG_BYTES)
        if config is None:
            raise CheckpointError(f"{self.model} has no config.json, so it is not a transformers model")
        return self.model, read_json(config)


def _names(word: str, *flags: str) -> bool:
    """Whether a word of a command line is one of some flags, as vLLM reads them: ``--a_b.c=d`` is ``--a-b``."""
    return word.partition("=")[0].partition(".")[0].replace("_", "-") in flags


def _holds_adapters(model: str) -> bool:
    """Whether a folder holds the adapters of its model beside it, as those of trainers do."""
    from engram_lm.adapt.adapter import CONTAINER

    return (Path(model) / CONTAINER).is_dir()
