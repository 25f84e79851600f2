"""Memory begins as nothing, leaves no trace, and learns."""

import copy

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import CONFIGS, TEXT, TOKENIZER, small_model, small_multimodal_model
from tests.small_model import needs_checkpointing_of_hooks
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

import engram_lm
from engram_lm.adapt import attached_adapters, set_adapters
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec, Segments
from engram_lm.training.data.tokenizer import train_tokenizer


def tokens(batch=2, length=20, seed=2):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def hooks(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [(name, kind) for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_begins_as_the_identity_and_leaves_no_trace(name, config):
    model, ids = small_model(name), tokens()
    before, keys, expected = hooks(model), list(model.state_dict()), whole(model, ids)
    adapter = engram_lm.attach(model, TOKENIZER, config())
    assert torch.equal(whole(model, ids), expected)
    assert not any(module.training for module in model.modules())
    speak(adapter)
    assert not torch.allclose(whole(model, ids), expected, atol=1e-2)
    adapter.detach()
    adapter.detach()
    assert torch.equal(whole(model, ids), expected)
    assert hooks(model) == before
    assert list(model.state_dict()) == keys
    assert "engram_adapters" not in dict(model.named_modules())


def test_the_model_says_how_wide_the_memory_is(config):
    model = small_model()
    adapter = engram_lm.attach(model, TOKENIZER, layers=(1,), num_heads=2, memory_dim=24, rows_per_head=97)
    assert adapter.config == config(layers=(1,), value_init="zero")
    adapter.detach()
    with pytest.raises(ConfigError, match=r"no option 'rows_per_haed'.*rows_per_head"):
        engram_lm.attach(model, TOKENIZER, layers=(1,), rows_per_haed=97)
    with pytest.raises(ConfigError, match="memory_dim would change"):
        engram_lm.attach(model, TOKENIZER, config(), memory_dim=48)
    with pytest.raises(ConfigError, match=r"layers is a sequence of whole numbers .*, not 1"):
        engram_lm.attach(model, TOKENIZER, layers=1)
    assert not attached_adapters(model)


def test_a_model_whose_outputs_change_is_refused_and_left_as_it_was(config, monkeypatch):
    monkeypatch.setattr("engram_lm.adapt.attachment.dataclasses.replace", lambda config, **_: config)
    model = small_model()
    with pytest.raises(MismatchError, match="differ by up to"):
        engram_lm.attach(model, TOKENIZER, config(value_init="normal"))
    assert not attached_adapters(model)
    assert not hooks(model)
    engram_lm.attach(model, TOKENIZER, config(value_init="normal"), check=False)


def test_the_check_leaves_a_model_in_training_as_it_was(config):
    model = small_model().train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.attention_dropout = 0.5  # outputs differ from call to call, but for the check
    adapter = engram_lm.attach(model, TOKENIZER, config())
    assert model.training
    assert adapter.layers["0"].training
    assert model.model.layers[0].training
    assert not model.model.layers[1].mlp.training


@torch.no_grad()
def test_a_layer_reads_its_hidden_states_plus_the_update_of_its_own_rows(adapted):
    model, adapter = adapted()
    ids, seen = tokens(), {}
    model.model.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(with_memory=args[0]), with_kwargs=True
    )
    with adapter.disabled():
        plain = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    adapter.layers["0"].key_value.weight.zero_()  # layer 0 silent, so that only layer 2 is heard
    adapter.layers["0"].conv_weight.zero_()
    model.model(ids, use_cache=False)
    update = adapter.layers["2"](plain[2], adapter.spec.rows(ids, 2))
    torch.testing.assert_close(seen["with_memory"], plain[2] + update)


def test_tokens_are_hashed_once_per_forward_pass(adapted, monkeypatch):
    model, _ = adapted()
    calls, hash_all = [], HashSpec.rows_for_layers
    monkeypatch.setattr(HashSpec, "rows_for_layers", lambda *args: calls.append(1) or hash_all(*args))
    whole(model, tokens())
    assert len(calls) == 1


@pytest.mark.parametrize("sparse", [True, False])
def test_training_the_memory_alone_lowers_the_loss(sparse, config):
    model = small_model().train()
    adapter = engram_lm.attach(model, TOKENIZER, config(table_gradient="sparse" if sparse else "dense"))
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "engram" not in name}
    ids = torch.tensor(TOKENIZER(TEXT)["input_ids"][:128]).view(2, 64)
    tables = list(adapter.memory_tables.parameters())
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad and not any(p is t for t in tables)], 1e-2),
        (torch.optim.SparseAdam if sparse else torch.optim.Adam)(tables, 5e-2),
    ]
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


