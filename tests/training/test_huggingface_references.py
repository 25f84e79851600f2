"""TRL's trainers compare a model with memory with what it was at the beginning, its memory included."""

import copy
import re
import warnings

import pytest
import torch
import transformers
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY
from tests.training.test_huggingface import IDS, arguments, weights

import engram_lm
from engram_lm import EngramConfig
from engram_lm.errors import ConfigError
from engram_lm.training.huggingface import MemoryTrainerMixin, train_memory

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

# peft, TRL and accelerate ask torch and transformers by names that those call deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
PAIRS = [{"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran to a rat"}] * 8
LOG_2 = 0.693147


class MemoryDPOTrainer(MemoryTrainerMixin, trl.DPOTrainer):
    pass


class MemoryGRPOTrainer(MemoryTrainerMixin, trl.GRPOTrainer):
    pass


class MemoryRLOOTrainer(MemoryTrainerMixin, trl.RLOOTrainer):
    pass


class MemoryKTOTrainer(MemoryTrainerMixin, trl.KTOTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def adapted(base, backbone="frozen", lora=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(0)
    speak(engram_lm.attach(model, TOKENIZER, EngramConfig(**MEMORY)))
    if lora is not None:
        torch.manual_seed(5)
        model = peft.get_peft_model(model, lora)
    train_memory(model, backbone)
    return model


def low_rank(targets=("q_proj",), **changes):
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **changes)


def dpo(model, folder, **changes):
    more = {key: changes.pop(key) for key in ("peft_config", "ref_model", "callbacks") if key in changes}
    usual = {key: value for key, value in arguments(folder, max_steps=3).to_dict().items() if key[0] != "_"}
    usual |= {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 3e-2, "disable_dropout": True}
    args = trl.DPOConfig(**{**usual, **changes})
    data = datasets.Dataset.from_list(PAIRS)
    tokenizer = copy.deepcopy(TOKENIZER)
    return MemoryDPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **more)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor([IDS[:12]]), use_cache=False).logits


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("backbone", ["frozen", "full"])
def test_a_reference_that_is_loaded_by_name_has_the_memory_and_keeps_it(backbone, base, tmp_path):
    model = adapted(base, backbone)
    beginning = logits(model)
    trainer = dpo(model, tmp_path)
    model.train()
    reference = trainer.ref_model
    before = weights(reference)
    assert torch.equal(logits(reference), beginning)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(LOG_2, abs=1e-4)
    assert losses[-1] < 0.6
    assert not torch.allclose(logits(model), beginning, atol=1e-2)
    assert torch.equal(logits(reference), beginning)
    assert all(torch.equal(value, before[name]) for name, value in weights(reference).items())
    assert not any(parameter.requires_grad for name, parameter in reference.named_parameters() if "engram" in name)
    shared = {one.data_ptr() for one in reference.parameters()} & {one.data_ptr() for one in model.parameters()}
    assert len(shared) == (len(list(small_model().parameters())) if backbone == "frozen" else 0)


