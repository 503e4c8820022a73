"""Prefix and prompt tuning beyond causal decoders: BERT and RoBERTa, T5 and BART."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers.prefix import attention_layers, flat_prefix, stack_of

P = 5
ENCODER = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
TWO = {
    "BART": (transformers.BartForConditionalGeneration, transformers.BartConfig, {
        "vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40, "max_position_embeddings": 64, "decoder_start_token_id": 2,
        "forced_eos_token_id": None, "dropout": 0.0,
    }),
    "T5": (transformers.T5ForConditionalGeneration, transformers.T5Config, {
        "vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3,
        "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    }),
}  # fmt: skip


def two_stacks(name, **more):
    kind, config, sizes = TWO[name]
    torch.manual_seed(0)
    model = kind(config(**{**sizes, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # small initial weights always say the same token
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def classifier(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ENCODER)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def concatenated(model, prefixed):
    """`model` with the prefix of `prefixed` by the textbook: keys and values concatenated."""
    pairs = [
        (own.prefix_key, own.prefix_value)
        for layer in attention_layers(stack_of(prefixed))
        for own in [layer.fusedpeft_prefix.adapters["default"]]
    ]

    def attention(module, q, k, v, attention_mask, scaling=None, **_):
        pk, pv = (t.expand(len(q), -1, -1, -1) for t in pairs[module.layer_idx])
        mask = None if attention_mask is None else F.pad(attention_mask, (P, 0), value=True)
        k, v = torch.cat((pk, k), 2), torch.cat((pv, v), 2)
        scores = q @ k.mT * scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("prefix_textbook", attention)
    AttentionMaskInterface.register("prefix_textbook", sdpa_mask)
    model.set_attn_implementation("prefix_textbook")
    return model


@pytest.mark.parametrize("name, first", [("Bert", 0), ("Roberta", 2)])
def test_encoders(name, first, ids, with_prefix):
    ids = ids.clamp(min=2)  # 1 is padding
    model = with_prefix(classifier(name))
    theirs = concatenated(classifier(name), model)
    positions = torch.arange(ids.shape[1])[None] + P + first
    padded = torch.ones_like(ids)
    padded[0, -3:] = 0
    for mask in (None, padded):
        want = theirs(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, want, rtol=0, atol=1e-5)
    labels = torch.tensor([0, 2])
    model(ids, labels=labels).loss.backward()
    trained = [p for n, p in model.named_parameters() if "fusedpeft_prefix" in n]
    assert len(trained) == 4 and all(p.grad.abs().sum() > 0 for p in trained)
    assert fp.trainable_parameters(model) == 2 * 2 * 24 * P  # 2 · layers · d · length
    with pytest.raises(
        InputError, match=f"expected at most {32 - first} positions.* got 28 tokens"
    ):
        model(torch.full((1, 28), 3))
    fp.detach(model)
    assert torch.equal(model(ids).logits, classifier(name)(ids).logits)


@pytest.mark.parametrize("name", TWO)
def test_encoder_decoders_mean_the_same_to_peft(name, ids, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    # PEFT counts the encoder's heads and layers.
    more = {"decoder_attention_heads": 4, "encoder_layers": 3} if name == "BART" else {}
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(two_stacks(name, **more), config).eval()
    weight = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.normal_()
    theirs.save_pretrained(tmp_path)
    model = fp.load_adapter(two_stacks(name, **more), tmp_path)
    labels = ids.flip(0)[:, :7].contiguous()
    padded = torch.ones_like(ids)
    padded[0, -3:] = 0
    for mask in (None, padded):
        one, two = (m(ids, attention_mask=mask, labels=labels) for m in (model, theirs))
        torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.loss, two.loss)
    assert not torch.allclose(one.logits, two_stacks(name, **more)(ids, labels=labels).logits)
    one.loss.backward()
    two.loss.backward()
    ours = torch.stack(
        [
            p.grad
            for layer in attention_layers(stack_of(model))
            for p in layer.fusedpeft_prefix.adapters["default"].parameters()
        ]
    )
    ours = ours.permute(2, 0, 1, 3).reshape(P, 3, -1)[:, [0, 2, 1]]  # of 3 layers, PEFT's order
    torch.testing.assert_close(ours.flatten(1), weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("projection", [None, 7])
def test_encoder_decoders_generate_and_save(name, projection, ids, tmp_path, with_prefix):
    more = {"d_kv": 8} if name == "T5" else {}  # d_kv · heads is not d_model: PEFT's breaks
    model = with_prefix(two_stacks(name, **more), projection=projection)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    growing = model.generate(ids, **options)
    assert growing.unique().numel() > 2
    assert torch.equal(model.generate(ids, use_cache=False, **options), growing)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), growing)
    assert not torch.equal(two_stacks(name, **more).generate(ids, **options), growing)
    fp.save_adapter(model, tmp_path)
    fp.load_adapter(model, tmp_path, "again")
    assert torch.equal(flat_prefix(model, "again"), flat_prefix(model, "default"))
    assert torch.equal(model.generate(ids, **options), growing)


def test_rows_of_a_decoder_s_prefix(ids, with_prefix):
    """BART's table of positions puts a dimension before what it is given."""
    model = with_prefix(two_stacks("BART"))
    with torch.no_grad():
        prefixed = model(ids, labels=ids).logits
        fp.activate(model, None)
        base = model(ids, labels=ids).logits
        with fp.rows(model, ["default", None]):
            mixed = model(ids, labels=ids).logits
    torch.testing.assert_close(mixed[0], prefixed[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], base[1], rtol=0, atol=1e-5)
    assert (prefixed[0] - base[0]).abs().max() > 1e-3


