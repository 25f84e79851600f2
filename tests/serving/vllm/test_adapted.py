"""A model of others with a memory adapter gives in vLLM the tokens that it gives in transformers."""

import shutil

import pytest
import torch
from tests.serving.vllm.adapted import BASES, SHAPE, save_adapted, save_adapter, save_base, save_lora
from tests.serving.vllm.engines import GREEDY, assert_equal, count, engine, generate, num_equal
from tests.serving.vllm.models import expect, prompts
from tests.serving.vllm.test_exact import CHUNKS, FEW_BLOCKS, NGRAM, SMALL_BLOCKS
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import engram_lm
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.serving.join import join
from engram_lm.serving.vllm.adapted import decoder_layers
from engram_lm.serving.vllm.adapted_names import OPTION
from engram_lm.serving.vllm.state import MemoryState
from engram_lm.serving.vllm.tables import OPTION as TABLES


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Folder with ``base`` and ``adapter`` by the name of a base, and what transformers generates with both."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, save_adapted(name, folder)
        return made[name]

    return get


def with_adapter(folder, **more):
    return {"additional_config": {OPTION: str(folder / "adapter"), **more}}


@pytest.mark.parametrize("name", BASES)
def test_every_kind_of_base(name, adapted):
    folder, expected = adapted(name)
    with engine(folder / "base", **with_adapter(folder)) as llm:
        assert_equal(generate(llm, prompts()), expected)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_prompts_in_chunks_that_share_prefixes(name, adapted):
    folder, expected = adapted(name)
    options = {"enable_prefix_caching": True, **CHUNKS, **SMALL_BLOCKS, **with_adapter(folder)}
    with engine(folder / "base", **options) as llm:
        assert_equal(generate(llm, prompts()), expected)
        before = count(llm, "prefix_cache_hits")
        assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "prefix_cache_hits") - before >= 100


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_preempted_requests_and_speculation(name, adapted):
    folder, expected = adapted(name)
    with engine(folder / "base", **FEW_BLOCKS, **NGRAM, **with_adapter(folder)) as llm:
        assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "num_preemptions") >= 1
        assert count(llm, "spec_decode_num_accepted_tokens") >= 5


@pytest.mark.parametrize("tier", ["mmap", "device"])
def test_memory_that_is_silent_where_rows_were_never_written(tier, adapted, tmp_path):
    folder, _ = adapted("llama")
    model = save_adapter("llama", folder / "base", tmp_path / "adapter", occupancy="ngrams")
    adapter = model.engram_adapters["default"]
    for number, table in enumerate(adapter.tables.values()):
        rows = (torch.rand(table.num_rows, generator=torch.Generator().manual_seed(number)) < 0.4).nonzero()[:, 0]
        table.store(rows, torch.zeros(len(rows), table.width))
    adapter.save_pretrained(tmp_path / "adapter")
    expected = expect(model, prompts())
    with engine(folder / "base", **CHUNKS, **with_adapter(tmp_path, **{TABLES: {"tier": tier}})) as llm:
        assert_equal(generate(llm, prompts()), expected)


def test_two_processes_share_a_model(adapted):
    folder, expected = adapted("llama")
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    options = {"enable_prefix_caching": True, **CHUNKS, **SMALL_BLOCKS, **two}
    with engine(folder / "base", **options, **with_adapter(folder, **{TABLES: {"tier": "mmap"}})) as llm:
        for _ in range(2):
            assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "prefix_cache_hits") > 0


def test_without_the_adapter_the_base_is_what_it_was(adapted):
    folder, expected = adapted("qwen3")
    with engine(folder / "base") as llm:
        tokens = generate(llm, prompts())[0]
    assert num_equal(tokens, expected) == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    assert num_equal(tokens, expect(base, prompts())) == len(expected)


def test_tokens_differ_where_the_convolution_sees_nothing(adapted, monkeypatch):
    folder, expected = adapted("llama")
    read = MemoryState.read
    monkeypatch.setattr(MemoryState, "read", lambda self, slots: tuple(map(torch.zeros_like, read(self, slots))))
    with engine(folder / "base", **with_adapter(folder)) as llm:
        assert num_equal(generate(llm, prompts())[0], expected) <= 1


@pytest.mark.parametrize(
    "tables", [{"tier": "mmap"}, {"tier": "file", "cache_bytes": 4096}, {"tier": "device"}], ids=str
)
def test_tables_of_an_adapter_lie_where_they_are_wanted(tables, adapted):
    folder, expected = adapted("llama")
    with engine(folder / "base", **with_adapter(folder, **{TABLES: tables})) as llm:
        assert_equal(generate(llm, prompts()), expected)


def test_several_adapters_add_up(adapted, tmp_path):
    folder, _ = adapted("qwen3")
    save_adapter("qwen3", folder / "base", tmp_path / "second", seed=6, layers=(0, 1))
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    both = [str(folder / "adapter"), str(tmp_path / "second")]
    for index, adapter in enumerate(both):
        engram_lm.MemoryAdapter.from_pretrained(model, adapter, name=f"a{index}")
    with engine(folder / "base", additional_config={OPTION: both}) as llm:
        assert_equal(generate(llm, prompts()), expect(model, prompts()))
    with pytest.raises(ValueError, match="2 adapters are to be served, and one source of tables"):
        refused(folder / "base", additional_config={OPTION: both, TABLES: {"tier": "mmap", "source": both[0]}})


