"""Continue a prompt."""

import dataclasses
import json as json_module
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import ConfigError
from engram_lm.hashing.token_map import check_tokens
from engram_lm.serving.load import ModelFlags, load_model
from engram_lm.tokenizing import prompt_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelFlags):
    """Continue a prompt with a trained model.

    The model is a quickstart run, or any folder with a causal language model and its tokenizer; --adapter adds memory
    to it.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 100
    """Tokens to add at most."""
    temperature: float = 0.8
    """Randomness of the choices, from 0, which always takes the likeliest token."""
    top_k: int = 50
    """Choose among this many of the likeliest tokens; 0 for all."""
    seed: int = 0
    """Seed of the choices."""
    num_samples: int = 1
    """Number of continuations."""
    device: str = "cpu"
    """Where to run, as torch names it."""
    json: bool = False
    """Print JSON: the prompt and its continuations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1 or self.num_samples < 1 or self.top_k < 0 or not 0 <= self.temperature < math.inf:
            raise ConfigError(
                "--max-new-tokens and --num-samples must be at least 1, --temperature and --top-k at least 0"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be a number from 0 to 2^63 - 1, not {self.seed}")

    def run(self) -> int:
        """Print the continuations."""
        model, tokenizer = load_model(self.model, device=self.device, tables=self, adapter=self.adapter)
        options: dict[str, Any] = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k")}
        seeds = range(self.seed, self.seed + self.num_samples)
        texts = [continue_text(model, tokenizer, self.prompt, seed=seed, **options) for seed in seeds]
        if self.json:
            print(json_module.dumps({"prompt": self.prompt, "continuations": texts}, ensure_ascii=False))
        else:
            print("\n\n".join(self.prompt + text for text in texts))
        return 0


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """Generate the continuation of a prompt by a causal language model of transformers, and return the new text only.

    The prompt is tokenized as `engram_lm.tokenizing.prompt_tokens` says. A temperature of 0 takes the likeliest token
    each time, and ``top_k`` 0 chooses among all. torch's global random state is left as it was.

    Raises:
        DataError: The prompt is empty and the tokenizer has no token to begin with.
        TokenError: The model does not embed a token of the prompt.
    """
    tokens = torch.from_numpy(prompt_tokens(tokenizer, prompt))[None]
    check_tokens(tokens, model.get_input_embeddings().num_embeddings)
    tokens = tokens.to(next(model.parameters()).device)
    choices = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k or None} if temperature else {"do_sample": False}
    )
    with evaluating(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **choices,
        )
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))
