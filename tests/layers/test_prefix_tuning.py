"""Prefix tuning against PEFT where PEFT is right, and where it is not."""

import copy

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers.prefix import flat_prefix

P = 5
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "Phi": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 24},
}


def family(name, **more):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES.get(name, {}), **more})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def in_peft(build, folder, model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    fp.save_adapter(model, folder)
    model = peft.PeftModel.from_pretrained(build(), folder).eval()
    model.prompt_encoder.requires_grad_(True)
    return model


def test_means_the_same_to_peft(build, ids, tmp_path, with_prefix):
    model = with_prefix(build())
    theirs = in_peft(build, tmp_path, model)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for mask in (None, padded):
        ours, peft = (m(ids, attention_mask=mask).logits for m in (model, theirs))
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(ours[seen], peft[seen], rtol=0, atol=1e-5)
    for m in (model, theirs):
        m(ids, labels=ids).loss.backward()
    theirs_grad = theirs.prompt_encoder.default.embedding.weight.grad
    ours_grad = torch.stack(
        [
            p.grad
            for layer in (m for m in model.modules() if hasattr(m, "prefix_key"))
            for p in (layer.prefix_key, layer.prefix_value)
        ]
    ).permute(2, 0, 1, 3)
    torch.testing.assert_close(ours_grad.flatten(1), theirs_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projection", [None, 7])
def test_saving_and_loading(build, ids, tmp_path, projection, with_prefix):
    model = with_prefix(build(), projection=projection)
    with torch.no_grad():
        out = model(ids).logits
        fp.save_adapter(model, tmp_path)
        fp.load_adapter(model, tmp_path, "again")
        torch.testing.assert_close(model(ids).logits, out, rtol=0, atol=1e-6)
        before = flat_prefix(model, "default")
        assert before.shape == (P, flat_prefix(model, "again").shape[1])
        assert torch.equal(before, flat_prefix(model, "again"))
        fp.activate(model, "default")
        assert torch.equal(model(ids).logits, out)


@pytest.mark.parametrize("projection", [None, 7])
def test_trainable_parameters(llama, projection):
    fp.attach(llama, fp.PrefixTuning(length=P, projection=projection))
    flat = 2 * 2 * 2 * 6  # layers, key and value, HKV, D
    mlp = 0 if projection is None else P * 24 + 25 * 7 + 8 * flat
    assert fp.trainable_parameters(llama) == (mlp or P * flat)
    assert all("fusedpeft_prefix" in n for n, p in llama.named_parameters() if p.requires_grad)


def test_the_base_returns(build, ids, with_prefix):
    model = build()
    names = [name for name, _ in model.named_modules()]
    before, implementation = model(ids).logits, model.config._attn_implementation
    with_prefix(model)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    fp.activate(model, None)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    fp.detach(model)
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert model.config._attn_implementation == implementation
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_families_generate_alike_with_every_cache(name, ids, lively, with_prefix):
    model = with_prefix(lively(family(name)))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    growing = model.generate(ids, **options)
    assert growing[:, 9:].unique().numel() > 4
    assert torch.equal(model.generate(ids, use_cache=False, **options), growing)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), growing)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 3:], **options)
    assert torch.equal(padded[0, 3:], alone[0])


