"""The parts of an adaptation: its controls, its costs, and how its text is divided."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.small_model import BACKBONE

import engram_lm
from engram_lm import EngramConfig
from engram_lm.adapt.controls import EmbeddingMeans, one_row, permuted_hash, shuffled_rows
from engram_lm.adapt.decoder import find_decoder
from engram_lm.errors import ConfigError, DataError
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.studies.adaptation.arms import arm_kind, arm_recipe
from engram_lm.studies.adaptation.bench import matched_rank
from engram_lm.studies.adaptation.duration import duration_text, runs_left
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmOptions, MemoryOptions
from engram_lm.training.assembly import open_text
from engram_lm.training.base_model import AdaptedBase, lora_targets
from engram_lm.training.data.batches import Batches
from engram_lm.training.distribution import Ranks
from engram_lm.training.flops import flops_per_token
from engram_lm.training.loop import Trainer, TrainOptions
from engram_lm.training.loss import language_model_loss
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml

MEMORY = EngramConfig(hidden_size=32, layers=(0, 2), num_heads=2, memory_dim=24, rows_per_head=97)


def test_a_permuted_hash_reads_other_rows_at_every_position_and_stays_in_its_head():
    adapter = engram_lm.attach(small_model(), TOKENIZER, MEMORY)
    spec = adapter.spec
    tokens = torch.tensor([[5, 6, 7] * 20])
    rows = spec.rows_for_layers(spec.encode(tokens))[spec.layers[1]]
    moved = permuted_hash(spec)(2, rows)
    # The same N-gram again and again: one row of each head as it is, and a different one each time here.
    assert len(rows[0, 5::3, 0].unique()) == 1
    assert len(moved[0, 5::3, 0].unique()) == len(moved[0, 5::3, 0])
    starts = torch.tensor(spec.offsets(spec.layers[1]))
    sizes = torch.tensor(spec.primes[1])
    assert ((moved >= starts) & (moved < starts + sizes)).all()
    assert torch.equal(permuted_hash(spec)(2, rows[:, :7]), moved[:, :7])  # what comes later changes nothing


def test_a_permuted_hash_moves_the_rows_of_a_head_of_any_size():
    token_map = engram_lm.TokenMap.from_tokenizer(TOKENIZER)
    for wanted in (2, 97, 1_000_003):
        spec = dataclasses.replace(MEMORY, rows_per_head=wanted).hash_spec(token_map, pad_token_id=1)
        starts = torch.tensor(spec.offsets(spec.layers[0]))
        moved = permuted_hash(spec)(0, starts.expand(1, 2, -1))
        assert (moved[0, 0] == starts).all() and (moved[0, 1] != starts).all(), wanted


def test_features_are_added_to_the_arms_that_name_them():
    names = ["memory", "memory+occupancy+sparse", "lora+retention"]
    recipe = AdaptationRecipe.from_dict(
        {
            "data": {"domain": ["a"], "general": ["b"]},
            "train": {"num_steps": 1},
            "memory": {"occupancy": "none"},
            "rates": {"lora": [1e-3, 1e-4]},
            "arms": {"names": names},
        }
    )
    plain, both, lora = (arm_recipe(recipe, name, lora_rank=2, dtype="float32") for name in names)
    assert (plain.adapter.occupancy, plain.writing.rule, plain.retention.weight) == ("none", "all", 0)
    assert (both.adapter.occupancy, both.writing.rule, both.retention.weight) == ("ngrams", "tf_idf", 0)
    assert (lora.adapter.layers, lora.lora.rank, lora.retention.weight) == ((), 2, 1)
    # By default memory has occupancy, but rows that are never written would say nothing with it.
    usual = dataclasses.replace(recipe, memory=MemoryOptions())
    made = [arm_recipe(usual, name, lora_rank=2, dtype="float32") for name in ("memory", "one_row", "random_table")]
    assert [one.adapter.occupancy for one in made] == ["ngrams", "ngrams", "none"]
    # Every seed has a hash of its own, the same for all arms.
    another = dataclasses.replace(usual, memory=MemoryOptions(seed=5))
    for name in ("memory", "one_row"):
        seeds = [arm_recipe(another, name, lora_rank=2, dtype="float32", seed=seed).adapter.seed for seed in (0, 1)]
        assert seeds == [5, 6]
    assert arm_kind("memory+occupancy+sparse").title == "memory + occupancy + sparse"
    assert recipe.rates.of("lora+retention") == (1e-3, 1e-4)
    with pytest.raises(ConfigError, match="there is no arm 'memry'; did you mean 'memory'"):
        ArmOptions(names=("memry",))
    for feature, arms in {
        "occupancy": ("lora", "full", "embeddings", "random_table"),
        "sparse": ("lora", "full", "embeddings", "random_table", "one_row"),
        "retention": ("full", "embeddings"),
    }.items():
        for arm in arms:
            with pytest.raises(ConfigError, match=f"'{arm}' cannot have '{feature}': it "):
                ArmOptions(names=(f"{arm}+{feature}",))
    ArmOptions(names=("random_table+retention", "one_row+occupancy", "permuted_hash+sparse"))
    with pytest.raises(ConfigError, match="at most once behind a plus"):
        ArmOptions(names=("memory+sparse+sparse",))


def test_what_has_no_rows_or_no_memory_is_not_asked_for_them(tmp_path):
    recipe = AdaptationRecipe.from_dict(
        {
            "data": {"domain": ["a"], "general": ["b"]},
            "train": {"num_steps": 1},
            "writing": {"rule": "kl"},
            "retention": {"weight": 1.0},
            "dependence": {"weight": 1.0},
        }
    )
    found = {
        name: arm_recipe(recipe, name, lora_rank=2, dtype="float32")
        for name in ("memory", "lora", "full", "random_table", "permuted_hash", "one_row")
    }
    assert {name for name, arm in found.items() if arm.writing.rule == "kl"} == {"memory", "permuted_hash"}
    assert {name for name, arm in found.items() if not arm.retention.weight} == {"full"}
    assert {name for name, arm in found.items() if not arm.dependence.weight} == {"lora", "full"}
    assert not arm_kind("embeddings").has_memory and not arm_kind("embeddings").has_rows


def test_runs_that_are_left_are_counted_and_durations_written():
    recipe = AdaptationRecipe.from_dict(
        {
            "train": {"num_steps": 1, "seeds": 3},
            "rates": {"memory": [1e-2, 1e-3], "full": 1e-3},
            "arms": {"names": ["memory", "random_table", "memory+retention", "full"]},
        }
    )
    left = runs_left(recipe, Path("nowhere"))
    assert left == {"memory": 4, "random_table": 3, "memory+retention": 4, "full": 3}
    assert [duration_text(seconds) for seconds in (0.4, 89, 90, 5_399, 7_260)] == [
        "0 s", "89 s", "2 min", "1 h 30 min", "2 h 1 min",
    ]  # fmt: skip


def test_one_row_of_each_head_is_read_everywhere():
    spec = engram_lm.attach(small_model(), TOKENIZER, MEMORY).spec
    rows = spec.rows_for_layers(spec.encode(torch.tensor([[5, 6, 7, 8]])))[spec.layers[1]]
    moved = one_row(spec)(2, rows)
    assert moved.shape == rows.shape
    assert moved[0].tolist() == [list(spec.offsets(spec.layers[1]))] * 4


def test_means_of_embeddings_are_gated_by_their_cosine_with_the_hidden_state():
    means = EmbeddingMeans(8, (2, 3))
    hidden, embedded = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(means(hidden, embedded), torch.zeros_like(hidden))  # it begins as nothing
    with torch.no_grad():
        means.scale.copy_(torch.arange(16.0).view(2, 8))
    expected = torch.zeros_like(hidden)
    for row in range(2):
        for place in range(5):
            for index, order in enumerate((2, 3)):
                mean = embedded[row, max(0, place + 1 - order) : place + 1].mean(0)
                gate = max(0.0, float(F.cosine_similarity(hidden[row, place], mean, dim=0)))
                expected[row, place] += means.scale[index].detach() * gate * mean
    torch.testing.assert_close(means(hidden, embedded), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_means_of_embeddings_reads_those_of_its_own_tokens():
    model = small_model()
    tokens = torch.tensor([[5, 6, 7, 8]])
    before = model(tokens).logits
    means = EmbeddingMeans.attach(model, find_decoder(model), (1,), (2,))
    assert torch.equal(model(tokens).logits, before)
    torch.nn.init.ones_(means.scale)
    after = model(tokens).logits
    assert not torch.equal(after, before) and not torch.equal(model(tokens.flip(1)).logits.flip(1), after)
    assert [name for name, _ in model.named_parameters() if "means" in name] == ["embedding_means.scale"]


def test_shuffled_rows_are_a_permutation_inside_each_head():
    spec = engram_lm.attach(small_model(), TOKENIZER, MEMORY).spec
    start, size = spec.offsets(spec.layers[0])[1], spec.primes[0][1]
    rows = torch.zeros(1, size, spec.num_heads_total, dtype=torch.int64) + torch.tensor(spec.offsets(spec.layers[0]))
    rows[0, :, 1] = torch.arange(start, start + size)
    shuffled = shuffled_rows(spec)(0, rows)[0, :, 1]
    assert torch.equal(shuffled.sort().values, rows[0, :, 1]) and not torch.equal(shuffled, rows[0, :, 1])
    assert torch.equal(shuffled_rows(spec)(0, rows)[0, :, 1], shuffled)


def test_operations_are_those_of_the_formula():
    length, model = 32, small_model("llama")
    layers = [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in model.model.layers]
    head = model.lm_head.weight.numel()
    attention = 3 * 2 * 2 * length * 32  # of each layer: products of all pairs, forward and twice back
    everything = 6 * (sum(layers) + head) + 3 * attention
    assert flops_per_token(model, length, training=True) == pytest.approx(everything)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    # Forward through all of it, and back to the head alone.
    assert flops_per_token(model, length, training=True) == pytest.approx(2 * sum(layers) + attention + 4 * head)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_rank_of_lora_is_the_nearest_in_weights():
    model = small_model("llama")
    targets = lora_targets(model, ("all-linear",))
    assert len(targets) == 3 * 7 and all(name.startswith("model.layers.") for name in targets)
    per_rank = sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    wide = EngramConfig(hidden_size=32, layers=(0, 1, 2), num_heads=2, memory_dim=240, rows_per_head=97)
    rank = matched_rank(model, targets, wide)
    weights = 3 * 240 * 2 * 32
    assert rank > 1 and abs(rank * per_rank - weights) <= per_rank / 2
    assert lora_targets(small_model("gpt2"), ("c_attn",)) == [f"transformer.h.{n}.attn.c_attn" for n in range(3)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lora_is_put_on_matrices_of_either_kind_without_a_warning(name, tmp_path):
    model = small_model(name)
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    recipe = Recipe.from_dict(
        {"model": {"base": str(tmp_path / "base")}, "lora": {"rank": 2}, "train": {"num_steps": 1}}
    )
    found = AdaptedBase(recipe, TOKENIZER, Ranks())
    trained = [key for key, parameter in found.module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(lora_targets(model, ("all-linear",)))


def test_any_causal_language_model_has_the_loss_that_transformers_computes():
    for name in ("gpt2", "gemma3"):
        model = small_model(name)
        tokens = torch.tensor(TOKENIZER(TEXT).input_ids[:66]).view(2, 33)
        expected = model(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(language_model_loss(model, tokens[:, :-1], tokens[:, 1:]), expected)


def test_a_frozen_backbone_keeps_the_selection_biases_of_its_experts():
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
    config = EngramLMConfig.for_tokenizer(TOKENIZER, None, **{**BACKBONE, **experts, "n_group": 1, "topk_group": 1})
    tokens = torch.tensor(TOKENIZER(TEXT).input_ids, dtype=torch.int64).numpy()
    for frozen in (True, False):
        model = EngramForCausalLM(config)
        width = config.hidden_size
        model.requires_grad_(not frozen)
        engram_lm.attach(
            model, TOKENIZER, EngramConfig(hidden_size=width, num_heads=2, memory_dim=24, rows_per_head=97)
        )
        trainer = Trainer(model, Batches(tokens, 2, 16, 0), TrainOptions(num_steps=3), OptimizerOptions(lr=1e-3))
        before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("correction_bias")}
        for _ in range(3):
            trainer.step()
        after = dict(model.named_buffers())
        assert before and all(torch.equal(after[name], value) for name, value in before.items()) is frozen
        assert trainer.table_use.summary()["engram_adapters.default.memory_tables.1"]["occupancy"] > 0


def test_the_recipe_of_the_project_is_read_back_as_it_was():
    one = AdaptationRecipe.read(Path(__file__).parents[2] / "recipes" / "adapt-cpu.toml")
    again = AdaptationRecipe.from_dict(tomllib.loads(write_toml(one.to_dict())))
    assert again == one and one.memory.for_base(128, 4).memory_dim == 128


def _opened(folder, **data):
    recipe = {
        "data": {"domain": [str(folder)], "cache": str(folder.parent / "shards"), "sequence_length": 16, **data},
        "train": {"num_steps": 1},
    }
    one = AdaptationRecipe.from_dict(recipe)
    return open_text(arm_recipe(one, "memory", lora_rank=1, dtype="float32"), TOKENIZER)


def test_the_parts_of_few_documents_do_not_meet(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    words = [f"w{number}" for number in range(2000)]
    (folder / "one.txt").write_text(" ".join(words))
    text = _opened(folder, held_out=0.2, validation=0.1)
    train = text.train[: text.num_tokens]
    parts = [TOKENIZER.decode(tokens.tolist()) for tokens in (train, text.texts["validation"].tokens, text.held_out)]
    found = [{word for word in words if f" {word} " in f" {part} "} for part in parts]
    assert all(found) and not (found[0] & found[1] or found[0] & found[2])
    assert len(found[1] & found[2]) <= 1  # the first token that is predicted needs one before it
    assert text.about is not None and len(found[2]) == pytest.approx(400, abs=60)
    assert abs(text.held_out_bytes - len(parts[2].encode())) <= 8


def test_of_many_documents_whole_ones_are_held_out_and_retained(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"document {number} of many. " * 5)
    more = {"held_out": 0.2, "validation": 0.05, "retained": [str(folder)]}
    text = _opened(folder, **more, retained_held_out=0.25, retained_tokens=100_000)
    train = TOKENIZER.decode(text.train[: text.num_tokens].tolist())
    retained = TOKENIZER.decode(text.texts["text"].tokens.tolist())
    trained = {number for number in range(200) if f"document {number} of" in train}
    kept = {number for number in range(200) if f"document {number} of" in retained}
    # The same share of the same documents: what a training with this share held out.
    assert text.about is None and len(trained) + len(kept) == 200 and not trained & kept
    with pytest.raises(DataError, match=r"held_out = 0\.01 of the text 1.txt selects no document or all of them"):
        _opened(folder, retained=[str(folder / "1.txt")])


def test_gates_of_an_attached_memory_are_those_of_its_layers():
    from engram_lm.studies.adaptation.diagnostics import gate_statistics

    model = small_model()
    adapter = engram_lm.attach(model, TOKENIZER, MEMORY)
    tokens = torch.tensor(TOKENIZER(TEXT).input_ids[:33])
    seen = []
    handle = adapter.layers["0"].register_forward_pre_hook(lambda module, args: seen.append(args))
    found = gate_statistics(model, adapter, tokens.numpy(), length=32, dtype="float32")
    handle.remove()
    ((hidden, rows, _),) = seen
    gates = adapter.layers["0"](hidden, rows, return_gates=True).gates.detach()
    assert found["0"]["mean"] == pytest.approx(float(gates.mean()), abs=1e-6)
    assert found["0"]["share_above_half"] == pytest.approx(float((gates > 0.5).float().mean()))
    logits = model(tokens[None]).logits  # nothing was left behind
    assert F.cross_entropy(logits[0, :-1], tokens[1:]).isfinite() and not adapter.layers["0"]._forward_hooks
