"""One analysis of two small models by the command, for all tests that look at what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import pytest

from engram_lm.cli import main

LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Analyzed:
    """What ``engram-lm analyze`` was given, and where it wrote."""

    memory: Path
    twin: Path
    text: Path
    out: Path

    @property
    def result(self):
        return json.loads((self.out / "analysis.json").read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0)


@pytest.fixture(scope="session")
def analyzed(tmp_path_factory):
    # Imported here, so that files of this folder that need no model load none.
    import torch
    from tests.page_reading import HOSTILE
    from tests.small_model import BACKBONE, MEMORY, VARIANTS
    from tests.training.test_loop import TOKENIZER

    import engram_lm

    folder = tmp_path_factory.mktemp("analyzed")
    backbone, changes = VARIANTS["streams"]
    for name, memory in (("memory", engram_lm.EngramConfig(**{**MEMORY, **changes})), ("memory/twin", None)):
        torch.manual_seed(0)
        shape = {**BACKBONE, **(backbone if memory else {})}
        model = engram_lm.EngramForCausalLM(engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, memory, **shape))
        with torch.no_grad():
            for parameter in model.parameters():  # some start at zero, so that memory would add nothing
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    text = folder / "text.txt"
    hostile = HOSTILE.encode("utf-8", "replace").decode().replace("\x00", "")
    text.write_text(
        f"The cat saw {hostile} on the mat. " + "The Cat sat on the mat; the rat ran. " * 40, encoding="utf-8"
    )
    tasks = folder / "questions.jsonl"
    questions = [{"prompt": "the cat sat on the", "answer": " mat", "family": family} for family in ("<b>one", "two")]
    tasks.write_text("".join(json.dumps(question) + "\n" for question in questions))
    found = Analyzed(folder / "memory", folder / "memory" / "twin", text, folder / "out")
    call = ["analyze", str(found.memory), str(found.twin), "--data", str(text), "--out", str(found.out)]
    assert main([*call, "--sequence-length", str(LENGTH), "--tasks", str(tasks)]) == 0
    return found
