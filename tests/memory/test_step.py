"""One forward pass seen from the memory, as an engine makes it: requests side by side, state handed in per token."""

import pytest
import torch
from tests.memory.test_layer import build

from engram_lm.errors import HistoryError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.memory.decode_state import DecodeState
from engram_lm.memory.step import begin_step
from engram_lm.tables import ParameterTable

NUM_TOKENS = 60


def spec_of(config: EngramConfig) -> HashSpec:
    return config.hash_spec(TokenMap.identity(NUM_TOKENS), pad_token_id=0)


def context_of(items: torch.Tensor, position: int, width: int, fill: float) -> torch.Tensor:
    """The items before a position of one sequence, [width, ...], the fill before its start."""
    blank = items.new_full((max(0, width - position), *items.shape[1:]), fill)
    return torch.cat([blank, items[max(0, position - width) : position]])


@pytest.mark.parametrize("options", [{}, {"num_streams": 2}], ids=str)
def test_tokens_of_ragged_requests_side_by_side_read_what_whole_requests_read(options):
    layer = build(**options)
    config, spec = layer.config, spec_of(layer.config)
    generator = torch.Generator().manual_seed(1)
    lengths, streams = (7, 3, 5), config.num_streams
    requests = [torch.randint(NUM_TOKENS, (1, length), generator=generator) for length in lengths]
    hidden = [torch.randn(1, length, streams, config.hidden_size, generator=generator) for length in lengths]
    table = ParameterTable(spec.num_rows(1), config.head_dim)
    layer.table = table
    expected, kept, codes = [], [], []
    for tokens, states in zip(requests, hidden, strict=True):
        step = begin_step(spec, {1: table}, tokens)
        expected.append(layer(states, step.rows[1], active=step.active)[0])
        value, gates = layer.weigh(
            states, layer.read(step.rows[1]), step.active
        )  # what an engine stores for each token
        kept.append(layer.convolution_input(gates.unsqueeze(-1) * value.unsqueeze(-2))[0])
        codes.append(step.codes[0])
    # One batch of single tokens, out of any order, each with what came before it.
    order = [(0, 3), (2, 4), (1, 0), (0, 6), (1, 2), (2, 0)]
    step = begin_step(
        spec,
        {1: table},
        torch.stack([requests[request][0, [place]] for request, place in order]),
        context=torch.stack([context_of(codes[request], place, spec.context, -1) for request, place in order]),
        checked=False,
    )
    width, size = layer.window_shape
    window = torch.stack([context_of(kept[request], place, width, 0) for request, place in order])
    assert window.shape == (len(order), width, size)
    states = torch.stack([hidden[request][0, [place]] for request, place in order])
    update = layer(states, step.rows[1], window, active=step.active)
    wanted = torch.stack([expected[request][[place]] for request, place in order])
    torch.testing.assert_close(update, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_streams": 2}, {"norm_weight": "zero_centered", "gate": "none"}, {"kernel_size": 0}],
    ids=str,
)
def test_what_an_engine_keeps_of_each_token_gives_the_updates_of_the_whole_text(options):
    layer = build(**options)
    config, spec = layer.config, spec_of(layer.config)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(NUM_TOKENS, (1, 14), generator=generator)
    tokens[0, 5] = NUM_TOKENS + 1
    hidden = torch.randn(1, 14, config.num_streams, config.hidden_size, generator=generator)
    layer.table = ParameterTable(spec.num_rows(1), config.head_dim)
    step = begin_step(spec, {}, tokens, checked=False)
    expected = layer(hidden, step.rows[1], active=step.active)
    with torch.no_grad():
        value, gates = layer.weigh(hidden, layer.read(step.rows[1]), step.active)
        kept = {}
        if config.kernel_size:
            scales = layer.convolution_scales(value, gates)
            before = torch.arange(14)[:, None] - torch.tensor(layer.tap_distances)
            kept = {
                "scales": scales[0, :, None],
                "earlier_value": value[0, before.clamp(min=0)],
                "earlier_scales": scales[0, before.clamp(min=0)].masked_fill(before[..., None] < 0, 0),
            }
        update = layer.refine(value[0, :, None], gates[0, :, None], **kept, active=step.active[0, :, None])
    assert expected.count_nonzero() == 13 * config.num_streams * config.hidden_size
    torch.testing.assert_close(update[:, 0], expected.view(hidden.shape)[0], atol=1e-6, rtol=1e-6)


def test_tokens_outside_the_vocabulary_are_dead_where_nothing_is_checked():
    spec = spec_of(build().config)
    tokens = torch.tensor([[1, NUM_TOKENS + 5, 2, 3]])
    step = begin_step(spec, {}, tokens, checked=False)
    assert step.active.tolist() == [[True, False, True, True]]
    alone = begin_step(spec, {}, tokens[:, 2:])
    assert torch.equal(step.rows[1][:, 2:], alone.rows[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unchecked_step_compiles_to_one_graph():
    spec, tokens = spec_of(build().config), torch.randint(NUM_TOKENS, (3, 4))
    expected = begin_step(spec, {}, tokens, checked=False)
    torch._dynamo.reset()
    rows = torch.compile(lambda t: begin_step(spec, {}, t, checked=False).rows[1], fullgraph=True, backend="eager")
    assert torch.equal(rows(tokens), expected.rows[1])


def test_a_state_that_is_saved_and_restored_goes_on_from_there():
    layer = build()
    spec, generator = spec_of(layer.config), torch.Generator().manual_seed(3)
    layer.table = ParameterTable(spec.num_rows(1), layer.config.head_dim)
    state = DecodeState(2, spec.context)

    def advance(tokens, hidden):
        step = begin_step(spec, {1: layer.table}, tokens, state=state)
        return layer(hidden, step.rows[1], step.window(1), active=step.active)

    first, second = ((torch.randint(NUM_TOKENS, (2, 5), generator=generator), torch.randn(2, 5, 8)) for _ in range(2))
    advance(*first)
    snapshot = state.snapshot()
    expected = advance(*second)
    state.restore(snapshot)
    assert torch.equal(advance(*second), expected)
    assert state.seen == 10
    with pytest.raises(HistoryError, match="takes back 6 tokens"):
        state.rollback(6)
    state.rollback(10)  # all of them
    assert state.seen == 0 and (state.history.values == -1).all()
