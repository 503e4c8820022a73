"""Bench of whole models with each method on them, as `fp.attach` puts it there.

    fusedpeft bench methods --device cpu --json FILE     a small Llama, fp32
    fusedpeft bench methods --device cuda --json FILE    Llama-3.2-1B's shape, bf16

step: forward, the model's own loss, the gradients of what is trained. The floor is PEFT's model
with the same numbers, for bottleneck adapters what `adapters` computes: linear, activation, linear,
sum, as modules. `+ loss` is ours with `fp.fuse_loss`, which never makes the logits.

generate: a prompt and then token by token over a cache, the tokens given. The floor of a prefix is
what PEFT does with one: keys and values copied into every row's cache. (Its own generate() is no
contestant: with transformers 5.24 the prefix is lost on the way.) Bottleneck adapters are held
against the bare model, whose time they should not add to.

On a CPU each model has a process of its own, as where it is trained (see harness.py).

Bars on a CPU: LoRA 0.9 of PEFT, prefix 0.8 and 0.9 generating, prompt 1.0, bottleneck 0.9 of the
modules and 1.10 of the bare model generating.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedpeft as fp
from fusedpeft.bench.harness import Call, Case, Expected, Impl
from fusedpeft.errors import InputError
from fusedpeft.layers.prefix import flat_prefix, shape_of, split

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

FLOORS = {  # (method, what): the floor
    ("lora", "step"): "peft",
    ("prefix", "step"): "peft",
    ("prefix", "generate"): "in the cache",
    ("prompt", "step"): "peft",
    ("bottleneck", "step"): "modules",
    ("bottleneck", "generate"): "bare model",
}
ALL = ("fusedpeft", "fusedpeft + loss", "accelerated", *dict.fromkeys(FLOORS.values()))
FLOOR = "peft"  # each case has its own, which always runs
CONFIGS = {
    "lora": fp.LoRA(rank=8, alpha=16),
    "prefix": fp.PrefixTuning(length=32),
    "prompt": fp.PromptTuning(length=20),
    "bottleneck": fp.BottleneckAdapter(size=64),
}
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary; rows, tokens, new
    "tiny": (64, 128, 2, 4, 2, 256, 2, 16, 3),
    "llama-20m": (512, 1536, 4, 8, 4, 8192, 4, 256, 32),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, 4, 1024, 32),
}


@dataclass(frozen=True)
class Spec:
    method: str
    what: str  # step, generate
    model: str  # of SHAPES
    dtype: torch.dtype

    @property
    def name(self) -> str:
        rows, tokens, new = SHAPES[self.model][6:]
        size = f"{rows}x{tokens}" if self.what == "step" else f"{rows}x{tokens}+{new}"
        return f"{self.method} {self.what} {self.model} {size}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    model, dtype = ("llama-1b", BF16) if device.type == "cuda" else ("llama-20m", FP32)
    return [Spec(method, what, model, dtype) for method, what in FLOORS]


def _llama(spec: Spec, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, layers, heads, kv, vocab, *_ = SHAPES[spec.model]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(spec.dtype)


def _ours(spec: Spec, base: nn.Module) -> nn.Module:
    """With the adapter, what begins at zero filled: it would hide gradients."""
    model = fp.attach(copy.deepcopy(base), CONFIGS[spec.method])
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad and not p.any()):
            p.normal_(std=0.02)
    return model


# --- what they are held against -----------------------------------------------------------------


def _peft(ours: nn.Module, base: nn.Module) -> nn.Module:
    """PEFT's model, its adapter read from ours."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        fp.save_adapter(ours, folder)
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    for name, p in model.named_parameters():  # is_trainable=True refuses prefixes and prompts
        p.requires_grad_("lora_" in name or "prompt_encoder" in name)
    return model


class _Adapter(nn.Module):
    """h + U act(D h + c) + e: what AdapterHub's modules compute after attention and the FFN."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.down, self.up = nn.Linear(dim, size), nn.Linear(size, dim)

    def forward(self, h: Tensor) -> Tensor:
        down, up = self.down, self.up
        return h + up(F.relu(down(h.to(down.weight.dtype)))).to(h.dtype)


def _modules(ours: nn.Module, base: nn.Module) -> nn.Module:
    """The bottleneck adapters of `ours` as modules, in the order of its parameters."""
    model = copy.deepcopy(base).requires_grad_(False)
    places = [m for m in ours.modules() if hasattr(m, "down_bias")]
    layers = model.model.layers
    for own, place in zip(
        places, (m for block in layers for m in (block.self_attn, block.mlp)), strict=True
    ):
        dim, size = own.up.shape
        adapter = _Adapter(dim, size).to(own.down)
        with torch.no_grad():
            for ours_, theirs in zip(
                (own.down, own.down_bias, own.up, own.up_bias), adapter.parameters(), strict=True
            ):
                theirs.copy_(ours_)
        place.adapter = adapter
        place.register_forward_hook(_after)
    return model


def _after(module: nn.Module, args: tuple, output):
    if isinstance(output, tuple):
        return (module.adapter(output[0]), *output[1:])
    return module.adapter(output)


def _prefix_of(ours: nn.Module) -> Tensor:
    """[2 · layers, HKV, P, D]"""
    pairs = split(flat_prefix(ours, "default"), shape_of(ours))
    return torch.stack([t for pair in pairs for t in pair])


# --- what is timed ------------------------------------------------------------------------------


def _step(model: nn.Module, ids: Tensor, labels: Tensor, *, in_one=None) -> Call:
    """in_one: the shape of a prefix that PEFT keeps in one tensor, where we have two a layer."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def call() -> tuple[Tensor, ...]:
        loss = model(input_ids=ids, labels=labels).loss
        grads = torch.autograd.grad(loss, trained)
        if in_one is not None:
            grads = [t for pair in split(grads[0], in_one) for t in pair]
        return loss.detach(), grads[0], grads[-1]

    return call


