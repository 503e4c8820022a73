"""Bench of a whole model in decode, each request of the batch with an adapter of its own.

    fusedpeft bench multi_lora_model --device cpu --json FILE    4 layers, 8 requests, fp32 and bf16

One call decodes 16 tokens a request, which are given, over a cache of 64, each step up to the
logits. The floor is the same model without any adapter in plain transformers, so that 1 / ratio is
its tokens a second times ours; PEFT is its mixed batch (`adapter_names`). On a CPU each has a
process of its own, as where it is served (see harness.py). Bar on a CPU: 1.3 times the tokens a
second of the floor, ratio 0.77.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fusedpeft as fp
from fusedpeft import ops
from fusedpeft.bench.harness import Call, Case, Expected, Impl

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

FLOOR = "no adapter"
ALL = ("fusedpeft", "peft", FLOOR)
RANKS = (8, 16, 64)  # in turn
CACHED, STEPS = 64, 16  # tokens of each request before the first step; decoded
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 256),
    "llama-64m": (1024, 2816, 4, 16, 4, 16384),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
}


@dataclass(frozen=True)
class Spec:
    model: str  # of SHAPES
    requests: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.model} B{self.requests}+{STEPS} R{'/'.join(map(str, RANKS))}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        return [Spec("llama-1b", b, BF16) for b in ((8, 32, 64) if full else (8,))]
    requests = (1, 4, 8, 16) if full else (8,)
    return [Spec("llama-64m", b, dtype) for dtype in (FP32, BF16) for b in requests]


def llama(spec: Spec, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, layers, heads, kv, vocab = SHAPES[spec.model]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(spec.dtype).eval().requires_grad_(False)


def _adapters(pool: fp.AdapterPool, spec: Spec, device: torch.device) -> list[dict]:
    """What `pool.put` takes, for each request, exact in 16 bits."""
    gen, made = torch.Generator(device).manual_seed(1), []
    for i in range(spec.requests):
        r, tensors = RANKS[i % len(RANKS)], {}
        for path in (p for paths in pool.stacked() for p in paths):
            slots = pool.at(path)
            sizes = (("lora_A", (r, slots.a.shape[2])), ("lora_B", (slots.sizes[0], r)))
            for name, size in sizes:
                noise = torch.randn(size, generator=gen, device=device) / size[1] ** 0.5
                tensors[f"{path}.{name}"] = noise.to(spec.dtype)
            tensors[f"{path}.scale"] = 0.5
        made.append(tensors)
    return made


def _peft(base: nn.Module, adapters: list[dict]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    made = None
    for i, tensors in enumerate(adapters):
        r = RANKS[i % len(RANKS)]
        config = LoraConfig(r=r, lora_alpha=0.5 * r, target_modules="all-linear")
        if made is None:
            made = get_peft_model(base, config, "0", autocast_adapter_dtype=False)
        else:
            made.add_adapter(str(i), config, autocast_adapter_dtype=False)
        for path, module in made.base_model.model.named_modules():
            for name in ("lora_A", "lora_B"):
                if f"{path}.{name}" in tensors:
                    getattr(module, name)[str(i)].weight.data = tensors[f"{path}.{name}"]
    return made.eval().requires_grad_(False)


def _by_reference(base: nn.Module, pool: fp.AdapterPool, slots: Tensor, dtype) -> nn.Module:
    """A copy whose linears are the specification, with the pool's adapters, in `dtype`."""
    model = copy.deepcopy(base).to(dtype)
    for path in (p for paths in pool.stacked() for p in paths):
        module, own = model.get_submodule(path), pool.at(path)
        own = own._replace(a=own.a.to(dtype), b=own.b.to(dtype))

        def forward(x: Tensor, module=module, own=own) -> Tensor:
            rows = ops.multi_lora_linear_ref(x.flatten(0, -2), module.weight, own, slots)
            return rows.view(*x.shape[:-1], -1)

        module.forward = forward
    return model


