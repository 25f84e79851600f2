"""How a sparse parameter budget is divided between routed experts and memory."""

import copy
import dataclasses
import math

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.sizes import ModelSizes, expert_parameters, model_sizes

_WIDTH_STEP = 8  # widths are multiples of this, as matrix products like them, unless that is too coarse


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A division of the budget in whole numbers, and how near it comes to the model of experts alone."""

    ratio: float
    """The share of sparse parameters that experts got, after rounding."""
    num_experts: int
    """Routed experts per block (``n_routed_experts``)."""
    rows_per_head: int
    """Rows asked for per hash head; 0 where nothing is left for memory."""
    intermediate_size: int
    """Width of the leading dense blocks, which pays for the projections of memory."""
    memory: EngramConfig | None
    """The memory with these rows; None at a ratio of 1."""
    total: int
    """Parameters without the vocabulary (P_tot)."""
    active: int
    """Parameters active per token (P_act)."""
    moe_total: int
    """P_tot of the model of experts alone."""
    moe_active: int
    """P_act of the model of experts alone."""
    moe_num_experts: int
    """Routed experts of the model of experts alone."""

    @property
    def total_difference(self) -> float:
        """Relative difference of the totals."""
        return self.total / self.moe_total - 1

    @property
    def active_difference(self) -> float:
        """Relative difference of the active parameters."""
        return self.active / self.moe_active - 1

    @property
    def backbone(self) -> dict[str, int]:
        """Fields of `EngramLMConfig` to set."""
        return {"n_routed_experts": self.num_experts, "intermediate_size": self.intermediate_size}


def allocate(
    config: EngramLMConfig,
    ratio: float,
    memory: EngramConfig | None = None,
    *,
    sparse_parameters: int | None = None,
    tolerance: float = 0.005,
) -> Allocation:
    """Divide a sparse budget: ``ratio`` of it to routed experts, the rest to rows of memory.

    As in the paper, the number of routed experts and of rows change. The projections of memory are active in every
    token, though, and would make the model larger by them; the leading dense blocks become narrower by as much.

    Args:
        config: The backbone, with mixtures of experts. Where it has a memory, the model of experts alone is the one
            with the same active and total parameters, and that memory is used where ``memory`` is None.
        ratio: rho, from 0 (as few experts as one token visits) to 1 (experts alone).
        memory: Where and how memory is read; its ``rows_per_head`` is what is looked for.
        sparse_parameters: P_sparse, experts and tables together; the config's own where None. It is rounded to whole
            experts, and groups of them.
        tolerance: Largest relative difference of total and of active parameters from the model of experts alone.

    Raises:
        ConfigError: The ratio is outside [0, 1], there are no experts to trade, the memory does not fit the backbone,
            or the numbers cannot be met; the message says by how much and what would help.

    Example:
        >>> moe = EngramLMConfig.preset("moe-27b")
        >>> memory = EngramLMConfig.preset("engram-27b").memory_config
        >>> found = allocate(moe, 0.7435, memory)
        >>> found.num_experts, round(found.rows_per_head, -5)
        (55, 2300000)

    Source: paper, section 3.1, Eq. 7.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise ConfigError(f"the ratio is the experts' share of the sparse budget, a number from 0 to 1, not {ratio!r}")
    if not 0 < tolerance < math.inf:
        raise ConfigError(f"tolerance is a relative difference above 0, not {tolerance}")
    if not config.has_experts:
        raise ConfigError("this backbone has no mixtures of experts to trade for memory; set first_k_dense_replace")
    own, memory = config.memory_config, config.memory_config if memory is None else memory
    sizes, per_expert = model_sizes(config, context=1), expert_parameters(config)
    sparse_parameters = sizes.sparse if sparse_parameters is None else sparse_parameters
    if not 0 <= sparse_parameters < math.inf:
        raise ConfigError(f"sparse_parameters is a number of parameters, not {sparse_parameters}")
    chosen, group, fewest = config.num_experts_per_tok or 0, config.n_group or 1, _fewest_experts(config)
    most = max(_multiple(chosen + round(sparse_parameters / per_expert), group), fewest)
    if most <= chosen:
        raise ConfigError(
            f"a sparse budget of {sparse_parameters:,} leaves no expert beyond the {chosen} that a token visits; one "
            f"expert has {per_expert:,} parameters over all blocks"
        )
    # The model of experts alone has the dense width that this model gave up for its memory.
    width = config.intermediate_size if own is None else _width(config, None, most, sizes.active, tolerance)
    reference = _backbone(config, most, width)
    moe_total, moe_active = reference.without_vocabulary, reference.active
    if ratio == 1:
        return Allocation(1.0, most, 0, width, None, moe_total, moe_active, moe_total, moe_active, most)
    if memory is None:
        raise ConfigError(
            f"a ratio of {ratio} leaves part of the budget to memory, and this model has none; pass "
            "memory=EngramConfig(...), or begin with an engram preset of this size"
        )
    config.check_memory(memory)
    if not isinstance(memory.rows_per_head, int):
        raise ConfigError(
            f"the budget decides one number of rows for all orders, and memory has rows_per_head={memory.rows_per_head}"
        )
    experts = max(_multiple(chosen + round(ratio * (most - chosen)), group), fewest)
    if experts == most:
        raise ConfigError(
            f"a ratio of {ratio} rounds to all {most} experts and leaves nothing to memory; the highest below 1 is "
            f"{(most - group - chosen) / (most - chosen):.4f}"
        )
    width = _width(config, memory, experts, moe_active, tolerance)
    base, read = _backbone(config, experts, width), len(memory.layers) * memory.memory_dim
    projections = len(memory.layers) * memory.layer_parameters()
    rows, memory = _with_rows(memory, moe_total - base.without_vocabulary - projections, ratio)
    sparse = base.sparse + memory.table_parameters() - read
    found = Allocation(
        ratio=base.sparse / sparse,
        num_experts=experts,
        rows_per_head=rows,
        intermediate_size=width,
        memory=memory,
        total=base.without_vocabulary + memory.num_parameters(),
        active=base.active + projections + read,
        moe_total=moe_total,
        moe_active=moe_active,
        moe_num_experts=most,
    )
    if abs(found.active_difference) > tolerance:
        if config.num_dense_layers:
            advice = "the leading dense blocks cannot become narrow enough: give the backbone wider ones, or memory"
        else:
            advice = "there are no leading dense blocks to pay for them: set first_k_dense_replace, or give memory"
        raise ConfigError(
            f"memory's projections are {projections:,} active parameters, which makes {moe_active:,} of them "
            f"{found.active:,} ({found.active_difference:+.2%}, allowed {tolerance:.2%}); {advice} a smaller "
            "memory_dim or fewer layers"
        )
    if abs(found.total_difference) > tolerance:
        raise ConfigError(
            f"the nearest total is {found.total:,} against {moe_total:,} ({found.total_difference:+.2%}, allowed "
            f"{tolerance:.2%}): the rows of a head are a prime number, and {memory.rows_per_head:,} of them are too "
            "few to be divided finely; use fewer heads, narrower rows or a larger budget"
        )
    return found


