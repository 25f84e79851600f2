"""Canonical tokens: raw token ids that spell the same thing, case, accents and space aside, share one id."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import TokenError, TokenMapError
from engram_lm.files import user_path, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "engram.token_map.1"
_REPLACEMENT = "\ufffd"
# A private-use character that keeps a token that is one space from being stripped to nothing.
_SPACE = "\ue000"


class TokenMap:
    """An immutable map from raw token ids to canonical ids.

    ``len(token_map)`` is the number of *canonical* tokens, as in the Engram demo.

    Args:
        canonical: The canonical id of each raw id, integers, shape [num_tokens], using every id from 0 to its maximum;
            -1 where the tokenizer has no token of that id.
        vocabulary_digest: `vocabulary_digest` of the tokenizer it was made from, if any.

    Raises:
        TokenMapError: The array is not such a map.
    """

    def __init__(self, canonical: Any, vocabulary_digest: str | None = None):
        array = np.asarray(canonical)
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
            raise TokenMapError(
                f"a token map is a non-empty one-dimensional array of integers, got {array.dtype} {list(array.shape)}"
            )
        if array.min() < -1 or not 0 <= array.max() < array.size:
            raise TokenMapError(
                f"canonical ids of {array.size} tokens lie in [0, {array.size}), or are -1 where there is no token; "
                f"got {array.min()}..{array.max()}"
            )
        if not np.bincount(array[array >= 0]).all():
            raise TokenMapError(f"canonical ids must be 0..{array.max()} without a gap; some of them are never used")
        self._canonical = array.astype(np.int64)
        self._canonical.flags.writeable = False
        self._vocabulary_digest = vocabulary_digest
        self._tensors: dict[Any, Tensor] = {}
        self._made: TokenMap | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TokenMap":
        """Build the map of a tokenizer, as DeepSeek's demo and V4.1 do.

        The tokenizer's Rust backend decodes each id alone, special tokens included. A text with U+FFFD (a piece of a
        UTF-8 character) is replaced by the raw token; any other text is normalized (NFKC, NFD, accents stripped, lower
        case, space collapsed and stripped), unless that leaves nothing. Equal texts share an id, in the order of their
        first appearance.

        Args:
            tokenizer: A fast Hugging Face tokenizer, a ``tokenizers.Tokenizer``, or the path of a ``tokenizer.json`` or
                of the folder that holds one.

        Returns:
            The map of all ids up to the tokenizer's largest. Ids in between that are no tokens are not mapped.

        Raises:
            TokenMapError: The tokenizer has no backend, or there is none at the path.

        Cost: about two seconds for 130,000 tokens.
        Source: paper, section 2.2 and Table 6; deepseek-ai/Engram ``engram_demo_v1.py``;
            deepseek-ai/DeepSeek-V4.1-Flash ``inference/engram.py``, the one that decodes with the backend.
        """
        return cls.of_tokens(tokenizer, read_vocabulary(tokenizer))

    @classmethod
    def of_tokens(cls, tokenizer: Any, tokens: Sequence[str | None]) -> "TokenMap":
        """Build the map of some of a tokenizer's tokens, as `from_tokenizer` does of all.

        Takes what `read_vocabulary` returned, of which the end was cut off or tokens were replaced by None.
        """
        ids = [token for token, text in enumerate(tokens) if text is not None]
        seen: dict[str, int] = {}
        canonical = np.full(len(tokens), -1)
        canonical[ids] = [seen.setdefault(key, len(seen)) for key in _keys(load_tokenizer(tokenizer), ids)]
        return cls(canonical, digest_vocabulary(tokens))

    @classmethod
    def identity(cls, num_tokens: int, tokenizer: Any = None) -> "TokenMap":
        """Build the map that leaves every id as it is.

        Args:
            num_tokens: Number of raw ids. Larger ones, of which a tokenizer may have some, are refused when they occur.
            tokenizer: The tokenizer in use, as for `from_tokenizer`, so that another one can be refused later.

        Raises:
            TokenMapError: ``num_tokens`` is below 1, or below half the number of the tokenizer's ids.
        """
        if num_tokens < 1:
            raise TokenMapError(f"a token map needs at least one token, got num_tokens={num_tokens}")
        digest = None
        if tokenizer is not None:
            tokens = read_vocabulary(tokenizer)
            if len(tokens) > 2 * num_tokens:
                raise TokenMapError(
                    f"the tokenizer has {len(tokens)} tokens, the identity map was asked for {num_tokens}; pass the "
                    "model's vocabulary size, or the tokenizer that belongs to the model"
                )
            digest = digest_vocabulary(tokens[:num_tokens])
        return cls(np.arange(num_tokens), digest)

    def covering(self, num_tokens: int) -> "TokenMap":
        """Return the map with a canonical token for every id below a number, such as the ids that a model embeds.

        Each id that is not mapped yet, because its token was added later or there is no such token, gets a canonical
        token of its own, in the order of ids. Mapped ids, `digest` and `made` stay, so what was trained stays valid.
        """
        made, size = self.made, max(num_tokens, self.made.num_tokens)
        canonical = np.append(made.canonical, np.full(size - made.num_tokens, -1))
        free = canonical < 0
        if not free.any():
            return made
        canonical[free] = made.num_canonical + np.arange(free.sum())
        covering = TokenMap(canonical, made.vocabulary_digest)
        covering._made = made
        return covering

    @property
    def made(self) -> "TokenMap":
        """The map as it was made, without what `covering` has added."""
        return self if self._made is None else self._made

    def __len__(self) -> int:
        return self.num_canonical

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenMap):
            return NotImplemented
        mine, others = ((one.digest, one.vocabulary_digest, one.num_tokens, one.num_canonical) for one in (self, other))
        return mine == others

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"TokenMap({self.num_tokens:,} tokens to {self.num_canonical:,}, digest {self.digest[:12]})"

    @property
    def canonical(self) -> np.ndarray:
        """The canonical id of each raw id, int64, shape [num_tokens], read-only; -1 where there is no token."""
        return self._canonical

    @property
    def num_tokens(self) -> int:
        """Number of raw ids."""
        return len(self._canonical)

    @cached_property
    def num_canonical(self) -> int:
        """Number of canonical ids."""
        return int(self._canonical.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the map, as it was `made`, in little-endian int32; in hexadecimal."""
        return hashlib.sha256(self.made.canonical.astype("<i4").tobytes()).hexdigest()

    @property
    def vocabulary_digest(self) -> str | None:
        """SHA-256 of the tokenizer's list of tokens in id order; None if it was made without a tokenizer."""
        return self._vocabulary_digest

    @cached_property
    def is_identity(self) -> bool:
        """Whether every raw id is its own canonical id."""
        return bool((self._canonical == np.arange(self.num_tokens)).all())

    @cached_property
    def has_holes(self) -> bool:
        """Whether some ids are not mapped, because the tokenizer has no such tokens."""
        return bool((self._canonical < 0).any())

    @property
    def compression(self) -> float:
        """The fraction of ids that merging saves, in [0, 1)."""
        return 1 - self.num_canonical / int((self._canonical >= 0).sum())

    def apply(self, tokens: Any) -> Any:
        """Map raw ids to canonical ids.

        Args:
            tokens: Integers of any shape, a NumPy array or a torch tensor, each in [0, num_tokens).

        Returns:
            int64, same shape, same kind and device.

        Raises:
            TokenError: An id is outside the vocabulary, or no token has it. Negative ids are refused too: they are
                labels, not text.
        """
        tokens = self.check(tokens)
        if not is_torch(tokens):
            return self._canonical[tokens]
        if self.is_identity:
            return tokens
        return on_device(self._tensors, "canonical", self._canonical, tokens.device)[tokens]

    def check(self, tokens: Any) -> Any:
        """Check raw ids as `check_tokens` does, and that the tokenizer has such tokens; return them as int64."""
        tokens = check_tokens(tokens, self.num_tokens)
        if not self.has_holes:
            return tokens
        if not is_torch(tokens):
            unknown = self._canonical[tokens] < 0
        else:
            import torch

            unknown = on_device(self._tensors, "canonical", self._canonical, tokens.device)[tokens] < 0
            if torch.compiler.is_compiling() or tokens.device.type not in ("cpu", "meta"):
                torch._assert_async(~unknown.any(), "the tokenizer has no token of an id")
                return tokens
        if unknown.any():
            raise TokenError(f"the tokenizer has no token of the id {int(tokens[unknown][0])}; is this the right one?")
        return tokens

    def largest_groups(self, k: int, tokenizer: Any, examples: int = 8) -> list[tuple[str, int, list[str]]]:
        """List the ``k`` canonical tokens that the most raw tokens share.

        Args:
            k: How many groups.
            tokenizer: The tokenizer that the map was built from.
            examples: How many raw tokens of each group to show.

        Returns:
            For each group, largest first: the text that stands for it, its number of tokens, and some of their texts.

        Raises:
            TokenMapError: The tokenizer is not the one the map was built from.
        """
        backend = load_tokenizer(tokenizer)
        given = digest_vocabulary(read_vocabulary(tokenizer))
        if self.vocabulary_digest not in (None, given):
            raise TokenMapError(
                f"this map belongs to the vocabulary {self.vocabulary_digest}, the tokenizer has {given}; "
                "pass the tokenizer the map was built from"
            )
        counts = np.bincount(self._canonical[self._canonical >= 0], minlength=self.num_canonical)
        groups = []
        for group in np.argsort(-counts, kind="stable")[:k]:
            members = np.flatnonzero(self._canonical == group).tolist()
            texts = [backend.decode([token], skip_special_tokens=False) for token in members[:examples]]
            groups.append((_keys(backend, members[:1])[0], int(counts[group]), texts))
        return groups

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map, as it was `made`, as one ``.safetensors`` file, atomically.

        Raises:
            OSError: The file cannot be written.
        """
        from safetensors.numpy import save

        metadata = {"format": _FORMAT, "digest": self.digest, "vocabulary_digest": self.vocabulary_digest or ""}
        write_atomically(path, save({"canonical": self.made.canonical.astype(np.int32)}, metadata=_sealed(metadata)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenMap":
        """Read a map that `save` wrote, and verify it.

        Raises:
            TokenMapError: The file is not a token map, or has been damaged.
            OSError: The file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        path = user_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no token map at {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                if metadata.get("format") != _FORMAT or names != ["canonical"]:
                    raise TokenMapError(
                        f"{path} is not a token map: expected format {_FORMAT} with the tensor 'canonical', found "
                        f"{metadata.get('format')} with {names[:8]}"
                    )
                canonical = file.get_tensor("canonical")
        except SafetensorError as error:
            raise TokenMapError(f"{path} is not a readable token map ({error}); build it again") from error
        if metadata != _sealed({key: value for key, value in metadata.items() if key != "seal"}):
            raise TokenMapError(f"{path} is damaged: its metadata does not match its own seal; build it again")
        token_map = cls(canonical, metadata.get("vocabulary_digest") or None)
        if token_map.digest != metadata.get("digest"):
            raise TokenMapError(
                f"{path} is damaged: its map has digest {token_map.digest}, the file promises "
                f"{metadata.get('digest')}; build it again"
            )
        return token_map


def is_torch(value: Any) -> bool:
    """Tell whether a value is a torch tensor, without importing torch."""
    if isinstance(value, np.ndarray):
        return False
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def check_tokens(tokens: Any, num_tokens: int) -> Any:
    """Check raw ids of any shape against a vocabulary, and return them as int64 of the same kind.

    On an accelerator and inside ``torch.compile`` the check is an assertion on the device, which ends the process,
    because nothing there may wait for the host. An id is never clamped.

    Raises:
        TokenError: The values are not integers, or one is outside [0, num_tokens); the message names the worst one.
    """
    if not is_torch(tokens):
        tokens = np.asarray(tokens)
        if tokens.size == 0:
            return tokens.astype(np.int64)
        if tokens.dtype.kind not in "iu":
            raise TokenError(f"token ids are integers, got an array of {tokens.dtype}")
        _refuse_outside(int(tokens.min()), int(tokens.max()), num_tokens)
        return tokens.astype(np.int64, copy=False)
    import torch

    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TokenError(f"token ids are integers, got a tensor of {tokens.dtype}")
    tokens = tokens.long()
    if torch.compiler.is_compiling() or tokens.device.type not in ("cpu", "meta"):
        inside = ((tokens >= 0) & (tokens < num_tokens)).all()
        torch._assert_async(inside, "a token id is outside the vocabulary")
    elif tokens.numel():
        # One copy to the host for both ends.
        low, high = torch.stack(torch.aminmax(tokens)).tolist()
        _refuse_outside(low, high, num_tokens)
    return tokens


def _refuse_outside(low: int, high: int, num_tokens: int) -> None:
    if low < 0 or high >= num_tokens:
        worst = low if low < 0 else high
        hint = "mask padding with attention_mask instead of negative ids" if low < 0 else "is this the right tokenizer?"
        raise TokenError(
            f"token id {worst} is outside the vocabulary of {num_tokens} tokens (0..{num_tokens - 1}); {hint}"
        )


def on_device(cache: dict[Any, "Tensor"], name: str, array: np.ndarray, device: Any) -> "Tensor":
    """Return a constant as a tensor on a device; it is copied there once."""
    import torch

    key = (name, device.type, device.index)
    if key not in cache:
        # NumPy makes the copy: torch.compile takes torch.tensor(array) for the copy of a tensor, and warns.
        cache[key] = torch.as_tensor(np.array(array), device=device)
    return cache[key]


def _sealed(metadata: dict[str, str]) -> dict[str, str]:
    """Add a checksum of the other entries, because safetensors itself does not notice a flipped byte."""
    return metadata | {"seal": hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()}


def load_tokenizer(tokenizer: Any) -> Any:
    """Find the ``tokenizers.Tokenizer`` behind what `TokenMap.from_tokenizer` accepts, or raise a `TokenMapError`."""
    if isinstance(tokenizer, str | os.PathLike):
        from tokenizers import Tokenizer

        path = user_path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise TokenMapError(f"there is no tokenizer at {path}; pass a tokenizer.json or the folder that holds one")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for every unreadable file
            raise TokenMapError(f"{path} is not a readable tokenizer.json ({error})") from error
    if hasattr(tokenizer, "id_to_token") and hasattr(tokenizer, "decode_batch"):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "id_to_token"):
        raise TokenMapError(
            f"{type(tokenizer).__name__} has no Rust backend, and only its decoding gives the published map; pass a "
            "fast tokenizer (AutoTokenizer.from_pretrained(...)), a tokenizers.Tokenizer or a tokenizer.json"
        )
    return backend


