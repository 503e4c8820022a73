"""A tiny model and tokenizer with a chat template, and rows to learn from."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusedpeft.train.tokenizer import train_tokenizer

TEXT = ["hello world what is this", "안녕 세상 이건 뭐예요", "yes no maybe please and thanks"] * 4


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXT, 300, 96)


@pytest.fixture
def make_model(tokenizer):
    def make(**kwargs):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=96,
                initializer_range=0.3,  # or the frozen head is near uniform, whatever h is
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **kwargs,
            )
        ).eval()

    return make


@pytest.fixture
def lists():
    """Longer answers are worse; the rows differ in length, so that batches are padded."""
    return [
        {
            "prompt": user("hello " * (1 + i % 3)),
            "responses": ["yes", "no no", "maybe maybe maybe"][: 2 + i % 2],
            "rewards": [1.0, 0.0, -1.0][: 2 + i % 2],
            "aspect": ("helpful", "safe", None)[i % 3],
        }
        for i in range(12)
    ]


@pytest.fixture
def pairs(lists):
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["responses"][0],
            "rejected": row["responses"][1],
            "aspect": row["aspect"],
        }
        for row in lists
    ]
