"""merge and unmerge: the same outputs merged, the same bits back."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers import LoraLinear
from fusedpeft.layers.lora_method import lora_modules


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_the_output_and_unmerge_every_bit(build, ids, stir, dora, dtype):
    model = stir(fp.attach(build().to(dtype), fp.LoRA(rank=3, dora=dora)))
    before, bits, base = logits(model, ids), weights(model), logits_of_base(model, ids)
    fp.merge(model)
    assert fp.trainable_parameters(model) == 0
    for _, module in lora_modules(model):  # the exact sum, rounded once
        exact = merged_ref(module, bits_of(module, bits, model))
        got = module.weight_nk().double()
        assert ((got - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
    merged = logits(model, ids)
    assert (merged - before).abs().max() < 0.2 * (merged - base).abs().max()
    if dtype == torch.float32:
        torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)
    fp.unmerge(model)
    now = weights(model)
    assert all(torch.equal(now[n], bits[n]) for n in bits)
    assert torch.equal(logits(model, ids), before)
    assert fp.trainable_parameters(model) > 0


def bits_of(module, bits, model):
    name = next(p for p, m in lora_modules(model) if m is module)
    weight = bits[f"{name}.weight"].double()
    return weight.t() if module.transposed else weight


def merged_ref(module, weight):
    adapter = module.adapters["default"]
    total = weight + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    if adapter.lora_magnitude_vector is not None:
        total *= (adapter.lora_magnitude_vector.double() / total.norm(dim=1))[:, None]
    return total


def logits_of_base(model, ids):
    fp.activate(model, None)
    out = logits(model, ids)
    fp.activate(model, "default")
    return out


def test_two_adapters_merge_together(llama, ids, stir):
    fp.attach(llama, fp.LoRA(rank=2), "one")
    fp.attach(llama, fp.LoRA(rank=3, targets=["q_proj"]), "two")
    fp.activate(stir(llama), ["one", "two"])
    before = logits(llama, ids)
    fp.merge(llama)
    torch.testing.assert_close(logits(llama, ids), before, rtol=0, atol=1e-5)
    fp.unmerge(llama)
    fp.activate(llama, "one")
    assert not torch.equal(logits(llama, ids), before)


def test_a_tied_head_is_untied_by_merge_and_tied_again(make_llama, ids, stir):
    model = make_llama(tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stir(fp.attach(model, fp.LoRA(targets=["lm_head", "q_proj"])))
    before, embedding = logits(model, ids), model.model.embed_tokens.weight.detach().clone()
    fp.merge(model)
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    fp.unmerge(model)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("tie", [False, True])
def test_unload_leaves_a_plain_model(make_llama, ids, stir, tie):
    model = make_llama(tie=tie)
    modules = [(path, type(m)) for path, m in model.named_modules()]
    flags = {p.requires_grad for p in model.parameters()}
    stir(fp.attach(model, fp.LoRA(targets=["lm_head", "q_proj", "up_proj"])))
    before = logits(model, ids)
    fp.merge(model, unload=True)
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-5)
    assert [(path, type(m)) for path, m in model.named_modules()] == modules
    assert not any(
        isinstance(m, LoraLinear) or "_original_weight" in vars(m) for m in model.modules()
    )
    assert {p.requires_grad for p in model.parameters()} == flags == {True}
    fp.attach(model, fp.LoRA())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
def test_a_tied_head_stays_merged_after_unload(make_llama, ids, stir, tmp_path, name):
    torch.manual_seed(0)
    size = {"vocab_size": 61, "d_model": 24, "pad_token_id": 0, "decoder_start_token_id": 0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    made = {
        "llama": lambda: make_llama(tie=True),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=4)),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(**size, **heads, encoder_layers=1, decoder_layers=1)
        ),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**size, num_layers=1)),
    }
    model = made[name]().eval()
    fed = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}

    def close(other):
        with torch.no_grad():
            got = other.eval()(ids, **fed).logits[..., :61]
        torch.testing.assert_close(got, before, rtol=0, atol=1e-5)

    stir(fp.attach(model, fp.LoRA(targets=["lm_head"])))
    with torch.no_grad():
        before = model(ids, **fed).logits
    fp.merge(model, unload=True)
    for change in (model.tie_weights, lambda: model.resize_token_embeddings(64)):
        change()
        close(model)
        model.save_pretrained(tmp_path)
        close(type(model).from_pretrained(tmp_path))
    assert model.config.tie_word_embeddings == (name in ("bart", "t5"))  # their stacks are tied


def test_a_weight_that_is_not_finite_is_refused_and_undone(llama, ids, stir):
    model = stir(fp.attach(llama, fp.LoRA()))
    bits = weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.adapters["default"].lora_B[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj' is not finite"):
        fp.merge(model)
    now = weights(model)
    assert all(torch.equal(now[n], bits[n]) for n in bits)
    fp.activate(model, None)  # not merged: everything still works


def test_what_merging_forbids(llama, ids):
    with pytest.raises(InputError, match="has no adapter"):
        fp.merge(llama)
    fp.attach(llama, fp.LoRA())
    with pytest.raises(InputError, match="no adapter is merged"):
        fp.unmerge(llama)
    fp.activate(llama, None)
    with pytest.raises(InputError, match="no adapter is active"):
        fp.merge(llama)
    fp.activate(llama, "default")
    fp.merge(llama)
    for call in (
        lambda: fp.merge(llama),
        lambda: fp.detach(llama),
        lambda: fp.activate(llama, None),
        lambda: fp.attach(llama, fp.LoRA(), "two"),
    ):
        with pytest.raises(InputError, match="unmerge first"):
            call()