@needs_checkpointing_of_hooks
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, adapted):
    model, adapter = adapted()
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    model.train()
    ids = tokens()

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in adapter.parameters()]

    expected = [gradient.clone() for gradient in gradients()]
    model.model.gradient_checkpointing = True
    model._set_gradient_checkpointing(
        True,
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant),
    )
    torch.testing.assert_close(gradients(), expected)
    # transformers drops the cache then, so nothing of the memory is kept in one.
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache)
    assert all(type(layer) is DynamicLayer for layer in cache.layers)


def test_a_layer_that_runs_without_its_model_is_refused_not_wrong(adapted):
    model, adapter = adapted()
    hidden = torch.zeros(1, 4, 32)
    position_embeddings = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(ConfigError, match="outside of a forward pass"):
        model.model.layers[2](hidden, position_embeddings=position_embeddings)
    with adapter.disabled():
        model.model.layers[2](hidden, position_embeddings=position_embeddings)


def test_the_model_reaches_the_adapter_and_a_copy_has_its_own(adapted):
    model, adapter = adapted()
    ids = tokens()
    expected = whole(model, ids)
    copied = copy.deepcopy(model)
    theirs = attached_adapters(copied)["default"]
    assert theirs is not adapter
    assert theirs.model is copied
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in model.parameters()}
    with torch.no_grad():
        adapter.layers["0"].key_value.weight.zero_()
    assert torch.equal(whole(copied, ids), expected)
    assert not torch.equal(whole(model, ids), expected)
    theirs.detach()
    assert attached_adapters(model) == {"default": adapter}
    assert not attached_adapters(copied)


def test_a_saved_model_loads_as_the_plain_one_and_resumes_with_its_memory(adapted, config, tmp_path):
    model, adapter = adapted()
    ids = tokens()
    expected = whole(model, ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(again, ids), whole(small_model(), ids))
    engram_lm.attach(again, TOKENIZER, config())
    again.load_state_dict(model.state_dict())
    assert torch.equal(whole(again, ids), expected)
    assert adapter.enabled


def test_several_adapters_add_up_and_are_switched_one_by_one(adapted, config):
    model, first = adapted()
    ids = tokens()
    alone = whole(model, ids)
    second = engram_lm.attach(model, TOKENIZER, config(layers=(1,), seed=5), name="second")
    speak(second, seed=3)
    both = whole(model, ids)
    second.enabled = False
    assert torch.equal(whole(model, ids), alone)
    second.enabled = True
    with first.disabled():
        other = whole(model, ids)
    assert torch.equal(whole(model, ids), both)
    assert not torch.equal(both, other)
    assert not torch.equal(both, alone)
    first.detach()
    assert torch.equal(whole(model, ids), other)
    assert attached_adapters(model) == {"second": second}


def test_switching_gives_the_logits_of_having_only_that_one_to_the_bit(adapted, config):
    ids, seeds = tokens(), {"first": 1, "second": 5, "third": 6}

    def with_adapters(*names):
        model = small_model()
        for name in names:
            torch.manual_seed(seeds[name])
            blocks = (0, 1) if name == "second" else (0, 2)
            speak(engram_lm.attach(model, TOKENIZER, config(layers=blocks, seed=seeds[name]), name=name), seeds[name])
        return model

    expected = {names: whole(with_adapters(*names), ids) for names in ((), *((name,) for name in seeds))}
    expected["first", "third"] = whole(with_adapters("first", "third"), ids)
    model = with_adapters(*seeds)
    for names, logits in expected.items():
        set_adapters(model, names)
        assert torch.equal(whole(model, ids), logits)
        cached = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
        assert torch.equal(
            cached, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1, use_cache=False)
        )
    set_adapters(model, "second")
    with pytest.raises(ConfigError, match=r"no memory adapter called 'fourth'; it has 'first', 'second', 'third'"):
        set_adapters(model, ["first", "fourth"])
    assert [adapter.enabled for adapter in attached_adapters(model).values()] == [False, True, False]
    with pytest.raises(ConfigError, match="it has none"):
        set_adapters(small_model(), "first")


