"""Adapted models in training and generation: dropout, checkpointing, compile, autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fusedpeft as fp


def next_token_loss(model, ids):
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model, ids):
    model.zero_grad()
    loss = next_token_loss(model, ids)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), grads


def assert_same(one, two, atol):
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=atol)
    assert one[1].keys() == two[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], two[1][name], rtol=0, atol=atol, msg=name)
        assert one[1][name].abs().max() > 0, name


def test_dropout_acts_in_training_only_and_follows_the_seed(build, ids, stir):
    model = stir(fp.attach(build(), fp.LoRA(dropout=0.5)))
    with torch.no_grad():
        still = model(ids).logits
        assert torch.equal(model(ids).logits, still)
        fp.activate(model, None)
        base = model(ids).logits
        fp.activate(model, "default")
        model.train()
        if hasattr(model, "transformer"):  # GPT-2 drops its own activations too: silence those
            for m in model.modules():
                if isinstance(m, torch.nn.Dropout):
                    m.eval()
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model(ids).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], still) and not torch.equal(runs[0], base)


def test_dropout_is_unbiased(stir):
    linear = torch.nn.ModuleDict({"l": torch.nn.Linear(64, 8)})
    module = stir(fp.attach(linear, fp.LoRA(dropout=0.3)))["l"]
    x = torch.randn(1, 64).expand(20000, 64)
    with torch.no_grad():
        mean = module.train()(x).mean(0)
        exact = module.eval()(x[:1])[0]
        base = module.base_layer(x[:1])[0]
    assert (mean - exact).abs().max() < 0.05 * (exact - base).abs().max()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(llama, ids, stir, reentrant):
    model = stir(fp.attach(llama, fp.LoRA(dropout=0.25))).train()
    torch.manual_seed(3)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # its inputs must ask for gradients, as with any frozen base
        model.enable_input_require_grads()
    torch.manual_seed(3)
    assert_same(gradients(model, ids), plain, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_compile_fullgraph(build, ids, stir, dora):
    model = stir(fp.attach(build(), fp.LoRA(rank=3, dora=dora)))
    eager = gradients(model, ids)
    # "aot_eager" runs Dynamo and the autograd partitioner whole; Inductor only adds its codegen.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(eager, gradients(compiled._orig_mod, ids), atol=1e-6)
    loss = next_token_loss(compiled, ids)
    torch.testing.assert_close(loss.detach(), eager[0], rtol=0, atol=1e-5)
    model.zero_grad()
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_same((loss.detach(), got), eager, atol=1e-5)


def test_compile_inductor_with_dropout_and_two_adapters(ids, stir):
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    fp.attach(block, fp.LoRA(rank=2), "one")
    fp.attach(block, fp.LoRA(rank=3, dropout=0.5), "two")
    stir(fp.activate(block, ["one", "two"]) or block)
    x = torch.randn(6, 8)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled.eval()(x), block.eval()(x))
    compiled.train()(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters() if p.requires_grad)


def test_autocast(build, ids, stir):
    model = stir(fp.attach(build(), fp.LoRA()))
    exact = gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model, ids)
    assert torch.isfinite(low[0]) and low[0] != exact[0]
    torch.testing.assert_close(low[0], exact[0], rtol=0.02, atol=0.0)
    for name, grad in low[1].items():
        assert grad.dtype == torch.float32
        assert (grad - exact[1][name]).norm() < 0.15 * exact[1][name].norm(), name


def test_generate_with_and_without_cache(build, ids, stir):
    model = stir(fp.attach(build(), fp.LoRA()))
    out = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*out) and out[0].shape == (2, 15)
    fp.merge(model)
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None), out[0]
    )


def test_learning_lowers_the_loss(build, ids):
    model = fp.attach(build(), fp.LoRA(rank=4, dora=True))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(30):
        losses.append(gradients(model, ids)[0].item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2  # a frozen, untrained head of std 0.02 allows no more


def test_a_compiled_model_follows_activate_and_merge(llama, ids, stir, tmp_path):
    model = torch.compile(llama, fullgraph=True, backend="aot_eager")
    assert fp.attach(model, fp.LoRA(), "one") is model
    fp.attach(model, fp.LoRA(targets=["q_proj"]), "two")
    stir(llama)
    with torch.no_grad():
        for names in ("one", None, ["one", "two"]):
            fp.activate(model, names)
            torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-6)
        before = model(ids).logits
        fp.merge(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
        fp.unmerge(model)
        fp.activate(model, "one")
        fp.save_adapter(model, tmp_path, "one")
        assert fp.load_adapter(model, tmp_path, "three") is model
        one = model(ids).logits
        for name in ("one", "two", "three"):
            fp.detach(model, name)
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-6)
        assert not torch.allclose(one, llama(ids).logits, atol=1e-3)


# --- linears that read the same x ---------------------------------------------------------------


def counted(monkeypatch):
    from fusedpeft.layers import lora

    calls = {"multi": 0, "single": 0}

    def count(kind, op):
        return lambda *a, **k: (calls.__setitem__(kind, calls[kind] + 1), op(*a, **k))[1]

    monkeypatch.setattr(lora, "lora_linear_multi", count("multi", lora.lora_linear_multi))
    monkeypatch.setattr(lora, "lora_linear", count("single", lora.lora_linear))
    return calls


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"targets": ["q_proj", "v_proj"]}])
def test_siblings_are_one_node_in_training(llama, ids, stir, settings, monkeypatch):
    model = stir(fp.attach(llama, fp.LoRA(rank=3, **settings)))
    together = gradients(copy.deepcopy(model), ids)
    calls = counted(monkeypatch)
    copied = copy.deepcopy(model)
    gradients(copied, ids)
    one = "targets" in settings  # without k they are not all there
    assert calls == ({"multi": 0, "single": 4} if one else {"multi": 4, "single": 4})
    for module in model.modules():
        module._siblings = None
    assert_same(gradients(model, ids), together, atol=1e-6)
    with torch.no_grad():
        calls.update(multi=0, single=0)
        copied(ids)
    assert calls["multi"] == 0


def test_siblings_that_read_another_x(stir, monkeypatch):
    class Cross(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(8, 4) for _ in range(3))

        def forward(self, x, z):
            return self.q_proj(x), self.k_proj(z), self.v_proj(z)

    model = stir(fp.attach(Cross(), fp.LoRA(rank=2)))
    x, z = torch.randn(5, 8), torch.randn(6, 8)
    calls = counted(monkeypatch)
    for _ in range(5):
        model.zero_grad()
        q, k, v = model(x, z)
        alone = [
            one._fused(t, one._active[0])
            for one, t in zip(model.children(), (x, z, z), strict=True)
        ]
        for one, two in zip((q, k, v), alone, strict=True):
            torch.testing.assert_close(one, two)
        (q.sum() + k.sum() + v.sum()).backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    before = calls["multi"]
    model(x, z)
    assert calls["multi"] == before <= 6  # no longer tried


def test_siblings_see_that_x_was_written(stir):
    class Written(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

        def forward(self, x):
            gate = self.gate_proj(x)
            return gate, self.up_proj(x.mul_(2))

    model = stir(fp.attach(Written(), fp.LoRA(rank=2)))
    x = torch.randn(5, 8)
    gate, up = model(x.clone())
    torch.testing.assert_close(gate, model.gate_proj(x))
    torch.testing.assert_close(up, model.up_proj(2 * x))
