"""Evaluation through lm-eval: models rigged to know the answer, what is cut, what stays untouched.

The files are made here, six questions each, and the tokenizer's tokens are their words.
"""

import bz2
import json
import random
import socket
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.evaluate import harness

lm_eval = pytest.importorskip("lm_eval")

LETTERS = "ABCD"
# The longest ending is the right one: by its sum it loses, by characters it wins (and "3" is 0).
ENDINGS = ["a", "b c", "d e", "incomprehensibilities unquestionably"]
ANSWERS = [0, 2, 1, 3, 3, 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with mmlu/ and hellaswag/; each question says which answer is right (right-2)."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mmlu").mkdir()
    (folder / "hellaswag").mkdir()
    for name, answers in (("dev", [0, 1, 2, 3, 0, 1]), ("test", ANSWERS)):
        rows = [
            {
                "question": f"{name}-{i} right-{answer} ?",
                "subject": "made_up",
                "choices": ["north", "south", "east", "west"],
                "answer": answer,
            }
            for i, answer in enumerate(answers)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "mmlu" / f"{name}.jsonl").write_text(text)
    lines = [line for i in range(6) for line in (f"story-{i} goes", "3", *ENDINGS)]
    text = "".join(f"{line}\n" for line in lines)
    (folder / "hellaswag" / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = "The following are multiple choice questions (with answers) about made up. ? Answer:"
    words += " A. B. C. D. A B C D north south east west goes " + " ".join(ENDINGS)
    words += "".join(f" dev-{i} test-{i} right-{i} story-{i}" for i in range(6))
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "</s>", *dict.fromkeys(words.split())])}
    raw = Raw(WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    return Tokenizer(tokenizer_object=raw, unk_token="[UNK]", eos_token="</s>")


@pytest.fixture
def make_model(tokenizer):
    def make(positions=256, flat=False):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=positions,
            eos_token_id=1,
        )
        model = LlamaForCausalLM(config)
        if flat:
            torch.nn.init.zeros_(model.lm_head.weight)
        return model

    return make


def rig(model, tokenizer, choose):
    """After "Answer:" the letter that `choose` makes of the question's right one is certain."""
    right = {tokenizer.convert_tokens_to_ids(f"right-{i}"): i for i in range(4)}
    letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
    answer = tokenizer.convert_tokens_to_ids("Answer:")

    def hook(module, args, kwargs, output):
        for ids, logits in zip(args[0].tolist(), output.logits, strict=True):
            known = None
            for position, token in enumerate(ids):
                known = right.get(token, known)
                if token == answer:
                    logits[position, letters[choose(known)]] += 100.0
        return output

    model.register_forward_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("choose", "acc"),
    [
        (lambda right: right, 1.0),
        (lambda right: (right + 1) % 4, 0.0),
        (lambda right: 0, 2 / 6),
        (lambda right: 3, 2 / 6),
        (lambda right: 2, 1 / 6),
    ],
    ids=["right", "next", "A", "D", "C"],
)
def test_mmlu_counts_what_a_rigged_model_answers(
    data, tokenizer, make_model, choose, acc, batch_size
):
    model = rig(make_model(flat=True), tokenizer, choose)
    found = harness.run(model, tokenizer, ["mmlu"], data, batch_size=batch_size)
    assert found == {"mmlu": {"acc": pytest.approx(acc), "n": 6.0, "truncated": 0.0}}


def test_hellaswag_divides_by_characters(data, tokenizer, make_model):
    """All tokens equally likely: the one-word ending has the highest sum, the longest words the
    highest share a character."""
    found = harness.run(make_model(flat=True), tokenizer, ["hellaswag"], data)
    assert found == {"hellaswag": {"acc": 0.0, "acc_norm": 1.0, "n": 6.0, "truncated": 0.0}}


