"""Caches that append in place: every result is what transformers' own layers give."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import fusedpeft as fp
from fusedpeft.layers.kv_cache import (
    ROOM,
    AppendingLayer,
    AppendingSlidingLayer,
    append_in_place,
)

B, H, D, WINDOW = 2, 3, 4, 6
KINDS = {
    "full": (DynamicLayer, AppendingLayer, ()),
    "sliding": (DynamicSlidingWindowLayer, AppendingSlidingLayer, (WINDOW,)),
}


def _new(tokens: int, batch: int = B, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, H, tokens, D, dtype=dtype), torch.randn(batch, H, tokens, 5).to(dtype)


def _same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _act(layer, what: str, arguments):
    if what == "update":
        return layer.update(*arguments)
    if what == "append_twice":  # of a copy and of itself: neither sees what the other wrote
        one, two = arguments
        other = copy.copy(layer)
        return (*other.update(*one), *layer.update(*two), *other.update(*two))
    if what == "deepcopy":
        return (*copy.deepcopy(layer).update(*arguments), *layer.update(*arguments))
    if what == "pickle":
        return pickle.loads(pickle.dumps(layer)).update(*arguments)
    getattr(layer, what)(*arguments)
    return ()


def _arguments(what: str, rng: random.Random, batch: int):
    if what in ("update", "deepcopy", "pickle"):
        return _new(rng.choice((1, 1, 1, 2, 9)), batch)
    if what == "append_twice":
        return _new(rng.choice((1, 3)), batch), _new(1, batch)
    if what == "crop":
        return (-rng.randint(1, 2),)
    if what == "reorder_cache":
        return (torch.tensor([rng.randrange(batch) for _ in range(batch)]),)
    if what == "batch_select_indices":
        return (torch.tensor([0]),)
    return (2,) if what == "batch_repeat_interleave" else ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_any_sequence_of_calls(kind: str, seed: int) -> None:
    theirs_kind, ours_kind, args = KINDS[kind]
    theirs, ours = theirs_kind(*args), ours_kind(*args)
    rng, batch, seen = random.Random(seed), B, []
    torch.manual_seed(seed)
    whats = ["update"] * 8 + ["append_twice", "deepcopy", "pickle", "crop", "reset"]
    whats += ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"]
    for step in range(2 * ROOM):
        what = rng.choice(whats) if step else "update"
        too_few = what == "crop" and (theirs.get_seq_length() < 3 or kind == "sliding")
        if too_few or (what == "reset" and rng.random() < 0.7) or (batch > 4 and "repeat" in what):
            what = "update"
        given = _arguments(what, rng, batch)
        results = [_act(layer, what, given) for layer in (ours, theirs)]
        _same(*results)
        batch = len(theirs.keys) if theirs.is_initialized else batch
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        seen = [] if what == "reset" else seen  # transformers 5.17 writes zeros over what is held
        seen += [(t, t.clone()) for t in results[0]]
    for tensor, value in seen:  # what was handed out is never written again
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_is_appended_in_place(kind: str) -> None:
    _, ours_kind, args = KINDS[kind]
    layer = ours_kind(*args)
    layer.update(*_new(7))
    buffers, held = 0, layer.keys
    for _ in range(2 * ROOM):
        layer.update(*_new(1))
        buffers += layer.keys.untyped_storage().data_ptr() != held.untyped_storage().data_ptr()
        held = layer.keys
    assert buffers == 1  # when the first, of 7 tokens and room behind them, was full


@torch.no_grad()
def test_memory_is_free_after_a_reordering() -> None:
    layer = AppendingLayer()
    layer.update(*_new(7))
    storage = layer.keys.untyped_storage()
    of_tensor = storage._weak_ref()
    del storage
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.UntypedStorage._expired(of_tensor)
    torch.UntypedStorage._free_weak_ref(of_tensor)


@torch.no_grad()
def test_what_a_window_has_passed_is_free() -> None:
    layer = AppendingSlidingLayer(WINDOW)
    layer.update(*_new(10 * ROOM))
    layer.update(*_new(1))
    held = layer.keys.untyped_storage().nbytes() // layer.keys[:, :, :1].nbytes
    assert held == WINDOW - 1 + 1 + ROOM


def test_gradients_pass_through_a_cache() -> None:
    grads = []
    for layer in (AppendingLayer(), DynamicLayer()):
        torch.manual_seed(0)
        with torch.no_grad():
            layer.update(*_new(3))
        first, second = ([t.requires_grad_() for t in _new(n)] for n in (2, 1))
        layer.update(*first)
        keys, values = layer.update(*second)
        (keys.square().sum() * values.sin().sum()).backward()
        grads.append([t.grad for t in (*first, *second)])
    _same(*grads)


@torch.no_grad()
def test_what_does_not_fit_is_refused_as_before() -> None:
    for kind in (AppendingLayer, DynamicLayer):
        layer = kind()
        layer.update(*_new(3))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*_new(1, batch=1))  # would be broadcast into a buffer
        assert layer.get_seq_length() == 3


@torch.no_grad()
def test_other_dtypes_are_promoted_as_before() -> None:
    layers = AppendingLayer(), DynamicLayer()
    given = _new(3, dtype=torch.bfloat16), _new(1), _new(1)
    for new in given:
        _same(*(layer.update(*new) for layer in layers))


def test_in_and_out_of_inference_mode() -> None:
    layers = AppendingLayer(), DynamicLayer()
    for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
        for tokens in (2 + i, 1):
            with mode():
                given = _new(tokens)
                _same(*(layer.update(*given) for layer in layers))


def test_caches_that_are_left_alone() -> None:
    config = _config(LlamaConfig)
    offloading = DynamicCache(config=config)
    offloading.offloading = True  # to ask for it takes a GPU
    for cache in (StaticCache(config=config, max_cache_len=8), offloading):
        before = [type(layer) for layer in cache.layers]
        append_in_place(cache)
        assert before and [type(layer) for layer in cache.layers] == before
    append_in_place(None)


# --- models -------------------------------------------------------------------------------------


def _config(kind, **more):
    return kind(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, **more,
    )  # fmt: skip


def _gpt2():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


MODELS = {
    "llama": lambda: LlamaForCausalLM(_config(LlamaConfig)),
    "mistral": lambda: MistralForCausalLM(_config(MistralConfig, sliding_window=7)),
    "gpt2": _gpt2,
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture
def caches(monkeypatch):
    """Every kind of layer that was appended to in place."""
    used, inner = set(), AppendingLayer._append

    def append(self, *args):
        used.add(type(self))
        return inner(self, *args)

    for kind in (AppendingLayer, AppendingSlidingLayer):
        monkeypatch.setattr(kind, "_append", append)
    return used


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, way: str, caches) -> None:
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    model = fp.attach(copy.deepcopy(base), fp.LoRA(rank=2))  # B is zero: computes what base does
    ids = torch.randint(1, 64, (2, 9))
    texts = []
    for one in (base, model):
        torch.manual_seed(1)
        texts.append(one.generate(ids, max_new_tokens=12, pad_token_id=0, **WAYS[way]))
    assert torch.equal(*texts)
    sliding = {AppendingLayer} if name != "mistral" else {AppendingSlidingLayer}
    assert caches == (set() if way == "static" else sliding)
    fp.detach(model)
    caches.clear()
    assert torch.equal(model.generate(ids, max_new_tokens=12, pad_token_id=0), base.generate(
        ids, max_new_tokens=12, pad_token_id=0
    ))  # fmt: skip
    assert not caches and not model._forward_pre_hooks


def test_assisted_generation_crops(caches) -> None:
    torch.manual_seed(0)
    base, assistant = (MODELS["llama"]().eval() for _ in range(2))
    model = fp.attach(copy.deepcopy(base), fp.LoRA(rank=2))
    assistant = fp.attach(assistant, fp.LoRA(rank=2))
    ids = torch.randint(1, 64, (1, 9))
    options = {"max_new_tokens": 16, "pad_token_id": 0}
    expected = base.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
    assert caches == {AppendingLayer}


def test_an_encoder_decoder(caches) -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    base = BartForConditionalGeneration(config).eval()
    model = fp.attach(copy.deepcopy(base), fp.PrefixTuning(length=3))
    fp.activate(model, None)
    ids = torch.randint(3, 64, (2, 9))
    texts = [m.generate(ids, max_new_tokens=12, min_new_tokens=12) for m in (base, model)]
    assert torch.equal(*texts) and caches == {AppendingLayer}
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    append_in_place(cache)
    assert cache.cross_attention_cache.layer_class_to_replicate is DynamicLayer


def test_a_prefix_and_a_served_model(caches) -> None:
    torch.manual_seed(0)
    base = MODELS["llama"]().eval()
    model = fp.attach(copy.deepcopy(base), fp.PrefixTuning(length=3))
    ids = torch.randint(1, 64, (2, 9))
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )
    assert caches == {AppendingLayer}
    caches.clear()
    pool = fp.AdapterPool.for_model(base, slots=1, max_rank=2)
    expected = base.generate(ids, **options)
    pool.install(base)
    with pool.batch([None, None]):
        assert torch.equal(base.generate(ids, **options), expected)
    assert caches == {AppendingLayer}
    pool.uninstall()
    assert not base._forward_pre_hooks


def test_a_compiled_step_takes_a_cache_that_grew(caches) -> None:
    torch.manual_seed(0)
    model = fp.attach(MODELS["llama"]().eval(), fp.LoRA(rank=2, targets=["q_proj"]))
    ids = torch.randint(1, 64, (2, 11))
    with torch.no_grad():
        expected = model(ids).logits[:, -2:]
        cache, found = DynamicCache(config=model.config), []
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:9], past_key_values=cache)
        compiled = torch.compile(model, backend="eager")
        for i in (9, 10):
            found.append(compiled(ids[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected)
    assert caches == {AppendingLayer} and cache.get_seq_length() == 11
