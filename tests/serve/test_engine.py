"""Continuous batching: every answer is the one that its adapter gives alone."""

import copy
import itertools
import threading

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.serve.engine import READ, Busy, Engine, Request

VOCAB = 61


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes of UTF-8 for ids from 3 on, of Korean letters and of a few of ASCII."""
    seen = dict.fromkeys(["<pad>", "<s>", "</s>"])
    seen |= dict.fromkeys(f"<0x{b:02X}>" for b in "가나다 abcdefghijkl.한국어말을해요".encode())
    words = {word: i for i, word in enumerate(seen)}
    for i in range(len(words), VOCAB):
        words[f"w{i} "] = i
    inner = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def served(build, adapted, lively):
    """(kinds of adapters -> config, slots) -> (pool installed in a model, {name: model alone})."""

    def made(configs: dict, slots: int = 8):
        base = lively(build())
        pool = fp.AdapterPool.for_model(
            base, slots, 4, max_prefix=8, max_prompt=8, bottleneck=fp.BottleneckAdapter(size=9)
        )
        alone = {None: copy.deepcopy(base)}
        for seed, (name, config) in enumerate(configs.items()):
            folder, alone[name] = adapted(base, config, seed)
            alone[name].folder = folder
            pool.load(name, folder)
        pool.install(base)
        return base, pool, alone

    return made


CONFIGS = {
    "lora": fp.LoRA(rank=3),
    "prefix": fp.PrefixTuning(5),
    "short": fp.PrefixTuning(2),
    "prompt": fp.PromptTuning(8),
    "few": fp.PromptTuning(3),
    "bottleneck": fp.BottleneckAdapter(size=4),
}


def prompts(count: int, longest: int = 11) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + (7 * i) % longest for i in range(count)]
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def greedy(model, ids: list[int], count: int) -> list[int]:
    """Without a cache, token by token."""
    said = []
    for _ in range(count):
        logits = model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == 2:
            break
    return said


def test_each_answer_is_its_adapters(served, tokenizer):
    """All kinds together, of unlike prompts and answers, more than there are rows."""
    model, pool, alone = served(CONFIGS)
    names = [*CONFIGS, None, "lora", "prompt", "prefix", None, "few", "short"]
    asked = [
        Request(ids, name, max_tokens=2 + (5 * i) % 9)
        for i, (ids, name) in enumerate(zip(prompts(len(names)), names, strict=True))
    ]
    engine = Engine(model, tokenizer, pool, context=64, max_batch=5)
    sizes = set()
    step = engine.step

    def watched() -> bool:
        sizes.add(engine.running)
        return step()

    engine.step = watched
    for request in engine.run(asked):
        want = greedy(alone[request.adapter], request.ids, request.max_tokens)
        assert request.tokens == want, request.adapter
        assert request.finish == ("stop" if want[-1] == 2 else "length")
        whole = tokenizer.decode([t for t in request.tokens if t != 2], skip_special_tokens=True)
        assert request.text == whole or "\ufffd" in whole  # random bytes
        assert request.began <= request.first <= request.ended
    assert max(sizes) == 5  # they did decode together
    assert pool.stats()["held"] == 0 and engine.running == engine.waiting == 0


def test_late_ones_join_and_those_that_leave_make_room(served, tokenizer):
    model, pool, alone = served({"lora": CONFIGS["lora"], "prompt": CONFIGS["prompt"]})
    engine = Engine(model, tokenizer, pool, max_batch=3)
    late = iter(prompts(6))
    asked = [engine.submit(Request(next(late), "prompt", max_tokens=12))]
    for count in itertools.count():
        if count in (1, 2, 4, 5, 9):
            name = (None, "lora", "prompt")[count % 3]
            asked.append(engine.submit(Request(next(late), name, max_tokens=3 + count)))
        if not engine.step():
            break
    assert len(asked) == 6
    for request in asked:
        assert request.tokens == greedy(alone[request.adapter], request.ids, request.max_tokens)
    # Nobody is left whose length the cache would have to have.
    assert engine._cache is None


def test_the_cache_is_no_longer_than_its_longest_row(served, tokenizer):
    model, pool, _ = served({})
    engine = Engine(model, tokenizer, pool)
    ids = prompts(1)[0]
    long = engine.submit(Request(ids * 20, max_tokens=4))
    short = engine.submit(Request(ids, max_tokens=9))
    engine._ends = set()
    while not long.done.is_set():
        engine.step()
    assert engine._cache.get_seq_length() == len(ids) + len(short.tokens) - 1
    while engine.step():
        pass
    assert short.finish == "length"


def test_a_request_keeps_the_adapter_it_began_with(served, tokenizer):
    model, pool, alone = served({"lora": fp.LoRA(rank=3), "other": fp.LoRA(rank=2)})
    engine = Engine(model, tokenizer, pool)
    ids = prompts(1)[0]
    first = engine.submit(Request(ids, "lora", max_tokens=8))
    gone = engine.submit(Request(ids, "other", max_tokens=8))
    engine.step()
    engine.step()
    pool.load("lora", alone["other"].folder)  # replaced
    pool.evict("other")
    second = engine.submit(Request(ids, "lora", max_tokens=8))
    while engine.step():
        pass
    assert first.tokens == greedy(alone["lora"], ids, 8)
    assert gone.tokens == second.tokens == greedy(alone["other"], ids, 8)
    assert first.tokens != second.tokens


def test_more_adapters_than_slots(served, tokenizer):
    """Who finds no slot waits, and lets those pass who do."""
    model, pool, alone = served({name: fp.LoRA(rank=2) for name in "abc"}, slots=2)
    engine = Engine(model, tokenizer, pool)
    asked = [Request(ids, name, max_tokens=4) for ids, name in zip(prompts(4), "abca", strict=True)]
    held = pool.acquire(["a"])
    engine.submit(asked[1])
    engine.submit(asked[2])
    engine.submit(asked[3])
    for _ in range(3):
        engine.step()
    assert asked[1].tokens and asked[3].tokens and not asked[2].tokens
    pool.release(held)
    engine.run(asked[:1])
    for request in asked:
        assert request.tokens == greedy(alone[request.adapter], request.ids, 4)


def test_short_prompts_are_read_together(served, tokenizer, caplog):
    """Up to READ tokens with their padding; soft prompts alone; a fault is found out one by one."""
    model, pool, alone = served({"lora": CONFIGS["lora"], "prompt": CONFIGS["prompt"]})
    engine = Engine(model, tokenizer, pool, max_batch=7)
    read, groups, spoilt = engine._read, [], []

    def watched(group):
        groups.append([len(request.ids) for request, _ in group])
        if any(request in spoilt for request, _ in group):
            raise RuntimeError("out of memory")
        return read(group)

    engine._read = watched
    lengths = [(3, None), (9, "lora"), (2, "prompt"), (30, None), (30, "lora"), (30, None)]
    asked = [Request(prompts(9)[i] * n, a, max_tokens=3) for i, (n, a) in enumerate(lengths)]
    for request, (n, _) in zip(asked, lengths, strict=True):
        request.ids = request.ids[:n]
    engine.run(asked)
    for request in asked:
        assert request.tokens == greedy(alone[request.adapter], request.ids, 3)
    assert groups == [[3, 9], [2], [30, 30], [30]] and 3 * 30 > READ
    groups.clear()
    engine.run([Request([3] * n, max_tokens=1) for n in (20, 22, 22, 20)])
    assert groups == [[20, 22], [22, 20]] and 3 * 22 > READ  # as padding counts
    good, bad = Request([3, 4, 5], max_tokens=3), Request([3, 4], max_tokens=3)
    spoilt.append(bad)
    groups.clear()
    engine.run([good, bad])
    assert groups == [[3, 2], [3], [2]]
    assert good.tokens == greedy(alone[None], good.ids, 3)
    assert bad.finish == "error" and str(bad.error) == "out of memory"
    assert pool.stats()["held"] == 0


def test_sampling_is_the_seeds(served, tokenizer):
    """The same seed, the same answer, whoever else is there; and as likely as the model says."""
    model, pool, _ = served({"lora": CONFIGS["lora"]})
    engine = Engine(model, tokenizer, pool)
    engine._ends = set()
    ids = prompts(1)[0]

    def draw(seed, others=0, **kw) -> list[int]:
        crowd = [Request(p, "lora", max_tokens=5) for p in prompts(others)]
        mine = Request(ids, "lora", max_tokens=6, seed=seed, **kw)
        engine.run([*crowd, mine])
        return mine.tokens

    assert draw(3, temperature=2.0) == draw(3, others=3, temperature=2.0)
    assert len({tuple(draw(seed, temperature=2.0)) for seed in range(6)}) > 1
    assert len({tuple(draw(None, temperature=2.0)) for _ in range(6)}) > 1
    plain = draw(0)
    for kw in (
        {"temperature": 1e-320},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
    ):
        assert draw(1, **kw) == plain
    with pool.batch(["lora"]):
        want = (model(torch.tensor([ids])).logits[0, -1] / 1.5).softmax(-1)
    many = [Request(ids, "lora", max_tokens=1, temperature=1.5, seed=i) for i in range(600)]
    engine.run(many)
    seen = torch.bincount(torch.tensor([r.tokens[0] for r in many]), minlength=VOCAB) / 600
    # Of 600 draws a share of p is within 5 of its deviations sqrt(p (1 - p) / 600).
    assert ((seen - want).abs() <= 5 * (want * (1 - want) / 600).sqrt() + 1 / 600).all()


def test_threads(served, tokenizer):
    """Handed in from many threads while adapters are loaded, with one engine thread."""
    model, pool, alone = served({"lora": fp.LoRA(rank=3), "prefix": fp.PrefixTuning(5)})
    want = {
        (name, i): greedy(alone[name], ids, 6)
        for name in ("lora", "prefix", None)
        for i, ids in enumerate(prompts(6))
    }
    engine = Engine(model, tokenizer, pool, max_batch=4).start()
    found, wrong = [], []

    def ask(name) -> None:
        for i, ids in enumerate(prompts(6)):
            request = engine.submit(Request(ids, name, max_tokens=6))
            if not request.done.wait(60) or request.tokens != want[name, i]:
                wrong.append((name, i, request.finish, request.error))
            found.append(request)

    threads = [threading.Thread(target=ask, args=(n,)) for n in ("lora", "prefix", None, "lora")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not wrong and len(found) == 24
    with pytest.raises(Busy, match="going down"):
        engine.submit(Request([3]))


def test_cancelled_and_closed(served, tokenizer):
    model, pool, _ = served({"lora": fp.LoRA(rank=3)})
    engine = Engine(model, tokenizer, pool, max_batch=1, max_waiting=2)
    engine._ends = set()
    asked = [engine.submit(Request([3, 4], "lora", max_tokens=40)) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests wait already"):
        engine.submit(Request([3]))
    engine.step()
    engine.cancel(asked[0])
    engine.step()
    assert asked[0].finish == "cancelled" and asked[1].tokens
    third = engine.submit(Request([3]))
    engine.close()
    assert asked[1].finish == third.finish == "cancelled"
    assert pool.stats()["held"] == 0


def test_stops_and_halves_of_characters(served, tokenizer):
    """Text comes in whole characters, and ends before what stops it."""
    model, pool, alone = served({})
    engine = Engine(model, tokenizer, pool)
    engine._ends = set()
    said = tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in "가 abc 한국".encode()])
    turn = iter(said * 4)
    logits = engine._logits

    def scripted(ids, cache, **given):
        return torch.nn.functional.one_hot(torch.tensor([next(turn)]), VOCAB) + 0 * logits(
            ids, cache, **given
        )

    engine._logits = scripted
    for stop, want in (
        ((), "가 abc 한국"),
        (("c 한",), "가 ab"),
        (("c 하", "국"), "가 abc 한"),
        (("가",), ""),
    ):
        turn, pieces = iter(said), []
        request = Request([3], max_tokens=len(said), stop=stop, on_text=pieces.append)
        engine.run([request])
        assert request.text == "".join(pieces) == want
        assert request.finish == ("stop" if stop else "length")
        assert not any("\ufffd" in p for p in pieces)
        if not stop:
            assert len(pieces) == len(want)  # as it comes
    turn = iter(said)
    cut = Request([3], max_tokens=2)  # two thirds of a letter
    assert engine.run([cut])[0].text == "\ufffd\ufffd"


def test_faults_are_their_own(served, tokenizer, caplog):
    model, pool, alone = served({"lora": fp.LoRA(rank=3), "bad": fp.LoRA(rank=2)})
    engine = Engine(model, tokenizer, pool)
    path = next(p for p in pool._places.by_field if p[1] == "lora_A")[0]
    shape = pool.at(path).a.shape[2], pool.at(path).sizes[0]
    nan = {
        f"{path}.lora_A": torch.full((1, shape[0]), torch.nan),
        f"{path}.lora_B": torch.ones(shape[1], 1),
    }
    pool.put("bad", nan)
    ids = prompts(1)[0]
    asked = [Request(ids, name, max_tokens=4) for name in ("lora", "bad", None)]
    deaf = Request(ids, max_tokens=4, on_text=lambda piece: 1 / 0)
    engine.run([*asked, deaf])
    assert asked[1].finish == "error" and "not finite" in str(asked[1].error)
    assert deaf.finish in ("cancelled", "length")
    for request in (asked[0], asked[2]):
        assert request.tokens == greedy(alone[request.adapter], ids, 4)
    late = engine.submit(Request(ids, "bad"))
    pool.evict("bad")
    engine.step()
    assert late.finish == "error" and isinstance(late.error, InputError)
    # A step that fails takes its rows with it, and no others.
    broken = engine.submit(Request(ids, max_tokens=9))
    engine.step()
    engine._next, after = lambda: 1 / 0, engine._next
    engine.step()
    engine._next = after
    assert broken.finish == "error" and isinstance(broken.error, ZeroDivisionError)
    # One whose keys find no room beside the others' as well, in the engine's own thread.
    engine._join, after = lambda rows, cache: (engine._rows.extend(rows), 1 / 0), engine._join
    engine.start()
    broken = engine.submit(Request(ids, max_tokens=9))
    assert broken.done.wait(30) and isinstance(broken.error, ZeroDivisionError) and engine.alive
    engine._join = after
    fine = engine.submit(Request(ids, max_tokens=4))
    assert fine.done.wait(30) and fine.tokens == asked[2].tokens
    engine.close()
    engine = Engine(model, tokenizer, pool)
    assert engine.run([Request(ids, max_tokens=4)])[0].tokens == asked[2].tokens
    assert pool.stats()["held"] == 0


SIZES = dict(vocab_size=VOCAB, d_model=24, decoder_layers=2, decoder_attention_heads=4,
             decoder_ffn_dim=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=40, max_position_embeddings=64, pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize("kind", ["Bart", "Bert", "Mamba"])
def test_models_that_rows_cannot_share(tokenizer, lively, kind):
    """Positions by the cache's length; every token sees every other; a state beside the keys."""
    torch.manual_seed(0)
    name = {"Bert": "BertLMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = lively(getattr(transformers, name)(config)).eval().requires_grad_(False)
    pool = fp.AdapterPool.for_model(model, 2, 4)
    pool.install(model)
    with pytest.raises(InputError, match=f"{name}: expected a causal model that decodes rows"):
        Engine(model, tokenizer, pool)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(adapter="none such"), "no adapter is named 'none such'"),
        (dict(ids=[]), "prompt: expected at least one token"),
        (dict(ids=[3, VOCAB]), "prompt: expected tokens 0..60"),
        (dict(max_tokens=0), "max_tokens: expected >= 1, got 0"),
        (dict(max_tokens=63), "within the 64 tokens that the model takes, got 2 \\+ 63"),
        (dict(temperature=-1.0), "temperature: expected a number >= 0"),
        (dict(temperature=float("nan")), "temperature: expected a number >= 0"),
        (dict(top_p=0.0), "top_p: expected 0 < p <= 1"),
        (dict(top_k=-1), "top_k: expected >= 0"),
        (dict(stop=[""]), "stop: expected a list of texts"),
        (dict(stop="ab"), "stop: expected a list of texts"),
    ],
)
def test_bad_requests(llama, tokenizer, change, said):
    pool = fp.AdapterPool.for_model(llama, 2, 4)
    pool.install(llama)
    engine = Engine(llama, tokenizer, pool, context=64)
    with pytest.raises(InputError, match=said):
        engine.submit(Request(**{"ids": [3, 4], "max_tokens": 8, **change}))
    assert engine.waiting == 0
    (done,) = engine.run([Request([3, 4], max_tokens=2)])
    with pytest.raises(InputError, match="request: expected a new one"):
        engine.submit(done)


def test_virtual_tokens_count(served, tokenizer):
    """A prompt that leaves no room for the answer is an error of its request alone."""
    model, pool, alone = served({"prefix": fp.PrefixTuning(5), "prompt": fp.PromptTuning(8)})
    engine = Engine(model, tokenizer, pool, context=64)
    for name, virtual in (("prefix", 5), ("prompt", 8)):
        fits = Request([3] * 40, name, max_tokens=24 - virtual)
        over = Request([3] * 40, name, max_tokens=25 - virtual)
        engine.run([fits, over])
        assert over.finish == "error" and f"{virtual} of them the adapter's own" in str(over.error)
        assert fits.tokens == greedy(alone[name], fits.ids, fits.max_tokens)