def test_a_sliding_window_does_not_hide_the_prefix(ids, with_prefix):
    model = with_prefix(family("Mistral", num_hidden_layers=1))
    model(ids).logits[:, -1].square().sum().backward()  # 9 tokens, a window of 4
    key = next(p for n, p in model.named_parameters() if n.endswith("prefix_key"))
    assert (key.grad.abs().sum((0, 2)) > 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", [None, 7])
def test_checkpointing_changes_no_gradient(build, ids, projection, reentrant, with_prefix):
    model = with_prefix(build(), projection=projection).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for _ in range(2):
        for one, two in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions(llama, ids, kind, with_prefix):
    model = with_prefix(llama)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    given = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    torch.testing.assert_close(model(ids, attention_mask=given).logits, model(ids).logits)


def test_attention_dropout_acts_on_the_weights(ids, with_prefix):
    """GPT-2's 0.1: torch's own attention over prefix and keys, the same when nothing is dropped."""
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, attn_pdrop=1e-9,
        resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model = with_prefix(transformers.GPT2LMHeadModel(config)).eval()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for given in (None, mask):
        seen = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        fused = model.eval()(ids, attention_mask=given).logits[seen]
        torch.testing.assert_close(model.train()(ids, attention_mask=given).logits[seen], fused)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.p = 0.5
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("projection", [None, 7])
def test_a_copy_is_its_own(llama, ids, projection, with_prefix):
    model = with_prefix(llama, projection=projection)
    out = model(ids).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, out)
    with torch.no_grad():
        for parameter in (p for p in copied.parameters() if p.requires_grad):
            parameter.mul_(2)
        assert not torch.equal(copied(ids).logits, out)
        assert torch.equal(model(ids).logits, out)


def test_a_written_projection_is_folded_anew(llama, ids, with_prefix):
    model = with_prefix(llama, projection=7)
    with torch.no_grad():
        out = model(ids).logits
        assert torch.equal(model(ids).logits, out)
        next(p for p in model.parameters() if p.requires_grad).mul_(2)
        assert not torch.equal(model(ids).logits, out)


def test_compiles_whole(llama, ids, with_prefix):
    model = with_prefix(llama)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_16_bits(ids, with_prefix):
    model = with_prefix(family("Qwen3").to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(ids, labels=ids).loss.backward()
    exact = with_prefix(copy.deepcopy(fp_free(model)).float())(ids).logits
    low = model(ids).logits.float()
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()


def fp_free(model):
    copied = copy.deepcopy(model)
    fp.detach(copied)
    return copied


def test_beside_lora_and_merged_lora(llama, ids, stir, with_prefix):
    model = with_prefix(llama, "prefix")
    fp.attach(model, fp.LoRA(rank=3), "lora")
    stir(model)
    fp.activate(model, ["prefix", "lora"])
    together = model(ids).logits
    with pytest.raises(InputError, match="cannot merge 'prefix': PrefixTuning changes no weight"):
        fp.merge(model)
    fp.activate(model, "lora")
    fp.merge(model)
    fp.unmerge(model)
    fp.activate(model, ["lora", "prefix"])
    torch.testing.assert_close(model(ids).logits, together)
    with_prefix(model, "second")
    with pytest.raises(InputError, match=r"one prefix acts at a time.*\['prefix', 'second'\]"):
        fp.activate(model, ["prefix", "second"])


def test_models_that_cannot(ids):
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=61, hidden_size=24, n_layer=1, n_head=4)
    )
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=4
        )
    )
    gemma = family("Gemma2", head_dim=8, num_key_value_heads=2)
    for model, message in (
        (bloom, "BloomForCausalLM does not take its attention from transformers' interface"),
        (falcon, "FalconForCausalLM does not take its attention from transformers' interface"),
        (gemma, "Gemma2ForCausalLM has attn_logit_softcapping"),
        (torch.nn.Linear(3, 3), "expected a model of transformers, got Linear"),
    ):
        with pytest.raises(InputError, match=message):
            fp.attach(model, fp.PrefixTuning(length=P))
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 0}, "PrefixTuning length: expected a whole number >= 1, got 0"),
        ({"length": 2.5}, r"PrefixTuning length: .*got 2\.5"),
        ({"projection": -1}, "PrefixTuning projection: expected a whole number >= 1, got -1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(InputError, match=message):
        fp.PrefixTuning(**settings)


def test_a_prefix_for_another_base(llama, ids, tmp_path, with_prefix):
    fp.save_adapter(with_prefix(llama), tmp_path)
    other = family("Qwen3")
    with pytest.raises(InputError, match=r"expected one floating tensor prompt_embeddings \(5, 64"):
        fp.load_adapter(other, tmp_path)
    assert not hasattr(other, "_fusedpeft")
