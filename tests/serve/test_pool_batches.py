"""Whose batch is open: by thread and by task, in whatever order they end; and what an installed
model does not let itself be used for."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
import transformers
from transformers import OPTConfig, OPTForCausalLM

import fusedpeft as fp
from fusedpeft.errors import InputError

OPT = dict(
    vocab_size=61, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=24, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def lora(pool, seed):
    """Tensors of an adapter on each linear of the pool."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for place in pool._places.of("lora"):
        n, k = place.fields["lora_B"].shape[0], place.fields["lora_A"].shape[1]
        found[f"{place.path}.lora_A"] = torch.randn(2, k, generator=g)
        found[f"{place.path}.lora_B"] = torch.randn(n, 2, generator=g)
    return found


@pytest.fixture
def served(llama, ids):
    """(pool, the installed model, ids, {name: logits alone, None: the base's})."""
    pool = fp.AdapterPool.for_model(llama, slots=3, max_rank=2)
    for i, name in enumerate("ab"):
        pool.put(name, lora(pool, i))
    alone = {None: llama(ids).logits}
    pool.install(llama)
    for name in "ab":
        with pool.batch([name] * len(ids)):
            alone[name] = llama(ids).logits
    return pool, llama, ids, alone


def is_alone(got, alone, name):
    torch.testing.assert_close(got, alone[name], rtol=0, atol=1e-5)
    return True


def test_tasks_take_turns(served):
    pool, model, ids, alone = served

    async def request(name, naps):
        with pool.batch([name] * len(ids)):
            for _ in range(naps):
                await asyncio.sleep(0)
                assert is_alone(model(ids).logits, alone, name) and not torch.is_grad_enabled()
        return name

    async def all_of_them():
        return await asyncio.gather(request("a", 3), request("b", 1), request("a", 2))

    assert asyncio.run(all_of_them()) == ["a", "b", "a"]
    assert torch.is_grad_enabled() and pool.stats()["held"] == 0
    assert is_alone(model(ids).logits, alone, None)


def test_a_task_that_outlives_the_batch_it_was_started_in_is_told(served):
    pool, model, ids, _ = served

    async def late():
        await asyncio.sleep(0.01)
        return model(ids)

    async def run():
        with pool.batch(["a"] * len(ids)):
            task = asyncio.create_task(late())
        with pytest.raises(InputError, match="started has ended"):
            await task

    asyncio.run(run())


def test_generators_do_not_take_each_others_batch(served):
    pool, model, ids, alone = served

    def stream(name):
        with pool.batch([name] * len(ids)):
            while True:
                yield model(ids).logits

    one, two = stream("a"), stream("b")
    assert is_alone(next(one), alone, "a")
    with pytest.raises(InputError, match="one is open here already"):
        next(two)
    assert is_alone(next(one), alone, "a")
    one.close()
    two = stream("b")
    assert is_alone(next(two), alone, "b")
    two.close()
    pool.evict("a")
    assert is_alone(model(ids).logits, alone, None) and torch.is_grad_enabled()


def test_another_thread_needs_a_batch_of_its_own(served):
    pool, model, ids, alone = served
    said, got = [], []

    def run(names):
        try:
            if names is None:
                model(ids)
            else:
                with pool.batch(names):
                    got.append(model(ids).logits)
        except InputError as error:
            said.append(str(error))

    with pool.batch(["a"] * len(ids)):
        for names in (None, ["b"] * len(ids), [None] * len(ids)):
            thread = threading.Thread(target=run, args=(names,))
            thread.start()
            thread.join()
        assert is_alone(model(ids).logits, alone, "a")
        inner = asyncio.run(
            asyncio.to_thread(lambda: model(ids).logits)
        )  # takes this context along
        assert is_alone(inner, alone, "a")
    assert len(said) == 1 and "none is open here" in said[0]
    assert is_alone(got[0], alone, "b") and is_alone(got[1], alone, None)


def test_a_batch_needs_a_model_that_reads_it(llama):
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=2)
    with pytest.raises(InputError, match=r"pool\.install\(model\)"), pool.batch([None]):
        pass


