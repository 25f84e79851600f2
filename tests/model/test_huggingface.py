"""What transformers, PyTorch and their users expect of a model, in all its variants."""

import copy
import importlib.util
import io

import pytest
import torch
from tests.small_model import BEFORE_5_23, VARIANTS, checkpoint_activations
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from engram_lm.errors import MismatchError, TokenError
from engram_lm.memory.step import begin_step
from engram_lm.model import EngramForCausalLM
from engram_lm.model.experts import Router, balance_experts, expert_load
from engram_lm.model.streams import StreamHead, StreamMixer
from engram_lm.tables import ParameterTable

IDS = torch.arange(2, 42).view(2, 20)
BATCH, LENGTH, HIDDEN = 2, 20, 32
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="needs accelerate (pip install accelerate)"
)


@pytest.fixture
def make(build):
    """Build a variant by name, with further fields of its backbone and memory."""

    def make_variant(name, backbone=None, memory=None, **kwargs):
        base = VARIANTS[name]
        return build(backbone={**base[0], **(backbone or {})}, memory={**base[1], **(memory or {})}, **kwargs)

    return make_variant


def gradients(model):
    return {
        name: parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        for name, parameter in model.named_parameters()
    }


def close(one, other, **kwargs):
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=lambda text, name=name: f"{name}: {text}", **kwargs)


# Outputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_that_is_asked_for_is_returned_in_its_shape(make, name):
    model = make(name)
    model.set_attn_implementation("eager")
    config = model.config
    asked = dict.fromkeys(("hidden_states", "attentions", "gates", "router_logits", "chosen_experts"), True)
    output = model(IDS, **{f"output_{key}": True for key in asked})
    streams = (config.num_streams,) if config.num_streams > 1 else ()
    assert [tuple(h.shape) for h in output.hidden_states] == [(BATCH, LENGTH, *streams, HIDDEN)] * 3 + [
        (BATCH, LENGTH, HIDDEN)
    ]
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert [tuple(a.shape) for a in output.attentions] == [(BATCH, 2, LENGTH, LENGTH)] * 3
    fused = config.num_streams if config.memory_fusion == "every_stream" else 1
    assert [tuple(g.shape) for g in output.gates] == [(BATCH, LENGTH, fused)] * 2
    routers = 2 if config.has_experts else 0
    shapes = [tuple(logits.shape) for logits in output.router_logits or ()]
    assert shapes == [(BATCH * LENGTH, 6)] * routers
    chosen = output.chosen_experts or ()
    assert [(tuple(c.shape), c.dtype) for c in chosen] == [((BATCH * LENGTH, 2), torch.int64)] * routers
    plain = model(IDS)
    assert torch.equal(plain.logits, output.logits)
    assert all(getattr(plain, key) is None for key in asked)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_tuple_holds_what_the_dictionary_holds(make, name):
    model = make(name)
    named = model(IDS, labels=IDS, output_hidden_states=True)
    values = model(IDS, labels=IDS, output_hidden_states=True, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], named.loss) and torch.equal(values[1], named.logits)
    assert isinstance(model.model(IDS, return_dict=False), tuple)
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradients_can_be_looked_at_in_every_hidden_state_and_attention(make, name):
    model = make(name)
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True, use_cache=False)
    for tensor in (*output.hidden_states, *output.attentions):
        tensor.retain_grad()
    output.logits.flatten()[::7].sum().backward()
    for tensor in (*output.hidden_states, *output.attentions):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "all"])