def _generate(model: nn.Module, ids: Tensor, new: Tensor, prefix: Tensor | None = None) -> Call:
    """The logits of the last token. prefix [2 · layers, HKV, P, D]: what the cache begins with."""
    from transformers import DynamicCache

    config = model.config

    def call() -> Tensor:
        cache = DynamicCache(config=config)
        if prefix is not None:
            shape = (len(ids), *prefix.shape[1:])
            for layer in range(config.num_hidden_layers):
                k, v = (prefix[2 * layer + i].expand(shape) for i in (0, 1))
                cache.update(k, v, layer)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for token in new.split(1, 1):
            logits = model(token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1]

    return call


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """One model and its batch for all; a step returns the loss and two gradients, generating the
    logits of the last token."""
    try:
        return _build(spec, device, impls)
    except ModuleNotFoundError as error:
        raise InputError(
            f"bench methods: expected {error.name}; pip install {error.name}"
        ) from error


def _build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None) -> Case:
    models = _models(spec, device)
    floor, step = FLOORS[spec.method, spec.what], spec.what == "step"
    names = ["fusedpeft"]
    names += ["fusedpeft + loss"] if step else []
    names += ["modules"] if floor == "bare model" else []
    names += [floor]
    names += ["accelerated"] if spec.method == "lora" else []
    weights = sum(p.numel() for p in models[0].parameters())
    size = torch.empty(0, dtype=spec.dtype).itemsize
    rows, tokens, new = SHAPES[spec.model][6:]
    if step:
        work = (4.0 * rows * tokens * weights, 2.0 * weights * size)
    else:
        work = (2.0 * rows * (tokens + new) * weights, float((1 + new) * weights * size))
    with torch.set_grad_enabled(step):
        expected = _expected(spec, device, models)
    entries = [
        Impl(n, lambda _, n=n: _call(spec, device, n, *models), expected[n == "bare model"], *work)
        for n in names
        if n in (*(impls or ALL), floor)
    ]
    apart = functools.partial(contestant, spec, device)
    return Case("methods", spec.name, spec.dtype, device, entries, floor, grad=step, apart=apart)


def contestant(spec: Spec, device: torch.device, name: str) -> Call:
    """One of a case's calls, the same in every process."""
    return _call(spec, device, name, *_models(spec, device))


def _models(spec: Spec, device: torch.device) -> tuple[nn.Module, nn.Module]:
    base = _llama(spec, device)
    return base, _ours(spec, base)


def _call(spec: Spec, device: torch.device, name: str, base: nn.Module, ours: nn.Module) -> Call:
    model, prefix, step = base, None, spec.what == "step"
    if name.startswith("fusedpeft"):
        model = copy.deepcopy(ours)
    elif name == "modules":
        model = _modules(ours, base)
    elif name in ("peft", "accelerated"):
        model = _peft(ours, base)
    if name == "accelerated":
        fp.accelerate(model)
    if name == "fusedpeft + loss":
        fp.fuse_loss(model)
    if name == "in the cache":
        prefix = _prefix_of(ours).to(spec.dtype)
    return _of_model(spec, device, model.train(step), prefix, name == "peft")


def _of_model(
    spec: Spec, device: torch.device, model: nn.Module, prefix: Tensor | None, peft: bool
) -> Call:
    vocab, rows, tokens, new = SHAPES[spec.model][5:]
    gen = torch.Generator(device=device).manual_seed(1)
    ids = torch.randint(0, vocab, (rows, tokens + new), generator=gen, device=device)
    ids, following = ids.split((tokens, new), 1)
    if spec.what != "step":
        return _generate(model, ids, following, prefix)
    labels = ids.clone()
    labels[:, : tokens // 4] = -100  # the prompt; PEFT would also count the first token
    in_one = shape_of(model.get_base_model()) if peft and spec.method == "prefix" else None
    return _step(model, ids, labels, in_one=in_one)


def _expected(spec: Spec, device: torch.device, models) -> tuple[Expected, Expected | None]:
    """What all compute, and the bare model."""
    base, ours = models
    names = ("loss", "first gradient", "last gradient") if spec.what == "step" else ("logits",)
    peft, prefix = False, None
    if spec.method == "bottleneck":
        theirs = _modules(ours, base)
    elif spec.what == "step":
        theirs, peft = _peft(ours, base), True
    else:
        theirs = base
        prefix = _prefix_of(ours)

    def of(model: nn.Module) -> Expected:
        made = []
        for own in (copy.deepcopy(model).double(), model):
            first = None if prefix is None else prefix.to(next(own.parameters()).dtype)
            value = _of_model(spec, device, own.train(spec.what == "step"), first, peft)()
            made.append(value if isinstance(value, tuple) else (value,))
        return Expected(names, *made)

    bare = of(base) if FLOORS[spec.method, spec.what] == "bare model" else None
    return of(theirs), bare
