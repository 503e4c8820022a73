"""Checkpoints of PEFT's, loaded into the pool: what comes out is what PEFT computes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedpeft as fp
from fusedpeft import ops
from fusedpeft.errors import InputError

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to:UserWarning", "ignore:.*is_gradient_checkpointing"
)
LORA = {
    "plain": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 7, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 3, "target_modules": "all-linear", "rank_pattern": {r"0\..*": 6},
        "alpha_pattern": {"c_fc|up_proj": 5},
    },
    "few": {"r": 8, "target_modules": ["c_attn", "q_proj", "v_proj", "down_proj"]},
    "one layer": {
        "r": 2, "target_modules": ["c_fc", "k_proj", "up_proj"], "layers_to_transform": [1],
    },
}  # fmt: skip


def test_a_mixed_batch_of_lora_is_each_adapter_alone(build, ids, peft_adapter):
    """Every kind of LoRA checkpoint in one batch, a row without any between them."""
    base = build()
    pool = fp.AdapterPool.for_model(base, slots=len(LORA), max_rank=8)
    want, plain = {}, base(ids).logits
    for seed, (name, settings) in enumerate(LORA.items()):
        folder, theirs = peft_adapter(base, peft.LoraConfig(**settings, lora_alpha=9), seed)
        want[name] = theirs(ids).logits
        assert (want[name] - plain).abs().max() > 1e-2
        assert pool.load(name, folder) == pool.slot(name) == seed
    want[None] = plain
    pool.install(base)
    for names in (["plain", None, "rslora", "few"], ["patterns", "one layer", "patterns", None]):
        with pool.batch(names):
            got = base(ids).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(got[row], want[name][row], rtol=0, atol=1e-5)
    torch.testing.assert_close(base(ids).logits, plain, rtol=0, atol=1e-6)  # no batch: the base
    pool.uninstall()
    assert torch.equal(base(ids).logits, plain)
    assert pool.stats()["held"] == 0


def test_a_token_each(build, ids, peft_adapter):
    """Packed rows: as many names as tokens. And generation with a cache, prefill and decode."""
    base = build()
    pool = fp.AdapterPool.for_model(base, slots=2, max_rank=8)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    folder, theirs = peft_adapter(base, config)
    pool.load("a", folder)
    pool.install(base)
    with pool.batch(["a"] * 9, by_token=True):
        packed = base(ids[:1]).logits
    torch.testing.assert_close(packed, theirs(ids[:1]).logits, rtol=0, atol=1e-5)
    with pool.batch(["a", None]):
        got = base.generate(ids[:2], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(
        got[:1], theirs.generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False,
                                 eos_token_id=None, attention_mask=torch.ones(1, 9)),
    )  # fmt: skip
    with pool.batch(["a", "a"]), pytest.raises(ValueError, match="batch: expected 2 rows"):
        base(ids)
    with pool.batch(["a"] * 4), pytest.raises(ValueError, match="batch: expected 4 rows"):
        base(ids[:1, :4])  # as many tokens
    with pool.batch(["a"] * 4, by_token=True), pytest.raises(ValueError, match="expected 4 tokens"):
        base(ids)  # as many rows


def test_threads_share_an_installed_model(build, ids, peft_adapter):
    """Each has its own batch, and its own place in a stacked product."""
    base = build()
    pool = fp.AdapterPool.for_model(base, slots=2, max_rank=8)
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(r=3 + seed, target_modules="all-linear")
        pool.load(name, peft_adapter(base, config, seed)[0])
    pool.install(base)

    def run(names):
        with pool.batch(names):
            return base(ids).logits

    batches = (["a", "b", None, "a"], ["b", None, "a", "b"], [None, "a", "b", "b"])
    alone = [run(names) for names in batches]
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    with ThreadPoolExecutor(len(batches)) as threads:
        together = list(threads.map(run, batches * 10))
    for i, got in enumerate(together):
        torch.testing.assert_close(got, alone[i % 3], rtol=0, atol=1e-6)


def test_our_own_checkpoints(llama, ids, tmp_path):
    ours = fp.attach(copy.deepcopy(llama), fp.LoRA(rank=5, alpha=3, rslora=True))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora_B" in name:
                p.normal_()
    fp.save_adapter(ours, tmp_path)
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=8)
    pool.load("a", tmp_path)
    pool.install(llama)
    with pool.batch(["a"] * 4):
        torch.testing.assert_close(llama(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


def test_the_views_of_stacked_linears_share_their_numbers(llama, peft_adapter):
    pool = fp.AdapterPool.for_model(llama, slots=2, max_rank=8)
    folder, theirs = peft_adapter(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    pool.load("a", folder)
    block = "model.layers.1.self_attn."
    paths = [block + name for name in ("q_proj", "k_proj", "v_proj")]
    q, k, v = (pool.at(p) for p in paths)
    stack, slots = pool.at(*paths), torch.tensor([0, -1, 0], dtype=torch.int32)
    assert stack.sizes == (24, 12, 12) and stack.rank.tolist() == [[4, 0, 4], [-1, -1, -1]]
    x, weights = torch.randn(3, 24), [llama.get_submodule(p).weight for p in paths]
    whole = ops.multi_lora_linear(x, torch.cat(weights), stack, slots)
    parts = [ops.multi_lora_linear(x, w, s, slots) for w, s in zip(weights, (q, k, v), strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts, 1))
    inner = theirs.base_model.model.get_submodule(paths[2])
    torch.testing.assert_close(parts[2][::2], inner(x)[::2])
    for single in (q, k, v):
        assert single.a.untyped_storage().data_ptr() == stack.a.untyped_storage().data_ptr()


def test_weights_are_there_once_while_installed(build):
    base = build()
    before = {name: p.clone() for name, p in base.named_parameters()}
    pool = fp.AdapterPool.for_model(base, slots=1, max_rank=8)
    pool.install(base)
    for paths in pool.stacked():
        modules = [base.get_submodule(p) for p in paths]
        assert len({m.weight.untyped_storage().data_ptr() for m in modules}) == 1
    with pytest.raises(InputError, match="serves a model already"):
        pool.install(base)
    with pytest.raises(InputError, match="hooks"):
        fp.AdapterPool.for_model(base, slots=1)
    pool.uninstall()
    assert not any("forward" in module.__dict__ for module in base.modules())
    with pytest.raises(InputError, match=r"with a linear at .*, got a \w+ that has none there"):
        pool.install(base.base_model)  # paths begin elsewhere
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name]) and p.is_contiguous()
    storages = [m.weight.untyped_storage().data_ptr() for m in map(base.get_submodule, paths)]
    assert len(set(storages)) == len(paths)


def test_prefixes(build, peft_adapter):
    base = build()
    pool = fp.AdapterPool.for_model(base, slots=2, max_rank=0, max_prefix=8)
    kind = peft.TaskType.CAUSAL_LM
    for seed, length in enumerate((5, 8)):
        for projected in (False, True):
            config = peft.PrefixTuningConfig(
                task_type=kind, num_virtual_tokens=length, prefix_projection=projected,
                encoder_hidden_size=10,
            )  # fmt: skip
            folder, theirs = peft_adapter(base, config, seed)
            slot = pool.load(f"p{seed}", folder)
            cache = theirs.get_prompt(batch_size=1)
            paths = [p for k, (p, *_) in pool._views if k == "prefix"]
            assert len(paths) == 2
            for layer, path in enumerate(paths):
                got = pool.at(path)
                assert got.length[slot] == length
                for mine, want in ((got.k, "keys"), (got.v, "values")):
                    torch.testing.assert_close(
                        mine[slot, :, :length], getattr(cache.layers[layer], want)[0]
                    )


def test_prompts(llama, ids, peft_adapter):
    pool = fp.AdapterPool.for_model(llama, slots=2, max_rank=0, max_prompt=6)
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4)
    folder, theirs = peft_adapter(llama, config)
    slot = pool.load("p", folder)
    got = pool.at("model.embed_tokens")
    assert got.length.tolist() == [4, -1]
    embedded = ops.soft_prompt_embedding(
        ids, llama.model.embed_tokens.weight, got.prompt[slot, :4].contiguous()
    )
    torch.testing.assert_close(
        llama(inputs_embeds=embedded).logits, theirs(ids).logits, rtol=0, atol=1e-5
    )


def test_bottleneck_adapters_beside_lora(llama):
    pool = fp.AdapterPool.for_model(
        llama, slots=2, max_rank=4, bottleneck=fp.BottleneckAdapter(size=12)
    )
    g = torch.Generator().manual_seed(0)
    place, linear = "model.layers.0.mlp", "model.layers.0.mlp.down_proj"
    sizes = {"down_w": (5, 24), "up_w": (24, 5), "down_b": (5,), "up_b": (24,)}
    given = {f"{place}.{name}": torch.randn(s, generator=g) for name, s in sizes.items()}
    lora = {"lora_A": torch.randn(2, 40, generator=g), "lora_B": torch.randn(24, 2, generator=g)}
    given |= {f"{place}.scale": 0.5} | {f"{linear}.{name}": t for name, t in lora.items()}
    slot = pool.put("both", given)
    x, slots = torch.randn(3, 24, generator=g), torch.tensor([slot, -1, slot], dtype=torch.int32)
    got = ops.multi_bottleneck_adapter(x, pool.at(place), slots, residual=x)
    parts = [given[f"{place}.{name}"] for name in ("down_w", "down_b", "up_w", "up_b")]
    want = ops.bottleneck_adapter_ref(x, *parts, scale=0.5, residual=x)
    torch.testing.assert_close(got[::2], want[::2])
    assert torch.equal(got[1], x[1])
    assert pool.at("model.layers.1.mlp").size.tolist() == [0, -1]  # this adapter leaves it alone
    assert pool.at(linear).rank.tolist() == [[2], [-1]]
    with pytest.raises(InputError, match="no slots at 'model.layers.0.mlp'"):
        pool.at(place, kind="prefix")


@pytest.mark.parametrize(
    "base_dtype, dtype", [(torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_dtypes(llama, ids, peft_adapter, base_dtype, dtype):
    wide = torch.float32
    folder, theirs = peft_adapter(llama, peft.LoraConfig(r=4, target_modules="all-linear"))
    exact = theirs(ids).logits
    llama.to(base_dtype)
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=8, dtype=dtype)
    pool.load("a", folder)
    assert pool.at("model.layers.0.mlp.down_proj").a.dtype == (dtype or base_dtype)
    pool.install(llama)
    with pool.batch(["a"] * 4):
        got = llama(ids).logits
    theirs.to(base_dtype)
    low = (theirs(ids).logits.to(wide) - exact).norm()
    assert (got.to(wide) - exact).norm() <= 2 * low
