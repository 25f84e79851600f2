"""One view of any model: its layers, its memory, and what its head makes of the hidden state of any layer."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead

from engram_lm.adapt import attached_adapters
from engram_lm.adapt.decoder import Decoder, find_decoder
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.token_map import digest_vocabulary, read_vocabulary
from engram_lm.memory.layer import EngramLayer

# Dimension key: S streams, D hidden, V vocabulary.

OWN_MEMORY = ""
"""In place of an adapter's name: the memory that a model was trained with, and none that was attached to it later."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A model that is analyzed. It is made by `find_subject`; no part of the model is copied or changed."""

    name: str
    """What people call it; unique among the models of one analysis."""
    model: Any
    """The causal language model: ours, any model of transformers, or one with an attached memory."""
    tokenizer: Any
    """Its tokenizer."""
    layers: nn.ModuleList
    """Decoder layers, in the order in which they run."""
    memories: dict[int, EngramLayer]
    """The memory that each block begins with, by the block's number from 0, in order of depth; empty without memory."""
    spec: HashSpec | None
    """How the memory hashes; None without memory."""
    num_streams: int
    """Number of residual streams between the layers."""
    hidden_size: int
    """Width of one stream."""
    vocab_size: int
    """Number of rows of the token embedding."""
    collapse: nn.Module | None
    """What combines the streams before the final norm; None if there is one stream."""
    norm: nn.Module | None
    """The final norm; None if none was found."""
    head: nn.Module | None
    """The output head; None if the model has none."""
    keeps_fewer_logits: bool
    """Whether the model takes ``logits_to_keep``, so that unneeded logits are not computed."""
    max_length: int | None
    """Tokens that it can see at once, at most; None if positions are not learned, so that there is no limit."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def ungated(self) -> str | None:
        """Why there are no gates; None if there are."""
        if not self.memories:
            return "it has no memory"
        return "its memory is not gated" if all(one.config.gate == "none" for one in self.memories.values()) else None

    @property
    def device(self) -> torch.device:
        """The device on which the model expects token ids."""
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        return torch.device(self.model.device) if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden states, as far as it is known beforehand: that of the first floating-point parameter."""
        floating = (parameter.dtype for parameter in self.layers.parameters() if parameter.is_floating_point())
        return next(floating, torch.float32)

    @cached_property
    def vocabulary_digest(self) -> str:
        """Digest of the tokenizer's vocabulary."""
        return digest_vocabulary(read_vocabulary(self.tokenizer))

    @torch.no_grad()
    def predict(self, hidden: Tensor) -> Tensor:
        """Compute what the model would predict if a hidden state were its last layer's output.

        The streams are combined as before the model's own head; then come the final norm, the head, and the scaling or
        soft-capping that the configuration names (Gemma, Cohere, Granite, Falcon-H1).

        Args:
            hidden: The output of any layer, ``[..., S, D]``.

        Returns:
            Logits ``[..., V]``, in the type of the head.

        Raises:
            MismatchError: The hidden state has another shape, or no head was found.

        Source: logit lens, nostalgebraist 2020; paper, section 6.1 (which does not say how streams are collapsed).
        """
        if hidden.shape[-2:] != (self.num_streams, self.hidden_size):
            raise MismatchError(
                f"hidden states of {self.name} end in {list(hidden.shape[-2:])}; expected "
                f"[..., {self.num_streams}, {self.hidden_size}] (streams, width)"
            )
        if self.head is None:
            raise MismatchError(f"{self.name} has no output head, so nothing can be predicted from its layers")
        state = hidden.squeeze(-2)
        if self.collapse is not None:
            state = self.collapse(hidden.reshape(1, -1, *hidden.shape[-2:])).reshape(*hidden.shape[:-2], -1)
        logits: Tensor = self.head(state if self.norm is None else self.norm(state))
        config = self.model.config.get_text_config(decoder=True)
        for name, apply in _SCALES.items():
            value = getattr(config, name, None)
            if value is not None:
                logits = apply(logits, value)
        return logits


_SCALES = {
    "logits_scaling": lambda logits, value: logits / value,
    "logit_scale": lambda logits, value: logits * value,
    "lm_head_multiplier": lambda logits, value: logits * value,
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,
}
"""What models do to the logits behind their head, by its name in their configuration."""


