"""fuse_loss on models whose loss is not a Llama's: theirs, or a refusal, and no other number."""

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.errors import InputError

V = 61
SMALL = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    "dropout": 0.0,
}  # fmt: skip
SWITCH = {
    "vocab_size": V, "d_model": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "d_kv": 6,
    "d_ff": 40, "pad_token_id": 0, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PROPHET = {
    "vocab_size": V, "hidden_size": 24, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def build(name: str, **sizes) -> torch.nn.Module:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**sizes)).train()


@pytest.fixture
def given(ids) -> dict[str, torch.Tensor]:
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def assert_own(model, **given):
    """Loss and gradients, in the first fused call and after it."""
    plain = model(**given)
    want = torch.autograd.grad(plain.loss, [p for p in model.parameters()], allow_unused=True)
    caches = {"cache", "past_key_values"}  # none is made where the model takes use_cache
    fp.fuse_loss(model)
    for _ in range(2):
        out = model(**given)
        assert out.logits is None and {*out} - caches == {*plain} - caches - {"logits"}
        torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)
        got = torch.autograd.grad(out.loss, [p for p in model.parameters()], allow_unused=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["BartForCausalLM", "MBartForCausalLM", "XLNetLMHeadModel"])
def test_labels_that_the_model_does_not_shift_are_refused(name):
    sizes = SMALL | {"d_model": 24, "n_layer": 1, "n_head": 4} if "XL" in name else BART
    with pytest.raises(InputError, match=f"expected {name} to take ForCausalLMLoss, which shifts"):
        fp.fuse_loss(build(name, **sizes))


class Penalised(transformers.LlamaForCausalLM):
    """As Bamba does with a z_loss_coefficient."""

    def forward(self, input_ids, labels=None, **more):
        out = super().forward(input_ids, labels=labels, **more)
        if labels is not None:
            out.loss = out.loss + 0.1 * out.logits.logsumexp(-1).square().mean()
        return out


class Aligned(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **more):
        out = super().forward(input_ids, **more)
        if labels is not None:
            out.loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        return out


def test_one_token_a_row_tells_nothing_and_the_next_call_is_looked_at(llama, ids, given):
    model = fp.fuse_loss(Aligned(llama.config).train())
    assert model(ids[:, :1], labels=ids[:, :1]).loss == 0
    with pytest.raises(InputError, match="Aligned makes another loss of its logits"):
        model(**given)


def test_pefts_prompt_which_leaves_return_dict_open(llama, given):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama, config).train()
    plain = model(**given).loss
    fused = fp.fuse_loss(model)(**given)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, plain)


def test_compiled_for_all_shapes(llama, ids):
    torch.compiler.reset()
    model = fp.fuse_loss(llama.train())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 5):
        part = ids[:, :tokens]
        out = compiled(input_ids=part, labels=part)
        assert out.logits is None
        torch.testing.assert_close(out.loss, model(input_ids=part, labels=part).loss)


class Lossless(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **more):
        return super().forward(input_ids, **more)


@pytest.mark.parametrize("kind", [Penalised, Aligned, Lossless])
def test_another_loss_of_the_same_logits_is_noticed_in_the_first_call(kind, llama, given):
    model = kind(llama.config).train()
    fp.fuse_loss(model)
    with pytest.raises(InputError, match=f"{kind.__name__} makes another loss of its logits"):
        model(**given)
    model = fp.fuse_loss(model, False)
    assert kind is Lossless or model(**given).loss.isfinite()


def test_a_router_whose_weight_has_another_name_or_stands_in_the_text_part(given):
    jet = SMALL | {"num_key_value_heads": 4, "kv_channels": 6, "num_local_experts": 4}
    jet |= {"output_router_logits": True, "aux_loss_coef": 0.5}
    assert_own(build("JetMoeForCausalLM", **jet), **given)
    moe = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    moe["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 24}
    vision |= {"intermediate_size": 16, "deepstack_visual_indexes": [0]}
    model = build(
        "Qwen3VLMoeForConditionalGeneration",
        text_config=SMALL | moe | {"output_router_logits": True, "router_aux_loss_coef": 0.5},
        vision_config=vision,
    )
    assert_own(model, **given, output_router_logits=True)


def test_losses_of_routers_that_are_not_known_are_refused(given):
    model = build("SwitchTransformersForConditionalGeneration", **SWITCH)
    try:
        model(**given, output_router_logits=True)
    except ValueError as error:
        pytest.skip(f"this transformers' own Switch gives no router logits: {error}")
    fp.fuse_loss(model)
    assert model(**given).logits is None
    with pytest.raises(InputError, match=r"adds \['encoder_z_loss', .*\] to its loss"):
        model(**given, output_router_logits=True)


def test_an_encoder_decoder_of_two_models_hides_its_decoders_padding(given):
    sizes = SMALL | STILL
    sizes.pop("num_key_value_heads")
    encoder, decoder = (transformers.BertConfig(**sizes) for _ in "ab")
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert_own(model, **given)
    hidden = torch.ones_like(given["labels"]).tril(1)[:, : given["labels"].shape[1]]
    fp.fuse_loss(model, False)
    assert_own(model, **given, decoder_attention_mask=hidden)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BartForConditionalGeneration"])
def test_no_cache_is_filled_where_labels_are(name, given):
    bert = {k: n for k, n in SMALL.items() if k != "num_key_value_heads"} | STILL
    model = build(name, **(BART if "Bart" in name else bert | {"is_decoder": True}))
    assert "past_key_values" not in model(**given) and "cache" not in model(**given)
    assert_own(model, **given)


def test_what_is_refused_says_why(given):
    sizes = BART | {"src_vocab_size": V, "tgt_vocab_size": V, "langs": ["a", "b"]}
    with pytest.raises(
        InputError, match="expected an nn.Linear as output layer of FSMT.*Embedding$"
    ):
        fp.fuse_loss(build("FSMTForConditionalGeneration", **sizes))
    with pytest.raises(InputError, match="expected prepare_decoder_input_ids_from_labels of Blend"):
        fp.fuse_loss(build("BlenderbotForConditionalGeneration", **BART))
    model = fp.fuse_loss(build("ProphetNetForConditionalGeneration", **PROPHET))
    with pytest.raises(InputError, match=r"as many last hidden states as labels, \[2, 9\], got"):
        model(**given)
