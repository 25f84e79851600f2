"""What checkpoints of trainers of Hugging Face hold of a model with memory, and how it is read from them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engram_lm.adapt.adapter import CONTAINER, MemoryAdapter
from engram_lm.adapt.decoder import find_decoder
from engram_lm.adapt.folder import BaseModel, LocalFiles, read_adapter
from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.model.table_place import TablePlace
from engram_lm.tables import ParameterTable

# Rows of a table that are restored at a time.
_PIECE_ROWS = 1 << 16


def is_memory(name: str) -> bool:
    """Whether a parameter of this name belongs to attached memory."""
    return CONTAINER in name.split(".")


def refuse_what_is_not_saved(model: nn.Module, adapters: dict[str, MemoryAdapter]) -> None:
    """Refuse, before training, to train what a checkpoint would not hold or could not give back."""
    for name, adapter in adapters.items():
        if parametrized := [weight for weight, place in adapter.weights().items() if place.is_parametrized]:
            raise ConfigError(
                f"{', '.join(parametrized)} of the memory {name!r} are parametrized: a checkpoint holds the weights "
                "that they give, from which training could not go on exactly; remove the parametrizations "
                "first"
            )
    if getattr(model, "peft_config", None) is None or not hasattr(model, "get_base_model"):
        return
    from peft import get_peft_model_state_dict

    saved = {parameter.data_ptr() for adapter in adapters.values() for parameter in adapter.own_parameters()}
    for name in model.peft_config:  # type: ignore[union-attr]
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        saved |= {tensor.data_ptr() for tensor in state.values()}
    lost = [name for name, value in model.named_parameters() if value.requires_grad and value.data_ptr() not in saved]
    if lost:
        raise ConfigError(
            f"{len(lost)} parameters are trained and no checkpoint would hold them, because with peft a checkpoint "
            f"holds peft's adapters and the memory: {', '.join(lost[:3])}, …; name them in modules_to_save of peft's "
            "configuration, freeze them, or train the whole model without peft"
        )


def restore_model(model: Any, checkpoint: str) -> None:
    """Read everything but the memory from a checkpoint, in place.

    Trainer itself takes the tensors by their names in the file, where the experts of a mixture, for example, are called
    otherwise than in the model; what it does not find stays as it is.
    """
    stored, report = type(model).from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    found = stored.state_dict()
    lacking = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    lacking |= {name for name in model.state_dict() if name not in found and not is_memory(name)}
    if lacking:
        raise CheckpointError(
            f"{checkpoint} lacks {len(lacking)} weights of the model, such as {sorted(lacking)[0]}; it was written for "
            "another model: resume from another checkpoint, or begin anew"
        )
    model.load_state_dict(found, strict=False)


@torch.no_grad()
def restore_adapters(adapters: dict[str, MemoryAdapter], checkpoint: str) -> None:
    """Read the weights of attached adapters from a checkpoint, in place."""
    for name, adapter in adapters.items():
        folder = Path(checkpoint) / CONTAINER / name
        if not folder.is_dir():
            raise CheckpointError(
                f"{checkpoint} holds no memory {name!r} (expected the folder {CONTAINER}/{name}); it was written "
                "without MemoryTrainerMixin, or for other adapters: resume from another checkpoint, or begin anew"
            )
        assert adapter.model is not None
        decoder = find_decoder(adapter.model, adapter.layer_list)
        stored = read_adapter(LocalFiles(folder), BaseModel.of(adapter.model, decoder))
        if stored.spec.digest != adapter.spec.digest:
            raise MismatchError(
                f"the memory {name!r} in {checkpoint} has the hash {stored.spec.digest}, the attached one "
                f"{adapter.spec.digest}; attach with the configuration and tokenizer of the run that is resumed"
            )
        for weight, place in adapter.weights().items():
            place.value.copy_(stored.layers[weight])
        tables = {key: table for key, table in adapter.tables.items() if isinstance(table, ParameterTable)}
        if not tables:
            continue
        opened = stored.open_tables(TablePlace(tier="mmap", read_ahead=False), None)
        try:
            for key, table in tables.items():
                for start in range(0, table.num_rows, _PIECE_ROWS):
                    rows = torch.arange(start, min(start + _PIECE_ROWS, table.num_rows))
                    table.store(rows, opened[key].gather(rows))
        finally:
            for stored_table in opened.values():
                stored_table.close()
