"""Switch the memory of a model off for a while, wholly or for single N-grams, or let it read the rows of others."""

import contextlib
import functools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from engram_lm.adapt.adapter import MemoryAdapter, attached_adapters
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.memory.interface import EngramOutput
from engram_lm.memory.layer import EngramLayer
from engram_lm.model.modeling import EngramModel

# Dimension key: H heads of all orders.

How = Literal["zero", "shuffle"]
"""How memory is suppressed: what it adds is set to zero, or it reads other rows."""


@contextlib.contextmanager
def suppressed(
    subject: Any, blocks: Sequence[int] | None = None, how: How = "zero", *, seed: int = 0
) -> Iterator[None]:
    """Suppress memory inside a ``with`` block, in forward passes and in generation, with a cache or without.

    ``"zero"`` sets what memory adds to the hidden states to zero. ``"shuffle"`` reads another row of the same head in
    place of each row: always the same one, and never the same one for two rows. The memory then says as much as before,
    but about other N-grams. If a table has rows that training never touched, some of them are read.

    Args:
        subject: An `EngramForCausalLM`, a model with attached memory (all of its adapters), a `MemoryAdapter`, or a
            `engram_lm.analysis.Subject` of either kind. It must not have been compiled before.
        blocks: Blocks whose memory is suppressed, counted from 0; None means all that have memory.
        how: ``"zero"`` or ``"shuffle"``.
        seed: Decides which rows ``"shuffle"`` reads.

    Raises:
        MismatchError: There is no memory.
        ConfigError: A block reads no memory, or there is no such ``how``.

    Source: paper, section 6.3 (zero). Shuffling is ours.
    """
    if how not in get_args(How):
        raise ConfigError(f"how is 'zero' or 'shuffle', not {how!r}")
    memories = memories_of(subject)
    for block in memories if blocks is None else blocks:
        if block not in memories:
            raise ConfigError(f"block {block} reads no memory; those that do are {', '.join(map(str, memories))}")
    with contextlib.ExitStack() as hooks:
        for block in memories if blocks is None else set(blocks):
            for layer, spec in memories[block]:
                if how == "zero":
                    handle = layer.register_forward_hook(_zero)
                else:
                    handle = layer.register_forward_pre_hook(functools.partial(_shuffle, _row_maps(spec, block, seed)))
                hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def without_ngrams(subject: Any, left_out: Tensor) -> Iterator[None]:
    """Let the memory of a model read single N-grams as if their rows were zero, inside a ``with`` block.

    Args:
        subject: As for `suppressed`.
        left_out: Which orders are left out at which positions of a text, bool ``[length, num_orders]``. Every forward
            pass inside the block reads texts of this length.

    Raises:
        MismatchError: There is no memory, or a text or the memory has another length or number of orders.
    """
    with contextlib.ExitStack() as hooks:
        for layers in memories_of(subject).values():
            for layer, _ in layers:
                if left_out.shape[1:] != (len(layer.config.orders),):
                    raise MismatchError(
                        f"N-grams are left out by position and order, bool [length, {len(layer.config.orders)}], got "
                        f"{list(left_out.shape)}"
                    )
                hooks.callback(layer.register_forward_pre_hook(functools.partial(_leave_out, left_out)).remove)
        yield


def find_memories(subject: Any) -> dict[int, list[tuple[EngramLayer, HashSpec]]]:
    """Find the memory layers of a model of any kind and how they hash, by block, in order of depth; none is no error.

    ``subject`` is as for `suppressed`.
    """
    found: list[tuple[int, Any, HashSpec]] = []
    if not isinstance(subject, torch.nn.Module):
        spec, layers = getattr(subject, "spec", None), getattr(subject, "memories", {})
        found = [] if spec is None else [(block, layer, spec) for block, layer in layers.items()]
    else:
        modules = list(subject.modules())  # the model may be inside another one, such as peft's
        for model in modules:
            if isinstance(model, EngramModel) and model.config.memory_layers:
                found += [(block, layer.memory, model.hash_spec) for block, layer in enumerate(model.layers)]
        adapters = [adapter for module in modules for adapter in attached_adapters(module).values()]
        for adapter in [subject] if isinstance(subject, MemoryAdapter) else adapters:
            found += [(block, adapter.layers[str(block)], adapter.spec) for block in adapter.spec.blocks]
    memories: dict[int, list[tuple[EngramLayer, HashSpec]]] = {}
    for block, layer, spec in sorted(found, key=lambda one: one[0]):
        if isinstance(layer, EngramLayer):
            memories.setdefault(block, []).append((layer, spec))
    return memories


def memories_of(subject: Any) -> dict[int, list[tuple[EngramLayer, HashSpec]]]:
    """Return what `find_memories` finds; a MismatchError if there is no memory."""
    memories = find_memories(subject)
    if not memories:
        kind = type(subject).__name__
        raise MismatchError(f"{kind} has no memory to suppress; pass a model with memory, or attach one to it")
    return memories


def _zero(layer: Any, args: tuple[Any, ...], output: Tensor | EngramOutput) -> Tensor | EngramOutput:
    # Not a product with zero, because memory may have said anything, NaN included.
    if isinstance(output, EngramOutput):
        return output._replace(update=torch.zeros_like(output.update))
    return torch.zeros_like(output)


def _row_maps(spec: HashSpec, block: int, seed: int) -> Tensor:
    """Draw a bijection of rows for each head; a permutation written out would be as long as the table.

    It is row -> (factor * row + shift) mod count, counted from the head's first row. Returns the offsets, factors,
    shifts and counts of the heads, int64 ``[4, H]``.
    """
    index = spec.blocks.index(block)
    # The seed is a string, because `random` turns a string into the same number in every process.
    chance = random.Random(f"{seed} {block}")
    factors, shifts = [], []
    for count in spec.primes[index]:
        # Below 2^31, so that a product with a row number stays below 2^63 in a table of up to 2^32 rows a head.
        bound = min(count, 2**31)
        candidates = (chance.randrange(2, bound) for _ in range(1000)) if bound > 3 else iter(())
        factors.append(next((factor for factor in candidates if math.gcd(factor, count) == 1), 1))
        shifts.append(chance.randrange(1, count) if count > 1 else 0)
    return torch.tensor([list(spec.offsets_at(index)), factors, shifts, list(spec.primes[index])], dtype=torch.int64)


def _shuffle(maps: Tensor, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, memory, *rest = args
    if memory.is_floating_point():
        raise MismatchError("rows cannot be shuffled where memory vectors are passed in place of row numbers")
    offsets, factors, shifts, counts = maps.to(memory.device)
    shuffled = offsets + (factors * (memory - offsets) + shifts) % counts
    return hidden, shuffled, *rest


def _leave_out(left_out: Tensor, layer: EngramLayer, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, memory, *rest = args
    if memory.shape[1] != len(left_out):
        raise MismatchError(f"N-grams are left out of {len(left_out)} tokens, and this text has {memory.shape[1]}")
    # The layer takes memory vectors as well as row numbers.
    vectors = memory if memory.is_floating_point() else layer.read(memory)
    parts = vectors.unflatten(-1, (left_out.shape[1], -1))
    return hidden, parts.masked_fill(left_out.to(parts.device)[None, ..., None], 0).flatten(-2), *rest
