"""fuse_loss: the model's own loss and gradients, and never its logits."""

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForMaskedLMLoss

import fusedpeft as fp
from fusedpeft.errors import InputError

V = 61
SIZES = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PAIR = {
    "vocab_size": V, "d_model": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "d_kv": 6, "d_ff": 40, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip
MODELS = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {},
    "OPTForCausalLM": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "PhiForCausalLM": {"num_attention_heads": 2},  # its head has a bias
    "Gemma2ForCausalLM": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "CohereForCausalLM": {"logit_scale": 3.0},
    "GraniteForCausalLM": {"logits_scaling": 0.25},
    "MixtralForCausalLM": {"num_local_experts": 4, "output_router_logits": True},
    "T5ForConditionalGeneration": PAIR,
    "BartForConditionalGeneration": BART,
}


def build(name: str) -> torch.nn.Module:
    kind = getattr(transformers, name)
    config = kind.config_class(
        **(MODELS[name] if name[:2] in ("T5", "Ba") else SIZES | MODELS[name])
    )
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "bias" in key and tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return model.train()


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


class Logits(TorchDispatchMode):
    """The most elements of any [B, T, V] that an operation gave back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.ndim == 3 and t.shape[2] == V:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.fixture
def labels(ids) -> torch.Tensor:
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    return labels


def step(model, **given):
    model.zero_grad()
    out = model(**given)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got.keys() == want.keys() and want
    for name, grad in want.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(got[name], grad, rtol=0, atol=2e-5 * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("method", [None, "lora", "prompt"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name, method, ids, labels):
    model = without_dropout(build(name))
    if method:
        fp.attach(model, fp.LoRA(rank=3) if method == "lora" else fp.PromptTuning(length=3))
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape) * 0.1)
    given = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    plain, want = step(model, **given)
    assert fp.fuse_loss(model) is model
    for _ in range(2):  # the first call looks at some logits
        fused, got = step(model, **given)
        assert fused.logits is None and type(fused) is type(plain)
        torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
        assert_same(got, want)
    with Logits() as seen:
        model(**given)
    with Logits() as before:
        fp.fuse_loss(model, False)(**given)
    assert seen.numel == 0 and before.numel >= 2 * 9 * V
    back, again = step(model, **given)
    assert torch.equal(back.logits, plain.logits) and torch.equal(back.loss, plain.loss)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_only_in_training_and_with_labels(name, ids, labels):
    model = without_dropout(build(name))
    given = {"input_ids": ids, "labels": labels}
    plain = model(**given)
    fp.fuse_loss(fp.fuse_loss(model))
    assert model(**given).logits is None
    assert plain.past_key_values is not None and model(**given).past_key_values is None
    assert model(**given, use_cache=True).past_key_values is not None
    assert torch.equal(model.eval()(**given).logits, plain.logits)
    if name.startswith("Llama"):
        assert torch.equal(model.train()(ids).logits, plain.logits)
        assert torch.equal(model(ids, None, labels=labels).loss, model(**given).loss)
    was = model.train()(**given)
    as_tuple = model(**given, return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], was.loss)
    assert not any(
        t is not None and t.shape[-1:] == (V,) for t in as_tuple[1:2] if hasattr(t, "shape")
    )
    copied = copy.deepcopy(model)
    fp.fuse_loss(model, False)
    assert copied(**given).logits is None and torch.equal(model(**given).loss, plain.loss)
    fp.fuse_loss(model, False)


def test_the_words_of_trainers(llama, ids, labels):
    given = {"input_ids": ids, "labels": labels}
    ahead = torch.cat((labels[:, 1:], labels.new_full((2, 1), -100)), 1)
    for more in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": ahead.roll(1, 0)},
        {"ignore_index": int(labels[0, 5])},
    ):
        if "ignore_index" in more:
            more["labels"] = labels.where(labels >= 0, labels[0, 5])
        want, grads = step(llama.train(), **given | more)
        got, own = step(fp.fuse_loss(llama), **given | more)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6, msg=str(more))
        assert_same(own, grads)
        fp.fuse_loss(llama, False)
    none = fp.fuse_loss(llama)(ids, labels=torch.full_like(ids, -100))
    assert none.loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_worse(llama, ids, labels, dtype, check_accuracy):
    given = {"input_ids": ids, "labels": labels}
    fp.attach(llama.train(), fp.LoRA(rank=3))
    exact, _ = step(copy.deepcopy(llama).double(), **given)
    low, _ = step(copy.deepcopy(llama).to(dtype), **given)
    fused, _ = step(fp.fuse_loss(copy.deepcopy(llama).to(dtype)), **given)
    check_accuracy("loss", fused.loss, low.loss, exact.loss)
    with torch.autocast("cpu", dtype):
        want, _ = step(llama, **given)
        got, _ = step(fp.fuse_loss(llama), **given)
    check_accuracy("autocast", got.loss, want.loss, exact.loss)


def test_compile_fullgraph_and_checkpointing(llama, ids, labels):
    given = {"input_ids": ids, "labels": labels}
    model = fp.attach(llama.train(), fp.LoRA(rank=3))
    plain, want = step(model, **given)
    fp.fuse_loss(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, got = step(compiled, **given)
    assert out.logits is None
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same({n.removeprefix("_orig_mod."): g for n, g in got.items()}, want)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(model, **given)[1], want)


def test_output_layers_take_turns(llama, ids, labels):
    given = {"input_ids": ids, "labels": labels}
    fp.fuse_loss(fp.attach(llama.train(), fp.LoRA(rank=3)))
    fp.attach(llama, fp.OutputLayer(), "head")
    with torch.no_grad():
        llama.lm_head.weight.add_(0.1 * torch.randn(V, 24))
    fused, got = step(llama, **given)
    assert fused.logits is None and list(got) == ["lm_head.weight"]
    plain, want = step(fp.fuse_loss(llama, False), **given)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same(got, want)
    fp.fuse_loss(llama)
    fp.activate(llama, "default")
    fused = llama(**given)
    assert fused.logits is None
    torch.testing.assert_close(
        fused.loss, fp.fuse_loss(llama, False)(**given).loss, rtol=1e-5, atol=1e-6
    )


def test_a_peft_model_and_its_base(llama, ids, labels):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    given = {"input_ids": ids, "labels": labels}
    model = peft.get_peft_model(llama, peft.LoraConfig(r=3, target_modules="all-linear"))
    plain, want = step(model.train(), **given)
    fp.accelerate(fp.fuse_loss(model))
    fused, got = step(model, **given)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same(got, want)
    fp.fuse_loss(model, False)
    assert model(**given).logits is not None


def test_what_is_refused(llama, ids, labels):
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=V, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=40,
        )
    )  # fmt: skip
    for other in (torch.nn.Linear(3, 3), bert):
        with pytest.raises(InputError, match="expected a causal LM or an encoder-decoder, got"):
            fp.fuse_loss(other)
    with pytest.raises(InputError, match="expected a model"):
        fp.fuse_loss("llama")
    on_head = fp.attach(copy.deepcopy(llama), fp.LoRA(rank=2, targets=["lm_head"]))
    with pytest.raises(InputError, match="got LoraLinear: leave it out of the adapter's targets"):
        fp.fuse_loss(on_head)
    late = fp.fuse_loss(copy.deepcopy(llama)).train()
    with pytest.raises(InputError, match="'lm_head', it has hooks"):
        fp.attach(late, fp.LoRA(rank=2, targets=["lm_head"]))
    late.lm_head = on_head.lm_head
    with pytest.raises(InputError, match="got LoraLinear"):
        late(ids, labels=labels)
    assert late.eval()(ids, labels=labels).logits is not None
    llama.loss_function = ForMaskedLMLoss
    with pytest.raises(InputError, match="ForCausalLMLoss, got ForMaskedLMLoss"):
        fp.fuse_loss(llama)
    del llama._loss_function
    llama.forward = lambda **given: None
    with pytest.raises(InputError, match="something has replaced"):
        fp.fuse_loss(llama)


class Doubled(transformers.LlamaForCausalLM):
    """Its logits go through what no option says."""

    def forward(self, input_ids, labels=None, **more):
        out = super().forward(input_ids, **more)
        out.logits = out.logits * 2
        return out


def test_logits_that_something_else_changes_are_noticed(llama, ids, labels):
    model = Doubled(llama.config).train()
    fp.fuse_loss(model)
    with pytest.raises(InputError, match="makes more of its logits"):
        model(ids, labels=labels)
    assert torch.equal(model(ids).logits, fp.fuse_loss(model, False)(ids).logits)


def test_a_call_that_failed_leaves_nothing_behind(llama, ids, labels):
    fp.fuse_loss(llama.train())
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 61\)"):
        llama(ids, labels=labels + V)
    h = torch.randn(2, 24)
    assert llama.lm_head(h).shape == (2, V)
    assert llama(ids, labels=labels).loss.isfinite()
