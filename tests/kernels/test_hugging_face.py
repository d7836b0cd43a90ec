"""patch_transformers: the kernels inside Hugging Face models give the models' own losses, gradients and texts."""

import copy
import inspect
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.kernels.harness import Recorder
from tritale.kernels import patch_transformers, unpatch

transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=60, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, use_cache=False)
CONFIGS = {  # heads × head size is not the width, where the architecture allows it
    "llama": lambda: transformers.LlamaConfig(**SHAPE, hidden_size=32, head_dim=12, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, hidden_size=24, head_dim=8, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, hidden_size=24, head_dim=8, tie_word_embeddings=True),
}


TORCH, TRITON = ([(kind, path) for kind in CONFIGS] for path in ("torch", "triton"))


@pytest.fixture(params=TORCH + TRITON[1:2], ids="-".join)
def model(request):
    """A model in float64 with weights that are all random, in training mode: each on the PyTorch path, one through the kernels."""
    kind, path = request.param
    return make(kind, "cpu" if path == "torch" else request.getfixturevalue("device"), n_layer=2 if path == "torch" else 1)


def make(kind, where, n_layer=2):
    config = CONFIGS[kind]()
    config.num_hidden_layers = n_layer
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:n_layer]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.to(where).train()


def batch(model, rows=2, length=11):
    tokens = torch.randint(60, (rows, length), device=model.device)
    labels = tokens.masked_fill(torch.rand(rows, length, device=model.device) < 0.2, -100)
    return {"input_ids": tokens, "labels": labels}


def loss_and_gradients(model, **inputs):
    loss = model(**inputs).loss
    return loss.double(), *torch.autograd.grad(loss, list(model.parameters()))


def assert_same(patched, plain):
    torch.testing.assert_close(patched, plain, rtol=1e-5, atol=1e-6)  # transformers casts its norms, its softmax and the logits to fp32


@pytest.mark.parametrize("model", TORCH + TRITON, ids="-".join, indirect=True)
def test_loss_and_gradients_are_the_models_own(model):
    inputs = batch(model)
    plain = loss_and_gradients(model, **inputs)
    patch_transformers(model)
    assert_same(loss_and_gradients(model, **inputs), plain)
    assert model(**inputs).logits is None  # never all there
    model.eval()
    result = model(**inputs)
    assert_same(result.loss.double(), plain[0])
    assert_same(result.logits, unpatch(model)(**inputs).logits)


