"""Attention of one decoded token in models with adapters: our kernel where it is sdpa's, and only
there."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fusedpeft as fp
from fusedpeft.layers import attention
from fusedpeft.layers.attention import sdpa
from fusedpeft.layers.frozen import _Attentions
from fusedpeft.ops.native import native

needs_kernel = pytest.mark.skipif(native is None, reason="fusedpeft._C is not built")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Who answered, call by call."""
    names = []
    for name in ("native_shared", "sdpa_attention_forward"):
        real = getattr(attention, name)
        spy = lambda *a, n=name, r=real, **k: names.append(n) or r(*a, **k)  # noqa: E731
        monkeypatch.setattr(attention, name, spy)
    return names


def tensors(b=2, h=4, hkv=2, t=1, s=7, d=16, dtype=torch.float32):
    """q as a model has it, k and v as a cache has them."""
    torch.manual_seed(0)
    q, kv = torch.randn(b, t, h, d).transpose(1, 2), torch.randn(2, b, hkv, s + 3, d)
    return [x.to(dtype) for x in (q, *kv[:, :, :, :s])]


def module(h=4, hkv=2) -> nn.Module:
    return SimpleNamespace(num_key_value_groups=h // hkv, is_causal=True, training=False)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 4, 2, 7, 16), (3, 8, 1, 130, 40)])
@torch.no_grad()
def test_against_float64(check_accuracy, size, dtype, calls):
    b, h, hkv, s, d = size
    for scaling in (None, 0.3):
        given, of = tensors(b, h, hkv, 1, s, d, dtype), module(h, hkv)
        got, weights = sdpa(of, *given, None, scaling=scaling, dropout=0.0, is_causal=None)
        assert weights is None and got.shape == (b, 1, h, d)
        low = sdpa_attention_forward(of, *given, None, scaling=scaling)[0]
        wide = [t.double() for t in given]
        check_accuracy("out", got, low, sdpa_attention_forward(of, *wide, None, scaling=scaling)[0])
    assert calls == ["native_shared"] * 2


@pytest.mark.parametrize(
    "what, options",
    [
        ({"t": 2}, {}),
        ({"dtype": torch.float64}, {}),
        ({}, {"dropout": 0.5}),
        ({}, {"position_bias": torch.ones(1, 4, 1, 7)}),
        ({}, {"attention_mask": torch.ones(2, 1, 1, 7, dtype=torch.bool)}),
        ({}, {"output_attentions": True}),
    ],
)
@torch.no_grad()
def test_what_is_left_to_sdpa(what, options, calls):
    torch.manual_seed(1)
    given, options = tensors(**what), dict(options)
    mask = options.pop("attention_mask", None)
    torch.manual_seed(2)
    got = sdpa(module(), *given, mask, **options)[0]
    torch.manual_seed(2)
    assert torch.equal(got, sdpa_attention_forward(module(), *given, mask, **options)[0])
    assert calls == ["sdpa_attention_forward"]


@torch.no_grad()
def test_arguments_by_name():
    """As ten of transformers' modules give them."""
    names = ("query", "key", "value")
    for mask in (None, torch.ones(2, 1, 1, 7, dtype=torch.bool)):
        given = dict(zip(names, tensors(), strict=True), attention_mask=mask, scaling=0.3)
        want = sdpa_attention_forward(module(), **given)[0]
        torch.testing.assert_close(sdpa(module(), **given)[0], want)


def test_gradients_are_left_to_sdpa(calls):
    q, k, v = tensors()
    sdpa(module(), q.requires_grad_(), k, v, None)[0].sum().backward()
    assert q.grad is not None and calls == ["sdpa_attention_forward"]


@torch.no_grad()
def test_softcaps_are_sdpa_s_to_refuse(calls):
    with suppress(ValueError):  # older ones pass them by
        sdpa(module(), *tensors(), None, softcap=30.0)
    assert calls == ["sdpa_attention_forward"]


# --- models -------------------------------------------------------------------------------------


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(18).view(2, 9) + 1


@needs_kernel
@pytest.mark.parametrize("method", ["attached", "served", "prefix put aside"])
def test_decoding_calls_it(method, calls, lively):
    base = lively(llama())
    expected = base.generate(IDS, max_new_tokens=5)
    assert not calls
    if method == "served":
        pool = fp.AdapterPool.for_model(base, slots=1, max_rank=2)
        pool.install(base)
        with pool.batch([None, None]):
            got = base.generate(IDS, max_new_tokens=5)
    else:
        fp.attach(base, fp.LoRA(rank=2) if method == "attached" else fp.PrefixTuning(length=2))
        if method != "attached":
            fp.activate(base, None)
        got = base.generate(IDS, max_new_tokens=5)
    assert torch.equal(got, expected)
    layers = ["sdpa_attention_forward"] * 2
    assert calls == layers + ["native_shared"] * 8  # the prompt; four tokens more


def test_padded_rows_are_sdpa_s(calls):
    model = fp.attach(llama(), fp.LoRA(rank=2))
    seen = torch.ones_like(IDS)
    seen[0, :3] = 0
    model.generate(IDS, attention_mask=seen, max_new_tokens=3)
    assert set(calls) == {"sdpa_attention_forward"}


def test_other_attentions_stay(calls, monkeypatch):
    eager = fp.attach(llama(attn_implementation="eager"), fp.LoRA(rank=2))
    eager.generate(IDS, max_new_tokens=3)
    model = fp.attach(llama(), fp.LoRA(rank=2))
    theirs = []
    given = AttentionInterface._global_mapping["sdpa"]

    def registered(*args, **kwargs):
        theirs.append(1)
        return given(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", registered)
    model.generate(IDS, max_new_tokens=3)
    assert len(theirs) == 6 and not calls


def test_a_table_of_ours_is_theirs_but_for_sdpa(calls):
    table, theirs = _Attentions(), ALL_ATTENTION_FUNCTIONS
    assert list(table) == list(theirs) and "sdpa" in table
    for name in theirs:
        assert table[name] is (sdpa if name == "sdpa" else theirs[name])
        assert table.get_interface(name, None) is table[name]
    assert table.get_interface("eager", len) is len
    with pytest.raises(KeyError):
        table.get_interface("another", len)


def test_a_compiled_model_is_the_class_s_own(calls):
    model = fp.attach(llama(), fp.LoRA(rank=2))
    with torch.no_grad():
        expected = model(IDS).logits
        got = torch.compile(model, backend="eager", fullgraph=True)(IDS).logits
    torch.testing.assert_close(got, expected)
