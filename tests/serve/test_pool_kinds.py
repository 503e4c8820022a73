"""Prefixes, soft prompts and bottleneck adapters in an installed model: row by row what the model
computes with that adapter attached."""

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.serve.checkpoint import read_adapter

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "adapterhub"
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
NEW = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)


def filled(pool, model, adapted, configs) -> dict:
    """The pool with these adapters; {name: the model with it attached}, None for the base."""
    alone = {None: copy.deepcopy(model)}
    for seed, (name, config) in enumerate(configs.items()):
        folder, alone[name] = adapted(model, config, seed)
        alone[name].folder = folder
        pool.load(name, folder)
    return alone


def padded(ids):
    """The same with two tokens of padding on the left of row 1, and its mask."""
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


KINDS = {
    "prefix": {"max_prefix": 8},
    "prompt": {"max_prompt": 8},
    "bottleneck": {"bottleneck": fp.BottleneckAdapter(size=9, activation="gelu_tanh")},
}
CONFIGS = {
    "prefix": {"a": fp.PrefixTuning(5), "b": fp.PrefixTuning(8), "c": fp.PrefixTuning(5)},
    "prompt": {"a": fp.PromptTuning(3), "b": fp.PromptTuning(8), "c": fp.PromptTuning(3)},
    "bottleneck": {
        name: fp.BottleneckAdapter(size=size, activation="gelu_tanh", scale=scale)
        for name, size, scale in (("a", 4, 1.0), ("b", 9, 0.5), ("c", 1, 2.0))
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_its_own(build, ids, adapted, kind, lively):
    base = lively(build())
    plain = base(ids).logits
    pool = fp.AdapterPool.for_model(base, slots=3, max_rank=4, **KINDS[kind])
    alone = filled(pool, base, adapted, CONFIGS[kind])
    pool.install(base)
    torch.testing.assert_close(base(ids).logits, plain)
    for names in (["a", "b", None, "c"], ["b"] * 4, [None] * 4):
        for given in ({"input_ids": ids}, padded(ids)):
            with pool.batch(names):
                got = base(**given).logits
            for row, name in enumerate(names):
                one = {key: value[row : row + 1] for key, value in given.items()}
                seen = given.get("attention_mask", torch.ones_like(ids))[row] == 1
                want = alone[name](**one).logits[0]
                torch.testing.assert_close(got[row][seen], want[seen], rtol=1e-4, atol=1e-4)
    pool.uninstall()
    assert torch.equal(base(ids).logits, plain)
    assert pool.stats()["held"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_generation(build, ids, adapted, kind, lively):
    """With a cache that grows and one that is allocated, and with padding."""
    base = lively(build())
    pool = fp.AdapterPool.for_model(base, slots=3, max_rank=4, **KINDS[kind])
    alone = filled(pool, base, adapted, CONFIGS[kind])
    pool.install(base)
    names = ["a", "b", None, "c"]
    for given, cache in (
        (padded(ids), "dynamic"), ({"input_ids": ids}, "dynamic"), ({"input_ids": ids}, "static")
    ):  # fmt: skip
        with pool.batch(names):
            got = base.generate(**given, **NEW, cache_implementation=cache)
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in given.items()}
            assert torch.equal(got[row], alone[name].generate(**one, **NEW)[0])


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_second_turn_on_the_cache(build, ids, adapted, kind, lively):
    base = lively(build())
    pool = fp.AdapterPool.for_model(base, slots=3, max_rank=4, **KINDS[kind])
    filled(pool, base, adapted, CONFIGS[kind])
    pool.install(base)
    with pool.batch(["a", "b", None, "c"]):
        first = base.generate(ids, return_dict_in_generate=True, **NEW)
        turn = torch.cat((first.sequences, ids[:, :3]), 1)
        second = base.generate(turn, past_key_values=first.past_key_values, **NEW)
        assert torch.equal(second, base.generate(turn, use_cache=False, **NEW))


def test_every_kind_in_one_batch(build, ids, adapted, lively):
    """And one adapter that is of all kinds."""
    base = lively(build())
    limits = {key: value for kind in KINDS.values() for key, value in kind.items()}
    pool = fp.AdapterPool.for_model(base, slots=5, max_rank=4, **limits)
    configs = {kind: CONFIGS[kind]["b"] for kind in KINDS} | {"lora": fp.LoRA(rank=3)}
    alone = filled(pool, base, adapted, configs)
    everything = {}
    for kind in configs:
        everything |= read_adapter(alone[kind].folder, pool._places)
    pool.put("all", everything)
    alone["all"] = fp.attach(copy.deepcopy(base), configs["prefix"], "prefix")
    for kind in ("prompt", "bottleneck", "lora"):
        fp.attach(alone["all"], configs[kind], kind)
    for kind in configs:
        source = alone[kind].state_dict()
        own = {k.replace(".one", f".{kind}"): v for k, v in source.items() if ".one" in k}
        assert own and not alone["all"].load_state_dict(own, strict=False).unexpected_keys
    fp.activate(alone["all"].eval(), list(configs))
    pool.install(base)
    for names in (["prefix", "lora", None, "all"], ["prompt", "all", "bottleneck", "prefix"]):
        with pool.batch(names):
            got, new = base(ids).logits, base.generate(ids, **NEW)
        for row, name in enumerate(names):
            want = alone[name](ids[row : row + 1]).logits[0]
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)
            assert torch.equal(new[row], alone[name].generate(ids[row : row + 1], **NEW)[0])


def test_prefixes_of_an_encoder(ids, adapted, lively):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, num_hidden_layers=2, num_attention_heads=4, hidden_size=24,
                 intermediate_size=40, max_position_embeddings=32)  # fmt: skip
    base = lively(BertForSequenceClassification(BertConfig(**sizes))).eval().requires_grad_(False)
    pool = fp.AdapterPool.for_model(base, slots=2, max_rank=0, max_prefix=8)
    alone = filled(pool, base, adapted, {"a": fp.PrefixTuning(5), "b": fp.PrefixTuning(8)})
    pool.install(base)
    names = ["a", None, "b", "a"]
    for given in ({"input_ids": ids}, padded(ids)):
        with pool.batch(names):
            got = base(**given).logits
        for row, name in enumerate(names):
            want = alone[name](**given).logits[row]
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)
    with pool.batch([None] * 4), pytest.raises(InputError, match="no adapter is named 'c'"):
        pool.acquire(["c"])
    with (
        pool.batch(["b"] * 4),
        pytest.raises(InputError, match="at most 32 positions, .* got 27 to"),
    ):
        base(ids.repeat(1, 3))


