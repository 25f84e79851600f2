"""Tokens → batches, as a pure function of (seed, step)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engram.errors import DataError
from engram.training.corpus import Document

__all__ = ["Batches", "pack"]

_DOCUMENTS_AT_ONCE = 64


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> np.ndarray:
    """Tokenize documents and lay them end to end, an end-of-text token after each if the tokenizer has one.

    Args:
        documents: What to tokenize.
        tokenizer: A fast tokenizer.
        on_progress: Called with the number of characters done since the last call.

    Returns:
        Tokens, int32 ``[num_tokens]``.
    """
    pieces: list[np.ndarray] = []
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces += [np.array(encoding.ids, dtype=np.int32), end]
        on_progress(sum(len(text) for text in texts))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Fixed-length sequences of a packed corpus, shuffled anew each time through it.

    Batch ``step`` is the same whatever was asked before, so a run that resumes sees what it would have seen.
    """

    tokens: np.ndarray
    """Packed tokens, int32."""
    batch_size: int
    """Sequences in a batch."""
    length: int
    """Tokens in a sequence."""
    seed: int
    """Decides the order."""

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise DataError(
                f"the text gives {len(self.tokens)} tokens, one sequence needs {self.length + 1}; "
                "give more text, or shorter sequences with --sequence-length"
            )

    @property
    def num_sequences(self) -> int:
        """Sequences in one pass through the corpus."""
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and the tokens that follow them, both int64 ``[batch_size, length]``."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [self._order(sample // self.num_sequences)[sample % self.num_sequences] for sample in samples]
        windows = np.stack([self.tokens[start * self.length : (start + 1) * self.length + 1] for start in starts])
        batch = torch.from_numpy(windows.astype(np.int64))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def _order(self, epoch: int) -> np.ndarray:
        # Drawn again rather than kept: it is cheap, and keeps the object a value.
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_sequences)