def test_what_the_model_is_asked(data, tokenizer, make_model, monkeypatch):
    """Context and continuation as published: five shots, "Answer:", a space and the letter."""
    from lm_eval.models.huggingface import HFLM

    asked = []
    scored = HFLM.loglikelihood

    def listen(self, requests, *args, **kwargs):
        asked.extend(request.args for request in requests)
        return scored(self, requests, *args, **kwargs)

    monkeypatch.setattr(HFLM, "loglikelihood", listen)
    harness.run(make_model(), tokenizer, ["mmlu", "hellaswag"], data, limit=2)
    assert len(asked) == 16
    context, continuation = asked[0]
    assert [c for _, c in asked[:4]] == [" A", " B", " C", " D"]
    choices = "\nA. north\nB. south\nC. east\nD. west\nAnswer:"
    assert context == (
        "The following are multiple choice questions (with answers) about made up.\n\n"
        + "".join(f"dev-{i} right-{a} ?{choices} {LETTERS[a]}\n\n" for i, a in enumerate(DEV))
        + f"test-0 right-0 ?{choices}"
    )
    assert asked[4][0].endswith(
        f"test-3 right-3 ?{choices}"
    )  # the second of two is from the middle
    assert asked[8:12] == [("story-0 goes", f" {ending}") for ending in ENDINGS]
    assert asked[12][0] == "story-3 goes"


DEV = [0, 1, 2, 3, 0]


@pytest.mark.parametrize("shots", [0, 1, 5])
def test_shots_and_limit(data, tokenizer, make_model, shots, monkeypatch):
    seen = []
    made = harness.local_task

    def listen(*args):
        task = made(*args)
        seen.extend(row["shots"].count("Answer: ") for row in task["custom_dataset"]()["test"])
        return task

    monkeypatch.setattr(harness, "local_task", listen)
    found = harness.run(make_model(), tokenizer, ["mmlu"], data, limit=4, num_fewshot=shots)
    assert found["mmlu"]["n"] == 4.0 and seen == [shots] * 4