@pytest.mark.parametrize("norm", [None, "layer_norm"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_bottleneck_placements(llama, ids, adapted, kind, placement, norm):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, num_hidden_layers=2, num_attention_heads=4, hidden_size=24,
                 intermediate_size=40, max_position_embeddings=32)  # fmt: skip
    t5 = dict(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
              decoder_start_token_id=0)  # fmt: skip
    base = {
        "llama": lambda: llama,
        "bert": lambda: BertForSequenceClassification(BertConfig(**sizes)),
        "t5": lambda: T5(T5Config(**t5)),
    }[kind]().eval().requires_grad_(False)  # fmt: skip
    given = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" else {})
    common = dict(placement=placement, activation="silu", norm=norm)
    pool = fp.AdapterPool.for_model(
        base, slots=2, max_rank=0, bottleneck=fp.BottleneckAdapter(size=16, **common)
    )
    configs = {n: fp.BottleneckAdapter(size=s, **common) for n, s in (("a", 5), ("b", 16))}
    alone = filled(pool, base, adapted, configs)
    pool.install(base)
    names = ["a", None, "b", "a"]
    with pool.batch(names):
        got = base(**given).logits
    for row, name in enumerate(names):
        want = alone[name](**given).logits[row]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)
    assert (got[0] - alone[None](**given).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bart", "gpt2", "llama", "roberta", "t5"])
def test_adapterhub_s_own(family, placement):
    """A checkpoint that the `adapters` package wrote, by name, and the logits that it computed."""
    golden = load_file(GOLDEN / family / "logits.safetensors")
    kind = json.loads((GOLDEN / family / "config.json").read_text())["architectures"][0]
    base = getattr(transformers, kind).from_pretrained(GOLDEN / family).eval()
    folder, ids = GOLDEN / family / placement, golden["ids"]
    settings = json.loads((folder / "adapter_config.json").read_text())["config"]
    activation = {"swish": "silu"}.get(settings["non_linearity"], settings["non_linearity"])
    common = fp.BottleneckAdapter(size=8, placement=placement, activation=activation)
    pool = fp.AdapterPool.for_model(base, slots=1, max_rank=0, bottleneck=common)
    pool.load("theirs", folder)
    pool.install(base)
    given = {"input_ids": ids}
    given |= {"decoder_input_ids": ids.flip(0)} if base.config.is_encoder_decoder else {}
    with pool.batch(["theirs"] * (len(ids) - 1) + [None]):
        got = base(**given).logits
    torch.testing.assert_close(got[:-1], golden[placement][:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[-1], golden["base"][-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_in_fp32_beside_a_model_in_16_bits(llama, ids, adapted, kind):
    exact, low = copy.deepcopy(llama), llama.to(torch.bfloat16)
    pool = fp.AdapterPool.for_model(low, slots=3, max_rank=0, dtype=torch.float32, **KINDS[kind])
    alone = filled(pool, exact, adapted, CONFIGS[kind])
    names = ["a", None, "b", "c"]
    pool.install(low)
    with pool.batch(names):
        got = low(ids).logits
    for row, name in enumerate(names):
        want = alone[name](ids[row : row + 1]).logits[0]
        lost = alone[name].to(torch.bfloat16)(ids[row : row + 1]).logits[0].float() - want
        assert (got[row].float() - want).norm() <= 2 * lost.norm()
        alone[name].float()


def test_threads(llama, ids, adapted, lively):
    base = lively(llama)
    limits = {key: value for kind in KINDS.values() for key, value in kind.items()}
    pool = fp.AdapterPool.for_model(base, slots=3, max_rank=0, **limits)
    filled(pool, base, adapted, {kind: CONFIGS[kind]["a"] for kind in KINDS})
    pool.install(base)

    def run(names):
        with pool.batch(names):
            return base(ids).logits

    batches = [list(names) for names in itertools.permutations([*KINDS, None])][::5]
    alone = [run(names) for names in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, batches * 8))
    for i, got in enumerate(together):
        torch.testing.assert_close(got, alone[i % len(batches)], rtol=0, atol=1e-5)


def test_what_is_refused(llama, ids, adapted, tmp_path):
    folder, theirs = adapted(llama, fp.BottleneckAdapter(size=4, activation="tanh"))
    common = dict(slots=1, max_rank=0)
    for config, said in (
        (fp.BottleneckAdapter(size=4), "expected activation 'relu', as the pool's, got 'tanh'"),
        (fp.BottleneckAdapter(size=4, placement="pfeiffer", activation="tanh"), "expected placem"),
        (fp.BottleneckAdapter(size=3, activation="tanh"), r"is of size 4, expected 1\.\.3"),
        (None, "the pool was made without them"),
    ):
        limits = {"max_prompt": 2} if config is None else {"bottleneck": config}
        pool = fp.AdapterPool.for_model(llama, **common, **limits)
        with pytest.raises(InputError, match=said):
            pool.load("a", folder)
        assert pool.stats()["free"] == 1
    with pytest.raises(InputError, match="bottleneck: expected a BottleneckAdapter or None, got i"):
        fp.AdapterPool.for_model(llama, bottleneck=4)
    with pytest.raises(InputError, match=r"install: expected a model without attached .*\['one'\]"):
        fp.AdapterPool.for_model(llama, **common, max_prompt=2).install(theirs)
    pool = fp.AdapterPool.for_model(llama, **common, max_prefix=5, max_prompt=2)
    for name, config in (("x", fp.PrefixTuning(5)), ("p", fp.PromptTuning(2))):
        pool.load(name, adapted(llama, config)[0])
        pool.install(llama)
        with pool.batch([name] * 3), pytest.raises(ValueError, match="expected 3 rows"):
            llama(ids)
        pool.uninstall()
    t5 = T5(T5Config(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3))
    with pytest.raises(InputError, match="expected max_prefix 0 and max_prompt 0"):
        fp.AdapterPool.for_model(t5, max_rank=0, max_prompt=2)
    sizes = dict(d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
    sizes |= dict(decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=61)
    bart = transformers.BartForCausalLM(transformers.BartConfig(**sizes))
    with pytest.raises(InputError, match="BartDecoder counts its own: expected max_prompt 0"):
        fp.AdapterPool.for_model(bart, max_rank=0, max_prompt=2)