def find_subject(model: Any, tokenizer: Any, *, name: str | None = None, adapter: str | None = None) -> Subject:
    """Find a model's layers, its memory, and how it predicts.

    Args:
        model: An `engram_lm.EngramForCausalLM`, any causal language model of transformers, one with an attached memory,
            or any of these inside peft.
        tokenizer: The tokenizer it was trained with.
        name: What it is called in results; None means the name by which it was loaded.
        adapter: Which attached memory to look at, if there are several; `OWN_MEMORY` for the model's own beside them.

    Raises:
        ConfigError: It is not such a model, several memories are attached and none is chosen, or none has that name.
        MismatchError: The memory was made for another tokenizer.
        TokenMapError: The model was built from a configuration alone, so it has no token map.
    """
    try:
        decoder = find_decoder(model)
    except ConfigError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be analyzed, because its layers were not found: {error}"
        ) from error
    memories, spec = _memories(model, decoder, adapter)
    if spec is not None:
        spec.bind(tokenizer)
    around = model.get_submodule(decoder.name.rpartition(".")[0])
    heads = [child for child in around.children() if isinstance(child, DeepseekV4HyperHead)]
    # The rows of a learned position embedding beside the layers, as GPT-2 and OPT have.
    learned = [
        child.num_embeddings
        for where, child in around.named_children()
        if isinstance(child, nn.Embedding) and (where == "wpe" or "position" in where)
    ]
    find_head = getattr(model, "get_output_embeddings", None)
    collapse = heads[0] if heads else None
    return Subject(
        # A model that was loaded by its folder is called like the folder.
        name=name
        or str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
        or type(model).__name__,
        model=model,
        tokenizer=tokenizer,
        layers=decoder.layers,
        memories=memories,
        spec=spec,
        num_streams=1 if collapse is None else int(collapse.hc_mult),
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        collapse=collapse,
        norm=_final_norm(around, decoder.layers),
        head=find_head() if callable(find_head) else None,
        keeps_fewer_logits=any("logits_to_keep" in inspect.signature(one.forward).parameters for one in decoder.outer),
        max_length=min(learned, default=None),
    )


def find_subjects(models: Any, tokenizer: Any, *, adapter: str | None = None) -> list[Subject]:
    """Find one or several models, as `find_subject` does.

    Several are a mapping of names in results to models; then the tokenizer may be a mapping of names too. In place of a
    model there may be a `Subject`, which keeps its own name unless it is in a mapping. Raises `ConfigError` if there is
    no model, or no tokenizer for one of them.
    """
    if not isinstance(models, Mapping):
        return [models if isinstance(models, Subject) else find_subject(models, tokenizer, adapter=adapter)]
    if not models:
        raise ConfigError("there is no model to analyze; pass at least one")
    subjects = []
    for name, model in models.items():
        if isinstance(model, Subject):
            subjects.append(dataclasses.replace(model, name=name))
            continue
        if isinstance(tokenizer, Mapping) and name not in tokenizer:
            raise ConfigError(f"no tokenizer was given for {name}; those given are for {', '.join(tokenizer)}")
        own = tokenizer[name] if isinstance(tokenizer, Mapping) else tokenizer
        subjects.append(find_subject(model, own, name=name, adapter=adapter))
    return subjects


def group_by_tokenizer(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """Divide models into groups that share a vocabulary and can therefore read a text together, token by token.

    The groups are in the order of their first models.
    """
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.vocabulary_digest, []).append(subject)
    return list(groups.values())


def _memories(
    model: nn.Module, decoder: Decoder, adapter: str | None
) -> tuple[dict[int, EngramLayer], HashSpec | None]:
    """Find the memory layers by their blocks, in order of depth, and how they hash."""
    attached = {} if adapter == OWN_MEMORY else attached_adapters(model)
    if adapter == OWN_MEMORY:
        adapter = None
    if adapter is not None and adapter not in attached:
        raise ConfigError(f"no memory called {adapter!r} is attached to this model; there are {sorted(attached)}")
    if adapter is None:
        active = [one for one in attached if attached[one].enabled]
        if len(active) > 1:
            raise ConfigError(
                f"several memories are attached to this model: {', '.join(active)}; choose with adapter='...'"
            )
        adapter = active[0] if active else None
    if adapter is not None:
        chosen = attached[adapter]
        if not chosen.enabled:
            raise ConfigError(f"the memory {adapter!r} is switched off; set adapter.enabled = True to look at it")
        layers = {block: chosen.layers[str(block)] for block in sorted(chosen.spec.blocks)}
        return layers, chosen.spec  # type: ignore[return-value]
    own = {block: getattr(layer, "memory", None) for block, layer in enumerate(decoder.layers)}
    layers = {block: memory for block, memory in own.items() if isinstance(memory, EngramLayer)}
    return layers, decoder.text_model.hash_spec if layers else None  # type: ignore[return-value]


def _final_norm(around: nn.Module, layers: nn.ModuleList) -> nn.Module | None:
    """Find the final norm: the last norm beside the list of layers, preferably behind it."""
    children = list(around.children())
    place = next(place for place, child in enumerate(children) if child is layers)
    for some in (children[place:], children[:place]):
        if norms := [child for child in some if "norm" in type(child).__name__.lower()]:
            return norms[-1]
    return None
