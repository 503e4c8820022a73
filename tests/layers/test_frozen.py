"""The norms, gated FFNs and rotary positions of models with adapters: which are ours, and that
nothing else shows."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.glm.modeling_glm import GlmAttention

import fusedpeft as fp
from fusedpeft.layers import frozen
from fusedpeft.layers.frozen import Faster, faster
from fusedpeft.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="fusedpeft._C is not built")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def built(kind: str, **more) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(std=0.5)
    return model


def ours(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Faster)]


IDS = torch.arange(20).view(2, 10) + 1


@pytest.mark.parametrize(
    "kind, a_block, more",
    [
        ("llama", 4, {}),
        ("mistral", 4, {}),
        ("qwen3", 6, {}),
        ("gemma", 4, {}),
        ("gemma3_text", 8, {}),
        ("llama", 4, {"hidden_act": "gelu"}),
        ("llama", 4, {"mlp_bias": True, "attention_bias": True}),
    ],
)
def test_models_compute_what_they_did(kind, a_block, more, monkeypatch):
    model = built(kind, **more)
    classes = [type(m) for m in model.modules()]
    fp.attach(model, fp.BottleneckAdapter(size=4))
    assert len(ours(model)) == 2 * a_block + 1  # the last norm

    def run():
        loss = model(IDS, labels=IDS).loss
        with torch.no_grad():
            logits = model(IDS).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        return loss, logits, *torch.autograd.grad(loss, trained)

    got = run()
    for name in CALLS:
        monkeypatch.setattr(frozen, name, lambda *_: None)
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    fp.detach(model)
    assert [type(m) for m in model.modules()] == classes


CALLS = ("rms_norm", "gated", "gated_mlp", "rotary")


def test_they_are_called(monkeypatch):
    calls = []
    for name in CALLS:
        real = getattr(frozen, name)
        spy = lambda *args, name=name, real=real: calls.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(frozen, name, spy)
    model = fp.attach(built("llama"), fp.PromptTuning(length=3))
    model(IDS)
    assert [calls.count(name) for name in CALLS] == [5, 0, 2, 2]
    calls.clear()
    with torch.no_grad():  # gated_mlp is asked and leaves it
        model(IDS)
    assert [calls.count(name) for name in CALLS] == [5, 2, 2, 2]


def test_an_attention_is_its_class_s_but_for_one_function():
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.apply_rotary_pos_emb
    model, plain = built("llama"), built("llama")
    fp.attach(model, fp.LoRA(rank=2))
    own, theirs = model.model.layers[0].self_attn, plain.model.layers[0].self_attn
    assert modeling_llama.apply_rotary_pos_emb is eager
    assert inspect.signature(own.forward) == inspect.signature(theirs.forward)
    assert faster(modeling_llama.LlamaAttention) is type(own) and type(own) is not type(theirs)
    x, position = torch.randn(2, 3, 32), torch.arange(3).unsqueeze(0)
    embeddings = plain.model.rotary_emb(x, position)
    got, want = (m(x, position_embeddings=embeddings, attention_mask=None) for m in (own, theirs))
    torch.testing.assert_close(got[0], want[0])
    with pytest.MonkeyPatch.context() as patch:  # other kernels, put in since then
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
        bare = own(x, position_embeddings=embeddings, attention_mask=None)[0]
        assert not torch.allclose(bare, want[0])
    with torch.no_grad():  # a cache under either of its names, which a decorator tells apart
        ids = IDS[:, :4]
        for m in (model, plain):
            cache = m(ids, use_cache=True).past_key_values
            m.after = m(IDS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(model.after, plain.after)


def test_copies_and_pickles_carry_their_own_weights():
    model = built("llama")
    fp.attach(model, fp.LoRA(rank=2))
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    for module in (norm, mlp):
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is type(module) and torch.equal(twin(x), module(x))
            with torch.no_grad():
                next(twin.parameters()).add_(1)
            assert not torch.equal(twin(x), module(x))


def test_classes_that_compute_something_else_stay():
    from transformers.models.gemma import modeling_gemma
    from transformers.models.llama import modeling_llama

    class Doubled(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Shifted(modeling_gemma.GemmaRMSNorm):
        def _norm(self, x):
            return x + self.eps

    for kind in (Doubled, Shifted):
        assert faster(kind) is None, "of another package"
        kind.__module__ = modeling_llama.__name__
        faster.cache_clear()
        assert faster(kind) is None
    assert faster(modeling_llama.LlamaRMSNorm).__name__ == "LlamaRMSNorm"
    assert faster(nn.LayerNorm) is None and faster(modeling_llama.LlamaDecoderLayer) is None
    for kind in (CohereAttention, GlmAttention):  # they turn pairs, not halves
        assert faster(kind) is None


def test_hooks_keywords_and_other_activations_go_the_usual_way():
    model = built("llama")
    plain = copy.deepcopy(model)
    fp.attach(model, fp.LoRA(rank=2))
    x, mlp, seen = torch.randn(2, 3, 32), model.model.layers[0].mlp, []
    want = plain.model.layers[0].mlp(x)
    torch.testing.assert_close(mlp(x=x), want)
    torch.testing.assert_close(model.model.norm(hidden_states=x), plain.model.norm(x))
    hook = mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mlp(x), want)
    hook.remove()
    assert seen == [1]
    mlp.act_fn = nn.ReLU()
    plain.model.layers[0].mlp.act_fn = nn.ReLU()
    torch.testing.assert_close(mlp(x), plain.model.layers[0].mlp(x))


def test_a_weight_that_learns_gets_its_gradient():
    model = fp.attach(built("llama"), fp.LoRA(rank=2))
    weight = model.model.norm.weight.requires_grad_()
    (got,) = torch.autograd.grad(model(IDS, labels=IDS).loss, weight)
    assert got.abs().sum() > 0


def test_compiled_whole():
    model = fp.attach(built("llama"), fp.LoRA(rank=2))
    norm = torch.compile(model.model.norm, fullgraph=True, backend="eager")
    mlp = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(norm(x), model.model.norm(x))
    torch.testing.assert_close(mlp(x), model.model.layers[0].mlp(x))
