"""The pool's rules: replacing, evicting, host memory, what is refused, what is left of a slot."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedpeft as fp
from fusedpeft import ops
from fusedpeft.errors import InputError


def output(pool, linear, slots, x):
    return ops.multi_lora_linear(
        x, linear.weight, pool.at("0"), torch.tensor(slots, dtype=torch.int32), linear.bias
    )


def alone(linear, adapter, x):
    a, b, scale = (adapter[f"0.{name}"] for name in ("lora_A", "lora_B", "scale"))
    return ops.lora_linear_ref(x, linear.weight, a, b, scale, linear.bias)


@pytest.fixture
def x():
    return torch.randn(1, 16, generator=torch.Generator().manual_seed(3))


def addresses(pool):
    return [t.data_ptr() for t in pool.at("0")[:4]]


def test_replaced_while_in_flight(one_linear, x):
    pool, linear, adapters = one_linear()
    first, before = pool.put("a", adapters["b"]), addresses(pool)
    with pool.hold(["a"]) as held:
        assert held.tolist() == [first]
        second = pool.put("a", adapters["d"])
        assert second != first == held.item() and pool.slot("a") == second
        assert pool.stats()["retired"] == 1
        torch.testing.assert_close(
            output(pool, linear, held.tolist(), x), alone(linear, adapters["b"], x)
        )
    assert pool.stats()["retired"] == 0 and pool.stats()["free"] == 2
    torch.testing.assert_close(output(pool, linear, [second], x), alone(linear, adapters["d"], x))
    assert addresses(pool) == before


def test_nothing_of_an_evicted_adapter_is_left(one_linear, x):
    pool, linear, adapters = one_linear()
    slot = pool.put("d", adapters["d"])  # the highest rank
    assert pool._numbers[slot].count_nonzero() == 4 * (16 + 24)
    with pool.hold(["d"]):
        pool.evict("d")
        assert pool._numbers[slot].any() and "d" not in pool  # still being read
    assert not pool._numbers.any() and not pool._scales.any() and (pool._sizes == -1).all()
    with pytest.raises(ValueError, match=f"slot {slot} holds no adapter"):
        output(pool, linear, [slot], x)
    assert pool.put("a", adapters["a"]) == slot  # rank 1 in the slot where rank 4 was
    assert pool._numbers[slot].count_nonzero() == 16 + 24
    torch.testing.assert_close(output(pool, linear, [slot], x), alone(linear, adapters["a"], x))
    with pytest.raises(InputError, match="no adapter is named 'd'"):
        pool.acquire(["a", "d"])
    assert pool.stats()["held"] == 0


def test_the_least_recently_used_waits_in_host_memory(one_linear, x):
    pool, linear, adapters = one_linear(slots=3)
    for name in "abc":
        pool.put(name, adapters[name])
    pool.release(pool.acquire(["a"]))  # b is now the oldest
    assert pool.put("d", adapters["d"]) == 1
    stats = pool.stats()
    assert stats["adapters"]["b"]["slot"] is None and "b" in pool
    with pytest.raises(InputError, match="no adapter is named 'b'"):
        pool.slot("b")
    with pool.hold(["b", None, "a", "b"]) as held:  # copied back; c gives its slot up
        slots = held.tolist()
        assert slots[0] == slots[3] == 2 and slots[1:3] == [-1, 0]
        torch.testing.assert_close(
            output(pool, linear, slots[:1], x), alone(linear, adapters["b"], x)
        )
        assert pool.stats()["adapters"]["b"]["holds"] == 2
    names = [n for n, a in pool.stats()["adapters"].items() if a["slot"] is not None]
    assert names == ["a", "b", "d"]


def test_host_memory_is_bounded(one_linear):
    pool, _, adapters = one_linear(slots=1)
    for name in "abc":
        pool.put(name, adapters[name])
    sizes = {name: a["host_bytes"] for name, a in pool.stats()["adapters"].items()}
    assert sizes == {n: 4 * ((1 + i) * 16 + 24 * 8 + 2) for i, n in enumerate("abc")}
    assert pool.stats()["host_bytes"] == sum(sizes.values())
    pool, _, _ = one_linear(slots=1, host_bytes=sizes["b"] + sizes["c"])
    for name in "abc":  # c takes the room of a, which has no slot any more
        pool.put(name, adapters[name])
    assert "a" not in pool and "b" in pool and "c" in pool
    with pytest.raises(InputError, match="no adapter is named 'a' .*load it again"):
        pool.acquire(["a"])
    pool.evict("b")
    pool.evict("c")
    assert pool.stats()["adapters"] == {} and pool.stats()["host_bytes"] == 0


def test_the_slots_of_one_linear(one_linear, x):
    _, linear, adapters = one_linear()
    given = [None if n is None else tuple(adapters[n].values()) for n in ("a", None, "d")]
    slots = fp.AdapterPool.from_tensors(given)
    got = ops.multi_lora_linear(
        x, linear.weight, slots, torch.tensor([2], dtype=torch.int32), linear.bias
    )
    torch.testing.assert_close(got, alone(linear, adapters["d"], x))


def test_full(one_linear, x):
    pool, linear, adapters = one_linear(slots=2)
    for name in "ab":
        pool.put(name, adapters[name])
    held = pool.acquire(["a", "b"])
    for _ in range(2):
        with pytest.raises(ValueError, match="pool full: all 2 slots are in use.*'c'"):
            pool.put("c", adapters["c"])
    assert "c" not in pool
    torch.testing.assert_close(output(pool, linear, [0], x), alone(linear, adapters["a"], x))
    pool.release(held[:1])
    with pytest.raises(ValueError, match="release: expected a slot that is held, got slot 0"):
        pool.release(held)
    assert pool.put("c", adapters["c"]) == 0
    pool.release(held[1:])
    assert pool.stats()["held"] == 0


def test_a_load_that_breaks_leaves_no_trace(one_linear, monkeypatch):
    pool, _, adapters = one_linear()
    pool.put("a", adapters["a"])

    def broken(slot, packed):
        pool._numbers[slot].fill_(7.0)
        raise RuntimeError("the device went away")

    monkeypatch.setattr(pool, "_write", broken)
    with pytest.raises(RuntimeError, match="went away"):
        pool.put("a", adapters["b"])
    stats = pool.stats()
    assert pool.slot("a") == 0 and stats["free"] == 2 and stats["loading"] == 0
    assert (
        not pool._numbers[1:].any()
        and (pool.at("0").rank.squeeze(1) == torch.tensor([1, -1, -1])).all()
    )


def test_bytes(llama):
    pool = fp.AdapterPool.for_model(
        llama, slots=5, max_rank=3, max_prefix=2, max_prompt=4, max_bottleneck=6
    )
    views = {k: made for k, made in pool._views.items() if k[0] != "lora" or len(k[1]) == 1}
    least = sum(t[0].numel() * t.element_size() for v in views.values() for t in v
                if isinstance(t, torch.Tensor))  # fmt: skip
    stats = pool.stats()
    assert (
        stats["device_bytes"]
        == 5 * stats["slot_bytes"]
        == sum(t.untyped_storage().nbytes() for t in (pool._numbers, pool._sizes, pool._scales))
    )
    assert least <= stats["slot_bytes"] < 1.2 * least
    assert pool._numbers.stride(0) % 64 == 0


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


def test_names(one_linear):
    pool, _, adapters = one_linear()
    for name in ("", None, 3):
        with pytest.raises(InputError, match="adapter name: expected a word"):
            pool.put(name, adapters["a"])
    pool.put("support", adapters["a"])
    with pytest.raises(InputError, match="no adapter is named 'suport'.*did you mean 'support'"):
        pool.acquire(["suport"])
    with pytest.raises(InputError, match="no adapter is named"):
        pool.evict("x")
    with pytest.raises(InputError, match="did you mean '0'|there are '0'"):
        pool.at("1")