def test_prompts_that_are_cut_are_counted_from_the_first_lost_token(data, tokenizer, make_model):
    """The last token is scored, never read: context + 1 tokens fit a model of `context` tokens."""
    row = harness.mmlu_rows(data, 1, 5)[0]
    text = row["shots"] + harness_question(row)
    length = len(tokenizer(text).input_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = harness.run(make_model(length), tokenizer, ["mmlu"], data)
    assert whole["mmlu"]["truncated"] == 0.0
    with pytest.warns(UserWarning, match=f"6 of 6 prompts are longer than the {length - 1} tokens"):
        cut = harness.run(make_model(length - 1), tokenizer, ["mmlu"], data)
    assert cut["mmlu"]["truncated"] == 6.0
    with pytest.warns(UserWarning, match="lower num_fewshot"):
        one = harness.run(make_model(length - 1), tokenizer, ["mmlu"], data, limit=1)
    assert one["mmlu"]["truncated"] == 1.0


def harness_question(row):
    from fusedpeft.evaluate.benchmarks import mmlu_question

    return mmlu_question(row)


def states():
    python, numpy = random.getstate(), np.random.get_state()
    return python, numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()


def test_a_training_run_around_it_does_not_notice(data, tokenizer, make_model):
    """Random states, every module's mode, the tokenizer's padding, gradients after it."""
    model = fp.attach(make_model(), fp.LoRA(rank=2))
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before, padding = states(), tokenizer.pad_token
    harness.run(model, tokenizer, ["mmlu", "hellaswag"], data, limit=2)
    assert states() == before and tokenizer.pad_token == padding
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert [p.requires_grad for p in model.parameters()] == grads

    ids = torch.arange(2, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_it_is_scored_in_evaluation_mode(data, tokenizer, make_model):
    model = make_model()
    seen = set()
    model.register_forward_hook(
        lambda module, *_: seen.add((module.training, torch.is_grad_enabled()))
    )
    model.train()
    harness.run(model, tokenizer, ["hellaswag"], data, limit=1)
    assert seen == {(False, False)} and model.training


def test_modes_come_back_after_an_error(tokenizer, make_model, tmp_path):
    model = make_model().train()
    with pytest.raises(InputError, match="expected this benchmark file"):
        harness.run(model, tokenizer, ["mmlu"], tmp_path)
    assert model.training


def test_an_active_adapter_takes_part(data, tokenizer, make_model):
    """Without it the model answers A; the adapter turns the head's input around."""
    model = make_model(flat=True)
    a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
    plain = fp.attach(model, fp.LoRA(rank=1, alpha=1, targets=["lm_head"]))
    lora = dict(plain.named_parameters())
    down = next(p for n, p in lora.items() if "lm_head" in n and "lora_A" in n)
    up = next(p for n, p in lora.items() if "lm_head" in n and "lora_B" in n)
    hidden = {}
    plain.lm_head.register_forward_pre_hook(lambda _, args: hidden.update(x=args[0].detach()))
    rows = harness.mmlu_rows(data, 1, 5)
    plain(tokenizer(rows[0]["shots"] + harness_question(rows[0]), return_tensors="pt").input_ids)
    answered = {}
    for name, letter in (("A", a), ("B", b)):
        with torch.no_grad():
            down.copy_(hidden["x"][0, -1:])
            up.zero_()
            up[letter] = 5.0
        answered[name] = harness.run(plain, tokenizer, ["mmlu"], data, limit=1)["mmlu"]["acc"]
    assert answered == {"A": 1.0, "B": 0.0}


def test_nothing_is_asked_of_the_network_and_nothing_is_said(
    data, tokenizer, make_model, monkeypatch, capfd
):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found = harness.run(make_model(), tokenizer, ["mmlu", "hellaswag"], data)
    assert set(found) == {"mmlu", "hellaswag"}
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    """As the harness sees them: readers of JSON make times of them."""
    from lm_eval.tasks import TaskManager

    dates = [f"2001-01-0{day}" for day in (1, 2, 3, 4)]
    row = {"question": "2020-01-01", "subject": "1999-12-31", "choices": dates, "answer": 1}
    (tmp_path / "mmlu").mkdir()
    for name in ("dev", "test"):
        (tmp_path / "mmlu" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    task = harness.local_task("mmlu", tmp_path, None, 0)
    loaded = TaskManager(include_defaults=False).load([task])["tasks"]["mmlu"]
    (doc,) = loaded.test_docs()
    assert loaded.doc_to_text(doc) == (
        "The following are multiple choice questions (with answers) about 1999-12-31.\n\n"
        "2020-01-01\nA. 2001-01-01\nB. 2001-01-02\nC. 2001-01-03\nD. 2001-01-04\nAnswer:"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["arc"]}, "tasks: expected mmlu, hellaswag, or hub:NAME .* got 'arc'"),
        ({"data_dir": None}, "data: expected the folder with mmlu's files, got None"),
        ({"data_dir": "/nowhere"}, "data: expected the folder with mmlu's files, got /nowhere"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot: expected at least 0, got -1"),
        ({"num_fewshot": 7}, "expected 7 dev rows of made_up for as many shots, got 6"),
        ({"tasks": ["hub:no_such_task"]}, "the harness has no task 'no_such_task'"),
    ],
)
def test_bad_input(data, tokenizer, make_model, change, message):
    arguments = {"tasks": ["mmlu"], "data_dir": data} | change
    with pytest.raises(InputError, match=message):
        harness.run(make_model(), tokenizer, **arguments)


def test_a_real_model_on_the_real_files(shared_data):
    """TinyStories' Llama knows no school subject: near chance, every long prompt counted."""
    base = shared_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with pytest.warns(UserWarning, match="3 of 3 prompts are longer than the 512 tokens"):
        found = harness.run(model, tokenizer, ["mmlu"], shared_data, limit=3)
    assert found["mmlu"]["truncated"] == 3.0
    found = harness.run(
        model, tokenizer, ["mmlu", "hellaswag"], shared_data, limit=12, num_fewshot=0
    )
    assert {task: (s["n"], s["truncated"]) for task, s in found.items()} == {
        "mmlu": (12.0, 0.0),
        "hellaswag": (12.0, 0.0),
    }
    assert all(0.0 <= found[task]["acc"] < 0.8 for task in found)
    again = harness.run(model, tokenizer, ["hellaswag"], shared_data, limit=12, batch_size=3)
    assert again["hellaswag"] == found["hellaswag"]
