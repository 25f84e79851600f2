"""On a GPU: the rows of a forward pass are hashed and read before it begins, into buffers that never move.

The runner that vLLM uses on GPUs lets a model prepare inputs of its own outside of captured graphs. It also keeps the
tokens of all requests on the GPU, so the tokens before a request's part of the pass come from there. The runner of CPUs
has neither, and the model looks its rows up inside the pass, see `ServedMemory.begin`.

This has been run on CPUs, with vLLM's own classes, and not on a GPU.

Source: vLLM ``v1/worker/gpu/model_states/interface.py``; ``models/deepseek_v41/nvidia/model_state.py`` finds the tokens
before a pass in the same place.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from engram_lm.memory.step import begin_step
from engram_lm.serving.vllm.lost_rows import Owners, read_or_note
from engram_lm.serving.vllm.memory import ServedMemory, StagedRows

# Dimension key: T tokens of all requests side by side, W context (highest order - 1), M memory width.


class StagingModelState(DefaultModelState):
    """What vLLM's runner of GPUs asks for the inputs of our model: its rows are read here."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.served: ServedMemory | None = model.model.served
        self.staged = None if self.served is None else make_buffers(self.served, self.max_num_tokens, device)
        # From one method that vLLM calls before a forward pass to the next one that it calls before the same pass.
        self._slots: Tensor | None = None

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        **more: Any,
    ) -> dict[str, Any]:
        """Prepare what layers with a cache are told, and keep the slots of the tokens."""
        if self.served is not None:
            first = self.served.first_state.name
            groups = kv_cache_config.kv_cache_groups
            self._slots = slot_mappings[next(i for i, group in enumerate(groups) if first in group.layer_names)]
        metadata: dict[str, Any] = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **more
        )
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        """Read the rows of a forward pass; the result is given to the model's ``forward``."""
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        if self.served is None or self.staged is None:
            return inputs
        slots, self._slots = self._slots, None
        stage(self.served, self.staged, input_batch, req_states.all_token_ids.gpu, slots)
        return {**inputs, "staged": self.staged}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return what `prepare_inputs` returns, for a pass that is nobody's."""
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs if self.staged is None else {**inputs, "staged": self.staged}


def make_buffers(served: ServedMemory, num_tokens: int, device: torch.device) -> StagedRows:
    """Make buffers for forward passes of at most `num_tokens` tokens; nothing in them is active."""
    return StagedRows(
        vectors={
            block: torch.zeros(
                num_tokens, 1, layer.config.memory_dim, dtype=layer.key_value.weight.dtype, device=device
            )
            for block, layer in served.layers.items()
        },
        active=torch.zeros(num_tokens, 1, dtype=torch.bool, device=device),
        codes=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
    )


def stage(
    served: ServedMemory, staged: StagedRows, batch: InputBatch, all_token_ids: Tensor, slots: Tensor | None
) -> None:
    """Hash the tokens of a forward pass and read their rows into the buffers.

    Args:
        served: The memory layers.
        staged: The buffers, which are written.
        batch: The requests of the pass.
        all_token_ids: Tokens of all requests that vLLM knows of, ``[requests, tokens]``; those that are computed in
            this pass, drafts among them, are in the batch alone.
        slots: Slot of each token in the cache of the first memory layer; None where there is no cache yet.

    Raises:
        EngramError: A row cannot be read, and nobody takes note; see `read_or_note`.
        OSError: Likewise.
    """
    assert served.spec is not None, "the checkpoint has not been loaded"
    spec, count = served.spec, batch.num_tokens
    tokens, positions = batch.input_ids[:count].long(), batch.positions[:count]
    ends = batch.query_start_loc[1 : batch.num_reqs + 1].long()
    place = torch.arange(count, device=tokens.device)
    request = torch.searchsorted(ends, place, right=True).clamp(max=batch.num_reqs - 1)
    distances = torch.arange(spec.context, 0, -1, device=tokens.device)
    earlier, position = place[:, None] - distances, positions[:, None] - distances
    known = all_token_ids[batch.idx_mapping[request][:, None], position.clamp(min=0)].long()
    is_here = earlier >= batch.query_start_loc[request][:, None]
    before = torch.where(is_here, tokens[earlier.clamp(min=0)], known)
    context = spec.encode_unchecked(before.view(-1, 1)).view_as(before).masked_fill(position < 0, -1)
    tables = {block: layer.table for block, layer in served.layers.items()}
    step = begin_step(spec, tables, tokens[:, None], context=context, checked=False)
    owners = Owners(served.first_state.name, ends, tokens.new_empty(0) if slots is None else slots[:count])
    staged.codes[:count] = step.codes[:, 0]
    staged.active[:count] = step.active
    for block, layer in served.layers.items():
        staged.vectors[block][:count] = read_or_note(layer, step.rows[block], owners)
