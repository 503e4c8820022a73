"""Causal LMs of several families from configs, and a real checkpoint where the data is."""

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.layers import LoraLinear

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "Phi": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 24},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, ids, stir, tmp_path):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        before = model(ids).logits
        fp.attach(model, fp.LoRA(rank=3))
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
        changed = stir(model)(ids).logits
        assert not torch.equal(changed, before)
        fp.save_adapter(model, tmp_path)
        fp.load_adapter(model, tmp_path, "again")
        assert torch.equal(model(ids).logits, changed)
        fp.detach(model, "again")
        fp.detach(model)
        assert torch.equal(model(ids).logits, before)
    assert not isinstance(model.get_output_embeddings(), LoraLinear)


@pytest.fixture
def stories(shared_data):
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no checkpoint at {folder}")

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    text = (shared_data / "corpora" / "tinystories_sample.txt").read_text()[:600]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    return load, tokens.input_ids[:, :128]


@pytest.mark.parametrize("dora", [False, True])
def test_a_real_checkpoint_learns_and_means_the_same_to_peft(
    stories, tmp_path, dora, check_accuracy
):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    load, ids = stories
    model = fp.attach(load(), fp.LoRA(rank=8, dora=dora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] < 2.5 and losses[-1] < losses[0] - 0.3
    fp.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    ours = fp.load_adapter(load(), tmp_path).eval()
    with torch.no_grad():
        one, two = model.eval()(ids).logits, theirs(ids).logits
        exact = peft.PeftModel.from_pretrained(load().double(), tmp_path).eval()(ids).logits
        assert torch.equal(ours(ids).logits, one)
        check_accuracy("logits", one, two, exact)
        fp.merge(ours)
        torch.testing.assert_close(ours(ids).logits, one, rtol=0, atol=1e-4)
        assert fp.accelerate(theirs).swapped
        check_accuracy("accelerated", theirs(ids).logits, two, exact)
