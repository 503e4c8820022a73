"""Prompt tuning against PEFT, in generation with every cache, and what it refuses."""

import copy

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.errors import InputError

P = 4


@pytest.fixture
def words():
    """Ten words, as a tokenizer that a text can be given to."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", *(f"w{i}" for i in range(9))]
    vocab = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def prompt_parameter(model):
    return next(p for p in model.parameters() if p.requires_grad)


def test_means_the_same_to_peft(build, ids, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = fp.attach(build(), fp.PromptTuning(length=P, init="vocab"))
    fp.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    theirs.prompt_encoder.requires_grad_(True)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for mask in (None, padded):
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        ours = model(ids, attention_mask=mask).logits
        peft_logits = theirs(ids, attention_mask=mask).logits[:, P:]
        torch.testing.assert_close(ours[seen], peft_logits[seen], rtol=0, atol=1e-5)
    model(ids).logits.square().mean().backward()
    theirs(ids).logits[:, P:].square().mean().backward()
    grad = theirs.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(prompt_parameter(model).grad, grad, rtol=0, atol=1e-5)


def test_one_logit_for_each_token(build, ids):
    model = fp.attach(build(), fp.PromptTuning(length=P))
    assert fp.trainable_parameters(model) == P * 24
    out = model(ids, labels=ids)
    assert out.logits.shape == (2, 9, 61)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, expected)
    pair = model(ids, return_dict=False)
    assert torch.equal(pair[0], out.logits)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits)


def test_generates_alike_with_every_cache(build, ids, lively):
    model = fp.attach(lively(build()), fp.PromptTuning(length=P, init="vocab"))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    growing = model.generate(ids, **options)
    assert growing[:, 9:].unique().numel() > 4
    assert torch.equal(model.generate(ids, use_cache=False, **options), growing)
    for _ in range(2):  # the second call finds the first one's cache
        static = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(static, growing)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(padded[0, 3:], model.generate(ids[:1, 3:], **options)[0])
    fp.activate(model, None)
    assert not torch.equal(model.generate(ids, **options), growing)


@pytest.mark.parametrize("window", [2, 6, 15, 40])  # within the prompt, the text, beyond both
def test_static_caches_that_slide(window, ids, lively):
    config = transformers.Gemma3TextConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=window,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = lively(transformers.Gemma3ForCausalLM(config).eval())
    fp.attach(model, fp.PromptTuning(length=P, init="vocab"))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options["attention_mask"] in (None, mask):
        growing = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(static, growing)
    turn = torch.cat((growing, ids[:, :3]), 1)
    options["attention_mask"] = None
    seconds = []
    for cache in (
        transformers.StaticCache(config=config, max_cache_len=32),
        transformers.DynamicCache(config=config),
    ):
        model.generate(ids, past_key_values=cache, **options)
        seconds.append(model.generate(turn, past_key_values=cache, **options))
    assert torch.equal(*seconds)


@pytest.mark.parametrize("more", [1, 3, 7])  # tokens of a second turn: fewer than P, and more
def test_a_second_turn_on_the_cache(build, ids, lively, more):
    model = fp.attach(lively(build()), fp.PromptTuning(length=P, init="vocab"))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for given in (model, copy.deepcopy(model)):
        first = given.generate(ids, return_dict_in_generate=True, **options)
        turn = torch.cat((first.sequences, ids[:, :more]), 1)
        second = given.generate(turn, past_key_values=first.past_key_values, **options)
        assert torch.equal(second, model.generate(turn, use_cache=False, **options))


def test_a_cache_of_another_prompt(llama, ids):
    options = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None}

    def turn(cache):
        text = torch.cat((ids, ids[:, :3]), 1)
        return llama.generate(text, past_key_values=cache, return_dict_in_generate=True, **options)

    plain = turn(None).past_key_values
    fp.attach(llama, fp.PromptTuning(length=P))
    prompted = turn(transformers.StaticCache(config=llama.config, max_cache_len=24)).past_key_values
    with pytest.raises(InputError, match="behind a prompt of 4, as acts now, got one of 0: give"):
        turn(plain)
    fp.activate(llama, None)
    with pytest.raises(InputError, match="behind a prompt of 0, as acts now, got one of 4: give"):
        turn(prompted)
    prompted.reset()
    for _ in range(2):  # empty, then filled behind no prompt
        assert turn(prompted).sequences.shape == (2, 14)


@pytest.fixture
def gemma():
    config = transformers.GemmaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config).eval()


def test_scaled_embeddings(gemma, ids):
    """Gemma multiplies what its embedding gives: the prompt stands beside that."""
    model = gemma
    fp.attach(model, fp.PromptTuning(length=P))
    embeds = model.get_input_embeddings()(ids)
    whole = torch.cat((prompt_parameter(model).expand(2, -1, -1), embeds), 1)
    prompted = model(ids).logits
    fp.activate(model, None)
    torch.testing.assert_close(model(inputs_embeds=whole).logits[:, P:], prompted)


def test_starts_from_scaled_embeddings(gemma, ids, words):
    front = torch.tensor([[3, 5, 7, 8]] * len(ids))
    expected = gemma(torch.cat((front, ids), 1)).logits[:, P:]
    fp.attach(gemma, fp.PromptTuning(P, "text", "w2 w4 w6 w7", words))
    torch.testing.assert_close(gemma(ids).logits, expected)
    fp.detach(gemma)
    fp.attach(gemma, fp.PromptTuning(2000, "random"))
    spread = gemma.get_input_embeddings().weight.std() * 24**0.5
    assert abs(prompt_parameter(gemma).std() / spread - 1) < 0.05


def test_the_base_returns(build, ids):
    model = build()
    names = [name for name, _ in model.named_modules()]
    before = model(ids).logits
    fp.attach(model, fp.PromptTuning(length=P))
    assert not torch.allclose(model(ids).logits, before, atol=1e-4)
    fp.activate(model, None)
    torch.testing.assert_close(model(ids).logits, before)
    fp.detach(model)
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert "create_masks_for_generate" not in vars(model)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_beside_a_prefix_and_lora(llama, ids):
    for name, config in (
        ("prompt", fp.PromptTuning(length=P)),
        ("prefix", fp.PrefixTuning(length=3)),
        ("lora", fp.LoRA(rank=2)),
    ):
        fp.attach(llama, config, name)
    fp.activate(llama, ["prompt", "prefix", "lora"])
    llama(ids, labels=ids).loss.backward()
    trained = [n for n, p in llama.named_parameters() if p.grad is not None and p.grad.any()]
    for word in ("fusedpeft_prompt", "prefix_value", "lora_B"):
        assert any(word in name for name in trained)
    fp.attach(llama, fp.PromptTuning(length=P), "second")
    with pytest.raises(InputError, match=r"one prompt acts at a time.*\['prompt', 'second'\]"):
        fp.activate(llama, ["prompt", "second"])


def test_starts(llama, words):
    weight = llama.get_input_embeddings().weight
    for config, rows in (
        (fp.PromptTuning(5, "text", "w2 w4", words), [3, 5, 3, 5, 3]),
        (fp.PromptTuning(1, "text", "w2 w4", words), [3]),
    ):
        fp.attach(llama, config)
        assert torch.equal(prompt_parameter(llama).detach(), weight[rows])
        fp.detach(llama)
    fp.attach(llama, fp.PromptTuning(50, "vocab"))
    rows = {tuple(row) for row in weight.tolist()}
    assert all(tuple(row) in rows for row in prompt_parameter(llama).tolist())
    fp.detach(llama)
    fp.attach(llama, fp.PromptTuning(2000, "random"))
    assert abs(prompt_parameter(llama).std() / weight.std() - 1) < 0.05


def test_copies_and_whole_graphs(llama, ids):
    model = fp.attach(llama, fp.PromptTuning(length=P))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        out = model(ids).logits
        prompt_parameter(copied).mul_(2)
        assert not torch.equal(copied(ids).logits, out)
        assert torch.equal(model(ids).logits, out)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, out)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 0}, "PromptTuning length: expected a whole number >= 1, got 0"),
        ({"init": "zero"}, 'PromptTuning init: expected "random", "vocab" or "text", got \'zero\''),
        ({"init": "text"}, "PromptTuning init_text: expected a text"),
        ({"init_text": "a"}, "PromptTuning init_text: .*got 'a' with init='random'"),
        ({"init": "text", "init_text": "a"}, "PromptTuning tokenizer: .*got None"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(InputError, match=message):
        fp.PromptTuning(**settings)


def test_what_cannot_be(llama, ids, words, tmp_path):
    for config, message in (
        (fp.PromptTuning(3, "text", "", words), "init_text: '' has no token"),
        (fp.PromptTuning(3, "text", "a", str(tmp_path)), "tokenizer: cannot load '.*'"),
        (
            fp.PromptTuning(3, "text", "a", "/nope"),
            "a folder .*, got '/nope', which does not exist",
        ),
        (fp.PromptTuning(3, "text", "a", tmp_path / "no"), "got '.*/no', which does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            fp.attach(llama, config)
    assert all(p.requires_grad for p in llama.parameters())
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40
    )
    with pytest.raises(InputError, match="PromptTuning: expected a model of text, .* in ViTModel"):
        fp.attach(transformers.ViTModel(config), fp.PromptTuning())
    fp.attach(llama, fp.PromptTuning(length=P))
    with pytest.raises(InputError, match=r"expected an attention_mask \[B, T\]"):
        llama(ids, attention_mask=torch.zeros(2, 1, 9, 9))
    cache = transformers.StaticCache(config=llama.config, max_cache_len=16)
    with torch.no_grad():
        fp.activate(llama, None)
        llama(ids, past_key_values=cache)
        cache.reset()
        fp.activate(llama, "default")
        with pytest.raises(InputError, match="a StaticLayer without room for the 4 positions"):
            llama(ids, past_key_values=cache)