@torch.no_grad()
def test_a_row_map_chooses_the_rows_that_are_read_instead(adapted):
    model, adapter = adapted()
    ids, given = tokens(), []
    expected, plain = adapter.spec.rows_for_layers(adapter.spec.encode(ids), None), whole(model, ids)
    order = {block: torch.randperm(table.num_rows) for block, table in adapter.tables.items()}
    adapter.row_map = lambda block, rows: given.append((block, rows)) or order[str(block)][rows]
    mapped = whole(model, ids)
    assert [block for block, _ in given] == [0, 2]
    assert all(torch.equal(rows, expected[block]) for block, rows in given)
    assert not torch.allclose(mapped, plain, atol=1e-2)
    # The same as tables whose rows lie in that order.
    adapter.row_map = None
    for block, table in adapter.memory_tables.items():
        table.weight.copy_(table.weight[order[block]])
    assert torch.equal(whole(model, ids), mapped)
    adapter.row_map = lambda block, rows: rows[..., :1]
    with pytest.raises(MismatchError, match=r"\(2, 20, 4\) of torch.int64 for layer 0 and returned \(2, 20, 1\)"):
        whole(model, ids)


@torch.no_grad()
def test_hooks_of_a_layer_may_ask_for_its_gates(adapted):
    model, adapter = adapted()
    ids, seen = tokens(), {}
    expected = whole(model, ids)
    for block, layer in adapter.layers.items():
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "return_gates": True}), with_kwargs=True
        )
        layer.register_forward_hook(
            lambda module, args, kwargs, output, block=block: seen.update({block: (output.gates, kwargs["active"])}),
            with_kwargs=True,
        )
    assert torch.equal(whole(model, ids), expected)
    assert all(gates.shape == (2, 20, 1) and gates.min() > 0 and gates.max() < 1 for gates, _ in seen.values())
    assert seen.keys() == {"0", "2"} and all(active.all() for _, active in seen.values())


@torch.no_grad()
def test_a_multimodal_wrapper_s_text_model_is_found_and_its_placeholders_are_no_text(config):
    model = small_multimodal_model()
    adapter = engram_lm.attach(model, TOKENIZER, config())
    speak(adapter)
    assert [name for name, _ in hooks(model.model.vision_tower)] == []
    ids = torch.cat([tokens(1, 4), torch.full((1, 4), 310), tokens(1, 8)], dim=1)
    pixels = torch.randn(1, 3, 8, 8)
    asked = {"input_ids": ids, "pixel_values": pixels, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(**asked), model.generate(**asked, use_cache=False))
    with pytest.raises(ConfigError, match="inputs_embeds without input_ids"):
        model.model.language_model(inputs_embeds=torch.zeros(1, 3, 32))


@torch.no_grad()
def test_packed_documents_do_not_read_each_other_s_n_grams(config):
    model, ids = small_model(), tokens(1, 12)
    adapter = engram_lm.attach(model, TOKENIZER, config(), segments=Segments(positions=True))
    seen = []
    gather = adapter.tables["0"].gather
    adapter.tables["0"].gather = lambda rows: seen.append(rows) or gather(rows)
    model(input_ids=ids, position_ids=torch.tensor([[*range(5), *range(7)]]), use_cache=False)
    assert torch.equal(seen[0][:, 5:], adapter.spec.rows(ids[:, 5:], 0))
    assert adapter.layers["0"].table is adapter.tables["0"]


def test_a_compiled_model_is_one_graph_and_gives_the_same_loss_and_gradients(adapted):
    model, adapter = adapted(layers=(1,), table_gradient="dense")
    ids = tokens()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    expected = [p.grad.clone() for p in adapter.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    found.backward()
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close([p.grad for p in adapter.parameters()], expected)


def test_weights_on_disk_do_not_hinder(adapted, config, tmp_path):
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    expected_model, expected_adapter = adapted()
    model = small_model()
    names = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.0": "disk", "model.layers.2": "disk"}
    model = dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu")
    adapter = engram_lm.attach(model, TOKENIZER, config())
    assert all(p.device.type == "cpu" for p in adapter.parameters())
    adapter.load_state_dict(expected_adapter.state_dict())
    ids = tokens()
    torch.testing.assert_close(whole(model, ids), whole(expected_model, ids))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused_with_the_fix(adapted, config):
    model, adapter = adapted()
    with pytest.raises(ConfigError, match=r"already has.*detach\(\).*name="):
        engram_lm.attach(model, TOKENIZER, config())
    adapter.detach()
    engram_lm.attach(model, TOKENIZER, config())
    with pytest.raises(ConfigError, match="letters"):
        engram_lm.attach(model, TOKENIZER, config(), name="a.b")


def test_a_tokenizer_that_is_not_the_model_s_is_refused(config):
    model = small_model()
    letters = torch.randint(97, 106, (9000,), generator=torch.Generator().manual_seed(0))
    larger = train_tokenizer(["".join(map(chr, letters.tolist()))], 700)
    with pytest.raises(MismatchError, match="700 tokens, the model embeds 320"):
        engram_lm.attach(model, larger, config())
    with pytest.raises(ConfigError, match="Hugging Face"):
        engram_lm.attach(small_model(), TOKENIZER.backend_tokenizer, config())
    assert not hooks(model)


class _NoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = CONFIGS["llama"]()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])