def test_rows_of_a_relative_bias_are_refused(ids, with_prefix):
    model = with_prefix(two_stacks("T5"))
    with (
        fp.rows(model, ["default", None]),
        pytest.raises(InputError, match="rows: prefixes by row"),
    ):
        model(ids, labels=ids)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO)
def test_prompts_mean_the_same_to_peft(name, ids, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(two_stacks(name), config).eval()
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs")  # twice as many rows, of which half act
    model = fp.load_adapter(two_stacks(name), tmp_path / "theirs")
    assert fp.trainable_parameters(model) == P * 24
    padded = torch.ones_like(ids)
    padded[0, -3:] = 0
    fp.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(two_stacks(name), tmp_path / "ours").eval()
    assert type(again).__name__ == "PeftModelForSeq2SeqLM"
    labels = ids.flip(0)[:, :7].contiguous()
    for mask in (None, padded):
        want = theirs(ids, attention_mask=mask, labels=labels)
        for m in (model, again):
            got = m(ids, attention_mask=mask, labels=labels)
            torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
    model(ids, attention_mask=padded, labels=labels).loss.backward()
    want.loss.backward()
    prompt = next(p for p in model.parameters() if p.requires_grad)
    weight = theirs.prompt_encoder.default.embedding.weight
    torch.testing.assert_close(prompt.grad, weight.grad[:P], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TWO)
def test_prompts_generate_and_leave(name, ids):
    model = two_stacks(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **options)
    fp.attach(model, fp.PromptTuning(length=P, init="vocab"))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).normal_(std=2.0)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    growing = model.generate(ids, attention_mask=mask, **options)
    for more in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **more), growing)
    alone = model.generate(ids[:1, :-3], **options)
    assert torch.equal(alone[0], growing[0])
    assert not torch.equal(model.generate(ids, **options), before)
    fp.detach(model)
    assert torch.equal(model.generate(ids, **options), before)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_prompts_of_encoders_mean_the_same_to_peft(name, ids):
    """The classifier reads the prompt's first position, as PEFT has it."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    theirs = peft.get_peft_model(classifier(name), config).eval()
    weight = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.normal_()
    model = fp.attach(classifier(name), fp.PromptTuning(length=P))
    prompt = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        prompt.copy_(weight)
    padded, types = torch.ones_like(ids), torch.zeros_like(ids)
    padded[0, -3:] = 0
    if name == "Bert":
        types[:, 5:] = 1
    for given in ({}, {"attention_mask": padded, "token_type_ids": types}):
        want = theirs(ids, labels=torch.tensor([0, 2]), **given)
        got = model(ids, labels=torch.tensor([0, 2]), **given)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(prompt.grad, weight.grad, rtol=0, atol=1e-5)


def test_prompts_of_encoders_leave_a_logit_a_token(ids):
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)).eval()
    before = model(ids).logits
    fp.attach(model, fp.PromptTuning(length=P))
    got = model(ids).logits
    assert got.shape == before.shape and not torch.allclose(got, before)
    with pytest.raises(InputError, match="at most 32 positions, .* got 30 tokens behind a prompt"):
        model(ids.repeat(1, 4)[:, :30])
    fp.detach(model)
    assert torch.equal(model(ids).logits, before)


# --- classifiers --------------------------------------------------------------------------------


def _settings(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    common = {"task_type": "SEQ_CLS"}
    if kind == "lora":
        return peft.LoraConfig(r=4, target_modules="all-linear", **common)
    return peft.PromptTuningConfig(num_virtual_tokens=P, **common)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "GPT2"])
@pytest.mark.parametrize("kind", ["lora", "prompt"])  # this PEFT's prefixes want a cache
def test_a_classifier_comes_and_goes_with_peft_s_adapter(kind, name, ids, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    build = two_labels if name == "GPT2" else classifier
    theirs = peft.get_peft_model(build(name), _settings(kind)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    want = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    model = fp.load_adapter(build(name), tmp_path / "theirs", "a")
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
    plain = build(name)(ids).logits
    fp.activate(model, None)
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-6)
    fp.activate(model, ["a", "a_head"])
    fp.save_adapter(model, tmp_path / "ours", "a")
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, want, rtol=0, atol=1e-5)
    assert type(again) is type(theirs)
    lost = {k: t for k, t in load_file(tmp_path / "ours/adapter_model.safetensors").items()
            if "classifier" not in k and "score" not in k}  # fmt: skip
    save_file(lost, tmp_path / "ours/adapter_model.safetensors")
    with pytest.raises(
        InputError, match="has no tensors of (classifier|score), which its settings"
    ):
        fp.load_adapter(build(name), tmp_path / "ours", "a")
    if name != "GPT2":
        other = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(InputError, match="does not fit the head of this BertForMaskedLM"):
            fp.load_adapter(other, tmp_path / "theirs", "a")
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_a_classifier_comes_and_goes_with_a_prefix(ids, tmp_path):
    model = classifier("Bert")
    fp.attach(model, fp.PrefixTuning(length=P), "a")
    fp.attach(model, fp.OutputLayer(), "a_head")
    fp.activate(model, ["a", "a_head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    fp.save_adapter(model, tmp_path, "a")
    again = fp.load_adapter(classifier("Bert"), tmp_path, "b")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def two_labels(_):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, pad_token_id=1,
        bos_token_id=1, eos_token_id=1, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config).eval()
