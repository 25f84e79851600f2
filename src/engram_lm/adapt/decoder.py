"""Finds the decoder layers of any causal language model by its structure."""

import dataclasses
import inspect
from typing import Any

from torch import nn

from engram_lm.errors import ConfigError

_INPUT = "input_ids"


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """The part of a model that memory is added to."""

    name: str
    """Path of the layer list inside the model, such as ``model.layers``."""
    layers: nn.ModuleList
    """The decoder layers, in the order in which they run."""
    outer: tuple[nn.Module, ...]
    """Modules around `text_model` that are handed tokens too, from the outside in."""
    text_model: nn.Module
    """The innermost module around the layers whose ``forward`` takes ``input_ids``."""
    hidden_size: int
    """Width of the hidden states between layers."""
    vocab_size: int
    """Rows of the token embedding."""


def find_decoder(model: nn.Module, layer_list: str | None = None) -> Decoder:
    """Find the decoder layers of a causal language model, also inside multimodal wrappers and peft.

    A layer list is an ``nn.ModuleList`` whose members all take ``hidden_states`` first and that lies in no other such
    list. Where there are several (a vision tower has one too), those inside ``model.get_decoder()`` go first, then
    those as long as the text configuration says, then the longest.

    Args:
        model: Any transformers causal language model.
        layer_list: Path of the list, where structure does not tell.

    Raises:
        ConfigError: There is no such list or path, several are equally likely, the model is an encoder-decoder or
            wrapped, or nothing around the layers takes ``input_ids``.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConfigError(f"memory is attached to a torch model, not to {kind}")
    if kind == "OptimizedModule" or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ConfigError(
            f"the model is wrapped in {kind}, which would not see the memory; attach to the model itself, then wrap it"
        )
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"memory is attached to a transformers causal language model (AutoModelForCausalLM), and {kind} is not one"
        )
    text = config.get_text_config(decoder=True)
    name = _chosen(model, text) if layer_list is None else layer_list
    try:
        layers = model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"{kind} has no module {name!r}; layer_list is a path such as 'model.layers', as named_modules() spells it"
        ) from error
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ConfigError(f"layer_list={name!r} is a {type(layers).__name__}; it must be an nn.ModuleList of layers")
    parts = name.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    handed = [module for module in around if _INPUT in argument_names(module)]
    if not handed:
        raise ConfigError(f"no module around {name} of {kind} takes input_ids, which memory is addressed by")
    rows = embedded_tokens(model)
    return Decoder(
        name=name,
        layers=layers,
        outer=tuple(handed[:-1]),
        text_model=handed[-1],
        hidden_size=text.hidden_size,
        vocab_size=int(text.vocab_size if rows is None else rows),
    )


def embedded_tokens(model: Any) -> int | None:
    """Rows of a model's token embedding, which a quantized or offloaded one still knows; None if it does not say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a module's ``forward`` takes by position, in order."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def _chosen(model: nn.Module, text: Any) -> str:
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in candidates):
            continue  # a list inside a layer, such as experts
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and all(argument_names(one)[:1] == ("hidden_states",) for one in module)
        ):
            candidates[name] = module
    if not candidates:
        raise ConfigError(
            f"{type(model).__name__} has no recognizable layer list: no nn.ModuleList whose members take hidden_states "
            "first; name it with layer_list=, such as 'model.layers'"
        )
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    inside = set() if decoder is None else {id(module) for module in decoder.modules()}
    count = getattr(text, "num_hidden_layers", None)
    rank = {name: (id(found) in inside, len(found) == count, len(found)) for name, found in candidates.items()}
    best = [name for name in candidates if rank[name] == max(rank.values())]
    if len(best) > 1:
        raise ConfigError(
            f"{type(model).__name__} has several layer lists that may be its decoder: {', '.join(best)}; choose with "
            "layer_list="
        )
    return best[0]