def test_a_given_number_of_targets_divides_the_loss(model):
    inputs = batch(model)
    for more in ({"num_items_in_batch": torch.tensor(17, device=model.device)}, {"num_items_in_batch": 17}):
        plain = model(**inputs, **more).loss
        assert_same(patch_transformers(model)(**inputs, **more).loss.double(), plain.double())
        unpatch(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_part_runs_its_kernel(kind, device):
    """The launches of one step: two norms a layer and the last one, and what else a layer has."""
    if device == "cuda":
        pytest.skip("launches are recorded in the interpreter")
    model = patch_transformers(make(kind, device))
    with Recorder() as recorder:
        model(**batch(model)).loss.backward()
    n_norm = 5 + (4 if kind == "qwen3" else 0)
    forward = n_norm + 2 * (1 + 1 + 1) + 1  # rope, attention, swiglu a layer, and the loss
    backward = n_norm + 2 * (1 + 2 + 1)  # attention's has two
    assert len(recorder.launches) == forward + backward
    unpatch(model)
    with Recorder() as recorder:
        model(**batch(model)).loss.backward()
    assert not recorder.launches


def test_names_and_signatures_stay(model):
    """Trainers take the inputs' names from the signature, and save_pretrained the architecture from the class's name."""
    before = {n: (type(m).__name__, inspect.signature(m.forward)) for n, m in model.named_modules()}
    patch_transformers(model)
    assert {n: (type(m).__name__, inspect.signature(m.forward)) for n, m in model.named_modules()} == before
    assert "tritale" not in model.config.to_json_string()
    inputs = batch(model)
    assert torch.equal(model(inputs["input_ids"], None, None, None, None, inputs["labels"]).loss, model(**inputs).loss)


def test_unpatch_leaves_nothing_behind(model):
    inputs = batch(model)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    before = [model(**inputs).logits, *loss_and_gradients(model, **inputs)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    other = copy.deepcopy(model)
    assert unpatch(patch_transformers(model)) is model
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    after = [model(**inputs).logits, *loss_and_gradients(model, **inputs)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    patch_transformers(model)
    assert not any("forward" in vars(m) for m in other.modules()), "another model was patched too"
    twin = copy.deepcopy(model)  # a copy of a patched model works on its own weights
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin(**inputs).loss != model(**inputs).loss


PADDED = [(model, side) for model in TORCH for side in ("left", "right")] + [(TRITON[1], "both")]


@pytest.mark.parametrize("model, side", PADDED, ids=[f"{kind}-{path}-{side}" for (kind, path), side in PADDED], indirect=["model"])
def test_padded_batches_give_the_losses_of_the_model(model, side):
    inputs = batch(model, rows=3)
    mask = torch.ones_like(inputs["input_ids"])
    if side != "right":
        mask[1, :4] = 0
    if side != "left":
        mask[2, 8:] = 0
        mask[1, 9:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    inputs["labels"][1, 4] = -100  # its prediction is made on padding
    plain = loss_and_gradients(model, **inputs, attention_mask=mask)
    assert_same(loss_and_gradients(patch_transformers(model), **inputs, attention_mask=mask), plain)
    unmasked = model(**inputs).loss.double()
    assert side == "right" or not torch.allclose(unmasked, plain[0], rtol=1e-6), "the mask makes no difference"


def test_packed_batches_give_the_losses_of_the_model(model):
    inputs = batch(model, rows=1)
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1]], device=model.device)
    plain = loss_and_gradients(model, **inputs)
    assert_same(loss_and_gradients(patch_transformers(model), **inputs), plain)
    bounds = torch.tensor([0, 3, 8, 9, 11], dtype=torch.int32, device=model.device)
    assert_same(loss_and_gradients(model, **inputs, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds), plain)


def test_rows_with_positions_of_their_own(model):
    inputs = batch(model)
    inputs["position_ids"] = torch.arange(11, device=model.device) + torch.tensor([[5], [40]], device=model.device)
    plain = loss_and_gradients(model, **inputs)
    assert_same(loss_and_gradients(patch_transformers(model), **inputs), plain)


@pytest.mark.parametrize("is_padded", [False, True])
def test_generates_the_models_own_text(model, is_padded):
    model.eval()
    tokens = batch(model, rows=2, length=9)["input_ids"]
    mask = torch.ones_like(tokens)
    if is_padded:
        mask[0, :3] = 0
    options = dict(attention_mask=mask, max_new_tokens=7, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    plain = model.generate(tokens, **options)
    assert torch.equal(patch_transformers(model).generate(tokens, **options), plain)


def test_masks_that_the_kernels_cannot_express_run_the_models_own_attention(model):
    inputs = batch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, 3] = mask[0, 6] = 0  # holes
    plain = loss_and_gradients(model, **inputs, attention_mask=mask)
    assert_same(loss_and_gradients(patch_transformers(model), **inputs, attention_mask=mask), plain)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_gradient_checkpointing_changes_nothing(model, use_cache, is_packed):
    """transformers turns use_cache off while it checkpoints, and only then looks for packed positions."""
    inputs = batch(model, rows=1)
    if is_packed:
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1]], device=model.device)
    model.config.use_cache = use_cache
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = loss_and_gradients(model, **inputs)
    assert_same(loss_and_gradients(patch_transformers(model), **inputs), plain)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("case", ["padded", "holes", "packed", "bidirectional"])
