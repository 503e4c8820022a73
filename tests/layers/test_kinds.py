"""Prefixes, prompts and adapters on models not built like Llama: right, or refused at once."""

import pytest
import torch
import transformers
from transformers import DynamicCache

import fusedpeft as fp
from fusedpeft.errors import InputError

V = 61
SMALL = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
BART = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip
LIGHTNING = {"layer_types": ["full_attention", "linear_attention"], "head_dim": 6}


def build(name: str, **sizes) -> torch.nn.Module:
    kind = getattr(transformers, name)
    known = kind.config_class().to_dict()
    torch.manual_seed(0)
    return kind(kind.config_class(**{k: v for k, v in sizes.items() if k in known})).eval()


REFUSED = {
    "DeepseekV3ForCausalLM": (LATENT, r"expected keys and values of 4 a head, got \[8, 4\]"),
    "MiniMaxForCausalLM": (LIGHTNING, "layer 1 of MiniMax.*goes around transformers' interface"),
    "BigBirdPegasusForCausalLM": (BART, "does not say that it is causal"),
    "DiffLlamaForCausalLM": ({}, "has lambda_q1, which the prefix kernels do not do"),
    "MambaForCausalLM": ({}, "a model of text with attention in its layers, got MambaForCausalLM"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_a_prefix_would_pass_by_is_refused_at_once(name):
    sizes, message = REFUSED[name]
    model = build(name, **SMALL | EXPERTS | sizes)
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(InputError, match=message):
        fp.attach(model, fp.PrefixTuning(length=3))
    assert names == [n for n, _ in model.named_parameters()]


def vision_model(**rope) -> torch.nn.Module:
    config = transformers.Qwen2VLConfig(
        text_config=SMALL
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 24},
    )
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_a_model_of_text_and_images_is_refused_in_one_line():
    with pytest.raises(InputError, match="expected a model of text .*, got Qwen2VLFor"):
        fp.attach(vision_model(mrope_section=[1, 1, 1]), fp.PrefixTuning(length=3))


@pytest.mark.parametrize("config", [fp.PrefixTuning(length=3), fp.PromptTuning(length=3)])
def test_an_encoder_decoder_without_such_parts_is_refused_in_one_line(config):
    sizes = {k: v for k, v in BART.items() if "start" not in k} | {"hidden_size": 24}
    sizes |= {"speech_encoder_layers": 1, "speech_encoder_attention_heads": 4, "adaptor_layers": 1}
    sizes |= {"t2u_encoder_layers": 1, "t2u_decoder_layers": 1, "conv_depthwise_kernel_size": 3}
    with pytest.raises(InputError, match="SeamlessM4TForTextToText"):
        fp.attach(build("SeamlessM4TForTextToText", **sizes), config)


def test_heads_that_the_config_does_not_tell_are_refused_in_the_first_call(ids):
    jet = {"num_key_value_heads": 4, "kv_channels": 6}
    model = build("JetMoeForCausalLM", **SMALL | EXPERTS | jet | {"num_key_value_heads": 2})
    fp.attach(model, fp.PrefixTuning(length=3))
    with pytest.raises(InputError, match=r"expected 2 heads of 6, as the config says, got keys \["):
        model(ids)


@pytest.mark.parametrize("name", ["GPTBigCodeForCausalLM", "AfmoeForCausalLM"])
def test_one_key_head_for_all_and_outputs_that_are_viewed(name, ids):
    more = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "head_dim": 6}
    model = build(name, **SMALL | EXPERTS | more)
    cache = DynamicCache()
    adapted = fp.attach(model, fp.PrefixTuning(length=3))
    pairs = [p for n, p in model.named_parameters() if n.endswith(("prefix_key", "prefix_value"))]
    for at, (key, value) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        for t in (key, value):
            torch.nn.init.normal_(t, std=0.5)
        cache.update(*(t.detach().expand(2, -1, -1, -1) for t in (key, value)), at)
    with torch.no_grad():
        got = adapted(ids).logits
        fp.detach(model)
        seen = torch.ones(2, 3 + ids.shape[1], dtype=torch.long)
        want = model(ids, past_key_values=cache, attention_mask=seen).logits
        assert not torch.allclose(model(ids).logits, want, atol=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_prompt_before_positions_of_three_axes(ids):
    model = vision_model(mrope_section=[1, 1, 1])
    fp.attach(model, fp.PromptTuning(length=3))
    prompt = next(p for p in model.parameters() if p.requires_grad)
    positions = torch.arange(ids.shape[1]).expand(3, 2, -1)
    with torch.no_grad():
        got = model(ids, position_ids=positions).logits
        fp.detach(model)
        rows = model.get_input_embeddings()(ids)
        all_of_it = torch.cat((prompt.expand(2, -1, -1), rows), 1)
        want = model(inputs_embeds=all_of_it).logits[:, 3:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_images_whose_positions_the_prompt_would_change_are_refused(ids):
    model = fp.attach(vision_model(mrope_section=[1, 1, 1]), fp.PromptTuning(length=3))
    with pytest.raises(InputError, match="expected text alone: the positions of images"):
        model(ids, image_grid_thw=torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_adapters_beside_norms_without_parameters(placement, ids):
    model = build("OlmoForCausalLM", **SMALL)
    plain = model(ids).logits
    fp.attach(model, fp.BottleneckAdapter(size=5, placement=placement))
    torch.testing.assert_close(model(ids).logits, plain)
    adapters = [p for p in model.parameters() if p.requires_grad]
    for p in adapters:
        torch.nn.init.normal_(p, std=0.2)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapters)


def test_layers_of_several_widths_or_of_lists_take_no_adapter(ids):
    longcat = {"ffn_hidden_size": 40, "expert_ffn_hidden_size": 16, "num_layers": 2, "moe_topk": 2}
    longcat |= {"zero_expert_num": 1, "head_dim": 4, "qk_head_dim": 8}
    for model, message in (
        (vision_model(mrope_section=[1, 1, 1]), "one width, config.hidden_size, got Qwen2VL"),
        (build("LongcatFlashForCausalLM", **SMALL | EXPERTS | LATENT | longcat), "are known"),
    ):
        with pytest.raises(InputError, match=message):
            fp.attach(model, fp.BottleneckAdapter(size=5))
        assert all(p.requires_grad for p in model.parameters())
        model(ids)


def test_what_a_prompt_cannot_enter():
    sizes = BART | {"src_vocab_size": V, "tgt_vocab_size": V, "langs": ["a", "b"]}
    for name, message in (
        ("FSMTForConditionalGeneration", "expected a model of text"),
        ("CpmAntForCausalLM", "expected CpmAntModel to take inputs_embeds"),
    ):
        cpm = {"dim_head": 6, "dim_ff": 40, "prompt_types": 2, "prompt_length": 2}
        with pytest.raises(InputError, match=message):
            fp.attach(build(name, **SMALL | sizes | cpm), fp.PromptTuning(length=3))