def _backbone(config: EngramLMConfig, experts: int, width: int) -> ModelSizes:
    """Sizes of the backbone alone."""
    changed = copy.deepcopy(config)
    changed.memory = changed.hash_spec = None
    changed.n_routed_experts, changed.intermediate_size = experts, width
    return model_sizes(changed, context=1)


def _fewest_experts(config: EngramLMConfig) -> int:
    """The smallest number of experts that a token can choose from: whole groups, none of a single expert."""
    groups, allowed = config.n_group or 1, config.topk_group or 1
    return groups * max(2, math.ceil((config.num_experts_per_tok or 0) / allowed))


def _multiple(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _width(config: EngramLMConfig, memory: EngramConfig | None, experts: int, wanted: int, tolerance: float) -> int:
    """Width of the dense blocks at which active parameters are those wanted; the given one where there are none."""
    per_column = 3 * config.hidden_size * config.num_dense_layers
    if not per_column:
        return config.intermediate_size
    own = 0 if memory is None else len(memory.layers) * (memory.layer_parameters() + memory.memory_dim)
    excess = _backbone(config, experts, config.intermediate_size).active + own - wanted
    step = _WIDTH_STEP
    while step > 1 and (step / 2 + 1) * per_column > tolerance * wanted:  # the nearest multiple may be that far away
        step //= 2
    return max(_WIDTH_STEP, _multiple(config.intermediate_size - math.ceil(excess / per_column), step))


def _with_rows(memory: EngramConfig, parameters: int, ratio: float) -> tuple[int, EngramConfig]:
    """Rows for each head with which the memory's tables come nearest to a number of parameters, and that memory."""
    num_tables = 1 if memory.tables == "shared" else len(memory.layers)
    per_row = num_tables * memory.memory_dim  # one more row in every head
    rows = parameters // per_row
    if rows < 1:
        raise ConfigError(
            f"a ratio of {ratio} leaves {max(parameters, 0):,} parameters for the tables, and one row in each of their "
            f"heads takes {per_row:,}; lower the ratio, or give memory fewer layers or a smaller memory_dim"
        )
    best = None
    # Heads take the next unused primes, a few rows more than asked for: ask for that many fewer.
    for _ in range(8):
        asked = max(1, rows)
        candidate = dataclasses.replace(memory, rows_per_head=asked)
        difference = candidate.table_parameters() - parameters
        if best is None or abs(difference) < abs(best[0]):
            best = (difference, asked, candidate)
        step = round(difference / per_row)
        if not step:
            break
        rows = asked - step
    assert best is not None
    return best[1:]
