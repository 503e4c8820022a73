"""accelerate: nobody can tell the model from PEFT's own but by its speed."""

import copy

import pytest
import torch

import fusedpeft as fp
from fusedpeft.errors import InputError

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


def make(build, stir, adapters=({},), **settings):
    """(PEFT's model, its accelerated twin) with adapters a0, a1, …"""
    model = build()
    for i, extra in enumerate(adapters):
        config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings, **extra})
        if i == 0:
            model = peft.get_peft_model(model, config, "a0")
        else:
            model.add_adapter(f"a{i}", config)
    stir(model).eval()
    fused = copy.deepcopy(model)
    report = fp.accelerate(fused)
    assert report.swapped and not report.kept and not report.already
    return model, fused


def run(model, ids, **kwargs):
    model.zero_grad()
    y = model(ids, **kwargs).logits
    if y.requires_grad:
        y.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads


def assert_same(one, two, ids, atol=1e-5, **kwargs):
    (y1, g1), (y2, g2) = run(one, ids, **kwargs), run(two, ids, **kwargs)
    assert y1.dtype == y2.dtype
    torch.testing.assert_close(y2, y1, rtol=0, atol=atol)
    assert g1.keys() == g2.keys()
    for name in g1:
        torch.testing.assert_close(g2[name], g1[name], rtol=0, atol=atol, msg=name)
    return y1


def count_fused(model, monkeypatch):
    from fusedpeft.layers import peft_linear

    calls, op = [], peft_linear.lora_linear
    monkeypatch.setattr(
        peft_linear, "lora_linear", lambda *a, **k: (calls.append(1), op(*a, **k))[1]
    )
    return calls


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_backward_and_merge(build, ids, stir, variant, monkeypatch):
    theirs, ours = make(build, stir, **VARIANTS[variant])
    assert list(theirs.state_dict()) == list(ours.state_dict())
    calls = count_fused(ours, monkeypatch)
    y = assert_same(theirs, ours, ids)
    assert len(calls) == (0 if variant == "bias" else len(fp.accelerate(ours).already))
    for model in (theirs, ours):
        model.merge_adapter()
    assert_same(theirs, ours, ids)
    for model in (theirs, ours):
        model.unmerge_adapter()
    with theirs.disable_adapter(), ours.disable_adapter():
        base = assert_same(theirs, ours, ids)
    assert (y - base).abs().max() > 1e-3
    assert_same(theirs, ours, ids)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, y, rtol=0, atol=1e-4)