@pytest.mark.parametrize("limits", [{"max_rank": 2}, {"max_rank": 0, "max_prefix": 2}])
def test_one_pool_at_a_time_and_nothing_else(llama, limits):
    pools = [fp.AdapterPool.for_model(llama, slots=1, **limits) for _ in range(2)]
    before = {name: id(t) for name, t in llama.named_parameters()}
    pools[0].install(llama)
    with pytest.raises(InputError, match="served by a pool already"):
        pools[1].install(llama)
    with pytest.raises(InputError, match="served by an AdapterPool"):
        fp.attach(llama, fp.PromptTuning(2))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="uninstall it first"):
            copied(llama)
    pools[0].uninstall()
    assert {name: id(t) for name, t in llama.named_parameters()} == before
    assert copy.deepcopy(llama).config._attn_implementation != "fusedpeft"
    pools[1].install(llama)


def test_weights_and_biases_that_are_written_are_the_ones_used(served):
    pool, model, ids, _ = served
    other = {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(other)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.add_(1.0)
    want = model(ids).logits
    with pool.batch([None] * len(ids)):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    model.load_state_dict(other, assign=True)
    with pool.batch([None] * len(ids)), pytest.raises(InputError, match="assign=True"):
        model(ids)
    pool.uninstall()
    weights = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert len(weights) == len(list(model.parameters()))  # each in memory of its own


def test_attention_that_was_changed_since_is_said(llama, ids):
    pool = fp.AdapterPool.for_model(llama, slots=1, max_rank=0, max_prefix=2)
    layers = pool._places.of("prefix")
    pool.put("a", {f"{p.path}.{n}": torch.randn(2, 2, 6) for p in layers for n in p.fields})
    pool.install(llama)
    llama.set_attn_implementation("eager")
    with pool.batch(["a"] * len(ids)), pytest.raises(InputError, match="got 'eager', set since"):
        llama(ids)
    pool.uninstall()
    fp.attach(llama, fp.PrefixTuning(2)).set_attn_implementation("eager")
    with pytest.raises(InputError, match="got 'eager', set since"):
        llama(ids)


def test_opt_lays_tokens_end_to_end_and_goes_around_its_backbone(ids, tmp_path):
    torch.manual_seed(0)
    base = OPTForCausalLM(OPTConfig(**OPT)).eval().requires_grad_(False)
    pool = fp.AdapterPool.for_model(base, slots=3, max_rank=2, max_prompt=4)
    plain, rows = base(ids).logits, {}
    for i, name in enumerate("ab"):
        pool.put(name, lora(pool, i))
    theirs = fp.attach(copy.deepcopy(base), fp.PromptTuning(3))
    fp.save_adapter(theirs, tmp_path / "prompt")
    pool.load("p", tmp_path / "prompt")
    rows["p"] = theirs(ids).logits
    assert (rows["p"] - plain).abs().max() > 1e-3
    pool.install(base)
    for name in "ab":
        for row in range(len(ids)):
            with pool.batch([name]):
                rows[name, row] = base(ids[row : row + 1]).logits[0]
    with pool.batch(["b", "p", None, "a"]):
        got = base(ids).logits
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[0], rows["b", 0], **close)
    torch.testing.assert_close(got[1], rows["p"][1], **close)
    torch.testing.assert_close(got[2], plain[2], **close)
    torch.testing.assert_close(got[3], rows["a", 3], **close)


def test_prompts_beside_token_types_and_hidden_states_and_too_many_positions(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    ids = torch.randint(3, 61, (2, 6))
    theirs = fp.attach(copy.deepcopy(base), fp.PromptTuning(4))
    fp.save_adapter(theirs, tmp_path / "prompt")
    more = dict(token_type_ids=torch.ones_like(ids), output_hidden_states=True)
    want = theirs(ids, **more)
    pool = fp.AdapterPool.for_model(base, slots=1, max_rank=0, max_prompt=4)
    pool.load("p", tmp_path / "prompt")
    pool.install(base)
    with pool.batch(["p", "p"]):
        got = base(ids, **more)
        torch.testing.assert_close(got.logits, want.logits)
        for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
            assert a.shape == (2, 6, 24)
            torch.testing.assert_close(a, b)
        with pytest.raises(
            InputError, match="at most 32 positions.* got 30 tokens behind a prompt"
        ):
            base(torch.ones(2, 30, dtype=torch.long))
