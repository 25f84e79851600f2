"""Adding memory to a pretrained model."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engram_lm.adapt.adapter import MemoryAdapter, check_free, home
from engram_lm.adapt.decoder import Decoder, embedded_tokens, find_decoder
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.adapt.folder import BaseModel, check_vocabulary
from engram_lm.adapt.placement import Placement, resolve_layers
from engram_lm.errors import ConfigError, MismatchError, suggestion
from engram_lm.hashing import HashSpec, Segments
from engram_lm.memory.config import EngramConfig, check_tokenizer_kind
from engram_lm.model.table_place import wanted_tables
from engram_lm.tables import Table

_CHECKED_TOKENS = 8
_LOG = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    tokenizer: Any,
    config: EngramConfig | None = None,
    *,
    layers: Sequence[int | Placement] | Placement | None = None,
    name: str = "default",
    layer_list: str | None = None,
    segments: Segments | None = None,
    dtype: torch.dtype | None = torch.float32,
    table_dtype: torch.dtype | None = None,
    check: bool = True,
    **options: Any,
) -> MemoryAdapter:
    """Add memory to decoder layers of a transformers causal language model, without touching its code.

    The model begins by computing what it computed before, bit for bit: the value projections start at zero, whatever
    ``config.value_init`` says. Only where ``occupancy`` is asked for too, ``value_init="normal"`` among the ``options``
    draws them: such a memory is silent until rows are written, and facts can be written into it without training
    (`RowPatch.fit_facts`). It then trains with any loop over ``model.parameters()``; an optimizer that knows no
    sparse gradients needs ``EngramConfig(table_gradient="dense")``. ``generate`` works in all its modes.

    Attach before ``torch.compile`` and before DDP; before or after peft.

    Args:
        model: The model, also inside a multimodal wrapper or peft.
        tokenizer: Its tokenizer, a fast Hugging Face one. Ids that the model embeds beyond those of the tokenizer, as
            of tokens that are added later, are each hashed as a token of its own.
        config: Geometry and options; ``hidden_size`` is the model's, ``num_streams`` is 1. Where None, it is made of
            ``layers``, ``options`` and the width of the model.
        layers: Decoder layers, from 0, that read memory before they run, or places: ``"early"`` (layer 1),
            ``"middle"`` (the layer before the middle) and ``"late"`` (the layer after three quarters), which become
            numbers. Those of ``config`` where None.
        name: Which adapter this is; a model may have several, and their updates add up where several are enabled.
        layer_list: Path of the decoder layers, such as ``"model.layers"``, where structure does not tell.
        segments: Where N-grams stop. By default at the end-of-text token; name image placeholders of a multimodal
            model as ``dead_tokens``.
        dtype: Type of tables and layers; the model's own where None.
        table_dtype: Type of the tables, if another than ``dtype``. Rows of bfloat16 take half the room, and the row
            optimizers of `engram_lm.training.optimizers` move them also by updates that rounding would lose.
        check: Whether to run the model on a few tokens with and without the memory and compare all logits.
        **options: Other fields of `EngramConfig`, such as ``rows_per_head=50_000``, where no ``config`` is given.

    Returns:
        The adapter: a module of the model.

    Raises:
        ConfigError: No recognizable layer list, impossible layers, more than one stream, a tokenizer without pad and
            end token, a name that is taken, a model without weights, an unknown option.
        MismatchError: Another hidden size, a tokenizer of which the model embeds less than half, or (``check``) other
            logits.
        TokenMapError: The tokenizer has no Rust backend.

    Example:
        >>> adapter = engram_lm.attach(model, tokenizer, layers=(1,), rows_per_head=50_000)  # doctest: +SKIP
        >>> model.requires_grad_(False), adapter.requires_grad_(True)  # doctest: +SKIP
    """
    decoder = find_decoder(model, layer_list)
    check_free(model, name)
    if config is None:
        config = _config_for(decoder.hidden_size, options)
    elif options:
        raise ConfigError(
            f"{', '.join(options)} would change the configuration that is passed too; set them in the configuration, "
            "or pass no configuration"
        )
    chosen: Mapping[str, Any] = {} if layers is None else {"layers": resolve_layers(layers, len(decoder.layers))}
    # With occupancy the memory is silent whatever the projections are: none of its rows is written.
    is_silent = config.occupancy != "none" and "value_init" in options
    config = dataclasses.replace(config, value_init=config.value_init if is_silent else "zero", **chosen)
    spec = adapter_spec(decoder, tokenizer, config, segments)
    if dtype is None:
        # The matrices of a quantized layer hold integers, its norms do not.
        types = (parameter.dtype for parameter in decoder.layers.parameters() if parameter.is_floating_point())
        dtype = next(types, torch.get_default_dtype())
    device = home(decoder.layers[spec.blocks[0]])
    tables: dict[str, Table] = {}
    for key, wanted in wanted_tables(spec, config.head_dim).items():
        try:
            tables[key] = wanted.new(config, device, table_dtype or dtype)
        except RuntimeError as error:  # There is no class for a host whose memory is at an end.
            raise ConfigError(
                f"there is no room on {device} for a table of {wanted.num_rows:,} rows of {wanted.width} numbers "
                f"({str(error).splitlines()[0]:.200}); choose fewer rows_per_head, or a smaller memory_dim"
            ) from error
    adapter = MemoryAdapter(config, spec, tables, name=name, base=BaseModel.of(model, decoder))
    adapter.layers.to(dtype=dtype)
    adapter.attach_to(model, decoder)
    if check:
        try:
            _check_identity(model, adapter)
        except BaseException:
            adapter.detach()
            raise
    return adapter


def _config_for(hidden_size: int, options: Mapping[str, Any]) -> EngramConfig:
    known = [field.name for field in dataclasses.fields(EngramConfig)]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"memory has no option {unknown[0]!r}; {suggestion(unknown[0], known)}")
    return EngramConfig(**{"hidden_size": hidden_size, **options})


def adapter_spec(decoder: Decoder, tokenizer: Any, config: EngramConfig, segments: Segments | None = None) -> HashSpec:
    """Make the hash of a memory attached to a model, and check that model, tokenizer and memory fit, as `attach` does.

    Raises:
        ConfigError: As for `attach`.
        MismatchError: As for `attach`.
        TokenMapError: The tokenizer has no Rust backend.
    """
    if config.entry.reads != "rows":
        raise ConfigError(
            f"the memory layer {config.layer!r} reads no hashed rows and can be part of a model of this library alone, "
            "not be attached to another; choose layer='engram'"
        )
    if config.entry.writes != "hidden":
        raise ConfigError(
            f"the memory layer {config.layer!r} adds to the {config.entry.writes} of attention, which only models of "
            "this library let it do; attached memory adds to the hidden states, so choose layer='engram'"
        )
    if config.num_streams != 1:
        raise ConfigError(f"memory is attached to one residual stream, not {config.num_streams}; set num_streams=1")
    if config.hidden_size != decoder.hidden_size:
        raise MismatchError(
            f"the configuration's hidden_size is {config.hidden_size}, the model's {decoder.hidden_size}; set "
            f"hidden_size={decoder.hidden_size}"
        )
    if max(config.layers) >= len(decoder.layers):
        raise ConfigError(
            f"layers {config.layers} are asked for; {decoder.name} has {len(decoder.layers)}, counted from 0"
        )
    check_tokenizer_kind(tokenizer)
    spec = config.hash_spec_for(tokenizer, segments=segments)
    rows = decoder.vocab_size
    check_vocabulary(spec.num_tokens, decoder.vocab_size)
    if spec.num_tokens > rows:
        _LOG.warning(
            "the tokenizer has tokens up to the id %d, the model embeds %d: the model refuses a text with one of those "
            "beyond",
            spec.num_tokens - 1,
            rows,
        )
    # Embeddings are rounded up by some hundreds of rows.
    elif spec.num_tokens < rows - max(256, rows // 32):
        _LOG.warning(
            "the tokenizer has tokens up to the id %d, the model embeds %d: is it the tokenizer of this model?",
            spec.num_tokens - 1,
            rows,
        )
    return spec.covering(rows)


@torch.no_grad()
def _check_identity(model: nn.Module, adapter: MemoryAdapter) -> None:
    """Compare all logits of a few tokens with and without the memory, in evaluation mode."""
    size = min(adapter.spec.num_tokens, embedded_tokens(model) or adapter.spec.num_tokens)
    if all(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ConfigError("the model has no weights yet (its device is meta); load them first, or pass check=False")
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    tokens = (torch.arange(1, _CHECKED_TOKENS + 1, device=device) * 7919 % size)[None]
    with evaluating(model):
        found = model(input_ids=tokens, use_cache=False)[0]
        with adapter.disabled():
            expected = model(input_ids=tokens, use_cache=False)[0]
    if not bool(((found == expected) | (found.isnan() & expected.isnan())).all()):
        worst = (found.float() - expected.float()).abs().max().item()
        raise MismatchError(
            f"with new memory the model's outputs differ by up to {worst:.3g}, and should not differ at all; its "
            "kernels may not repeat themselves (torch.use_deterministic_algorithms), or its layers take something "
            "else than hidden_states first; check=False attaches all the same"
        )
