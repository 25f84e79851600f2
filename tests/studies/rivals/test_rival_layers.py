"""The rivals against their published definitions, written plainly here or in a package, and as parts of models."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.small_model import BACKBONE, TEXT, perturbed
from torch import nn
from transformers import DynamicCache

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.memory.interface import build_layer
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.sizes import model_sizes
from engram_lm.studies.rivals.arms import scone_memory
from engram_lm.studies.rivals.f_grams import FGramLayer, f_gram_keys
from engram_lm.studies.rivals.study import RivalsStudy
from engram_lm.tables import ParameterTable
from engram_lm.training.data.tokenizer import train_tokenizer

PLAIN = {"hidden_size": 32, "layers": (1,), "gate": "none", "kernel_size": 0, "orders": (1,)}
KEYS = PLAIN | {"layer": "pkm", "num_heads": 2, "memory_dim": 64, "rows_per_head": 60}
RIVALS = {
    "pkm": KEYS | {"layer_options": {"chosen": 3, "key_width": 8, "gate": "none", "query_norm": "layer"}},
    "memory_plus": KEYS | {"memory_dim": 24, "layer_options": {"chosen": 5, "key_width": 8}},
    "ultra_mem": PLAIN
    | {"layer": "ultra_mem", "num_heads": 1, "memory_dim": 12, "rows_per_head": 40}
    | {"layer_options": {"chosen": 4, "key_width": 8}},
    "per_token": PLAIN
    | {
        "layer": "per_token",
        "layers": (0, 2),
        "num_heads": 1,
        "memory_dim": 10,
        "rows_per_head": 400,
        "token_map": "raw",
    },
    "ngram_mean": PLAIN
    | {
        "layer": "ngram_mean",
        "orders": (2, 4),
        "num_heads": 1,
        "memory_dim": 2,
        "rows_per_head": 1,
        "token_map": "raw",
    },
    "scone": PLAIN
    | {"layer": "scone", "layers": (0,), "orders": (2, 3), "num_heads": 1, "memory_dim": 2, "rows_per_head": 1}
    | {"token_map": "raw", "layer_options": {"num_f_grams": 50, "min_count": 2}},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


def rival(name, tokenizer):
    config = EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(**RIVALS[name]), **BACKBONE)
    torch.manual_seed(0)
    model = perturbed(EngramForCausalLM(config), 0.05).eval()
    for block in model.model.layers:
        if block.memory is not None:
            block.memory.prepare(model.hash_spec, text())
    return model


def text(length=20):
    """Tokens in which N-grams repeat."""
    generator = torch.Generator().manual_seed(3)
    piece = torch.randint(2, 280, (length,), generator=generator)
    return torch.cat([piece, piece[5:], piece[:9], piece]).numpy()


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_is_counted_saved_and_decodes_as_its_whole_forward(name, tokenizer, tmp_path):
    model = rival(name, tokenizer)
    sizes = model_sizes(model.config, context=64)
    assert sum(p.numel() for p in model.parameters()) == sizes.total
    assert sum(t.num_rows * t.width for t in model.tables.values()) == sizes.memory_tables
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.from_numpy(text())[None, 4:40].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, whole)
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([1, 7, 1, 1, 20, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=3e-5, rtol=1e-4)
        padded = F.pad(ids, (3, 0), value=1)
        mask = F.pad(torch.ones_like(ids), (3, 0))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(found, whole, atol=3e-5, rtol=1e-4)
        for block in model.model.layers:  # without its update the model says something else
            if block.memory is not None:
                block.memory.register_forward_hook(lambda layer, given, output: (output[0] * 0, output[1]))
        assert not torch.allclose(model(ids).logits, whole, atol=1e-3)


@pytest.mark.parametrize("name", RIVALS)
def test_every_number_of_a_rival_gets_a_gradient(name, tokenizer):
    model = rival(name, tokenizer)
    ids = torch.from_numpy(text())[None]
    model(ids, labels=ids).loss.backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.to_dense().abs().sum() > 0, path


def layer_of(name, **changed):
    config = EngramConfig(**RIVALS[name] | changed)
    rows = config.num_table_rows()
    table = ParameterTable(rows[0], config.head_dim) if rows else None
    torch.manual_seed(1)
    layer = build_layer(config, table)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        if table is not None:
            table.weight.normal_()
    return layer


def test_product_keys_read_what_a_search_of_all_pairs_finds():
    layer = layer_of("memory_plus")
    hidden = torch.randn(2, 5, 32)
    side = math.isqrt(layer.table.num_rows)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * layer.input_norm
    expected = torch.zeros(2, 5, 12)
    for b in range(2):
        for t in range(5):
            for head in range(2):
                query = layer.query.weight.view(2, 8, 32)[head] @ normed[b, t]
                all_pairs = (layer.keys[head, 0] @ query[:4])[:, None] + (layer.keys[head, 1] @ query[4:])
                best = all_pairs.flatten().topk(5)
                expected[b, t] += best.values.softmax(0) @ layer.table.weight[: side**2][best.indices]
    torch.testing.assert_close(layer.choose(hidden), expected)
    gate = F.silu(normed @ layer.gate.weight.T)
    torch.testing.assert_close(layer(hidden, None), (expected * gate) @ layer.output.weight.T)


def test_product_keys_equal_those_of_a_package():
    package = pytest.importorskip("product_key_memory")
    layer = layer_of("pkm")
    heads, side = 2, math.isqrt(layer.table.num_rows)
    theirs = package.PKM(
        32, heads=heads, num_keys=side, topk=3, dim_head=4, use_layernorm=True, pre_layernorm=False
    ).eval()
    state = theirs.state_dict()
    state["keys"] = layer.keys.permute(0, 2, 1, 3)
    state["to_queries.weight"] = layer.query.weight.view(heads, 2, 4, 32).transpose(0, 1).reshape(-1, 32)
    state["values.weight"] = layer.table.weight[: side**2]
    theirs.load_state_dict(state)
    with torch.no_grad():
        layer.input_norm.fill_(1)
        layer.query_norm.fill_(1)
    hidden = torch.randn(2, 7, 32)
    hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()  # as normalized hidden states are
    torch.testing.assert_close(layer(hidden, None), theirs(hidden), atol=1e-4, rtol=1e-4)


def test_ultra_mem_equals_its_definition_cell_by_cell():
    layer = layer_of("ultra_mem").requires_grad_(False)
    layer.core.uniform_()
    hidden = torch.randn(1, 3, 32)
    side = math.isqrt(layer.table.num_rows)
    assert layer.num_keys == 2 * side and layer.num_rows == side**2
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * layer.input_norm
    core = layer.core[0].sum(0)
    left, _, right = torch.linalg.svd(core)
    sign = 1 if left[:, 0].sum() > 0 else -1
    norm = lambda x, weight: F.layer_norm(x, (4,)) * weight  # noqa: E731
    for t in range(3):
        query = (layer.query.weight @ normed[0, t]).view(2, 4)
        s1, s2 = (norm(layer.keys[half], layer.key_norm) @ norm(query[half], layer.query_norm) for half in (0, 1))
        rows = (s1 @ left[:, 0] * sign).topk(4).indices
        columns = (s2 @ right[0] * sign).topk(4).indices
        cells = {(int(i), int(j)): float(s1[i] @ core @ s2[j]) for i in rows for j in columns}
        best = sorted(cells, key=cells.get, reverse=True)[:4]
        copies = torch.zeros(4, 12)
        for i, j in best:
            cell = (i * layer.num_keys + j) * layer.step % layer.num_cells
            value = layer.table.weight[cell % layer.num_rows]
            scores = torch.stack([s1[i] @ layer.core[0, part] @ s2[j] for part in (0, 1)])
            copies[cell // layer.num_rows] += value * scores.repeat_interleave(6)
        expected = layer.output.weight @ copies.flatten()
        torch.testing.assert_close(layer(hidden, None)[0, t].detach(), expected, atol=1e-4, rtol=1e-4)


def test_every_cell_of_ultra_mem_stands_for_one_row_and_copy():
    layer = layer_of("ultra_mem")
    cells = torch.arange(layer.num_cells) * layer.step % layer.num_cells
    assert len(cells.unique()) == layer.num_cells == 4 * layer.num_rows


def test_per_token_embeddings_equal_gemma_s():
    gemma = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig

    layer = layer_of("per_token")
    layer.embedding = nn.Embedding(50, 32)
    tokens, hidden = torch.randint(0, 50, (2, 6)), torch.randn(2, 6, 32)
    config = Gemma3nTextConfig(
        vocab_size=50, vocab_size_per_layer_input=50, hidden_size=32, hidden_size_per_layer_input=10,
        intermediate_size=[16], num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        layer_types=["full_attention"], num_kv_shared_layers=0, laurel_rank=2, activation_sparsity_pattern=[0.0],
    )  # fmt: skip
    theirs = gemma.Gemma3nTextModel(config)
    block = theirs.layers[0]
    with torch.no_grad():
        for ours, weight in (
            (layer.table.weight[:50], theirs.embed_tokens_per_layer.weight),
            (layer.context.weight, theirs.per_layer_model_projection.weight),
            (layer.context_norm, theirs.per_layer_projection_norm.weight),
            (layer.gate.weight, block.per_layer_input_gate.weight),
            (layer.output.weight, block.per_layer_projection.weight),
            (layer.output_norm, block.post_per_layer_input_norm.weight),
        ):
            weight.copy_(ours)
        rows = theirs.get_per_layer_inputs(tokens)
        said = theirs.project_per_layer_inputs(layer.embedding(tokens), rows)[..., 0, :]
        gated = block.act_fn(block.per_layer_input_gate(hidden)) * said
        expected = block.post_per_layer_input_norm(block.per_layer_projection(gated))
        torch.testing.assert_close(layer(hidden, tokens[..., None]), expected, atol=1e-5, rtol=1e-4)


def test_ngm_weighs_means_by_their_cosines():
    layer = layer_of("ngram_mean")
    layer.embedding = nn.Embedding(50, 32)
    tokens = torch.tensor([[[7, 3, -1, -1], [9, 7, 3, 1]]])
    hidden = torch.randn(1, 2, 32)
    e = layer.embedding.weight
    means = [[(e[7] + e[3]) / 2, (e[7] + e[3]) / 2], [(e[9] + e[7]) / 2, (e[9] + e[7] + e[3] + e[1]) / 4]]
    for t in range(2):
        cosines = [F.cosine_similarity(hidden[0, t], mean, dim=0).relu() for mean in means[t]]
        expected = sum(c * mean for c, mean in zip(cosines, means[t], strict=True)) / 2
        torch.testing.assert_close(layer(hidden, tokens)[0, t], expected)


def scone():
    layer = layer_of("scone", layer_options={"num_f_grams": 3, "min_count": 2})
    layer.embedding = nn.Embedding(300, 32)
    spec = EngramConfig(**RIVALS["scone"]).hash_spec(TokenMap.identity(300), pad_token_id=1)
    assert isinstance(spec, HashSpec)
    return layer, spec


def test_scone_takes_the_most_frequent_and_then_the_longest_f_gram():
    layer, spec = scone()
    # (5, 6) four times, (5, 6, 7) and (6, 7) three times; (8, 9) twice; everything else once.
    layer.prepare(spec, torch.tensor([5, 6, 7, 11, 5, 6, 7, 12, 5, 6, 7, 13, 5, 6, 8, 9, 14, 8, 9]).numpy())
    known = [(6, 5, -1), (7, 6, -1), (7, 6, 5)]
    keys = [f_gram_keys(torch.tensor(one))[sum(t >= 0 for t in one) - 1] for one in known]
    assert layer.keys.tolist() == sorted(map(int, keys))
    seen = torch.tensor([[[7, 6, 5], [7, 6, 20], [6, 5, -1], [9, 8, 6], [7, -1, -1]]])
    assert layer.longest(seen).tolist() == [[3, 2, 2, 0, 0]]
    keys, rows = layer.tabulate(torch.tensor(known))
    hidden = torch.randn(1, 5, 32)
    update = layer(hidden, seen)
    # What is computed in training is what the table for serving holds; a token without an f-gram stays as it is.
    expected = torch.stack([rows[2], rows[1], rows[0]]) - hidden[0, :3]
    torch.testing.assert_close(update[0, :3], expected, atol=1e-5, rtol=1e-5)
    assert not update[0, 3:].any() and sorted(keys.tolist()) == layer.keys.tolist()


def test_scone_s_encoder_is_a_causal_transformer_over_the_tokens_of_the_f_gram_alone():
    layer, _ = scone()
    tokens = torch.tensor([4, 8, 15])  # oldest first
    plain = nn.TransformerEncoder(layer.encoder[0], 1, enable_nested_tensor=False)
    plain.layers = layer.encoder
    plain.num_layers = len(layer.encoder)
    for length in (2, 3):
        wanted = tokens[-length:]
        hidden = (layer.embedding(wanted) + layer.places.weight[:length].flip(0))[None]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        expected = plain(hidden, mask=mask, is_causal=True)[0, -1]
        given = F.pad(wanted.flip(0), (0, 3 - length), value=-1)[None]
        torch.testing.assert_close(layer.encode(given)[0], expected, atol=1e-5, rtol=1e-4)


def test_scone_s_bytes_beside_its_weights_are_those_of_the_table():
    config = EngramConfig(**RIVALS["scone"])
    assert FGramLayer.beside(config) == 50 * (8 + 4 * 32)
    study = RivalsStudy()
    table, ours = FGramLayer.beside(scone_memory(study.reference)), 4 * study.reference.num_parameters()
    assert ours - (8 + 4 * study.reference.hidden_size) < table <= ours  # the transformer is needed in training alone


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel_size": 4}, "set kernel_size=0"),
        ({"gate": "plain"}, "gate='none'"),
        ({"orders": (2,)}, r"orders=\(1,\)"),
        ({"layer_options": {"gate": "relu"}}, "one of silu, none, not 'relu'"),
        ({"layer_options": {"gate": "none"}, "memory_dim": 24}, "set memory_dim to num_heads x hidden_size, 64"),
        ({"layer_options": {"key_width": 7}}, "an even number"),
        ({"layer_options": {"chosen": 2.5}}, "is of type int: 2.5"),
        ({"layer_options": {"choosen": 2}}, "did you mean 'chosen'"),
        ({"occupancy": "rows"}, "reads no hashed rows"),
        ({"layer": "scone", "layer_options": {}}, "has no table; set rows_per_head=1"),
    ],
)
def test_what_a_rival_does_not_have_is_refused_in_words(changed, message):
    with pytest.raises(ConfigError, match=message):
        EngramConfig(**KEYS | changed).layer_parameters()
