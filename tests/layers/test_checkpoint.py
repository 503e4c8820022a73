"""Checkpoints both ways with the installed PEFT: files, logits, gradients."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers import LoraLinear

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {r"0\..*": 6}, "alpha_pattern": {"c_fc|up_proj": 5}},
}


def run(model, ids):
    """(logits, gradients by PEFT's key)."""
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            path, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
            path = path.removesuffix(".adapters.default")
            grads[path, leaf.split(".")[0]] = p.grad
    return logits.detach(), grads


def assert_same(one, two, ids, train=True):
    if train:
        for model in (one, two):
            for name, p in model.named_parameters():
                p.requires_grad_("lora_" in name)
    (y1, g1), (y2, g2) = run(one, ids), run(two, ids)
    torch.testing.assert_close(y1, y2, rtol=0, atol=1e-5)
    assert g1.keys() == g2.keys() and len(g1) >= 16
    for key in g1:
        torch.testing.assert_close(g1[key], g2[key], rtol=0, atol=1e-5, msg=str(key))
    assert max(g.abs().max() for g in g1.values()) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_loads_in_peft(build, ids, stir, tmp_path, variant):
    ours = stir(fp.attach(build(), fp.LoRA(rank=4, alpha=7, **VARIANTS[variant])))
    base = build()(ids).logits
    assert fp.save_adapter(ours, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "a" / "b", is_trainable=True)
    assert_same(ours, theirs, ids)
    assert (theirs(ids).logits - base).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_in_ours_and_goes_back_the_same(build, ids, stir, tmp_path, variant):
    ours = fp.LoRA(rank=4, alpha=7, **VARIANTS[variant])
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules="all-linear", use_rslora=ours.rslora,
        use_dora=ours.dora, rank_pattern=ours.rank_pattern, alpha_pattern=ours.alpha_pattern,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = stir(peft.get_peft_model(build(), config))
    theirs.save_pretrained(tmp_path / "theirs")
    model = fp.load_adapter(build(), tmp_path / "theirs")
    assert_same(model, theirs, ids)
    fp.save_adapter(model, tmp_path / "ours")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    "select",
    [
        {"target_modules": ["q_proj", "v_proj", "c_attn"], "layers_to_transform": [0]},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"target_modules": r".*layers\.[0-9]\.self_attn\.(q|k)_proj"},
    ],
)
def test_peft_ways_to_choose_modules(llama, make_llama, ids, stir, tmp_path, select):
    theirs = stir(peft.get_peft_model(make_llama(), peft.LoraConfig(r=3, **select)))
    theirs.save_pretrained(tmp_path)
    ours = fp.load_adapter(llama, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    names = {p for p, m in ours.named_modules() if isinstance(m, LoraLinear)}
    wrapped = {p for p, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {f"base_model.model.{n}" for n in names} == wrapped


@pytest.mark.parametrize("tie", [False, True])
def test_an_output_layer_goes_with_its_adapter(make_llama, ids, stir, tmp_path, tie):
    model = stir(fp.attach(make_llama(tie=tie), fp.LoRA(rank=3), "a"))
    fp.attach(model, fp.OutputLayer(), "a_head")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        fp.activate(model, ["a", "a_head"])
        logits = model(ids).logits
        fp.save_adapter(model, tmp_path / "ours", "a")
        theirs = peft.PeftModel.from_pretrained(make_llama(tie=tie), tmp_path / "ours")
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        for folder in ("ours", "theirs"):
            again = fp.load_adapter(make_llama(tie=tie), tmp_path / folder, "b")
            assert again._fusedpeft.active == ("b", "b_head")
            assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("method", [fp.PromptTuning(4), fp.OutputLayer()], ids=["prompt", "head"])
def test_another_architecture_of_the_same_sizes(make_llama, method, tmp_path):
    """The one tensor fits: the settings tell."""
    fp.save_adapter(fp.attach(make_llama(), method), tmp_path)
    gpt2 = transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4)
    t5 = transformers.T5Config(vocab_size=61, d_model=24, num_layers=2, num_heads=4, d_ff=40)
    for other, said in (
        (transformers.GPT2LMHeadModel(gpt2), r"expected parent_library .*gpt2'"),
        (transformers.T5ForConditionalGeneration(t5), "expected task_type 'SEQ_2_SEQ_LM', got"),
    ):
        with pytest.raises(InputError, match=rf"for another model than this .*: {said}.*"):
            fp.load_adapter(other, tmp_path)
        assert not hasattr(other, "_fusedpeft")
    fp.load_adapter(make_llama(), tmp_path)


@pytest.mark.parametrize("method", [fp.PromptTuning(4), fp.PrefixTuning(4)], ids=["prompt", "px"])
def test_settings_of_another_model(make_llama, method, tmp_path):
    fp.save_adapter(fp.attach(make_llama(), method), tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, said in (
        ({"num_layers": 7}, "expected num_layers 2, got 7"),
        ({"num_attention_heads": 3}, "expected num_attention_heads 2 or 4, got 3"),
        ({"token_dim": 99}, "expected token_dim 12 or 24, got 99"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "expected task_type 'CAUSAL_LM', got 'SEQ_2"),
    ):
        path.write_text(json.dumps({**settings, **change}))
        with pytest.raises(InputError, match=f"config.json is for another model.*: {said}"):
            fp.load_adapter(make_llama(), tmp_path)
    unsaid = ("num_layers", "num_attention_heads", "token_dim", "task_type", "auto_mapping")
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in unsaid}))
    fp.load_adapter(make_llama(), tmp_path)