def test_compiled_masks_are_those_of_the_model(kind, case):
    model = make(kind, "cpu", n_layer=1)
    inputs = batch(model)
    if case in ("padded", "holes"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, : 3 if case == "padded" else 0] = 0
        inputs["attention_mask"][1, 5] = case == "padded"
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["labels"][0, 3] = -100  # its prediction is made on padding
    elif case == "packed":
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1]]).expand(2, -1)
    more = {"is_causal": False} if case == "bidirectional" else {}
    plain = model(**inputs, **more).loss
    patch_transformers(model)
    assert_same(model(**inputs, **more).loss.double(), plain.double())
    compiled = torch.compile(model, backend="eager")
    assert_same(compiled(**inputs, **more).loss.double(), plain.double())


def test_the_window_is_the_one_that_transformers_applies():
    """Llama ignores a sliding_window in its config, Qwen3 applies it to some layers only."""
    llama = transformers.LlamaConfig(**SHAPE, hidden_size=32, head_dim=8, sliding_window=3)
    layers = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}
    for config in (llama, transformers.Qwen3Config(**SHAPE, hidden_size=24, head_dim=8, **layers)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        inputs = batch(model)
        plain = loss_and_gradients(model, **inputs)
        assert_same(loss_and_gradients(patch_transformers(model), **inputs), plain)


def _bias(model):
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 60, dtype=torch.float64)


def _subclass(module, **methods):
    module.__class__ = type("Changed", (type(module),), methods)


def _norm_forward(self, hidden_states):
    return hidden_states * self.weight


CHANGES = {
    "bias": _bias,
    "hook": lambda model: model.lm_head.register_forward_hook(lambda module, args, logits: logits / 8),
    "pre-hook": lambda model: model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 2,)),
    "loss": lambda model: setattr(model, "loss_function", lambda logits, labels, vocab_size, **_: logits[labels != -100].square().mean()),
    "activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
    "activation's hook": lambda model: model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: out / 2),
    "norm": lambda model: _subclass(model.model.norm, forward=_norm_forward),
    "norm's hook": lambda model: model.model.norm.register_forward_hook(lambda module, args, out: out / 2),
    "scaling": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1),
    "attention of a subclass": lambda model: _subclass(model.model.layers[0].self_attn),
    "layer of a subclass": lambda model: _subclass(model.model.layers[0]),
    "model of a subclass": lambda model: _subclass(model.model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_not_stock_run_as_they_are(change):
    model = make("llama", "cpu", n_layer=1)
    CHANGES[change](model)
    inputs = batch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :3], inputs["labels"][1, :4] = 0, -100
    plain = loss_and_gradients(model, **inputs, attention_mask=mask)
    assert_same(loss_and_gradients(patch_transformers(model), **inputs, attention_mask=mask), plain)


def test_a_layer_alone_is_the_models_own():
    model = make("llama", "cpu", n_layer=1).eval()
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    embeddings = model.model.rotary_emb(hidden, torch.arange(5)[None])
    plain = model.model.layers[0](hidden, position_embeddings=embeddings)
    assert_same(patch_transformers(model).model.layers[0](hidden, position_embeddings=embeddings), plain)


def test_pickles_and_replicas_compute_with_their_own_weights():
    model = patch_transformers(make("qwen3", "cpu", n_layer=1))
    inputs = batch(model)
    with tempfile.TemporaryDirectory() as folder:
        torch.save((model, inputs, model(**inputs).loss), Path(folder, "model.pt"))
        code = """if True:
            import sys, torch
            model, inputs, loss = torch.load(sys.argv[1], weights_only=False)
            assert torch.equal(model(**inputs).loss, loss) and model(**inputs).logits is None
        """
        command = [sys.executable, "-c", code, str(Path(folder, "model.pt"))]
        result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    replica = model.model.norm._replicate_for_data_parallel()
    replica.weight = torch.zeros(24, dtype=torch.float64)
    assert not replica(torch.ones(1, 24, dtype=torch.float64)).any()


