"""Two tiny models from configs (nothing is downloaded), and what the tests do to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fusedpeft as fp


def with_biases(model: torch.nn.Module) -> torch.nn.Module:
    """Biases start at zero, which would hide one that is lost or added twice."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_llama(tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return with_biases(LlamaForCausalLM(config))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return with_biases(GPT2LMHeadModel(config))


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=list(BUILDERS))
def build(request) -> Callable[[], torch.nn.Module]:
    """Builds the same model at every call: a Llama (tied: no), a GPT-2 (Conv1D; tied)."""
    return BUILDERS[request.param]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stir() -> Callable[..., torch.nn.Module]:
    """Give every LoRA parameter a value, B included: an untrained adapter is silent."""

    def stir(model: torch.nn.Module, only: str = "", seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and only in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    if "magnitude" in name:
                        parameter.mul_(1 + 0.2 * noise)
                    else:
                        parameter.copy_(0.1 * noise)
        return model

    return stir


@pytest.fixture
def with_prefix() -> Callable[..., torch.nn.Module]:
    """(model, name, **settings) -> the model with a prefix of 5 that acts on it."""

    def attach(model: torch.nn.Module, name: str = "default", **settings) -> torch.nn.Module:
        fp.attach(model, fp.PrefixTuning(length=5, **settings), name)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "fusedpeft_prefix" in key and parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    return attach
