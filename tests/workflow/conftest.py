"""A whole run in seconds: a tiny base with its tokenizer, small files for every stage."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fusedpeft.train.tokenizer import train_tokenizer

NOUNS = ("cat", "dog", "고양이", "tree", "길", "boat")
TEXT = [f"tell me of the {n}. the {n} is here. no. go away." for n in NOUNS] * 3


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(TEXT, 300, 64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    asks = [f"tell me of the {n} {i}" for i in range(6) for n in NOUNS]
    right = [f"the {n} is here." for _ in range(6) for n in NOUNS]
    write_rows(
        folder / "sft.jsonl",
        [{"prompt": q, "completion": a} for q, a in zip(asks, right, strict=True)],
    )
    pairs = [
        {"prompt": q, "chosen": a, "rejected": "go away.", "aspect": ("helpful", "safe")[i % 2]}
        for i, (q, a) in enumerate(zip(asks, right, strict=True))
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    lists = [
        {"prompt": q, "responses": ["no.", a, "go away."], "rewards": [0.0, 1.0, -1.0]}
        for q, a in zip(asks, right, strict=True)
    ]
    write_rows(folder / "lists.jsonl", lists)
    return folder


@pytest.fixture
def sections(data) -> dict[str, dict]:
    """The training stages' settings."""
    stage = {"max_steps": 12, "save_steps": 4, "logging_steps": 2, "learning_rate": 1e-2}
    return {
        "sft": {"data": str(data / "sft.jsonl"), "eval_steps": 6, **stage},
        "reward": {"data": str(data / "pairs.jsonl"), **stage},
        "pro": {"data": str(data / "lists.jsonl"), "answers": 4, "max_new_tokens": 8, **stage},
    }


@pytest.fixture
def write_config(tmp_path, base, sections):
    """Writes run.yaml; keyword arguments replace or (None) remove top-level keys."""

    def write(**changes) -> Path:
        raw = {
            "name": "tiny",
            "threads": 2,
            "base": str(base),
            "output": str(tmp_path / "run"),
            "lora": {"rank": 4, "dropout": 0.1},
            **sections,
            "report": {"samples": 2, "max_new_tokens": 8},
        }
        for key, value in changes.items():
            raw.pop(key, None) if value is None else raw.update({key: value})
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(raw, allow_unicode=True), "utf-8")
        return path

    return write