def _decode(model: nn.Module, cached: Tensor, given: Tensor, kwargs: dict | None = None) -> Call:
    """given [B, STEPS]; the cache, which all fill and read alike, is cut back after the last. The
    logits of that one."""
    from transformers import DynamicCache

    config, dtype = model.config, next(model.parameters()).dtype
    shape = (len(given), config.num_key_value_heads, CACHED, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        k, v = cached[layer].to(dtype).view(2, *shape).unbind(0)
        cache.update(k, v, layer)
    options = {"past_key_values": cache, "use_cache": True, **(kwargs or {})}

    def call() -> Tensor:
        for token in given.split(1, 1):
            logits = model(token, **options).logits
        cache.crop(-STEPS)
        return logits[:, -1]

    return call


class Scene(NamedTuple):
    base: nn.Module
    pool: fp.AdapterPool
    adapters: list[dict]
    cached: Tensor
    given: Tensor

    @property
    def names(self) -> list[str]:
        return [str(i) for i in range(len(self.adapters))]


def _scene(spec: Spec, device: torch.device) -> Scene:
    """The same in every process."""
    base, n = llama(spec, device), spec.requests
    config = base.config
    pool = fp.AdapterPool.for_model(base, slots=n, max_rank=max(RANKS))
    adapters = _adapters(pool, spec, device)
    gen = torch.Generator(device).manual_seed(2)
    size = (config.num_hidden_layers, 2 * n * config.num_key_value_heads * CACHED, config.head_dim)
    cached = torch.randn(size, generator=gen, device=device).to(spec.dtype)
    given = torch.randint(0, config.vocab_size, (n, STEPS), generator=gen, device=device)
    scene = Scene(base, pool, adapters, cached, given)
    for name, tensors in zip(scene.names, adapters, strict=True):
        pool.put(name, tensors)
    return scene


def _call(name: str, scene: Scene) -> Call:
    base, pool, adapters, cached, given = scene
    if name == FLOOR:
        return _decode(base, cached, given)
    model, names = copy.deepcopy(base), scene.names
    if name == "peft":
        return _decode(_peft(model, adapters), cached, given, {"adapter_names": names})
    pool.install(model)
    decode = _decode(model, cached, given)

    def call() -> Tensor:
        with pool.batch(names):
            return decode()

    return call


def contestant(spec: Spec, device: torch.device, name: str) -> Call:
    return _call(name, _scene(spec, device))


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """One model, once with the pool, once as it is, once PEFT's; each returns the logits."""
    scene = _scene(spec, device)
    base, pool, adapters, cached, given = scene
    slots = [pool.slot(name) for name in scene.names]
    slots = torch.tensor(slots, dtype=torch.int32, device=device)

    def by_reference(dtype: torch.dtype, slots: Tensor) -> tuple[Tensor]:
        return (_decode(_by_reference(base, pool, slots, dtype), cached, given)(),)

    with_, without = (
        Expected(("logits",), *(by_reference(t, s) for t in (torch.float64, spec.dtype)))
        for s in (slots, torch.full_like(slots, -1))
    )
    weights = sum(p.numel() for p in base.parameters())  # tied: the head's, once
    used = sum(t.numel() for tensors in adapters for t in tensors.values() if isinstance(t, Tensor))
    bytes_, flops = torch.empty(0, dtype=spec.dtype).itemsize, 2.0 * STEPS * len(given) * weights

    def impl(name: str) -> Impl:
        bare = name == FLOOR
        read = float(STEPS * bytes_ * (weights if bare else weights + used))
        return Impl(name, lambda _: _call(name, scene), without if bare else with_, flops, read)

    entries = [impl(name) for name in ALL if name in (impls or ALL)]
    apart = functools.partial(contestant, spec, device)
    return Case("multi_lora_model", spec.name, spec.dtype, device, entries, FLOOR, apart=apart)
