"""The pool's rules: replacing, evicting, host memory, a full pool, what is left of a slot."""

import pytest
import torch

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
    stats = pool.stats()
    assert stats["host_bytes"] == sizes["a"] + sizes["b"] and stats["adapters"]["a"]["bytes"]
    assert stats["host_copies_bytes"] == sizes["c"] == stats["adapters"]["c"]["bytes"]
    pool, _, _ = one_linear(slots=1, host_bytes=sizes["b"] + sizes["c"])
    for name in "abcd":  # c takes the room of a, as d has its slot
        pool.put(name, adapters[name])
    assert "a" not in pool and all(name in pool for name in "bcd")
    with pytest.raises(InputError, match="no adapter is named 'a' .*load it again"):
        pool.acquire(["a"])
    for name in "bcd":
        pool.evict(name)
    assert pool.stats()["adapters"] == {} and pool.stats()["host_bytes"] == 0


def test_what_is_used_most_is_not_what_host_memory_forgets(one_linear):
    pool, _, adapters = one_linear(slots=2, rank=1)
    one = pool._places.pack("a", adapters["a"], torch.float32, False).bytes
    pool.host_bytes = 2 * one
    pool.put("a", adapters["a"])
    for name in "bcd":
        pool.put(name, adapters[name])
        pool.release(pool.acquire(["a"]))  # always on the device
    assert set(pool._host) == set("abcd")
    pool.release(pool.acquire(["b", "c"]))  # d and a give their slots up, in the order of use
    assert [n for n in pool._host if pool._table.find(n) < 0] == ["d", "a"]
    pool.release(pool.acquire(["a"]))
    assert all(name in pool for name in "abcd")


def test_an_adapter_too_large_to_wait_takes_no_one_elses_place(one_linear):
    pool, _, adapters = one_linear(slots=1, rank=60)
    large = {"0.lora_A": torch.randn(60, 16), "0.lora_B": torch.randn(24, 60)}
    small = pool._places.pack("a", adapters["a"], torch.float32, False).bytes
    pool.host_bytes = 3 * small
    for name in ("x", "y", "d"):
        pool.put(name, large if name == "d" else adapters["a"])
    assert set(pool._host) == {"x", "y"} and "d" in pool
    assert pool.stats()["adapters"]["d"]["bytes"] > 3 * small
    pool.release(pool.acquire(["x"]))
    assert "d" not in pool and "y" in pool


def test_a_replaced_adapter_costs_no_one_else_a_slot(one_linear, x):
    pool, linear, adapters = one_linear(slots=2, host_bytes=0)
    pool.put("a", adapters["a"])
    slot = pool.put("b", adapters["b"])
    assert pool.put("b", adapters["d"]) == slot and "a" in pool
    torch.testing.assert_close(output(pool, linear, [slot], x), alone(linear, adapters["d"], x))
    assert pool.stats()["adapters"]["a"]["host_bytes"] == 0 < pool.stats()["adapters"]["a"]["bytes"]


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
        llama,
        slots=5,
        max_rank=3,
        max_prefix=2,
        max_prompt=4,
        bottleneck=fp.BottleneckAdapter(size=6),
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


def test_a_head_that_is_given_another_weight(llama, ids):
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=4)
    pool.install(llama)
    with pool.batch([None] * len(ids)):
        before = llama(ids[:, :1]).logits
        llama.lm_head.weight = torch.nn.Parameter(2.0 * llama.lm_head.weight)
        torch.testing.assert_close(llama(ids[:, :1]).logits, 2.0 * before)
