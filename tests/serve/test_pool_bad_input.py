"""What the pool refuses, by message, and that it is as it was then."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedpeft as fp
from fusedpeft.errors import InputError

MISFITS = {
    "unknown module": ({"9.lora_A": (2, 16)}, "9.lora_A has no place in the pool"),
    "unknown name": ({"0.lora_C": (2, 16)}, "0.lora_C has no place"),
    "no B": ({"0.lora_A": (2, 16)}, "0.lora_B is missing"),
    "wrong K": ({"0.lora_A": (2, 15), "0.lora_B": (24, 2)}, r"\(2, 15\), expected \(2, 16\)"),
    "wrong N": ({"0.lora_A": (2, 16), "0.lora_B": (23, 2)}, r"\(23, 2\), expected \(24, 2\)"),
    "two ranks": ({"0.lora_A": (2, 16), "0.lora_B": (24, 3)}, r"\(24, 3\), expected \(24, 2\)"),
    "rank too large": ({"0.lora_A": (5, 16), "0.lora_B": (24, 5)}, "of size 5, expected 1..4"),
    "rank 0": ({"0.lora_A": (0, 16), "0.lora_B": (24, 0)}, "of size 0, expected 1..4"),
    "one dim": ({"0.lora_A": (16,), "0.lora_B": (24, 2)}, r"\(16,\), expected \('R', 16\)"),
    "nothing": ({}, "it has no tensors"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_before_anything_is_written(one_linear, case):
    shapes, said = MISFITS[case]
    pool, _, adapters = one_linear(slots=1)
    pool.put("a", adapters["a"])
    before = pool._numbers.clone()
    with pytest.raises(InputError, match=said):
        pool.put("new", {key: torch.ones(shape) for key, shape in shapes.items()})
    with pytest.raises(InputError, match="lora_A is torch.int64"):
        ones = torch.ones(2, 16, dtype=torch.int64)
        pool.put("new", {"0.lora_A": ones, "0.lora_B": torch.ones(24, 2)})
    assert torch.equal(pool._numbers, before) and "new" not in pool and pool.slot("a") == 0


@pytest.mark.parametrize(
    "kwargs, said",
    [
        ({"slots": 0}, "slots: expected a whole number >= 1, got 0"),
        ({"max_rank": -1}, "max_rank: expected a whole number >= 0"),
        ({"max_rank": 0}, "all are 0"),
        ({"host_bytes": 1.5}, "host_bytes: expected a whole number"),
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"targets": 5}, "targets: expected 'all-linear', a regular expression or a list .*got 5"),
        ({"targets": [5]}, r"targets: expected .* got \[5\]"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32"),
    ],
)
def test_what_for_model_refuses(llama, kwargs, said):
    with pytest.raises(InputError, match=said):
        fp.AdapterPool.for_model(llama, **kwargs)


def test_bad_checkpoints(llama, tmp_path):
    fp.attach(llama, fp.LoRA(rank=2, targets=["q_proj", "v_proj"]))
    folder = fp.save_adapter(llama, tmp_path / "good")
    fp.detach(llama)
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=2, targets=["q_proj", "v_proj"])
    pool.load("good", folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)

    def refused(said, change=None, drop=None, add=None):
        kept = {k: t for k, t in tensors.items() if drop is None or drop not in k}
        save_file(kept | (add or {}), weights)
        config.write_text(json.dumps(settings | (change or {})))
        with pytest.raises(InputError, match=said):
            pool.load("bad", folder)

    refused("DoRA", {"use_dora": True})
    refused("expected rank 3", {"r": 3})
    refused("layers.1.self_attn.q_proj.lora_A is missing", drop="layers.1.self_attn.q_proj")
    refused("q_proj.lora_B is missing", drop="layers.1.self_attn.q_proj.lora_B")
    k = "base_model.model.model.layers.0.self_attn.k_proj.lora_"
    more = {f"{k}A.weight": torch.ones(2, 24), f"{k}B.weight": torch.ones(12, 2)}
    refused("k_proj.lora_A has no place in the pool", add=more)
    refused("x is no tensor of LoRA", add={"x": torch.ones(1)})
    refused("is a prefix, and the pool was made with max_prefix 0",
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2})  # fmt: skip
    weights.write_bytes(b"junk")
    with pytest.raises(InputError, match="damaged"):
        pool.load("bad", folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="never opened"):
        pool.load("bad", folder)
    with pytest.raises(InputError, match="there is none"):
        pool.load("bad", tmp_path / "nowhere")
    assert "bad" not in pool and pool.slot("good") == 0


def test_a_model_that_was_converted_while_installed(llama, ids):
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=2)
    pool.install(llama)
    llama.to(torch.bfloat16)
    with pool.batch([None] * 4), pytest.raises(InputError, match="got torch.bfloat16: uninstall"):
        llama(ids)


def test_names(one_linear):
    pool, _, adapters = one_linear()
    for name in ("", None, 3):
        with pytest.raises(InputError, match="adapter name: expected a word"):
            pool.put(name, adapters["a"])
    pool.put("support", adapters["a"])
    with pytest.raises(InputError, match="no adapter is named 'suport'.*did you mean 'support'"):
        pool.acquire(["suport"])
    for names, said in (
        (None, "expected a list, one for each row, got None"),
        ("support", "expected a list, one for each row, got 'support'"),
        ([5], "expected an adapter's name or None, the base alone, got 5"),
        ([""], "expected an adapter's name or None, the base alone, got ''"),
    ):
        with pytest.raises(InputError, match=f"names: {said}"), pool.hold(names):
            pass
    with pytest.raises(InputError, match="no adapter is named"):
        pool.evict("x")
    with pytest.raises(InputError, match="did you mean '0'|there are '0'"):
        pool.at("1")
