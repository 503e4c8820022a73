"""The three classics: a classifier over frozen features, the output layer, everything."""

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.errors import InputError

SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
KINDS = {"Bert": 24, "Roberta": 24, "Llama": 24}


def classifier(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, num_labels=2)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def train(model, ids, labels, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("family", KINDS)
def test_features_and_a_new_classifier(family, ids, tmp_path):
    model = classifier(family)
    labels = torch.tensor([4, 1])
    with torch.no_grad():
        before = model(ids).logits
    fp.attach(model, fp.FeatureBased(num_labels=5), "five")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith(("classifier", "score")) for n in trained)
    losses = train(model, ids, labels)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        after = model(ids).logits
        assert after.shape == (2, 5)
        fp.activate(model, None)
        assert torch.equal(model(ids).logits, before) and model.config.num_labels == 2
        fp.activate(model, "five")
        assert torch.equal(model(ids).logits, after)
        fp.save_adapter(model, tmp_path, "five")
        fp.load_adapter(model, tmp_path, "again")
        assert torch.equal(model(ids).logits, after)
        fp.detach(model, "five")
        fp.detach(model, "again")
        assert torch.equal(model(ids).logits, before)
    assert not hasattr(model, "fusedpeft_heads") and all(
        p.requires_grad for p in model.parameters()
    )


def test_an_output_layer_tied_to_the_embeddings(make_llama, ids, tmp_path):
    model = make_llama(tie=True)
    with torch.no_grad():
        before = model(ids).logits
    fp.attach(model, fp.OutputLayer(), "head")
    assert fp.trainable_parameters(model) == 61 * 24
    train(model, ids, ids)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert embedding.grad is None and not torch.equal(head, embedding)
    with torch.no_grad():
        after = model(ids).logits
        fp.save_adapter(model, tmp_path, "head")
        fp.activate(model, None)
        assert torch.equal(model(ids).logits, before)
        fp.load_adapter(model, tmp_path, "again")
        assert torch.equal(model(ids).logits, after)
        fp.detach(model, "again")
        fp.detach(model, "head")
        assert model.get_output_embeddings().weight is embedding


def test_beside_lora(ids):
    model = classifier("Bert")
    fp.attach(model, fp.OutputLayer(), "head")
    fp.attach(model, fp.LoRA(rank=2, targets=["query", "value"]), "lora")
    fp.activate(model, ["lora", "head"])
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bert", "classifier"}
    losses = train(model, ids, torch.tensor([0, 1]))
    assert losses[-1] < losses[0]


def test_everything(llama, ids):
    before = {n: p.detach().clone() for n, p in llama.named_parameters()}
    fp.attach(llama, fp.FullFineTuning(), "all")
    assert fp.trainable_parameters(llama) == sum(p.numel() for p in llama.parameters())
    train(llama, ids, ids)
    assert all(not torch.equal(p, before[n]) for n, p in llama.named_parameters())
    fp.activate(llama, None)
    assert fp.trainable_parameters(llama) == 0
    with pytest.raises(InputError, match=r"'all' is the whole model: model.save_pretrained\(dir\)"):
        fp.save_adapter(llama, "nowhere", "all")
    fp.detach(llama, "all")
    assert all(p.requires_grad for p in llama.parameters())


def test_bad_input(llama, ids, tmp_path):
    with pytest.raises(
        InputError, match="FeatureBased: expected a classification model .*LlamaFor"
    ):
        fp.attach(llama, fp.FeatureBased(num_labels=2))
    with pytest.raises(InputError, match="OutputLayer: expected a model with an output layer"):
        fp.attach(llama.model, fp.OutputLayer())
    with pytest.raises(InputError, match="num_labels: expected a whole number >= 1, got 0"):
        fp.FeatureBased(num_labels=0)
    model = classifier("Bert")
    fp.attach(model, fp.FeatureBased(num_labels=3), "three")
    fp.attach(model, fp.OutputLayer(), "own")
    with pytest.raises(InputError, match=r"one head acts at a time.*\['three', 'own'\]"):
        fp.activate(model, ["three", "own"])
    fp.save_adapter(model, tmp_path, "three")
    other = classifier("Roberta")
    with pytest.raises(InputError, match="does not fit the head of this RobertaForSequence"):
        fp.load_adapter(other, tmp_path)
    assert not hasattr(other, "_fusedpeft")
    lora = classifier("Bert")
    fp.attach(lora, fp.LoRA(rank=2))  # every linear, which the head's are not
    fp.attach(lora, fp.OutputLayer(), "head")
    fp.detach(lora, "head")
    fp.attach(lora, fp.LoRA(rank=2, targets=["classifier"]), "more")
    with pytest.raises(InputError, match="OutputLayer: the head carries LoRA"):
        fp.attach(lora, fp.OutputLayer(), "again")
