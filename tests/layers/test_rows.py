"""A batch of rows with an adapter each is what each row is with its adapter alone."""

import pytest
import torch

import fusedpeft as fp
from fusedpeft.errors import InputError

CONFIGS = {
    "small": fp.LoRA(rank=2, alpha=4),
    "large": fp.LoRA(rank=5, targets="all-linear"),
    "dora": fp.LoRA(rank=3, dora=True),
    "houlsby": fp.BottleneckAdapter(size=3),
    "pfeiffer": fp.BottleneckAdapter(size=2, placement="pfeiffer"),
    "parallel": fp.BottleneckAdapter(size=4, placement="parallel"),
    "prefix": fp.PrefixTuning(length=3),
    "folded": fp.PrefixTuning(length=3, projection=5),
}
NAMES = ["small", None, "prefix", "large", "houlsby", "small", "dora", "folded", "pfeiffer"]
NAMES += ["parallel", "prefix"]


@pytest.fixture
def model(build):
    made = build()
    generator = torch.Generator().manual_seed(2)
    for name, config in CONFIGS.items():
        fp.attach(made, config, name)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture
def many():
    return torch.randint(3, 61, (len(NAMES), 9), generator=torch.Generator().manual_seed(1))


def alone(model, ids, name):
    fp.activate(model, name)
    return model(ids).logits


def test_each_row_is_its_own(model, many):
    with torch.no_grad():
        each = torch.cat([alone(model, many[i : i + 1], name) for i, name in enumerate(NAMES)])
        fp.activate(model, None)
        base = model(many).logits
        with fp.rows(model, NAMES):
            torch.testing.assert_close(model(many).logits, each, rtol=0, atol=1e-5)
        assert torch.equal(model(many).logits, base)
        assert ((each - base).abs().amax((1, 2)) > 1e-3).tolist() == [n is not None for n in NAMES]


def test_padding_and_generation(model, many):
    fp.activate(model, None)
    mask = torch.ones_like(many)
    mask[::2, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with fp.rows(model, NAMES):
        together = model.generate(many, attention_mask=mask, **options)
    for i, name in enumerate(NAMES):
        fp.activate(model, name)
        start = 3 if i % 2 == 0 else 0
        one = model.generate(many[i : i + 1, start:], **options)
        assert torch.equal(together[i, start:], one[0]), name


def test_trains_several_at_once(model, many):
    """Gradients of a mixed batch are those of each adapter's rows alone."""
    trained = ["small", "large", "houlsby", "prefix"]
    rows = [i for i, name in enumerate(NAMES) if name in trained]
    names, ids = [NAMES[i] for i in rows], many[rows]
    model.zero_grad()
    fp.activate(model, trained)
    with fp.rows(model, names):
        model(ids).logits.square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name, row in zip(names, ids, strict=True):
        alone(model, row[None], name).square().sum().backward()
    each = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == each.keys() and len(mixed) > 20
    for name in mixed:
        torch.testing.assert_close(mixed[name], each[name], rtol=1e-4, atol=1e-4)


def test_the_state_returns_after_an_error(model, many):
    with torch.no_grad():
        before = alone(model, many, "prefix")
        with pytest.raises(ZeroDivisionError), fp.rows(model, NAMES):
            raise ZeroDivisionError
        assert torch.equal(model(many).logits, before)


def test_rows_within_rows(model, many):
    fp.activate(model, None)
    turned = NAMES[::-1]
    with torch.no_grad(), fp.rows(model, NAMES):
        outer = model(many).logits
        with fp.rows(model, turned):
            inner = model(many).logits
        assert torch.equal(model(many).logits, outer)
        assert torch.equal(model(many, adapter_names=turned).logits, inner)
        assert torch.equal(model(many).logits, outer)
    assert (outer - inner).abs().max() > 1e-3


def test_adapter_names_for_one_call(model, many):
    """PEFT's keyword, which transformers' models pass on and nobody would read."""
    fp.activate(model, None)
    with torch.no_grad():
        base = model(many).logits
        with fp.rows(model, NAMES):
            want = model(many).logits
        named = ["__base__" if n is None else n for n in NAMES]
        for names in (NAMES, tuple(NAMES), named):
            assert torch.equal(model(many, adapter_names=names).logits, want)
            assert torch.equal(model(many, adapter_names=None).logits, base)
        for names, message in (
            (["smal"] * len(many), "no adapter is named 'smal'; did you mean 'small'"),
            (["small"] * 3, "expected a batch of 3, as there are names, got 11"),
            ("small", "rows: expected a list of names, one for each row, got 'small'"),
        ):
            with pytest.raises(InputError, match=message):
                model(many, adapter_names=names)
            assert torch.equal(model(many).logits, base)
    with pytest.raises(ValueError, match="adapter_names"):  # transformers' own refusal
        model.generate(many, adapter_names=NAMES, max_new_tokens=1)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(InputError, match="adapter_names: expected a model without gradient check"):
        model(many, adapter_names=NAMES)
    for name in CONFIGS:
        fp.detach(model, name)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_adapter_names_and_whole_graphs(llama, ids, stir):
    fp.attach(llama, fp.LoRA(rank=2), "small")
    stir(llama)
    with torch.no_grad():
        want = llama(ids).logits
        named = llama(ids, adapter_names=["small", None]).logits
        assert (want - named).abs().amax((1, 2)).gt(1e-3).tolist() == [False, True]
        for options in ({"fullgraph": True}, {}):
            torch._dynamo.reset()
            compiled = torch.compile(llama, backend="aot_eager", **options)
            torch.testing.assert_close(compiled(ids).logits, want, rtol=0, atol=1e-5)
        got = compiled(ids, adapter_names=["small", None]).logits
        torch.testing.assert_close(got, named, rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(ids).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config", [fp.PromptTuning(length=2), fp.OutputLayer(), fp.FullFineTuning()]
)
def test_nothing_active_acts_on_whole_batches(model, many, config):
    fp.attach(model, config, "whole")
    fp.activate(model, ["whole", "small"])
    kind = type(config).__name__
    with pytest.raises(InputError, match=f"rows: 'whole', a {kind}, is active .* activate None"):
        with fp.rows(model, [None, "small"]):
            pass


def test_bad_input(model, many):
    fp.attach(model, fp.PromptTuning(length=2), "prompt")
    fp.attach(model, fp.PrefixTuning(length=4), "longer")
    fp.activate(model, None)
    for names, message in (
        ("small", "rows: expected a list of names, one for each row, got 'small'"),
        ([], r"rows: expected a list of names"),
        (5, "rows: expected a list of names, one for each row, got 5"),
        (iter(["small"]), "rows: expected a list of names, .*got <list_iterator"),
        (["smal"], "no adapter is named 'smal'; did you mean 'small'"),
        (["prompt"], "rows: 'prompt' is a PromptTuning, which acts on whole batches"),
        (["prefix", "longer"], "expected prefixes of one length, got {'prefix': 3, 'longer': 4}"),
    ):
        with pytest.raises(InputError, match=message), fp.rows(model, names):
            pass
    for name in ("small", "houlsby", "prefix"):
        with pytest.raises(ValueError, match="expected .*3"), fp.rows(model, [name] * 3):
            model(many[:2])
    fp.activate(model, "small")
    fp.merge(model)
    with pytest.raises(InputError, match="cannot choose by row while .* merged"):
        with fp.rows(model, ["small"]):
            pass
