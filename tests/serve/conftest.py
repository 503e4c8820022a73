"""Two tiny models from configs, and adapters of PEFT's on disk with PEFT's model of each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fusedpeft as fp

VOCAB = 61


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_bias=True, mlp_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=list(BUILDERS))
def build(request) -> Callable[[], nn.Module]:
    """The same model at every call, with biases that are not zero: a Llama, a GPT-2 (Conv1D)."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = BUILDERS[request.param]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model.eval().requires_grad_(False)

    return made


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama().eval().requires_grad_(False)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted(tmp_path):
    """(model, config, seed) -> (folder of a saved adapter, the model with it attached)."""
    count = itertools.count()

    def made(model, config, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        theirs = fp.attach(copy.deepcopy(model), config, "one").eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path / f"adapter-{next(count)}"
        fp.save_adapter(theirs, folder, "one")
        return folder, theirs.requires_grad_(False)

    return made


@pytest.fixture
def peft_adapter(tmp_path) -> Callable[..., tuple[Path, nn.Module]]:
    """(model, PEFT's config, seed) -> (folder of the checkpoint, PEFT's model of it)."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def made(model: nn.Module, config, seed: int = 0) -> tuple[Path, nn.Module]:
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name or "prompt_encoder" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path / f"{config.peft_type.value}-{seed}"
        theirs.save_pretrained(folder)
        return folder, theirs

    return made


@pytest.fixture
def one_linear() -> Callable[..., tuple]:
    """(adapters, slots, rank) -> (pool over one linear 16 -> 24, the linear, {name: tensors})."""

    def made(names: str = "abcd", slots: int = 3, rank: int = 4, **kwargs):
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
        pool = fp.AdapterPool.for_model(model, slots, rank, **kwargs)
        adapters = {
            name: {
                "0.lora_A": torch.randn(1 + i % rank, 16, generator=generator),
                "0.lora_B": torch.randn(24, 1 + i % rank, generator=generator),
                "0.scale": 0.5 + i,
            }
            for i, name in enumerate(names)
        }
        return pool, model[0], adapters

    return made
