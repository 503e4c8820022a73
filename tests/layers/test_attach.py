"""attach, activate, detach: what changes, what does not, what the model still can do."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers import LoraLinear
from fusedpeft.ops import linear_cpu


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def adapted(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, LoraLinear)}


def test_attach_is_silent_freezes_and_counts(build, ids):
    model = build()
    before = logits(model, ids)
    assert fp.attach(model, fp.LoRA(rank=3)) is model
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-6)
    modules = adapted(model)
    expected = sum(3 * (m.in_features + m.out_features) for m in modules.values())
    assert fp.trainable_parameters(model) == expected > 0
    assert all(
        "adapters.default.lora_" in n for n, p in model.named_parameters() if p.requires_grad
    )
    head = model.get_output_embeddings()
    assert not isinstance(head, LoraLinear)
    assert len(modules) == {"LlamaForCausalLM": 14, "GPT2LMHeadModel": 8}[type(model).__name__]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        fp.LoRA(dropout=0.1), fp.BottleneckAdapter(4), fp.PrefixTuning(4),
        fp.PrefixTuning(4, projection=5), fp.PromptTuning(4), fp.OutputLayer(),
    ],
    ids=["lora", "bottleneck", "prefix", "projection", "prompt", "output"],
)  # fmt: skip
def test_what_is_added_is_in_the_model_s_mode(build, config, training):
    model = build().train(training)
    fp.attach(model, config)
    fp.attach(model, config, "second")
    assert {m.training for m in model.modules()} == {training}


@pytest.mark.parametrize(
    "config", [fp.LoRA(targets=["q_proj"]), fp.BottleneckAdapter(4), fp.PrefixTuning(4)]
)
def test_a_few_tokens_take_the_kernel_and_no_trace_stays(llama, ids, config, monkeypatch):
    if linear_cpu.native is None:
        pytest.skip("fusedpeft._C is not built")
    monkeypatch.setattr(linear_cpu, "_LEAST", 0)
    before, kinds = logits(llama, ids[:, :2]), [type(m) for m in llama.modules()]
    fp.attach(llama, config)
    fp.activate(llama, None)
    again = pickle.loads(pickle.dumps(copy.deepcopy(llama)))
    kernel = Counting(linear_cpu.native)
    monkeypatch.setattr(linear_cpu, "native", kernel)
    torch.testing.assert_close(logits(again, ids[:, :2]), before)
    assert kernel.calls == 15  # 7 linears in each of two layers, and the head
    logits(llama, ids)  # 18 rows
    assert kernel.calls == 15
    fp.detach(llama)
    assert [type(m) for m in llama.modules()] == kinds


class Counting:
    def __init__(self, native):
        self.native, self.calls = native, 0

    def linear(self, *args):
        self.calls += 1
        return self.native.linear(*args)


def test_init_is_uniform_in_one_over_root_k(llama):
    fp.attach(llama, fp.LoRA(rank=64, targets=["up_proj"]))
    for module in adapted(llama).values():
        a, b = module.adapters["default"].lora_A, module.adapters["default"].lora_B
        bound = 24**-0.5
        assert a.abs().max() <= bound and a.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not b.any()


def test_adapters_are_fp32_beside_bf16(llama, ids, stir):
    model = fp.attach(llama.to(torch.bfloat16), fp.LoRA(dora=True))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    stir(model)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable)
    fp.detach(model)
    fp.attach(model, fp.LoRA()).to(torch.bfloat16)
    assert logits(model, ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "targets, paths",
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["self_attn.o_proj"], {"o_proj"}),
        (r".*\.1\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_targets(llama, targets, paths):
    fp.attach(llama, fp.LoRA(targets=targets))
    assert {p.rpartition(".")[2] for p in adapted(llama)} == paths
    if isinstance(targets, str):
        assert all(".1." in p for p in adapted(llama))


def test_patterns_choose_rank_and_scale_by_module(llama):
    config = fp.LoRA(
        rank=2, alpha=4, rank_pattern={r"0\..*q_proj": 5}, alpha_pattern={"up_proj": 9}
    )
    modules = adapted(fp.attach(llama, config))
    first = modules["model.layers.0.self_attn.q_proj"].adapters["default"]
    assert first.lora_A.shape[0] == 5 and first.scale == 4 / 5
    assert modules["model.layers.1.self_attn.q_proj"].adapters["default"].lora_A.shape[0] == 2
    assert modules["model.layers.1.mlp.up_proj"].adapters["default"].scale == 9 / 2


def test_detach_returns_the_very_modules(build, ids):
    model = build()
    model.lm_head.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    fp.attach(model, fp.LoRA(), "one")
    fp.attach(
        model, fp.LoRA(targets=["c_attn" if "GPT2" in type(model).__name__ else "q_proj"]), "two"
    )
    fp.detach(model, "one")
    assert len(adapted(model)) == 2
    fp.detach(model, "two")
    now = dict(model.named_modules())
    assert list(now) == list(modules) and all(now[p] is modules[p] for p in modules)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(InputError, match="has no adapter"):
        fp.detach(model, "two")


def test_activate_one_several_none(build, ids, stir):
    model = build()
    base = logits(model, ids)
    fp.attach(model, fp.LoRA(rank=2), "one")
    fp.attach(model, fp.LoRA(rank=5, alpha=3), "two")
    stir(model)
    out = {}
    for key, names in {"two": "two", "one": "one", "sum": ["one", "two"], "none": None}.items():
        fp.activate(model, names)
        out[key] = logits(model, ids)
        wanted = {n for n in ("one", "two") if names and n in names}
        trained = {
            n.split(".adapters.")[1].split(".")[0]
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        assert trained == wanted
    torch.testing.assert_close(out["none"], base)
    # The sum in one linear is base + both updates.
    fp.activate(model, ["two", "one"])
    torch.testing.assert_close(logits(model, ids), out["sum"], rtol=0, atol=1e-5)
    module = next(iter(adapted(model).values()))
    x = torch.randn(4, module.in_features)
    total = module.base_layer(x) + sum(x @ module.adapters[n].delta().t() for n in ("one", "two"))
    torch.testing.assert_close(module(x), total, rtol=0, atol=1e-5)
    assert len({round(o.sum().item(), 3) for o in out.values()}) == 4


def test_a_module_that_stands_twice_is_adapted_in_both_places(ids):
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared)})
    fp.attach(model, fp.LoRA())
    assert model["a"] is model["b"][0] and isinstance(model["a"], LoraLinear)
    fp.detach(model)
    assert model["a"] is shared and model["b"][0] is shared


def test_deepcopy_is_independent(llama, ids, stir):
    model = stir(fp.attach(llama, fp.LoRA()))
    twin, before = copy.deepcopy(model), logits(model, ids)
    stir(twin, seed=9)
    assert torch.equal(logits(model, ids), before) and not torch.equal(logits(twin, ids), before)
    fp.detach(twin)
    assert adapted(model) and not adapted(twin)


@pytest.mark.parametrize("tie", [False, True])
def test_save_pretrained_writes_what_from_pretrained_reads(make_llama, ids, stir, tmp_path, tie):
    model = make_llama(tie=tie)
    base = model(ids).logits
    stir(fp.attach(model, fp.LoRA(targets=["q_proj", "down_proj", "lm_head"])))
    keys, logits = set(model.state_dict()), model(ids).logits
    model.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    assert set(again.state_dict()) < keys and torch.equal(again(ids).logits, base)
    other = fp.attach(make_llama(tie=tie), fp.LoRA(targets=["q_proj", "down_proj", "lm_head"]))
    lost = other.load_state_dict(load_file(tmp_path / "base/model.safetensors"), strict=False)
    assert not lost.unexpected_keys and len(lost.missing_keys) == tie
    assert torch.equal(other(ids).logits, logits)
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert names == keys  # torch.distributed.checkpoint goes by both
    fp.merge(model)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_an_adapted_head_that_is_tied(make_llama, ids, stir):
    model = make_llama(tie=True)
    before = model(ids).logits
    stir(fp.attach(model, fp.LoRA(targets=["lm_head"])))
    logits = model(ids).logits
    model.tie_weights()
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(InputError, match=r"a weight of 61 outputs, got \(70, 24\): detach"):
        model.resize_token_embeddings(70)
    fp.detach(model)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(model(ids).logits[..., :61], before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_without_memory(make_llama, ids, dora):
    """On the meta device sizes can be asked for before anything is allocated."""
    model = fp.attach(make_llama().to("meta"), fp.LoRA(rank=3, dora=dora))
    assert model(ids.to("meta")).logits.shape == (*ids.shape, model.config.vocab_size)