def test_logits_are_computed_only_where_they_are_kept(make, name):
    model = make(name)
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
    each = torch.arange(IDS.shape[0])[:, None] + torch.tensor([0, 5])
    torch.testing.assert_close(model(IDS, logits_to_keep=each).logits, whole.take_along_dim(each[..., None], dim=1))
    torch.testing.assert_close(model(IDS, logits_to_keep=IDS > 9).logits, whole[IDS > 9])


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "all"])
def test_positions_and_embeddings_may_be_given(make, name):
    model = make(name)
    whole = model(IDS).logits
    positions = torch.arange(LENGTH)
    torch.testing.assert_close(model(IDS, position_ids=positions[None]).logits, whole)
    torch.testing.assert_close(model(IDS, position_ids=positions.expand(2, -1)).logits, whole)
    # Rotations are relative, and N-grams ask only where a position is 0.
    torch.testing.assert_close(model(IDS, position_ids=positions[None] + 7).logits, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(IDS, position_ids=2 * positions[None]).logits, whole, atol=1e-3)
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(input_ids=IDS, inputs_embeds=embeddings).logits, whole)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_call_twice_gives_the_same_bits(make, name):
    model = make(name)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(make(name)(IDS).logits, model(IDS).logits)


# Loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_loss_is_the_mean_over_the_labels_that_count(make, name):
    model = make(name)
    labels = IDS.clone()
    labels[0, :7] = -100
    labels[1, 3:9] = -100
    output = model(IDS, labels=labels)
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = -logits.log_softmax(-1)[torch.arange(len(targets)), targets.clamp_min(0)][targets != -100].mean()
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_gradients_are_equal_however_a_batch_is_divided(make, balance):
    found = []
    for parts in (1, 2):
        model = make("all", {"sequence_balance": balance}).train()
        total = 0.0
        for part in IDS.chunk(parts):
            output = model(part, labels=part, num_items_in_batch=IDS[:, 1:].numel())
            output.loss.backward()
            total += float(output.loss.detach())
        found.append({**gradients(model), "loss": torch.tensor(total)})
    close(*found, atol=1e-5, rtol=1e-4)


# Types --------------------------------------------------------------------------------------------------------------

PRECISE = ("mlp.gate.weight", "e_score_correction_bias", "attention_streams", "feed_forward_streams", "stream_head")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in VARIANTS), ("plain", torch.float16), ("all", torch.float16)],
)
def test_a_model_in_sixteen_bits_keeps_what_must_be_precise(make, tmp_path, name, dtype):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for key, value in loaded.state_dict().items():
        expected = torch.float32 if any(part in key for part in PRECISE) else dtype
        assert value.dtype == (torch.int64 if key == "model.token_map" else expected), key
    for module in loaded.modules():
        if isinstance(module, Router):
            assert module.expert_counts.dtype == torch.int64  # bfloat16 counts to 256
    logits = loaded(IDS).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    # Wide for experts: a token whose choice is nearly even may be sent elsewhere.
    tolerance = (0.3, 0.1) if dtype == torch.bfloat16 else (0.05, 0.05)
    error = (logits.float() - model(IDS).logits).abs()
    rerouted = model.config.has_experts
    assert error.mean() < (0.4 if rerouted else 0.2) * tolerance[0] and (rerouted or error.max() < 1.5 * tolerance[0])
    tokens = loaded.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert tokens.shape == (2, 26)
    # Saved and loaded again, as it is.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize("name", ["streams", "all"])
def test_autocast_keeps_the_residual_streams_and_their_maps_in_float32(make, name):
    model = make(name).train()
    seen = []

    def record(module, inputs, output):
        seen.append((inputs[0].dtype, *(value.dtype for value in output)))

    for module in model.modules():
        if isinstance(module, StreamMixer):
            module.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, labels=IDS, output_hidden_states=True, output_gates=True, output_router_logits=True)
    assert len(seen) == 6 and set(seen) == {(torch.float32,) * 4}
    assert {h.dtype for h in output.hidden_states[:-1]} == {torch.float32}
    assert {g.dtype for g in output.gates} | {r.dtype for r in output.router_logits or ()} == {torch.float32}
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    exact = model.eval()(IDS).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = DynamicCache(config=model.config)
        whole = model(IDS).logits
        pieces = [model(IDS[:, t : t + 5], past_key_values=cache).logits for t in range(0, 20, 5)]
    assert (torch.cat(pieces, 1) - whole).abs().mean() < 0.05 and (whole - exact).abs().mean() < 0.1


