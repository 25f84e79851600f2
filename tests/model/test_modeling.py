"""The reference model as a Hugging Face model: saving, loading, counting, refusing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.small_model import BACKBONE, MEMORY, checkpoint_activations
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import engram_lm
from engram_lm.errors import ConfigError, EngramError, MismatchError, TokenMapError
from engram_lm.hashing import TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.sizes import model_sizes
from engram_lm.training.optimizers import sort_parameters

IDS = torch.arange(2, 42).view(2, 20)


def test_memory_adds_its_update_to_the_residual_and_nothing_else(build):
    """Output minus input of a block's memory equals the layer's update; without memory the block is the plain one."""
    model, plain = build(), build(memory=False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "memory" not in k and k != "model.token_map"})
    with torch.no_grad():
        for block in model.config.memory_layers:
            memory = model.model.layers[block].memory
            memory.key_value.weight[-memory.config.hidden_size :] = 0
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("memory", [{}, {"tables": "shared", "layers": (0, 1, 2)}, {"kernel_size": 0}, False], ids=str)
def test_a_saved_model_loads_to_the_same_bits(build, tmp_path, memory):
    model = build(memory=memory)
    model.save_pretrained(tmp_path)
    for loaded in (EngramForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is EngramForCausalLM
        assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
        assert set(loaded.state_dict()) == set(model.state_dict())
    assert not list(tmp_path.glob("*.bin"))


def test_the_checkpoint_holds_the_whole_hash(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = engram_lm.HashSpec.from_config(tmp_path)
    assert spec.digest == model.hash_spec.digest
    assert all(isinstance(m, str) for row in config["hash_spec"]["multipliers"] for m in row)
    assert not {name for name in config if name.startswith("_")}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.token_map"], model.model.token_map)


def test_another_tokenizer_is_refused_with_both_digests(model, tokenizer, other_tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    EngramForCausalLM.from_pretrained(tmp_path, tokenizer=tokenizer)
    own, other = (TokenMap.from_tokenizer(t) for t in (tokenizer, other_tokenizer))
    with pytest.raises(MismatchError) as refusal:
        EngramForCausalLM.from_pretrained(tmp_path, tokenizer=other_tokenizer)
    assert own.digest in str(refusal.value) and other.digest in str(refusal.value)
    with pytest.raises(MismatchError):
        EngramForCausalLM(AutoConfig.from_pretrained(tmp_path)).bind_tokenizer(other_tokenizer)


def test_a_model_that_hashes_raw_tokens_keeps_to_its_tokenizer_too(tokenizer, other_tokenizer, tmp_path):
    config = EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(**MEMORY, token_map="raw"), **BACKBONE)
    assert config.spec.token_map == TokenMap.identity(len(tokenizer), tokenizer)
    model = EngramForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, tokenizer=tokenizer)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(EngramError, match="vocabulary"):
        loaded.check_tokenizer(other_tokenizer)


def test_a_changed_token_map_in_the_checkpoint_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.token_map"][5] = weights["model.token_map"][6]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises((MismatchError, TokenMapError)):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_a_model_built_from_a_configuration_file_asks_for_its_tokenizer(model, tokenizer, tmp_path):
    model.config.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(TokenMapError, match="bind_tokenizer"):
        fresh(IDS)
    fresh.bind_tokenizer(tokenizer)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IDS).logits, model(IDS).logits)


def test_a_checkpoint_with_tables_of_another_size_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.memory_tables.0.weight"] = weights["model.memory_tables.0.weight"][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=model.config.spec.digest):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_building_on_the_meta_device_allocates_nothing_and_loads_like_any_other(model, tokenizer, tmp_path):
    with torch.device("meta"):
        empty = EngramForCausalLM(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    model.save_pretrained(tmp_path)
    assert not any(p.is_meta for p in EngramForCausalLM.from_pretrained(tmp_path).parameters())


def test_shared_tables_are_one_table_read_by_different_rows(build):
    model = build(memory={"tables": "shared", "layers": (0, 2)})
    assert list(model.tables) == ["shared"]
    assert model.model.layers[0].memory.table is model.model.layers[2].memory.table
    spec = model.hash_spec
    assert not torch.equal(spec.rows(IDS, 0), spec.rows(IDS, 2))
    own = build(memory={"tables": "per_layer", "layers": (0, 2)})
    assert list(own.tables) == ["0", "2"]


@pytest.mark.parametrize(
    "memory", [{}, {"tables": "shared"}, {"kernel_size": 0, "gate": "none", "bias": True}, False], ids=str
)
@pytest.mark.parametrize("backbone", [{}, {"q_lora_rank": 12, "tie_word_embeddings": False}], ids=str)
def test_counted_sizes_are_those_of_the_built_model(build, memory, backbone):
    model = build(memory=memory, backbone=backbone)
    sizes = model_sizes(model.config, context=64)
    parameters = dict(model.named_parameters())
    assert sizes.total == sum(parameter.numel() for parameter in parameters.values())
    assert sizes.memory_tables == sum(p.numel() for n, p in parameters.items() if "memory_tables" in n)
    assert sizes.memory_layers == sum(p.numel() for n, p in parameters.items() if ".memory." in n)
    assert sizes.feed_forward == sum(p.numel() for n, p in parameters.items() if ".mlp." in n)
    assert sizes.attention == sum(p.numel() for n, p in parameters.items() if ".self_attn." in n)


def test_counted_flops_agree_with_torch_s_counter(build):
    from torch.utils.flop_counter import FlopCounterMode

    model = build(memory={"gate": "none", "kernel_size": 0})
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(IDS[:1])
    # Eager attention multiplies the masked half too: count the full context, 2 * 20 - 1 averaging to 20.
    assert counter.get_total_flops() == 20 * model_sizes(model.config, context=39).flops_per_token


def test_gates_and_hidden_states_are_returned_on_request(model):
    output = model(IDS, output_gates=True, output_hidden_states=True)
    assert [gate.shape for gate in output.gates] == [(2, 20, 1)] * 2
    assert len(output.hidden_states) == 4
    assert model(IDS).gates is None


def test_tokens_are_hashed_once_per_forward_for_all_layers(model, monkeypatch):
    calls = []
    spec = model.hash_spec
    encode = type(spec).encode
    monkeypatch.setattr(type(spec), "encode", lambda self, *a, **k: calls.append(1) or encode(self, *a, **k))
    model(IDS)
    assert calls == [1]


def test_loss_gradients_and_checkpointed_gradients_are_equal(build):
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            checkpoint_activations(model)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert gradients[0]["model.memory_tables.0.weight"].abs().sum() > 0


def test_checkpointed_gradients_are_right_with_a_cache_passed_in(build):
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            checkpoint_activations(model)
        cache = DynamicCache(config=model.config) if checkpointing else None
        model(IDS, labels=IDS, past_key_values=cache).loss.backward()
        gradients.append(model.model.layers[0].memory.conv_weight.grad)
    torch.testing.assert_close(*gradients)


def test_dense_table_gradients_suit_ordinary_optimizers(build):
    model = build(memory={"table_gradient": "dense"}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = model.tables["0"].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.tables["0"].weight, before)


def test_a_mask_of_pairs_is_refused_rather_than_ignored(model):
    with pytest.raises(MismatchError, match="attention_mask"):
        model(IDS, attention_mask=torch.zeros(2, 1, 20, 20))


def test_memory_needs_tokens_not_only_embeddings(model):
    embeddings = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="addressed by tokens"):
        model(inputs_embeds=embeddings)
    assert torch.equal(model(input_ids=IDS, inputs_embeds=embeddings).logits, model(IDS).logits)


def test_a_token_outside_the_vocabulary_is_refused(model):
    with pytest.raises((engram_lm.errors.TokenError, IndexError)):
        model(torch.tensor([[5, 300]]))


def test_configurations_that_contradict_themselves_are_refused(tokenizer, model):
    with pytest.raises(ConfigError, match="reach past"):
        EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(**{**MEMORY, "layers": (3,)}), **BACKBONE)
    with pytest.raises(ConfigError, match="streams"):
        EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(**{**MEMORY, "num_streams": 2}), **BACKBONE)
    with pytest.raises(ConfigError, match="for_tokenizer"):
        EngramLMConfig(memory=EngramConfig(**MEMORY).to_dict(), **BACKBONE)
    with pytest.raises(ConfigError, match="must be a Hugging Face one"):
        EngramLMConfig.for_tokenizer("a-tokenizer", EngramConfig(**MEMORY), **BACKBONE)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers", {"layers": [0, 1]}),
        ("orders", {"orders": [3, 4]}),
        ("num_heads", {"orders": [2, 3], "num_heads": 4}),
        ("tables", {"tables": "shared"}),
        ("seed", {"seed": 5}),
        ("rows", {"rows_per_head": 1_000_000}),
    ],
)
def test_a_hash_and_a_memory_that_contradict_each_other_are_refused(model, name, change):
    values = model.config.to_dict()
    values["memory"].update(change)
    with pytest.raises(ConfigError, match=f"contradict each other in {name}"):
        EngramLMConfig(**{k: v for k, v in values.items() if k != "model_type"})


@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": -100},
        {"kv_lora_rank": 0},
        {"q_lora_rank": 0},
        {"qk_nope_head_dim": -32},
        {"v_head_dim": None},
        {"max_position_embeddings": 0},
        {"num_hidden_layers": 0},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": float("nan")},
        {"stream_eps": 0.0},
        {"routed_scaling_factor": float("nan")},
        {"router_bias_speed": float("inf")},
        {"first_k_dense_replace": -3},
        {"num_mtp_layers": 1},
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        EngramLMConfig(**{**BACKBONE, **change})


def test_no_leading_dense_blocks_means_that_all_are_dense_or_none():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert not EngramLMConfig(**BACKBONE, **experts, first_k_dense_replace=None).has_experts
    assert EngramLMConfig(**BACKBONE, **experts, first_k_dense_replace=0).num_dense_layers == 0


def test_a_model_has_room_for_mixtures_of_experts(build):
    backbone = {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = build(backbone={**backbone, "n_group": 1, "topk_group": 1})
    output = model(IDS, output_router_logits=True)
    assert len(output.router_logits) == 2 and output.logits.isfinite().all()


@pytest.mark.parametrize("route", ["built", "copied", "loaded"])
def test_tables_are_told_from_other_parameters_however_the_model_came_about(model, route, tmp_path):
    if route == "copied":
        model = copy.deepcopy(model)
    elif route == "loaded":
        model.save_pretrained(tmp_path)
        model = EngramForCausalLM.from_pretrained(tmp_path)
    tables = [*sort_parameters(model).tables.values()]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(table)] for table in tables} == {"model.memory_tables.0.weight", "model.memory_tables.2.weight"}
    # The layers read the model's own tables, not those of the model they were copied from.
    model(IDS, labels=IDS).loss.backward()
    assert all(table.grad is not None for table in tables)
