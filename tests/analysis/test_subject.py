"""One view of any model: what it predicts from its last layer is what the model itself says."""

import pytest
import torch
import transformers
from tests.adapt.small_models import CONFIGS, TEXT, TOKENIZER, small_model, small_multimodal_model
from tests.small_model import BACKBONE, MEMORY, VARIANTS

import engram_lm
from engram_lm.analysis import Analysis, find_subject, group_by_tokenizer, read_text
from engram_lm.errors import ConfigError, MismatchError

LENGTH = 24


class Prediction(Analysis):
    """Compares the head on the last hidden state, and on the one before, with the model's own logits."""

    wants = frozenset({"predict"})

    def update(self, readings):
        reading = readings[0]
        self.last, self.before = (
            float((reading.subject.predict(hidden) - reading.logits).abs().max()) for hidden in reading.hidden[:-3:-1]
        )

    def result(self):
        return self.last, self.before


def own_model(variant="plain", memory=True):
    torch.manual_seed(0)
    backbone, changes = VARIANTS[variant]
    config = engram_lm.EngramConfig(**{**MEMORY, **changes}) if memory else None
    return engram_lm.EngramForCausalLM(
        engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, config, **{**BACKBONE, **backbone})
    ).eval()


def scaled(name, **changes):
    shape = {**CONFIGS["llama"]().to_dict(), **changes}
    shape.pop("model_type")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**shape)).eval()


MODELS = {
    **{name: lambda name=name: small_model(name) for name in CONFIGS},
    **{f"engram, {name}": lambda name=name: own_model(name) for name in ("plain", "streams", "single", "all")},
    "engram, no memory": lambda: own_model(memory=False),
    "soft-capped": lambda: scaled("Gemma2", final_logit_softcapping=0.5),
    "divided": lambda: scaled("Granite", logits_scaling=7.0),
    "multiplied": lambda: scaled("Cohere", logit_scale=0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_predicts_what_the_model_says(name):
    model = MODELS[name]()
    last, before = read_text([find_subject(model, TOKENIZER)], TEXT[:80], {"it": Prediction()}, length=LENGTH)["it"]
    assert last < 1e-5 < before


@pytest.mark.parametrize("make", [small_model, own_model])
def test_half_precision_is_predicted_too(make):
    model = make().bfloat16()
    last, before = read_text([find_subject(model, TOKENIZER)], TEXT[:80], {"it": Prediction()}, length=LENGTH)["it"]
    assert last == 0 < before


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_an_attached_memory_is_found_and_predicts_what_the_model_says(name):
    model = small_model(name)
    engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    subject = find_subject(model, TOKENIZER)
    assert list(subject.memories) == [0, 2]
    assert subject.ungated is None and (subject.num_streams, subject.hidden_size, subject.num_layers) == (1, 32, 3)
    assert read_text([subject], TEXT[:80], {"it": Prediction()}, length=LENGTH)["it"][0] < 1e-5


def test_our_own_model_is_seen_with_its_streams_and_its_memory():
    model = own_model("streams")
    subject = find_subject(model, TOKENIZER)
    assert subject.memories == {0: model.model.layers[0].memory, 2: model.model.layers[2].memory}
    assert subject.spec is model.hash_spec
    assert (subject.num_streams, subject.vocab_size, subject.name) == (4, len(TOKENIZER), "EngramForCausalLM")
    assert find_subject(model, TOKENIZER, name="nano").name == "nano"


def test_one_of_several_attached_memories_is_chosen():
    model = small_model()
    first = engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY), name="first")
    engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**{**MEMORY, "layers": (1,)}), name="second")
    with pytest.raises(ConfigError, match="first, second; choose with adapter="):
        find_subject(model, TOKENIZER)
    assert list(find_subject(model, TOKENIZER, adapter="second").memories) == [1]
    with pytest.raises(ConfigError, match="called 'third'"):
        find_subject(model, TOKENIZER, adapter="third")
    with first.disabled():
        assert list(find_subject(model, TOKENIZER).memories) == [1]
        with pytest.raises(ConfigError, match="switched off"):
            find_subject(model, TOKENIZER, adapter="first")


# peft asks transformers by names that transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_memory_is_found_inside_peft():
    import peft

    model = small_model()
    engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    subject = find_subject(model, TOKENIZER)
    assert list(subject.memories) == [0, 2]
    assert read_text([subject], TEXT[:80], {"it": Prediction()}, length=LENGTH)["it"][0] < 1e-5


def test_the_text_layers_of_a_multimodal_model_are_seen():
    subject = find_subject(small_multimodal_model(), TOKENIZER)
    assert subject.num_layers == 3
    assert read_text([subject], TEXT[:80], {"it": Prediction()}, length=LENGTH)["it"][0] < 1e-5


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ConfigError, match="Linear cannot be analyzed"):
        find_subject(torch.nn.Linear(1, 1), TOKENIZER)


def test_another_tokenizer_is_refused(other_tokenizer):
    model = small_model()
    engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    with pytest.raises(MismatchError, match=r"token map [0-9a-f]{64}, the given map is [0-9a-f]{64}"):
        find_subject(model, other_tokenizer)


def test_hidden_states_of_another_shape_are_refused():
    with pytest.raises(MismatchError, match=r"expected \[\.\.\., 4, 32\]"):
        find_subject(own_model("streams"), TOKENIZER).predict(torch.zeros(2, 3, 32))


def test_models_are_grouped_by_their_vocabulary(other_tokenizer):
    model = small_model()
    subjects = [
        find_subject(model, tokenizer, name=name)
        for name, tokenizer in (("a", TOKENIZER), ("b", other_tokenizer), ("c", TOKENIZER))
    ]
    names = [[subject.name for subject in group] for group in group_by_tokenizer(subjects)]
    assert names == [["a", "c"], ["b"]]
