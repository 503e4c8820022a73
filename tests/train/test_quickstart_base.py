"""The base that examples/quickstart holds: of the recipe as it stands, and knowing its world."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_asks import people
from fusedpeft.data.quickstart_world import josa
from fusedpeft.train import pretrain as p
from fusedpeft.train.tokenizer import train_tokenizer

COMMITTED = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def test_the_committed_base_is_the_recipes(tmp_path, monkeypatch):
    shutil.copytree(COMMITTED / "base", tmp_path / "base")
    monkeypatch.setattr(p, "_batch", lambda *_: pytest.fail("the recipe makes another base"))
    made = p.remake_quickstart(tmp_path)
    assert made["eval_loss_after"] < 0.5 < made["eval_loss_before"]
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED / "base")
    text = (tmp_path / "data" / "pretrain.txt").read_text(encoding="utf-8").splitlines()
    again = train_tokenizer(
        [d for i, d in enumerate(text) if i % p._HELD_OUT], p.Shape().vocab_size, 512
    )
    assert again.get_vocab() == tokenizer.get_vocab()


def test_the_committed_base_knows_its_world():
    """What is learned later is to answer: the facts of everyone must be there, of held-out people
    too. The right value is the likeliest of ten."""
    model = AutoModelForCausalLM.from_pretrained(COMMITTED / "base")
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED / "base")
    assert model.dtype == torch.float32
    right = []
    for person in people(0):
        for kind, (values, _, say_en, _, say_ko) in world.FACTS.items():
            for i, say in enumerate((say_en, say_ko)):
                said = [josa(say.format(n=person.name[i], v=value[i])) for value in values]
                best = log_likelihoods(model, tokenizer, said).argmax()
                right.append(values[best] == person.facts[kind])
    assert sum(right) / len(right) > 0.95


@torch.no_grad()
def log_likelihoods(model, tokenizer, texts: list[str]) -> torch.Tensor:
    rows = [[tokenizer.eos_token_id, *tokenizer.encode(text)] for text in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, 1 : len(row)] = torch.tensor(row), True
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(1)
