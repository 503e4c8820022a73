"""The three classics: a classifier over frozen features, the output layer, everything."""

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers import LoraLinear

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
        torch.testing.assert_close(model(ids).logits, before)
        assert model.config.num_labels == 2
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
        torch.testing.assert_close(model(ids).logits, before)
        fp.load_adapter(model, tmp_path, "again")
        assert torch.equal(model(ids).logits, after)
        fp.detach(model, "again")
        fp.detach(model, "head")
        assert model.get_output_embeddings().weight is embedding


def test_each_head_has_its_own_labels(ids):
    model = classifier("Bert")
    config, names = model.config, {0: "good", 1: "bad"}
    config.id2label, config.label2id = names, {"good": 0, "bad": 1}
    labels = torch.tensor([0, 1])
    before = model(ids, labels=labels).loss
    fp.attach(model, fp.FeatureBased(num_labels=1), "score")
    model(ids, labels=torch.tensor([0.3, 0.7]))
    assert config.problem_type == "regression"
    fp.attach(model, fp.FeatureBased(num_labels=3), "three")
    model(ids, labels=torch.tensor([0, 2]))
    assert config.problem_type == "single_label_classification" and len(config.id2label) == 3
    fp.attach(model, fp.OutputLayer(), "own")
    assert config.id2label == names
    fp.activate(model, "score")
    fp.activate(model, None)
    assert config.id2label == names and config.label2id == {"good": 0, "bad": 1}
    assert config.problem_type == "single_label_classification"
    assert torch.equal(model(ids, labels=labels).loss, before)


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_leaves_a_trained_output_layer_alone(make_llama, ids, tmp_path, tie):
    model = make_llama(tie=tie)
    with torch.no_grad():
        before = model(ids).logits
    ties = dict(model.all_tied_weights_keys)
    fp.attach(model, fp.OutputLayer(), "head")
    train(model, ids, ids)
    with torch.no_grad():
        after = model(ids).logits
        model.save_pretrained(tmp_path)  # refused shared tensors
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, after)
        model.load_state_dict(model.state_dict())
        model.tie_weights()
        assert torch.equal(model(ids).logits, after)
        model.resize_token_embeddings(70)
        torch.testing.assert_close(model(ids).logits[..., :61], after)
        fp.activate(model, None)
        logits = model(ids).logits
        assert logits.shape[-1] == 70
        torch.testing.assert_close(logits[..., :61], before)
        fp.activate(model, "head")
        torch.testing.assert_close(model(ids).logits[..., :61], after)
        model.resize_token_embeddings(61)
        fp.detach(model, "head")
        assert torch.equal(model(ids).logits, before)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == tie and model.all_tied_weights_keys == ties
    assert "_tied_weights_keys" not in vars(model)


def test_beside_lora(ids):
    model = classifier("Bert")
    fp.attach(model, fp.OutputLayer(), "head")
    fp.attach(model, fp.LoRA(rank=2, targets=["query", "value"]), "lora")
    fp.activate(model, ["lora", "head"])
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bert", "classifier"}
    losses = train(model, ids, torch.tensor([0, 1]))
    assert losses[-1] < losses[0]


def test_lora_goes_around_what_adapters_added(make_llama, ids, stir, tmp_path):
    model = make_llama()
    fp.attach(model, fp.PrefixTuning(length=3, projection=8), "prefix")
    fp.attach(model, fp.OutputLayer(), "head")
    for name, targets in (("all", "all-linear"), ("regex", ".*(proj|projections.*|own|head)")):
        if name == "regex":
            with pytest.raises(InputError, match="cannot adapt 'lm_head', an attached head trains"):
                fp.attach(model, fp.LoRA(targets=targets), name)
            targets = ".*_proj"
        stir(fp.attach(model, fp.LoRA(targets=targets), name))
        fp.save_adapter(model, tmp_path / name, name)
        other = fp.load_adapter(make_llama(), tmp_path / name)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, other(ids).logits)
    paths = [p for p, m in model.named_modules() if isinstance(m, LoraLinear)]
    assert len(paths) == 14 and all(p.startswith("model.layers.") for p in paths)


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