def test_several_active_mixed_batches_and_a_new_adapter(build, ids, stir, monkeypatch):
    theirs, ours = make(build, stir, [{}, {"r": 2, "lora_alpha": 3}])
    for active in (["a0", "a1"], ["a1", "a0"], "a1", "a0"):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        assert_same(theirs, ours, ids)
    names = ["a1", "__base__"]
    with torch.no_grad():
        assert_same(theirs, ours, ids, adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names"):  # a copy: PEFT's hooks outlive the error
        copy.deepcopy(ours)(ids, adapter_names=["a0"])
    for model in (theirs, ours):
        model.add_adapter("a2", peft.LoraConfig(r=3, target_modules="all-linear"))
        model.load_state_dict(stir(copy.deepcopy(theirs)).state_dict(), strict=False)
        model.set_adapter("a2")
    assert_same(theirs, ours, ids)
    for model in (theirs, ours):
        model.delete_adapter("a2")
        model.base_model.set_adapter(["a0", "a1"])
    assert_same(theirs, ours, ids)


def test_every_variant(make_llama, ids):
    """What PEFT has beside DoRA, and its ways to begin: on the op or on PEFT's own code."""
    from peft.tuners.lora import config as configs

    variants = {
        "alora": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        "tokens": {"trainable_token_indices": [3, 5]},
        "saved": {"modules_to_save": ["lm_head"]},
        "replication": {"layer_replication": [(0, 2), (1, 2)]},
        "parameters": {"target_parameters": ["mlp.gate_proj.weight"], "target_modules": ["q_proj"]},
    }
    for start in ("pissa", "olora", "mica", "orthogonal", "gaussian"):
        variants[start] = {"init_lora_weights": start}
    for name in ("velora", "monteclora", "kasa"):
        kind = getattr(configs, f"{name.capitalize()}Config", None)
        if kind is not None:
            variants[name] = {f"{name}_config": kind()}
    known = set(peft.LoraConfig.__dataclass_fields__)
    ids[:, 4:6] = torch.tensor([5, 6])
    for name, settings in variants.items():
        if not known.issuperset(settings):
            continue  # an older PEFT
        torch.manual_seed(0)
        config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
        theirs = peft.get_peft_model(make_llama(), config).eval()
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                if "lora_B" in key:
                    p.add_(0.1 * torch.randn(p.shape))
        ours = copy.deepcopy(theirs)
        assert fp.accelerate(ours).swapped, name
        results = []
        for model in (theirs, ours):
            torch.manual_seed(3)  # some draw noise
            results.append(run(model, ids))
        (y1, g1), (y2, g2) = results
        torch.testing.assert_close(y2, y1, rtol=0, atol=1e-5, msg=name)
        assert g1.keys() == g2.keys() and g1
        for key in g1:
            torch.testing.assert_close(g2[key], g1[key], rtol=0, atol=1e-5, msg=f"{name} {key}")


def test_hotswap(build, ids, stir, tmp_path, monkeypatch):
    from peft.utils.hotswap import hotswap_adapter

    theirs, ours = make(build, stir)
    other = stir(peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules="all-linear")))
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_B" in name:
                p.mul_(-3)
    other.save_pretrained(tmp_path)
    before = assert_same(theirs, ours, ids)
    calls = count_fused(ours, monkeypatch)
    for model in (theirs, ours):
        hotswap_adapter(model, tmp_path, adapter_name="a0")
    after = assert_same(theirs, ours, ids)
    assert (after - before).abs().max() > 1e-3 and calls
    torch.testing.assert_close(after, other(ids).logits, rtol=0, atol=1e-5)