# Gradient checkpointing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reentrant"), [*((name, False) for name in VARIANTS), ("plain", True), ("all", True)])
def test_checkpointed_gradients_and_expert_shares_are_those_of_a_plain_step(make, name, reentrant):
    found, loads = [], []
    for checkpointing in (False, True):
        model = make(name, {"sequence_balance": 0.1} if not reentrant else {}).train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        model(IDS, labels=IDS).loss.backward()
        found.append(gradients(model))
        loads.append(expert_load(model))
    close(*found)
    close(*loads)
    assert len(loads[0]) == (2 if model.config.has_experts else 0)


# Compiling ----------------------------------------------------------------------------------------------------------

KINDS = {
    "dense": ("plain", 1),
    "memory": ("plain", 0),
    "experts": ("experts", 1),
    "streams": ("streams", 1),
    "memory, single fusion": ("single", 0),
}


def block_inputs(model, block, length=LENGTH):
    config = model.config
    streams = (config.num_streams,) if config.num_streams > 1 else ()
    hidden = torch.randn(BATCH, length, *streams, HIDDEN, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None]
    inputs = {
        "position_embeddings": model.model.rotary_emb(hidden[:, :, 0] if streams else hidden, positions),
        "attention_mask": None,
        "position_ids": positions,
    }
    if block in config.memory_layers:
        spec = model.hash_spec
        inputs["memory_step"] = begin_step(spec, {}, IDS[:, :length])
    return hidden, inputs


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_compiles_as_one_graph_forward_and_backward(make, kind):
    if kind == "experts" and BEFORE_5_23:
        pytest.skip("transformers before 5.23 cannot compile the backward pass of its grouped experts")
    name, block = KINDS[kind]
    results = []
    for compiled in (False, True):
        model = make(name, memory={"table_gradient": "dense"}).train()
        layer = model.model.layers[block]
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        hidden, inputs = block_inputs(model, block)
        hidden.requires_grad_()
        output = run(hidden, **inputs)
        output.square().mean().backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        table = layer.memory.table.weight.grad if layer.memory is not None else torch.zeros(1)
        results.append({"output": output.detach(), "hidden": hidden.grad, "table": table, **grads})
    close(*results, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
def test_the_whole_model_compiles_as_one_graph_and_decodes_with_a_static_cache(make):
    model = make("all")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    whole = compiled(IDS, use_cache=False).logits  # first: nothing has been copied to the device by an ordinary call
    expected = model(IDS).logits
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    pieces = [model(IDS[:, :14], past_key_values=cache).logits]  # the first step allocates the cache
    pieces += [compiled(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(14, LENGTH)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=2e-5, rtol=1e-5)


# Attention ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when flex attention is loaded
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.compiler.set_stance("force_eager")  # torch 2.13 writes C++ for flex attention that does not compile on CPUs
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["plain", "yarn", "all"])
def test_every_attention_gives_the_same_logits(make, name, implementation):
    model = make(name)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    for each in ("eager", implementation):
        model.set_attn_implementation(each)
        padded = model(IDS, attention_mask=mask, position_ids=positions).logits
        cache, pieces = DynamicCache(config=model.config), []
        for start, stop in ((0, 9), (9, 10), (10, 20)):
            pieces.append(
                model(
                    IDS[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                ).logits
            )
        found.append(
            {"plain": model(IDS).logits, "padded": padded[mask.bool()], "cached": torch.cat(pieces, 1)[mask.bool()]}
        )
    close(*found, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found[0]["padded"], found[0]["cached"], atol=2e-5, rtol=1e-5)


# Embeddings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_vocabulary_grows_without_changing_what_old_tokens_say(make, tmp_path, name):
    model = make(name)
    size, expected = model.config.spec.num_tokens, model(IDS).logits
    model.resize_token_embeddings(size + 5, pad_to_multiple_of=64)
    assert model.config.vocab_size == model.lm_head.out_features == 320
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits[..., :size], expected)
    assert model(torch.tensor([[4, size]])).logits.isfinite().all()
    with pytest.raises(TokenError, match="320"):
        model(torch.tensor([[4, 320]]))
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    model.resize_token_embeddings(size)
    torch.testing.assert_close(model(IDS).logits, expected)
    with pytest.raises(MismatchError, match="cannot shrink"):
        model.resize_token_embeddings(size - 1)
    assert model.config.vocab_size == size


def test_a_vocabulary_of_a_model_without_memory_may_shrink(build):
    model = build(memory=False)
    model.resize_token_embeddings(100)
    assert model(IDS).logits.shape[-1] == 100


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_where_they_should_be_and_stay_so(build, tied):
    model = build(backbone={"tie_word_embeddings": tied})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for other in (copy.deepcopy(model), model.to(torch.float64)):
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head


# Saving with torch, starting weights --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_torch_saves_and_loads_the_state_and_the_model(make, name):
    model = make(name)
    file = io.BytesIO()
    torch.save({"state": model.state_dict(), "model": model}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    other = make(name, seed=1)
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    other.load_state_dict(stored["state"])
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert torch.equal(stored["model"](IDS).logits, model(IDS).logits)
    layers = stored["model"].model.layers
    assert layers[0].memory.table is stored["model"].tables["0"]


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_start_where_they_should_built_or_loaded(make, name, tmp_path):
    config = make(name).config
    torch.manual_seed(0)
    model = EngramForCausalLM(config)
    for key, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            where = f"{key}.{part}"
            if isinstance(module, ParameterTable):
                assert 0.9 < parameter.std() < 1.1, where
            elif isinstance(module, StreamMixer | StreamHead) and part in ("base", "hc_base", "scale", "hc_scale"):
                continue
            elif "norm" in where.rsplit(".", 2)[-2] or part.endswith("norm"):
                assert (parameter == 1).all(), where
            elif part == "conv_weight":
                assert (parameter == 0).all(), where
            elif "key_value" in where:
                assert 0 < parameter.std() < 0.2 and (parameter[-HIDDEN:] == 0).all() == (
                    config.memory_config.value_init == "zero"
                ), where
            else:
                rows = parameter[torch.arange(len(parameter)) != (config.pad_token_id if "embed" in where else -1)]
                assert abs(rows.mean()) < 0.01 and 0.015 < rows.std() < 0.025, where
    for module in model.modules():
        if isinstance(module, Router):
            assert (module.e_score_correction_bias == 0).all() and (module.expert_counts == 0).all()
    # Loading leaves nothing as it came from the allocator.
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    buffers = dict(model.named_buffers())
    for key, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[key]), key


# Trainer ------------------------------------------------------------------------------------------------------------


@needs_accelerate
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_trainer_trains_saves_and_resumes(make, tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Balance(TrainerCallback):
        """Moves the routers' bias after every step, as `engram_lm.training` does."""

        def __init__(self):
            self.loads = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.loads.append(balance_experts(model, 0.01))

    text = [{"input_ids": IDS[0], "labels": IDS[0]}, {"input_ids": IDS[1], "labels": IDS[1]}] * 4

    def train(folder, steps, resume=None):
        model = make("all", {"sequence_balance": 1e-3}, {"table_gradient": "dense"}).train()
        balance = Balance()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=steps,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=0.01,
                lr_scheduler_type="constant",
                save_steps=4,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                seed=0,
                disable_tqdm=True,
            ),
            train_dataset=text,
            callbacks=[balance],
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return model, losses, balance.loads

    model, losses, loads = train(tmp_path / "whole", 8)
    assert losses[-1] < 0.6 * losses[0]
    assert len(loads) == 8 and all(abs(load.sum() - 1) < 1e-5 for load in loads[0].values())
    biases = [module.e_score_correction_bias for module in model.modules() if isinstance(module, Router)]
    assert len(biases) == 2 and all(bias.abs().max() > 0.005 for bias in biases)
    resumed, _, later = train(tmp_path / "resumed", 8, str(tmp_path / "whole" / "checkpoint-4"))
    assert len(later) == 4
    close(model.state_dict(), resumed.state_dict(), atol=1e-6, rtol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)
