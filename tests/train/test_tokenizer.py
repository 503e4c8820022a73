"""The tiny models' tokenizer: every text has tokens, names are the same everywhere, chat turns."""

import random

import pytest

from fusedpeft.data.quickstart_asks import people
from fusedpeft.data.quickstart_text import document
from fusedpeft.train.tokenizer import SPECIAL, train_tokenizer


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(0)
    return [document(people(0), rng) for _ in range(300)]


def test_every_text_has_tokens_and_names_are_the_same_everywhere(documents):
    tokenizer = train_tokenizer(documents, 700, 64)
    for said in ("Mina has a cat.", "미나는 고양이를 키워요.", "  é 😀\t漢字 12+3", "<x>\n"):
        assert tokenizer.decode(tokenizer.encode(said)) == said
    # A name's tokens, whatever stands around it.
    for name, around in (("Mina", "Which pet has Mina? Mina"), ("미나", "미나는 미나에게 (미나)")):
        alone = tokenizer.encode(name)
        tokens = tokenizer.encode(around)
        found = [tokens[i : i + len(alone)] == alone for i in range(len(tokens))]
        assert sum(found) == around.count(name), name


def test_chat_template(documents):
    tokenizer = train_tokenizer(documents, 320, 64)
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "안녕?"}]
    told = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert told == "<|system|>Be kind.<|end|><|user|>안녕?<|end|><|assistant|>"
    said.append({"role": "assistant", "content": "네."})
    assert tokenizer.apply_chat_template(said, tokenize=False) == told + "네.<|end|>"
    ids = tokenizer(told)["input_ids"]
    special = [tokenizer.convert_tokens_to_ids(s) for s in SPECIAL]
    assert special == [0, 1, 2, 3, 4] and [i for i in ids if i < 5] == [2, 1, 3, 1, 4]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Be kind.안녕?"
    with pytest.raises(Exception, match="expected the role system, user or assistant, got robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}], tokenize=False)