def read_vocabulary(tokenizer: Any) -> list[str | None]:
    """List a tokenizer's tokens by id, up to the largest id, with None where no token has the id.

    Takes what `TokenMap.from_tokenizer` takes. The length is what a model has to embed, which is more than
    ``len(tokenizer)`` where ids have holes.
    """
    backend = load_tokenizer(tokenizer)
    # A wrapper may hold tokens that its backend does not.
    holder = tokenizer if hasattr(tokenizer, "backend_tokenizer") else backend
    size = max(holder.get_vocab().values(), default=-1) + 1
    return [backend.id_to_token(token) for token in range(size)]


def digest_vocabulary(tokens: Sequence[str | None]) -> str:
    """Compute the SHA-256 of a list of tokens, in hexadecimal."""
    return hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode()).hexdigest()


def find_beginning(tokens: Sequence[str | None], digest: str) -> int | None:
    """Find how many tokens from the beginning of a list have a digest; None if no number of them has."""
    if digest_vocabulary(tokens) == digest:
        return len(tokens)
    running = hashlib.sha256(b"[")
    for place, token in enumerate(tokens):
        running.update((b"," if place else b"") + json.dumps(token).encode())
        whole = running.copy()
        whole.update(b"]")
        if whole.hexdigest() == digest:
            return place + 1
    return None


def _keys(backend: Any, tokens: Any) -> list[str]:
    """Return what each raw id is compared by."""
    from tokenizers import Regex, normalizers

    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SPACE),
            normalizers.Strip(),
            normalizers.Replace(_SPACE, " "),
        ]
    )
    texts = backend.decode_batch([[token] for token in tokens], skip_special_tokens=False)
    return [
        backend.id_to_token(token) if _REPLACEMENT in text else normalizer.normalize_str(text) or text
        for token, text in zip(tokens, texts, strict=True)
    ]
