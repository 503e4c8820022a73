"""Bench of a whole step of preference ranking optimisation on a LoRA model.

    fusedpeft bench pro_step --device cpu --json FILE     a small Llama, 4 candidates x 256 tokens
    fusedpeft bench pro_step --device cuda --json FILE    Llama-3.2-1B's shape, 4 x 512, bf16

Forward over all candidates of a prompt, the loss, the gradients of every adapter. The floor is what
one writes with PEFT: its model, the whole logits, log_softmax, gather, the same loss; the third
contestant is that with `fp.accelerate` on the model. A result is right where every token's
log-probability and the gradients of the first and the last adapter are. Bars on a GPU: 1.5 times
the tokens a second of the floor (0.67 of its time) and half of its peak memory.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedpeft as fp
from fusedpeft import ops
from fusedpeft.bench.harness import Call, Case, Expected, Impl
from fusedpeft.errors import InputError

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

FLOOR = "peft + eager"
ALL = ("fusedpeft", "accelerated", FLOOR)
CANDIDATES, RANK = 4, 16
BF16, FP32 = torch.bfloat16, torch.float32
Logps = Callable[[Tensor, Tensor], Tensor]  # ids, labels -> log p [n, T-1]


@dataclass(frozen=True)
class Spec:
    model: str  # of SHAPES
    tokens: int  # of each candidate
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.model} {CANDIDATES}x{self.tokens} R{RANK}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 256),
    "llama-50m": (512, 1536, 8, 8, 4, 32000),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
}


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        return [Spec("llama-1b", 512, BF16)] + ([Spec("llama-50m", 512, BF16)] if full else [])
    return [Spec("llama-50m", 256, FP32)]


def _llama(spec: Spec, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, layers, heads, kv, vocab = SHAPES[spec.model]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True,
        max_position_embeddings=max(2048, spec.tokens), bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(spec.dtype)


def _eager(model: nn.Module) -> Logps:
    def logps(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        target = labels[:, 1:].clamp(min=0).unsqueeze(-1)
        logp = wide.log_softmax(-1).gather(-1, target).squeeze(-1)
        return logp.where(labels[:, 1:] != -100, 0.0)

    return logps


def _ours(model: nn.Module) -> Logps:
    from fusedpeft.train import TokenLogprobs

    module = TokenLogprobs(model)
    return lambda ids, labels: module(ids, torch.ones_like(ids), labels)


def _models(spec: Spec, device: torch.device) -> dict[str, nn.Module]:
    """Ours, and PEFT's models with the same adapters, which are read from ours."""
    from peft import PeftModel

    base = _llama(spec, device)
    ours = fp.attach(copy.deepcopy(base), fp.LoRA(rank=RANK, alpha=2 * RANK))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad and "lora_B" in name:  # zeros would hide dA
                p.normal_(std=RANK**-1.5)
    with tempfile.TemporaryDirectory() as folder:
        fp.save_adapter(ours, folder)
        theirs = [
            PeftModel.from_pretrained(model, folder, is_trainable=True)
            for model in (copy.deepcopy(base), base)
        ]
    fp.accelerate(theirs[0])
    return {"fusedpeft": ours.train(), "accelerated": theirs[0].train(), FLOOR: theirs[1].train()}


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """One model and its batch; each contestant returns log p by token and two gradients."""
    try:
        models = _models(spec, device)
    except ModuleNotFoundError as error:
        raise InputError(
            f"bench pro_step: expected {error.name}; pip install {error.name}"
        ) from error
    gen = torch.Generator(device=device).manual_seed(1)
    size = (CANDIDATES, spec.tokens)
    ids = torch.randint(0, SHAPES[spec.model][-1], size, generator=gen, device=device)
    labels = ids.clone()
    labels[:, : spec.tokens // 4] = -100  # the prompt
    length = (labels[:, 1:] != -100).sum(1)
    reward = torch.linspace(1.0, -1.0, CANDIDATES, device=device)
    group = torch.zeros(CANDIDATES, dtype=torch.int64, device=device)

    def step(model: nn.Module, logps: Logps) -> Call:
        trained = [p for p in model.parameters() if p.requires_grad]

        def call() -> tuple[Tensor, ...]:
            logp = logps(ids, labels)
            total = logp.sum(1)
            loss = ops.pro_loss(total, length, reward.to(total.dtype), group)
            grads = torch.autograd.grad(loss, trained)
            return logp.detach(), grads[0], grads[-1]

        return call

    wide = copy.deepcopy(models[FLOOR]).double()
    ref = step(wide, _eager(wide))()
    del wide
    low = step(models[FLOOR], _eager(models[FLOOR]))()
    expected = Expected(("logp", "first gradient", "last gradient"), ref, low)
    tokens = CANDIDATES * spec.tokens
    weights = sum(p.numel() for p in models[FLOOR].parameters())
    # Forward and dx through every frozen weight; the weights are read twice.
    work = (4.0 * tokens * weights, 2.0 * weights * ids.new_empty(0, dtype=spec.dtype).itemsize)

    def made(name: str) -> Callable[[int], Call]:
        logps = _ours if name == "fusedpeft" else _eager
        return lambda _: step(models[name], logps(models[name]))

    chosen = [name for name in ALL if name in (impls or ALL)]
    entries = [Impl(name, made(name), expected, *work) for name in chosen]
    return Case("pro_step", spec.name, spec.dtype, device, entries, FLOOR, 1, True, {})
