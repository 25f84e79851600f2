"""``engram-lm plan``: instant, and right."""

import json
import subprocess
import sys

import pytest
import torch
from tests.small_model import BACKBONE, MEMORY

from engram_lm.cli import main
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.optimizers import RowAdam, sort_parameters


def planned(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_stable_keys_of_the_paper_s_model(capsys):
    found = planned(capsys, "engram-27b")
    parameters = found["parameters"]
    assert parameters["total"] == pytest.approx(26.7e9, rel=0.01)
    assert parameters["active"] == pytest.approx(3.8e9, rel=0.01)
    assert parameters["memory"] == 5_792_338_560
    assert parameters["vocabulary"] == 129_280 * 2560
    assert parameters["sparse"] == parameters["total"] - parameters["active"] - parameters["vocabulary"]
    assert parameters["stored"] == parameters["total"] + parameters["vocabulary"]  # embedding and head
    assert found["table"]["rows"] == [36_199_972, 36_204_260]
    assert found["table"]["bytes"]["bfloat16"] == 2 * parameters["memory"]
    assert found["table"]["bytes"]["float8_e4m3"] == (36_199_972 + 36_204_260) * (80 + 3)
    assert found["reads_per_token"] == {
        "rows": 32,
        "bytes": {"float32": 32 * 320, "bfloat16": 5120, "float8_e4m3": 32 * 83},
    }
    assert found["flops_per_token"]["training"] == 3 * found["flops_per_token"]["inference"]
    # 576 numbers per token and block: the latents of multi-head latent attention.
    assert found["decode"]["kv_cache_bytes_per_token"] == 30 * 576 * 2
    assert found["optimizer_bytes"]["total_adamw"] == 8 * parameters["stored"]
    build = found["build"]
    assert build["initialize_seconds"] == pytest.approx(parameters["stored"] / build["values_per_second"])
    assert 1e7 < build["values_per_second"] < 1e11 and 0 < build["hash_seconds"] < 60


def test_tokens_in_the_cache_of_an_engine(capsys, tmp_path, build):
    found = planned(capsys, "engram-27b")["vllm_cache"]["bfloat16"]
    # 32 heads of 192 (keys are larger than values) in 30 blocks; value, gates of four streams and a code in 2 of them.
    memory = (2560 * 2 + 4 * 4 + 4 + 12) + (2560 * 2 + 4 * 4)
    assert found["memory_bytes_per_token"] == memory
    assert found["bytes_per_token"] == 30 * 32 * 2 * 192 * 2 + memory
    assert found["tokens_per_gib"] == (1 << 30) // found["bytes_per_token"]
    assert planned(capsys, "dense-nano")["vllm_cache"]["float32"]["memory_bytes_per_token"] == 0
    build(backbone={"v_head_dim": 640}).config.save_pretrained(tmp_path)
    assert planned(capsys, str(tmp_path))["vllm_cache"]["float32"] is None
    assert main(["plan", "engram-tiny"]) == 0
    assert "18,380 tokens in a GiB" in " ".join(capsys.readouterr().out.split())


def test_state_of_decoding_is_what_decoding_keeps(capsys, tmp_path, build):
    model = build(backbone={"num_streams": 4}, memory={"num_streams": 4}).bfloat16()
    model.config.save_pretrained(tmp_path)
    length = 17
    found = planned(capsys, str(tmp_path), "--context", str(length), "--batch-size", "3")["decode"]
    with torch.no_grad():
        cache = model(torch.randint(2, 280, (1, length)), use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert found["kv_cache_bytes_per_sequence"] == sum(tensor.nbytes for tensor in tensors)
    states = next(layer.memory_states for layer in cache.layers if getattr(layer, "memory_states", None))
    (state,) = states.values()
    kept = [state.history.values, *(window.values for window in state.windows.values())]
    assert found["memory_state_bytes_per_sequence"] == sum(tensor.nbytes for tensor in kept)
    assert found["bytes_of_batch"] == 3 * found["bytes_per_sequence"]


def test_optimizer_state_of_tables_is_what_the_optimizer_holds(capsys, tmp_path, build):
    model = build()
    model.config.save_pretrained(tmp_path)
    tables = [table.weight for table in model.tables.values()]
    optimizer = RowAdam(tables)
    model.train()(torch.randint(2, 280, (1, 8)), labels=torch.randint(2, 280, (1, 8))).loss.backward()
    optimizer.step()
    held = sum(value.nbytes for table in tables for value in optimizer.state[table].values() if value.dim())
    assert planned(capsys, str(tmp_path / "config.json"))["optimizer_bytes"]["tables_adam"] == held


def test_a_checkpoint_s_folder_is_planned_as_it_was_built(capsys, tmp_path, build):
    experts = {"first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = build(backbone={"num_streams": 4, **experts}, memory={"num_streams": 4})
    model.save_pretrained(tmp_path)
    found = planned(capsys, str(tmp_path))["parameters"]
    assert found["stored"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_hand_written_file_needs_no_hash_spec(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**BACKBONE, "vocab_size": 300, "memory": EngramConfig(**MEMORY).to_dict()}))
    assert planned(capsys, str(path))["table"]["rows_per_head"] == 97


def test_a_ratio_divides_the_budget_anew(capsys):
    found = planned(capsys, "engram-27b", "--ratio", "0.5")
    assert found["allocation"]["num_experts"] == 39
    assert found["parameters"]["total"] == pytest.approx(26.7e9, rel=0.005)
    assert found["parameters"]["memory"] == pytest.approx(11.2e9, rel=0.02)


def test_for_people_it_prints_a_table(capsys):
    assert main(["plan", "engram-nano"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "parameters, total",
        "6.70 M",
        "read per token",
        "key-value cache",
        "optimizer state",
        "time to build",
    ):
        assert words in printed


def test_it_neither_builds_the_model_nor_loads_its_code():
    script = (
        "import sys, torch\n"
        "from engram_lm.cli import main\n"
        "class Counter(torch.utils._python_dispatch.TorchDispatchMode):\n"
        "    largest = 0\n"
        "    def __torch_dispatch__(self, function, types, args=(), kwargs=None):\n"
        "        result = function(*args, **(kwargs or {}))\n"
        "        if isinstance(result, torch.Tensor): Counter.largest = max(Counter.largest, result.numel())\n"
        "        return result\n"
        "with Counter():\n"
        "    assert main(['plan', 'engram-40b', '--json']) == 0\n"
        "assert Counter.largest <= 1 << 20, Counter.largest\n"
        "assert 'engram_lm.model.modeling' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SIZES = '"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("1" * 5000, "is not readable JSON"),
        ("[1]", "not an object"),
        ('{"model_type": "llama"}', "configuration of a 'llama' model"),
        ('{"num_hiden_layers": 3}', "did you mean 'num_hidden_layers'"),
        ("{}", "says at least hidden_size, num_hidden_layers, vocab_size"),
        (f'{{{SIZES}, "num_streams": 0}}', "num_streams must be at least 1, not 0"),
        (f'{{{SIZES}, "kv_lora_rank": "wide"}}', "kv_lora_rank"),
        (f'{{{SIZES}, "id2label": 5}}', "config.json: "),
        (f'{{{SIZES}, "has_experts": true}}', "config.json: "),
        ('{"hidden_size": 64, "num_hidden_layers": 1000000000, "vocab_size": 100}', "must be from 1 to 10000"),
        ('{"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000000000000, "memory": {"hidden_size": 64}}',
         "vocab_size must be at most"),
        (f'{{{SIZES}, "memory": {{"hidden_size": 64, "memory_dims": 64}}}}', "did you mean 'memory_dim'"),
        (f'{{{SIZES}, "memory": {{"hidden_size": 64, "bias": 5}}}}', "bias must be true or false"),
        (f'{{{SIZES}, "memory": {{"hidden_size": 64, "memory_dim": 1{"0" * 400}}}}}', "memory_dim must be a whole"),
        (f'{{{SIZES}, "memory": {{"hidden_size": 64, "orders": [2, 1000000000]}}}}', "an order is at most 64"),
        (f'{{{SIZES}, "memory": {{"hidden_size": 64, "num_heads": 1000000}}}}', "heads over all orders"),
        (f'{{{SIZES}, "memory": {{"hidden_size": 64, "memory_dim": 64, "layers": [7]}}}}', "reach past the model's 2"),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_files_that_are_no_configuration_are_refused_in_words(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["plan", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_field_that_nothing_reads_is_named(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(f'{{{SIZES}, "foo_bar": 3}}')
    assert main(["plan", str(path), "--json"]) == 0
    assert "'foo_bar'" in capsys.readouterr().err


def test_a_folder_of_a_preset_s_name_does_not_hide_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engram-nano").mkdir()
    assert planned(capsys, "engram-nano")["parameters"]["total"] == 6_703_709
    assert main(["plan", "./engram-nano"]) == 1
    assert "there is no file engram-nano/config.json" in capsys.readouterr().err


def test_every_number_of_the_nano_model(capsys):
    found = planned(capsys, "engram-nano")
    model = EngramForCausalLM(EngramLMConfig.preset("engram-nano"))
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    tables = sum(parameter.numel() for name, parameter in parameters.items() if "memory_tables" in name)
    muon = sum(parameter.numel() for parameter in sort_parameters(model).matrices.values())
    assert found["context_tokens"] == 1024
    assert found["parameters"]["stored"] == found["parameters"]["total"] == total
    assert found["weights_bytes"] == {"float32": 4 * total, "bfloat16": 2 * total}
    assert found["table"]["bytes"] == {"float32": 4 * tables, "bfloat16": 2 * tables, "float8_e4m3": tables // 8 * 9}
    assert found["optimizer_bytes"] == {
        "backbone_adamw": 8 * (total - tables),
        "backbone_muon": 8 * (total - tables) - 4 * muon,
        "tables_adam": 8 * tables,
        "total_adamw": 8 * total,
    }


def test_unknown_names_and_flags_are_refused(capsys):
    assert main(["plan", "engram-27"]) == 1
    assert "did you mean 'engram-27b'" in capsys.readouterr().err
    assert main(["plan", "nowhere/config.json"]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert main(["plan", "engram-27b", "--context", "0"]) == 2
    assert main(["plan", "engram-27b", "--ratio", "1.5"]) == 1
    assert main(["plan"]) == 2