def test_lora_of_vllm_and_memory_add_up(adapted, tmp_path):
    folder, expected = adapted("qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    engram_lm.MemoryAdapter.from_pretrained(model, folder / "adapter")
    save_lora(model, tmp_path / "lora")
    with_both = expect(model, prompts())
    assert num_equal([each.tokens for each in expected], with_both) == 0
    request = LoRARequest("lora", 1, str(tmp_path / "lora"))
    with engine(folder / "base", enable_lora=True, max_lora_rank=8, **with_adapter(folder)) as llm:
        assert_equal(generate(llm, prompts()), expected)
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY, use_tqdm=False, lora_request=request
        )
    assert [list(answer.outputs[0].token_ids) for answer in answers] == [each.tokens for each in with_both]


def test_a_joined_folder_is_served_without_a_flag(adapted, tmp_path):
    folder, expected = adapted("llama")
    base, joined = folder / "base", tmp_path / "joined"
    assert join(str(base), (str(folder / "adapter"),), joined) == "EngramLlamaForCausalLM"
    with engine(joined) as llm:
        assert_equal(generate(llm, prompts()), expected)
        # Text gets the beginning-of-text token of the base in both.
        text = "the cat sat on the mat"
        tokenizer = AutoTokenizer.from_pretrained(base)
        given = tokenizer(text).input_ids
        assert given[0] == tokenizer.bos_token_id
        greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        answer = llm.generate([text], greedy, use_tqdm=False)[0]
    assert list(answer.prompt_token_ids) == given
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    engram_lm.MemoryAdapter.from_pretrained(model, joined / "engram_adapters/00")
    assert num_equal([list(answer.outputs[0].token_ids)], expect(model, [given])) == 1
    # Transformers would leave the memory out without a word.
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(joined)


def test_a_folder_that_holds_an_adapter_as_a_trainer_leaves_it_is_served_with_it(adapted, tmp_path):
    folder, expected = adapted("qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    engram_lm.MemoryAdapter.from_pretrained(model, folder / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")  # with the memory among the weights
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "checkpoint")
    shutil.copytree(folder / "adapter", tmp_path / "checkpoint/engram_adapters/default")
    with engine(tmp_path / "checkpoint") as llm:
        assert_equal(generate(llm, prompts()), expected)


def refused(model, **options):
    LLM(str(model), dtype="float32", max_model_len=64, **options)


def test_an_adapter_of_another_model_is_refused(adapted, other_tokenizer, tmp_path, monkeypatch):
    folder, _ = adapted("llama")
    for field, value in (("hidden_size", 96), ("num_hidden_layers", 2)):
        monkeypatch.setitem(SHAPE, field, value)
        save_base("llama", tmp_path / field)
        monkeypatch.undo()
    with pytest.raises(ValueError, match=r"made for a hidden size of 64 .*this model has 96"):
        refused(tmp_path / "hidden_size", **with_adapter(folder))
    with pytest.raises(ValueError, match=r"made for a number of decoder layers of 3 .*this model has 2"):
        refused(tmp_path / "num_hidden_layers", **with_adapter(folder))
    other_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"hashes with the token map .*, the given map is"):
        refused(folder / "base", tokenizer=str(tmp_path / "tokenizer"), **with_adapter(folder))
    with pytest.raises(MismatchError, match="this model has 96"):
        join(str(tmp_path / "hidden_size"), (str(folder / "adapter"),), tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_what_memory_cannot_be_added_to_is_refused(adapted, tmp_path):
    folder, _ = adapted("qwen3")
    base = folder / "base"
    with pytest.raises(ValueError, match="--pipeline-parallel-size must be 1 for a model with memory"):
        refused(base, pipeline_parallel_size=2, **with_adapter(folder))
    with pytest.raises(ValueError, match="is the folder or repository of an adapter, or a list of them, not 3"):
        refused(base, additional_config={OPTION: 3})
    with pytest.raises(ValueError, match=r"there is no .*config\.json; an adapter is a folder"):
        refused(base, additional_config={OPTION: str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="memory is added to text models that vLLM itself has"):
        refused(base, model_impl="transformers", **with_adapter(folder))
    with pytest.raises(ValueError, match="for generating alone, not as --runner pooling"):
        refused(base, runner="pooling", **with_adapter(folder))
    with pytest.raises(ValueError, match="holds no adapter in engram_adapters"):
        refused(base, hf_overrides={"architectures": ["EngramQwen3ForCausalLM"]})


class Layer(torch.nn.Module):
    def forward(self, positions, hidden_states, residual):
        raise NotImplementedError


class OtherLayer(torch.nn.Module):
    def forward(self, positions, hidden_states, per_layer_input):
        raise NotImplementedError


def lists(*kinds):
    return torch.nn.ModuleDict(
        {str(i): torch.nn.ModuleList([kind() for _ in range(3)]) for i, kind in enumerate(kinds)}
    )


def test_layers_that_memory_cannot_be_added_to_are_refused():
    assert all(isinstance(layer, Layer) for layer in decoder_layers(lists(torch.nn.Identity, Layer), 3))
    with pytest.raises(ConfigError, match="has no lists of 3 layers that take hidden_states"):
        decoder_layers(lists(torch.nn.Identity), 3)
    with pytest.raises(ConfigError, match="has 2 lists of 3 layers that take hidden_states"):
        decoder_layers(lists(Layer, Layer), 3)
    with pytest.raises(ConfigError, match="take per_layer_input, and it is not known"):
        decoder_layers(lists(OtherLayer), 3)
