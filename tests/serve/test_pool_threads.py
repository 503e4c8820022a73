"""Threads that load, replace, evict and decode at once: every output is the single adapter's."""

import random
import threading

import pytest
import torch

from fusedpeft import ops

NAMES = "abcdefghijklmnop"
THREADS = 4


def run(one_linear, steps: int) -> dict[str, int]:
    """`steps` in all threads together; the counts of what was done."""
    pool, linear, adapters = one_linear(NAMES, slots=12, rank=4)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    # "p" is replaced, now by one adapter, now by another, while it is in use.
    either = {name: (name,) for name in NAMES} | {"p": ("p", "a")}
    want = {
        name: torch.cat([ops.lora_linear_ref(
            x[i : i + 1], linear.weight, *adapters[name].values(), linear.bias) for i in range(3)])
        for name in NAMES
    }  # fmt: skip
    base = torch.nn.functional.linear(x, linear.weight, linear.bias)
    for name in NAMES:
        pool.put(name, adapters[name])
    kinds, slots_of, done, failures = ("decode", "load", "evict"), pool.at("0"), [], []

    def decode(pick: random.Random) -> None:
        names = [pick.choice(NAMES), pick.choice((None, *NAMES)), pick.choice(NAMES)]
        try:
            slots = pool.acquire(names)
        except ValueError as error:  # evicted: nothing may be held
            assert "no adapter is named" in str(error), error
            return
        try:
            held = torch.tensor(slots, dtype=torch.int32)
            got = [ops.multi_lora_linear(x, linear.weight, slots_of, held, linear.bias)]
            if pick.random() < 0.2:  # others load and evict in between
                got.append(ops.multi_lora_linear(x, linear.weight, slots_of, held, linear.bias))
                assert torch.equal(got[0], got[1]), f"{names} changed while held"
            for i, name in enumerate(names):
                options = [base] if name is None else [want[n] for n in either[name]]
                close = [torch.allclose(got[0][i], w[i], rtol=1e-5, atol=1e-5) for w in options]
                assert any(close), f"row {i} of {names} is not its adapter's"
        finally:
            pool.release(slots)

    def work(seed: int) -> None:
        pick, counts = random.Random(seed), dict.fromkeys(kinds, 0)
        try:
            for _ in range(steps // THREADS):
                kind = pick.choices(kinds, (8, 1.5, 0.5))[0]
                name = pick.choice(NAMES)
                if kind == "decode":
                    decode(pick)
                elif kind == "load":
                    pool.put(name, adapters[pick.choice(either[name])])
                elif name in pool:
                    try:
                        pool.evict(name)
                    except ValueError as error:  # another thread was first
                        assert "no adapter is named" in str(error), error
                counts[kind] += 1
        except BaseException as error:
            failures.append(error)
        done.append(counts)  # added up once all have ended: += of two threads may lose one

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    stats = pool.stats()
    assert stats["held"] == stats["retired"] == stats["loading"] == 0
    live = {a["slot"] for a in stats["adapters"].values()} - {None}
    for slot in range(12):  # and what is free is clean
        assert pool._numbers[slot].any() == (slot in live)
    return {kind: sum(counts[kind] for counts in done) for kind in kinds}


def test_ten_thousand_steps(one_linear):
    done = run(one_linear, 10_000)
    assert sum(done.values()) == 10_000 and min(done.values()) > 100


@pytest.mark.slow
def test_a_hundred_thousand_steps(one_linear):
    assert sum(run(one_linear, 100_000).values()) == 100_000
