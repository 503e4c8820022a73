"""Bottleneck adapters: AdapterHub's own logits and files, and how they live with the rest."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers.bottleneck import Bottleneck

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "adapterhub"
FAMILIES = sorted(p.name for p in GOLDEN.iterdir())
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def golden_model(family):
    config = json.loads((GOLDEN / family / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(GOLDEN / family).eval()


def inputs(model, ids):
    more = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **more}


def learned(model, placement, name=None, **settings):
    config = fp.BottleneckAdapter(size=3, placement=placement, **settings)
    fp.attach(model, config, name or placement)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapterhub_s_logits_and_files(family, placement, tmp_path):
    golden = load_file(GOLDEN / family / "logits.safetensors")
    model = golden_model(family)
    given = inputs(model, golden["ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, golden["base"], rtol=1e-4, atol=1e-4)
        fp.load_adapter(model, GOLDEN / family / placement, placement)
        torch.testing.assert_close(model(**given).logits, golden[placement], rtol=1e-4, atol=1e-4)
    apart = (golden[placement] - golden["base"]).abs().max()
    assert apart > 0.01 * golden["base"].abs().max()  # the adapter shows in the logits
    fp.save_adapter(model, tmp_path, placement)
    ours = load_file(tmp_path / "adapter.safetensors")
    theirs = load_file(GOLDEN / family / placement / "adapter.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    settings, wanted = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, GOLDEN / family / placement)
    )
    for key in settings["config"].keys() - {"init_weights", "inv_adapter_reduction_factor"}:
        assert settings["config"][key] == wanted["config"][key], key


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_saving_and_loading(build, ids, tmp_path, placement, norm):
    model = learned(build(), placement, norm=norm, scale=0.5, activation="leaky_relu")
    with torch.no_grad():
        out = model(ids).logits
        fp.save_adapter(model, tmp_path, placement)
        fp.load_adapter(model, tmp_path, "again")
        assert torch.equal(model(ids).logits, out)
    assert model._fusedpeft.configs["again"] == model._fusedpeft.configs[placement]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_changes_nothing_at_first_and_leaves_nothing(family, placement):
    model = golden_model(family)
    given = inputs(model, load_file(GOLDEN / family / "logits.safetensors")["ids"])
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        before = model(**given).logits
        fp.attach(model, fp.BottleneckAdapter(size=3, placement=placement))
        torch.testing.assert_close(model(**given).logits, before)
    places = (2 if placement == "houlsby" else 1) * (4 if model.config.is_encoder_decoder else 2)
    assert fp.trainable_parameters(model) == places * (2 * 3 * 16 + 3 + 16)
    fp.detach(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sandwich_norms(ids):
    """Gemma 2 norms what attention and FFN put out: the adapter stands behind that norm."""
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = learned(transformers.Gemma2ForCausalLM(config).eval(), "houlsby")
    seen = {}
    layer = model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda m, a, out: seen.update(attention=out[0]))
    layer.pre_feedforward_layernorm.register_forward_pre_hook(
        lambda m, args: seen.update(stream=args[0])
    )
    layer.register_forward_pre_hook(lambda m, args: seen.update(start=args[0]))
    with torch.no_grad():
        model(ids)
        norm = layer.post_attention_layernorm
        h = norm.forward(seen["attention"])
        adapter = norm.fusedpeft_serial.adapters["houlsby"]
        torch.testing.assert_close(seen["stream"], seen["start"] + adapter(h, h))


def test_several_at_once_and_beside_lora(build, ids):
    model = build()
    for placement in PLACEMENTS:
        learned(model, placement, activation="gelu")
    fp.attach(model, fp.LoRA(rank=2), "lora")
    everyone = [*PLACEMENTS, "lora"]
    fp.activate(model, everyone)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("lora_A"):
            assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        together = model(ids).logits
        fp.activate(model, "houlsby")
        assert not torch.equal(model(ids).logits, together)
    with pytest.raises(InputError, match="cannot merge 'houlsby': BottleneckAdapter changes no we"):
        fp.merge(model)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generation_checkpointing_copies_and_whole_graphs(build, ids, placement, lively):
    model = learned(lively(build()), placement)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), cached)
    with torch.no_grad():
        out = model(ids).logits
        copied = copy.deepcopy(model)
        for parameter in (p for p in copied.parameters() if p.requires_grad):
            parameter.mul_(2)
        assert not torch.equal(copied(ids).logits, out)
        assert torch.equal(model(ids).logits, out)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, out, rtol=1e-5, atol=1e-5)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, two in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, two)


def test_dropout_in_training_only(llama, ids):
    model = learned(llama, "houlsby", dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": 0}, "BottleneckAdapter size: expected a whole number >= 1, got 0"),
        (
            {"placement": "both"},
            "placement: expected one of houlsby, pfeiffer, parallel, got 'both'",
        ),
        ({"activation": "swish"}, "activation: expected one of relu, .* got 'swish'"),
        ({"norm": "batch"}, "norm: expected one of None, layer_norm, rms_norm, got 'batch'"),
        ({"scale": 0}, "scale: expected a number other than 0, got 0"),
        ({"dropout": 1}, "dropout: expected 0 <= p < 1, got 1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(InputError, match=message):
        fp.BottleneckAdapter(**settings)


@pytest.fixture
def saved(llama, tmp_path):
    fp.save_adapter(learned(llama, "houlsby", "a"), tmp_path, "a")
    fp.detach(llama, "a")
    return tmp_path


def refused(model, folder, message):
    with pytest.raises(InputError, match=message) as caught:
        fp.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_fusedpeft") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"phm_layer": True, "use_gating": True},
            "expected AdapterHub's default: use_gating=True, p",
        ),
        ({"mh_adapter": True, "output_adapter": False}, "expected double_seq_bn .* or par_bn"),
        ({"non_linearity": "prelu"}, "non_linearity: expected one of relu, .* got 'prelu'"),
        ({"reduction_factor": {"0": 2}}, "expected one reduction_factor > 0"),
        (
            {"reduction_factor": 2},
            r"tensors 12 of another shape: model.layers.0.attention_adapters",
        ),
        ({"scaling": "learned"}, "BottleneckAdapter scale: .*got 'learned'"),
        ({"ln_before": True}, "16 missing: .*adapter_down.1.bias"),
    ],
)
def test_other_architectures(llama, saved, change, message):
    path = saved / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "config": {**raw["config"], **change}}))
    refused(llama, saved, message)


def test_other_tensors_and_pickles(llama, saved):
    path = saved / "adapter.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.output_adapters.adapters.a.adapter_up.bias"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != key}, "1 missing: .*1.output_adapters"),
        ({**tensors, "x": torch.zeros(1)}, "1 extra: x"),
        ({**tensors, key: torch.zeros(3)}, "1 of another shape: .*adapter_up.bias"),
    ):
        save_file(changed, path)
        refused(llama, saved, message)
    path.rename(saved / "pytorch_adapter.bin")
    refused(llama, saved, "pytorch_adapter.bin is a pickle, .*use_safetensors=True")


SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norms_of_what_is_added(ids, placement):
    """OLMo-2: r + norm(attention(r)), then r + norm(FFN(r))."""
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SMALL)).eval()
    layer, seen = model.model.layers[0], {}
    learned(model, placement)
    parts = {"mlp": layer.mlp, "after": layer}
    for adapter in (m for m in model.modules() if isinstance(m, Bottleneck)):
        parts["adapter"] = adapter  # the last: the FFN's
    for name, module in parts.items():
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        model(ids)
        (r, ffn), adapter = seen["mlp"], parts["adapter"]
        h = layer.post_feedforward_layernorm.forward(ffn)
        x = {"houlsby": h, "pfeiffer": r + h, "parallel": r}[placement]
        torch.testing.assert_close(seen["adapter"][0], x)
        out = adapter(x, h) + r if placement != "pfeiffer" else adapter(x, x)
    torch.testing.assert_close(seen["after"][1], out)


def test_models_that_cannot(tmp_path):
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=61, hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=4,
            word_embed_proj_dim=24,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="expected a model whose layers are known .*got OPTFor"):
        fp.attach(opt, fp.BottleneckAdapter())
    nomic = transformers.NomicBertModel(transformers.NomicBertConfig(**SMALL))
    with pytest.raises(InputError, match="expected a model whose layers are known .*got NomicBert"):
        fp.attach(nomic, fp.BottleneckAdapter())  # its post_attention_layernorm is behind the sum
    llama = golden_model("llama")
    with pytest.warns(UserWarning, match="norm='rms_norm' trains, but save_adapter cannot write"):
        fp.attach(llama, fp.BottleneckAdapter(norm="rms_norm"))
    with pytest.raises(InputError, match="AdapterHub has no rms_norm, which 'default' has"):
        fp.save_adapter(llama, tmp_path / "new")
    assert not (tmp_path / "new").exists()
