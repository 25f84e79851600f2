"""What the tests of sharing do in a process of its own, whose Hub is the one on loopback."""

import torch
from tests.adapt.conftest import MEMORY, speak
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm

IDS = torch.randint(2, 280, (2, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def adapter_of(seed=1):
    """The memory that every test means by a seed, on a model of its own."""
    model = small_model()
    adapter = engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    speak(adapter, seed)
    return model, adapter


def push(repo_id, seed=1, **options):
    """Push the memory of a seed; returns the commit's address."""
    return adapter_of(seed)[1].push_to_hub(repo_id, **options)


def load(repo_id, seed=1, **options):
    """Load an adapter; returns whether its logits are those of the memory of a seed, to the bit."""
    torch.manual_seed(0)
    model = small_model()
    engram_lm.MemoryAdapter.from_pretrained(model, repo_id, tokenizer=TOKENIZER, **options)
    return torch.equal(logits(model), logits(adapter_of(seed)[0]))


def load_facts(repo_id, folder, **options):
    """Load an adapter from the Hub and from a folder; returns whether both have the same logits, to the bit."""
    models = small_model(), small_model()
    for model, place in zip(models, (repo_id, folder), strict=True):
        model.load_state_dict(models[0].state_dict(), strict=False)
        engram_lm.MemoryAdapter.from_pretrained(model, place, **(options if place == repo_id else {}))
    return torch.equal(logits(models[0]), logits(models[1]))


def load_into_another_size(repo_id):
    """Load an adapter into a model with one layer less."""
    import transformers
    from tests.adapt.small_models import CONFIGS

    config = CONFIGS["llama"]()
    config.num_hidden_layers = 2
    engram_lm.MemoryAdapter.from_pretrained(transformers.AutoModelForCausalLM.from_config(config), repo_id)


def bytes_left(repo_id, **options):
    """Bytes of a model that are still to be downloaded."""
    from engram_lm.training.assembly import bytes_to_download

    return bytes_to_download(repo_id, **options)


def fetch(repo_id, name):
    """Download one file of a repository."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo_id, name)


def without_answer(address, function, *args):
    """Call a function of this module while the Hub is at an address that says nothing."""
    from huggingface_hub import constants, hf_api

    from engram_lm.adapt import hub

    api, seconds = hf_api.HfApi.model_info, hub._ANSWER_SECONDS

    def ask(self, *rest, **options):
        self.endpoint = address
        return api(self, *rest, **options)

    hf_api.HfApi.model_info, hub._ANSWER_SECONDS = ask, 0.2
    endpoint, constants.ENDPOINT = constants.ENDPOINT, address
    try:
        return function(*args)
    finally:
        hf_api.HfApi.model_info, hub._ANSWER_SECONDS, constants.ENDPOINT = api, seconds, endpoint