def test_a_reference_is_the_model_that_was_given_whatever_its_name_holds_now(base, tmp_path):
    model = adapted(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    beginning = logits(model)
    assert torch.equal(logits(dpo(model, tmp_path).ref_model), beginning)
    model = adapted(base)
    model.resize_token_embeddings(400, mean_resizing=False)
    with pytest.raises(ConfigError, match=r"has no model\.embed_tokens\.weight of \[400, 32\].*as ref_model"):
        dpo(model, tmp_path)


def test_a_reference_that_follows_the_model_shares_nothing_and_follows_the_memory_too(base, tmp_path):
    model = adapted(base)
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    table = model.engram_adapters["default"].memory_tables["0"].weight
    start = table.detach().clone()
    trainer = dpo(model, tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, max_steps=1)
    trainer.train()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    theirs = trainer.ref_model.engram_adapters["default"].memory_tables["0"].weight
    assert not torch.equal(table, start)
    torch.testing.assert_close(theirs, (table.detach() + start) / 2)


def test_references_computed_beforehand_and_a_reference_that_is_given_are_used_as_they_are(base, tmp_path):
    trainer = dpo(adapted(base), tmp_path / "beforehand", precompute_ref_log_probs=True)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(LOG_2, abs=1e-4)
    given = small_model().requires_grad_(False)
    trainer = dpo(adapted(base), tmp_path / "given", ref_model=given)
    assert trainer.ref_model is given
    assert not any("engram" in name for name, _ in given.named_modules())


@pytest.mark.parametrize("kind", ["given", "made", "on the memory"])
def test_with_peft_the_memory_is_the_earlier_one_while_peft_is_switched_off(kind, base, tmp_path):
    config = low_rank("all-linear" if kind == "on the memory" else ("q_proj", "v_proj"))
    model = adapted(base, lora=config if kind == "given" else None)
    beginning = logits(model)
    trainer = dpo(model, tmp_path, peft_config=None if kind == "given" else config)
    before = reference_of(trainer)
    assert torch.equal(before, beginning)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(LOG_2, abs=1e-4)
    assert losses[-1] < 0.6
    assert torch.equal(reference_of(trainer), before)
    # Outside of the trainer, switching peft off leaves the memory as it was trained.
    with trainer.model.disable_adapter():
        assert not torch.allclose(logits(trainer.model), beginning, atol=1e-2)


@torch.no_grad()
def reference_of(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    with (
        trainer._references.used(),
        trl.trainer.utils.use_adapter(model, "ref" if "ref" in model.peft_config else None),
    ):
        return logits(model)


@pytest.mark.parametrize("with_peft", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"), [(MemoryGRPOTrainer, trl.GRPOConfig), (MemoryRLOOTrainer, trl.RLOOConfig)]
)
def test_the_divergence_of_reinforcement_starts_at_none(kind, options, with_peft, base, tmp_path):
    model = adapted(base)
    usual = {key: value for key, value in arguments(tmp_path).to_dict().items() if key[0] != "_"}
    usual |= {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 3, "learning_rate": 0.1}
    args = options(**{**usual, "per_device_train_batch_size": 4}, num_generations=4, max_completion_length=6, beta=0.1)
    trainer = kind(
        model=model,
        args=args,
        reward_funcs=lambda completions, **more: [float(len(one)) for one in completions],
        train_dataset=datasets.Dataset.from_list([{"prompt": "the cat"}] * 8),
        processing_class=copy.deepcopy(TOKENIZER),
        peft_config=low_rank() if with_peft else None,
    )
    compared = reference_of if with_peft else lambda trainer: logits(trainer.ref_model)
    before = compared(trainer)
    trainer.train()
    assert torch.equal(compared(trainer), before)
    divergences = logged(trainer, "kl")
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert max(divergences[1:]) > 1e-3


@pytest.mark.parametrize("with_peft", [False, True])
def test_kto_starts_where_the_model_is_its_own_reference(with_peft, base, tmp_path):
    usual = {key: value for key, value in arguments(tmp_path, max_steps=2).to_dict().items() if key[0] != "_"}
    usual |= {"logging_strategy": "steps", "logging_steps": 1, "train_sampling_strategy": "sequential"}
    labelled = [
        {"prompt": "the cat", "completion": " sat on the mat", "label": True},
        {"prompt": "the cat", "completion": " ran to a rat", "label": False},
    ]
    trainer = MemoryKTOTrainer(
        model=adapted(base),
        args=trl.KTOConfig(**{**usual, "learning_rate": 0.1}),
        train_dataset=datasets.Dataset.from_list(labelled * 4),
        processing_class=copy.deepcopy(TOKENIZER),
        peft_config=low_rank() if with_peft else None,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-5)
    assert losses[1] < 0.45


def test_a_model_of_ours_is_compared_with_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    config = engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**MEMORY), **BACKBONE)
    engram_lm.EngramForCausalLM(config).save_pretrained(tmp_path / "base")
    trainer = dpo(engram_lm.EngramForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(LOG_2, abs=1e-4)


@pytest.mark.parametrize(
    ("lora", "given", "words"),
    [
        (False, False, "reference model has no memory"),
        (False, True, None),
        (True, False, "memory as trained so far.*; its checkpoints hold peft's adapters without"),
    ],
)
def test_a_trainer_that_knows_nothing_of_memory_is_warned_of_once(lora, given, words, base, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    # TRL copies what is called default, which is peft's adapter and would be the memory.
    speak(engram_lm.attach(model, TOKENIZER, EngramConfig(**MEMORY | {"table_gradient": "dense"}), name="facts"))
    more = {"ref_model": copy.deepcopy(model)} if given else {}
    model = peft.get_peft_model(model, low_rank()) if lora else model
    train_memory(model)
    args = trl.DPOConfig(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_steps=2, disable_tqdm=True)
    data, tokenizer = datasets.Dataset.from_list(PAIRS), copy.deepcopy(TOKENIZER)
    trainer = trl.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(warning.message) for warning in caught if "knows nothing of memory" in str(warning.message)]
    assert len(said) == (words is not None)
    assert words is None or re.search(words, said[0])