def test_compiled_hotswap(llama, ids, stir):
    """PEFT makes the scalings tensors that it writes to: its own code reads them."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    theirs, ours = make(lambda: llama, stir)
    for model in (theirs, ours):
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for scale in (2.0, 0.5):
        for model in (theirs, ours):
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.scaling["a0"].fill_(scale)
        torch.testing.assert_close(compiled(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_transforms_of_functions(llama, stir, dora, monkeypatch):
    from torch.func import functional_call, grad, jacrev, jvp, vmap

    models = make(lambda: llama, stir, use_dora=dora)
    x = torch.randn(5, 24)
    calls, results = count_fused(models[1], monkeypatch), []
    for model in models:
        layer = model.base_model.model.model.layers[0].mlp.gate_proj
        own = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

        def loss(own, row, layer=layer):
            return functional_call(layer, own, (row,)).square().sum()

        each = vmap(grad(loss), in_dims=(None, 0))(own, x)
        more = (vmap(layer)(x), jvp(layer, (x,), (x,))[1], jacrev(layer)(x[0]))
        results.append([*grad(loss)(own, x).values(), *each.values(), *more])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not calls
    models[1].base_model.model.model.layers[0].mlp.gate_proj(x)
    assert calls


def test_dora_sees_writes_through_data(build, ids, stir):
    theirs, ours = make(build, stir, use_dora=True)
    assert_same(theirs, ours, ids)
    for part in ("lora_B", "lora_A", "base_layer.weight"):
        for model in (theirs, ours):
            for name, p in model.named_parameters():
                if part in name:
                    p.data.mul_(1.5)
        assert_same(theirs, ours, ids, atol=1e-4)


def test_dora_beside_another_goes_to_peft(build, ids, stir):
    theirs, ours = make(build, stir, [{"use_dora": True}, {}])
    for active in (["a0", "a1"], ["a1", "a0"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        assert_same(theirs, ours, ids, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_in_training(llama, ids, stir, dora, monkeypatch):
    """Another mask than PEFT's (DoRA: PEFT's own), but the same mean; the same seed, the same."""
    theirs, ours = make(lambda: llama, stir, lora_dropout=0.25, use_dora=dora)
    layers = [m.base_model.model.model.layers[0].self_attn.q_proj.train() for m in (theirs, ours)]
    calls, means, x = count_fused(ours, monkeypatch), [], torch.randn(1, 24)
    with torch.no_grad():
        for layer in layers:
            torch.manual_seed(0)
            y = layer(x.expand(20000, 24))
            torch.manual_seed(0)
            assert torch.equal(layer(x.expand(20000, 24)), y)
            means.append((y.mean(0), y.std(0)))
        moved = (layers[0].eval()(x) - layers[0].base_layer(x)).abs().max()
    assert len(calls) == (0 if dora else 2)
    for one, two in zip(*means, strict=True):
        assert (one - two).abs().max() < 0.05 * moved


def test_dropping_everything_is_left_to_peft(llama, ids, stir):
    theirs, ours = make(lambda: llama, stir, lora_dropout=1.0)
    assert_same(theirs.train(), ours.train(), ids)


def test_bf16_autocast_and_training(build, ids, stir):
    theirs, ours = make(build, stir)
    with torch.autocast("cpu", torch.bfloat16):
        y = assert_same(theirs, ours, ids, atol=0.05)
    assert y.dtype == torch.bfloat16
    theirs, ours = make(lambda: build().bfloat16(), stir)
    assert_same(theirs, ours, ids, atol=0.05)
    trained = [p.dtype for p in ours.parameters() if p.requires_grad]
    assert set(trained) == {torch.float32}


def test_hooks_on_inner_modules_still_fire(llama, ids, stir):
    theirs, ours = make(lambda: llama, stir)
    seen = []
    module = ours.base_model.model.model.layers[0].self_attn.q_proj
    module.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    assert_same(theirs, ours, ids)
    module = ours.base_model.model.model.layers[1].self_attn.q_proj
    module.lora_A["a0"].register_forward_hook(lambda *_: seen.append("A"))
    assert_same(theirs, ours, ids)
    assert seen == ["base", "base", "A"]


def test_compile_generate_and_saving(build, ids, stir, tmp_path):
    theirs, ours = make(build, stir)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        ours.generate(input_ids=ids, **options), theirs.generate(input_ids=ids, **options)
    )
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "a0")
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)


def test_report_and_twice(llama, ids, stir):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "embed_tokens"])
    model = peft.get_peft_model(llama, config)
    v_proj = model.base_model.model.model.layers[0].self_attn.v_proj
    v_proj.base_layer = type("Odd", (torch.nn.Linear,), {})(24, 12)
    report = fp.accelerate(model)
    assert len(report.swapped) == 3 and len(report.kept) == 2
    assert "fused 3 LoRA linears" in str(report)
    assert "lora.layer.Embedding is not lora.Linear (such as base_model.model.model" in str(report)
    assert "its base is a " in report.kept["base_model.model.model.layers.0.self_attn.v_proj"]
    kinds = {status.module_type for status in model.get_layer_status()}
    assert kinds == {"lora.Linear", "lora.Embedding"}
    again = fp.accelerate(model)
    assert not again.swapped and sorted(again.already) == sorted(report.swapped)
    model(ids)


def test_models_that_are_not_pefts(make_llama):
    with pytest.raises(InputError, match="has no adapter of PEFT's; for a plain model use fused"):
        fp.accelerate(make_llama())
    with pytest.raises(InputError, match="expected a PEFT model, got dict"):
        fp.accelerate({})
    model = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="carries PEFT's adapters: use fusedpeft.accelerate"):
        fp.attach(model, fp.LoRA())