def test_a_head_that_stays_behind_is_named(make_llama, tmp_path):
    model = fp.attach(make_llama(), fp.BottleneckAdapter(4), "a")
    fp.save_adapter(model, tmp_path / "alone", "a")
    fp.attach(model, fp.OutputLayer(), "a_head")
    with pytest.warns(UserWarning, match="'a_head' stays behind"):
        fp.save_adapter(model, tmp_path / "both", "a")


@pytest.mark.parametrize("tie", [False, True])
def test_what_peft_keeps_of_the_base(make_llama, ids, stir, tmp_path, tie):
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])
    theirs = stir(peft.get_peft_model(make_llama(tie=tie), settings))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("base_layer" in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    model = fp.load_adapter(make_llama(tie=tie), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        other = make_llama(tie=tie)
        other.lm_head.weight[0] += 1
    wrong = r"the base's (lm_head|model.embed_tokens).weight .*not what .* the values differ"
    with pytest.raises(InputError, match=wrong):
        fp.load_adapter(other, tmp_path)
    other = make_llama(tie=tie)
    other.resize_token_embeddings(67)
    with pytest.raises(InputError, match=r"weight \(61, 24\), which is .*, expected \(67, 24\)"):
        fp.load_adapter(other, tmp_path)


@pytest.mark.parametrize("there, here", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_what_peft_keeps_of_the_base_in_another_dtype(make_llama, stir, tmp_path, there, here):
    base = make_llama().to(getattr(torch, there))
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])
    theirs = stir(peft.get_peft_model(base, settings))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = fp.load_adapter(make_llama().to(getattr(torch, here)), tmp_path)
    assert model.lm_head.weight.dtype == getattr(torch, here)


def test_a_bf16_base_keeps_fp32_adapters_on_disk(llama, make_llama, ids, stir, tmp_path):
    ours = stir(fp.attach(llama.bfloat16(), fp.LoRA()))
    fp.save_adapter(ours, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    theirs = peft.PeftModel.from_pretrained(make_llama().bfloat16(), tmp_path)
    y = ours(ids).logits
    assert (y - theirs(ids).logits).abs().max() < 0.02 * y.abs().max()


def test_layers_beyond_those_that_peft_s_settings_name(llama, make_llama, ids, stir, tmp_path):
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"])
    stir(peft.get_peft_model(make_llama(), settings)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    for layers, extra in ([1], 2), (0, 2), ([7], 4):
        for pattern in (None, "layers", ["h", "layers"]):
            more = {"layers_to_transform": layers, "layers_pattern": pattern}
            path.write_text(json.dumps({**raw, **more}))
            with pytest.raises(
                InputError, match=rf"{extra} extra: model.layers.\d.self_attn.q_pro"
            ):
                fp.load_adapter(llama, tmp_path)
    path.write_text(json.dumps({**raw, "layers_to_transform": [0, 1]}))
    fp.load_adapter(llama, tmp_path)


def test_names_targets_and_settings_round_trip(llama, make_llama, tmp_path):
    fp.attach(llama, fp.LoRA(targets=["q_proj", "down_proj"], dropout=0.1, rslora=True), "chat")
    fp.save_adapter(llama, tmp_path, "chat")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "down_proj"]
    assert settings["task_type"] == "CAUSAL_LM" and settings["base_model_name_or_path"] is None
    model = fp.load_adapter(make_llama(), tmp_path, "other")
    module = model.model.layers[0].self_attn.q_proj.adapters["other"]
    assert module.dropout == 0.1 and module.scale == 16 / 8**0.5
    fp.load_adapter(model, tmp_path, "second")
    fp.activate(model, ["other", "second"])


def test_a_saved_adapter_is_replaced_whole(llama, stir, tmp_path, monkeypatch):
    """Stopped at any replacement, the folder holds the old adapter, the new one, or none."""
    fp.attach(llama, fp.LoRA(rank=2), "old")
    fp.attach(llama, fp.LoRA(rank=3), "new")
    stir(llama)
    replace, fail_at = os.replace, [0]

    def failing(src, dst):
        fail_at[0] -= 1
        if fail_at[0] == 0:
            raise KeyboardInterrupt
        replace(src, dst)

    for stop in (1, 2):
        fp.save_adapter(llama, tmp_path, "old")
        monkeypatch.setattr(os, "replace", failing)
        fail_at[0] = stop
        with pytest.raises(KeyboardInterrupt):
            fp.save_adapter(llama, tmp_path, "new")
        monkeypatch.setattr(os, "replace", replace)
        assert not (tmp_path / "adapter_config.json").exists()
        with pytest.raises(InputError, match="adapter_config.json"):
            fp.load_adapter(llama, tmp_path, "again")
        assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors"}
    fp.save_adapter(llama, tmp_path, "new")
    fp.load_adapter(llama, tmp_path, "again")
