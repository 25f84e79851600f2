"""Trainers of Hugging Face with peft over everything, or over nothing: checkpoints, resuming, what is refused."""

import pytest
import safetensors.torch
import torch
import transformers
from tests.adapt.small_models import TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY
from tests.training.test_huggingface import IDS, adapted, assert_same, trainer_of, weights
from torch.nn.utils import parametrizations

import engram_lm
from engram_lm import EngramConfig
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.training.huggingface import train_memory

peft = pytest.importorskip("peft")

# peft and accelerate ask torch and transformers by names that those call deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def under_peft(seed=0, train=True, **changes):
    torch.manual_seed(5 + seed)
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = peft.get_peft_model(adapted(seed=seed), peft.LoraConfig(**options))
    if train:
        train_memory(model)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor([IDS[:12]])).logits


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.filterwarnings("error:peft has put")  # a checkpoint holds both
@pytest.mark.parametrize(
    "changes", [{}, {"use_dora": True}, {"target_modules": ["key_value"]}, {"train": False}], ids=str
)
def test_a_run_with_peft_on_the_memory_resumes_with_the_same_bits_and_loads_again(changes, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "warmup_steps": 2}
    whole = under_peft(**changes)
    trainer_of(whole, tmp_path / "whole", **arguments).train()
    first = trainer_of(under_peft(**changes), tmp_path / "parts", **arguments)
    first.add_callback(Stop())
    first.train()
    again = under_peft(seed=9, **changes)  # nothing of the first run but its folder
    if not changes.get("train", True):  # a frozen memory is no part of its checkpoints
        again = under_peft(**changes)
    trainer_of(again, tmp_path / "parts", **arguments).train(resume_from_checkpoint=True)
    assert_same(weights(again), weights(whole))
    checkpoint = tmp_path / "parts/checkpoint-6"
    if changes.get("train", True):
        model = small_model()
        engram_lm.MemoryAdapter.from_pretrained(model, checkpoint / "engram_adapters/default")
        model = peft.PeftModel.from_pretrained(model, checkpoint)
        torch.testing.assert_close(logits(model), logits(again), rtol=1e-5, atol=1e-5)


def test_choosing_memories_leaves_what_peft_has_put_on_them_as_it_was():
    model = under_peft()
    train_memory(model, adapters=["default"])
    engram_lm.attach(model, TOKENIZER, EngramConfig(**{**MEMORY, "layers": (1,)}), name="other", check=False)
    train_memory(model, adapters=["other"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    memory = {name for name in trained if "engram_adapters.default" in name}
    assert memory
    assert all("lora_" in name for name in memory)
    assert any("engram_adapters.other" in name for name in trained)


def test_what_no_checkpoint_would_hold_is_not_trained(tmp_path):
    model = under_peft()
    train_memory(model, "full")
    with pytest.raises(ConfigError, match=r"no checkpoint would hold them.*base_layer\.weight.*modules_to_save"):
        trainer_of(model, tmp_path).train()
    model = adapted()
    parametrizations.weight_norm(model.engram_adapters["default"].layers["0"].key_value)
    with pytest.raises(ConfigError, match=r"0\.key_value\.weight of the memory 'default' are parametrized"):
        trainer_of(model, tmp_path).train()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_full_training_resumes_with_the_same_bits_whatever_the_file_calls_its_experts(kind, tmp_path):
    def build(seed):
        model = small_model(kind)
        engram_lm.attach(model, TOKENIZER, EngramConfig(**MEMORY))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(seed / 100)
        train_memory(model, "full")
        return model

    whole, again = build(0), build(9)
    changes = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(whole, tmp_path / "whole", **changes).train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    trainer_of(again, tmp_path / "parts", **changes).train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(again), weights(whole))
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        {name: value for name, value in tensors.items() if "layers.1.self_attn.q_proj" not in name},
        file,
        {"format": "pt"},
    )
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights of the model, such as model\.layers\.1\.self_attn\.q_proj"
    ):
        trainer_of(build(9), tmp_path / "lost", **changes).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_a_reference_model_with_a_compiled_block_is_saved_plainly_and_resumed(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        config = engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**MEMORY), **BACKBONE)
        model = engram_lm.EngramForCausalLM(config)
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        return model

    changes = {"save_strategy": "steps", "save_steps": 2}
    whole, again = build(0), build(9)
    trainer_of(whole, tmp_path / "whole", **changes).train()
    trainer_of(again, tmp_path / "parts", **changes).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_same(weights(again), weights(whole))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4")
    assert not any("_orig_mod" in name for name in loaded.state_dict())
    torch.testing.assert_close(logits(loaded), logits(whole), rtol=1e-5, atol=1e-5)