class _NoTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = CONFIGS["llama"]()
        self.layers = small_model().model.layers


def with_two_lists():
    model = small_model()
    model.model.more = copy.deepcopy(model.model.layers)
    return model


def encoder_decoder():
    model = small_model()
    model.config.is_encoder_decoder = True
    return model


def without_weights():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS["llama"]())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (_NoLayers, {}, "no recognizable layer list.*layer_list="),
        (_NoTokens, {}, "no module around layers of _NoTokens takes input_ids"),
        (with_two_lists, {}, "several layer lists.*model.layers, model.more; choose with layer_list="),
        (encoder_decoder, {}, "transformers causal language model"),
        (without_weights, {}, "has no weights yet"),
        (lambda: nn.Linear(2, 2), {}, "transformers causal language model"),
        (lambda: nn.DataParallel(small_model()), {}, "attach to the model itself, then wrap it"),
        (lambda: torch.compile(small_model(), backend="eager"), {}, "attach to the model itself, then wrap it"),
        (small_model, {"layer_list": "model.blocks"}, "has no module 'model.blocks'"),
        (small_model, {"layer_list": "model"}, "must be an nn.ModuleList"),
        (small_model, {"layers": (0, 3)}, r"layers \[0, 3\].*has 3 decoder layers"),
    ],
)
def test_a_model_without_the_layers_asked_for_is_refused(model, options, message, config):
    with pytest.raises(ConfigError, match=message):
        engram_lm.attach(model(), TOKENIZER, config(), **options)


def test_another_geometry_is_refused_with_both_sizes(config):
    with pytest.raises(MismatchError, match="64, the model's 32"):
        engram_lm.attach(small_model(), TOKENIZER, config(hidden_size=64))
    with pytest.raises(ConfigError, match="num_streams=1"):
        engram_lm.attach(small_model(), TOKENIZER, config(num_streams=2))


def test_a_list_inside_a_layer_is_not_taken_for_the_layers(config):
    model = small_model()
    model.model.layers[1].parts = copy.deepcopy(model.model.layers)
    engram_lm.attach(model, TOKENIZER, config())
    assert not hooks(model.model.layers[1].parts)


def test_n_grams_stop_at_the_end_of_a_text(config):
    model, ids = small_model(), tokens(1, 9)
    adapter = engram_lm.attach(model, TOKENIZER, config())
    ids[0, 4] = TOKENIZER.eos_token_id
    assert torch.equal(adapter.spec.rows(ids, 0)[:, 5:], adapter.spec.rows(ids[:, 5:], 0))


def test_a_named_layer_list_is_taken(config):
    adapter = engram_lm.attach(small_model("gpt2"), TOKENIZER, config(), layer_list="transformer.h", layers=(1,))
    assert list(adapter.layers) == ["1"]


def test_positions_without_a_token_are_refused(adapted):
    model, _ = adapted(layers=(1,))
    twice = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].repeat(1, 2, 1),), prepend=True)
    with pytest.raises(MismatchError, match=r"\(2, 20\) tokens were given and \(2, 40\) positions are computed"):
        whole(model, tokens())
    twice.remove()
    whole(model, tokens())


def test_embeddings_without_tokens_are_refused_unless_the_memory_is_switched_off(adapted):
    model, adapter = adapted()
    embeddings = torch.zeros(1, 4, 32)
    with pytest.raises(ConfigError, match=r"pass input_ids.*adapter.disabled\(\)"):
        model(inputs_embeds=embeddings)
    with adapter.disabled():
        model(inputs_embeds=embeddings)
