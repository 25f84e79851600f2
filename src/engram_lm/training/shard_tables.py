"""Dividing a model's tables over ranks, before it is wrapped and before its optimizer is made."""

from typing import Any

import torch
import torch.distributed as dist

from engram_lm.errors import ConfigError
from engram_lm.tables.tiers.device import ParameterTable
from engram_lm.tables.tiers.sharded import ShardedTable


def shard_tables(
    model: Any,
    group: "dist.ProcessGroup | None" = None,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
    deduplicate: bool = True,
) -> dict[str, ShardedTable]:
    """Divide the trained tables of an Engram model over ranks, in place: every rank keeps its own rows.

    Call it before the model is wrapped and before its optimizer is made. With a seed the rows are drawn anew and are
    the same under any number of ranks, one included; without one, rows that exist are kept (every rank must then have
    built the same model), and rows on the meta device stay there, to be drawn from the seed 0 by
    ``reset_parameters``. A table on the meta device is never allocated whole.

    Args:
        model: An `EngramForCausalLM` or `EngramModel`.
        group: Ranks that share the tables; all of them where None. A group that is used for nothing else lets rows
            travel beside the gradients of the backbone.
        seed: Of the rows, see `draw_rows`; each table has one of its own under it.
        device: Where the rows shall be; where they are if None.
        deduplicate: See `ShardedTable`.

    Returns:
        Name to table, as in ``model.tables``.

    Raises:
        ConfigError: A table is trained with dense gradients, or is none that is trained.
    """
    base = model.base_model
    for name, table in model.tables.items():
        if not isinstance(table, ParameterTable):
            raise ConfigError(
                f"table {name} is a {type(table).__name__}; only a ParameterTable is divided over ranks: load the "
                "model with its tables on the device"
            )
        if table.gradient != "sparse":
            raise ConfigError(f"table {name} has dense gradients; tables over ranks need table_gradient='sparse'")
    made = {}
    for number, (name, table) in enumerate(model.tables.items()):
        target = torch.device(device) if device is not None else table.weight.device
        # Drawn at once only where a seed says so: what exists is about to be copied.
        options = {"group": group, "std": table.std, "dtype": table.dtype, "deduplicate": deduplicate}
        options["first_rows"] = table.first_rows
        seeds = (0 if seed is None else seed, number)
        sharded = ShardedTable(table.num_rows, table.width, seed=seeds, device="meta", **options)
        if target.type != "meta":
            sharded = sharded.to_empty(device=target)
            if seed is not None or table.weight.is_meta:
                sharded.reset_parameters()
            else:
                stop = sharded.first_row + sharded.weight.shape[0]
                with torch.no_grad():
                    sharded.weight.copy_(table.weight[sharded.first_row : stop])
            sharded.fill()  # a checkpoint that is loaded next may hold first numbers
        sharded.weight.requires_grad_(table.weight.requires_grad)
        made[name] = sharded.train(table.training)
        base.memory_tables[name] = sharded
        for layer in base.layers:
            if layer.memory is not None and layer.memory.table is table:
                layer.memory.table = sharded
    return made