def test_unpatch_refuses_to_undo_half():
    model = patch_transformers(make("llama", "cpu", n_layer=1))
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="replaced after patch_transformers"):
        unpatch(model)
    assert model(**batch(model)).logits is None  # still patched
    del model.forward
    assert unpatch(model)(**batch(model)).logits is not None


def test_sharded_models_are_refused(tmp_path):
    """fully_shard changes the classes of the modules, so that none would be found to be stock."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make("llama", "cpu", n_layer=1)
        inputs = batch(model)
        plain = model(**inputs).loss
        fully_shard(patch_transformers(model))
        assert_same(model(**inputs).loss.double(), plain.double())
        with pytest.raises(ValueError, match="cannot be unpatched"):
            unpatch(model)
        with pytest.raises(ValueError, match="before fully_shard"):
            patch_transformers(fully_shard(make("llama", "cpu", n_layer=1)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", CONFIGS)
def test_bare_models_are_patched_too(kind, device):
    model = make(kind, device).model
    tokens = torch.randint(60, (1, 6), device=device)
    plain = model(tokens).last_hidden_state
    assert_same(patch_transformers(model)(tokens).last_hidden_state, plain)


def test_compiled_whole_equals_eager(device):
    model = patch_transformers(make("qwen3", device))
    inputs = batch(model, rows=1, length=6)
    eager = loss_and_gradients(model, **inputs)
    step = torch.compile(lambda **inputs: model(**inputs).loss, fullgraph=True, backend="aot_eager")
    loss = step(**inputs)
    torch.testing.assert_close((loss.double(), *torch.autograd.grad(loss, list(model.parameters()))), eager)


def test_what_cannot_be_patched_says_why():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))
    with pytest.raises(ValueError, match="supports llama, mistral, qwen3, not 'gpt2'"):
        patch_transformers(gpt2)
    with pytest.raises(ValueError, match="not 'Linear'"):
        patch_transformers(torch.nn.Linear(1, 1))
    for setting, message in (({"hidden_act": "gelu"}, "silu"), ({"attention_dropout": 0.1}, "set it to 0")):
        with pytest.raises(ValueError, match=message):
            patch_transformers(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, hidden_size=32, **setting)))
    model = patch_transformers(make("llama", "cpu"))
    with pytest.raises(ValueError, match="already replaced by patch_transformers"):
        patch_transformers(model)
    with pytest.raises(ValueError, match="attention matrix"):
        model(torch.ones(1, 2, dtype=torch.long), output_attentions=True)
    for option in ("softcap", "position_bias", "s_aux"):
        with pytest.raises(ValueError, match=option):
            model(torch.ones(1, 2, dtype=torch.long), **{option: 1.0})
    model.model.layers[1].self_attn.is_causal = False  # as for embeddings of sentences; transformers' sdpa attends to all tokens then
    with pytest.raises(ValueError, match="is_causal is False"):
        model(torch.ones(1, 2, dtype=torch.long))
    model = make("llama", "cpu")
    with mock.patch.object(model.model.norm, "forward", lambda x: x), pytest.raises(ValueError, match="something else"):
        patch_transformers(model)
    assert not any("forward" in vars(m) for m in model.modules()), "half a model was patched"


def test_importing_the_kernels_does_not_import_transformers():
    code = "import sys, tritale.kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_transformers_finds_no_second_copy_of_the_ops_in_the_repository():
    """It looks for a package `kernels`, which the folder of that name is for a process in the repository's root."""
    code = """if True:
        import sys, torch, tritale.kernels
        from transformers.utils import is_kernels_available
        assert not is_kernels_available() and "kernels.rms_norm" not in sys.modules
        from tritale.kernels import LinearCrossEntropy
        LinearCrossEntropy(4, 4)(torch.ones(2, 4), torch.ones(2, dtype=torch.long)).backward()
    """
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
