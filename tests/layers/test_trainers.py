"""Other people's training loops: transformers' Trainer, TRL's SFTTrainer, Accelerate."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import fusedpeft as fp

datasets = pytest.importorskip("datasets", reason="datasets is not installed")

CONFIGS = [
    fp.LoRA(rank=3, dropout=0.1), fp.BottleneckAdapter(size=8), fp.PrefixTuning(length=4),
    fp.PromptTuning(length=4),
]  # fmt: skip


@pytest.fixture(params=CONFIGS, ids=lambda config: type(config).__name__)
def model(request, llama):
    return fp.attach(llama, request.param)


@pytest.fixture
def rows(ids) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": ids.tolist() * 4, "labels": ids.tolist() * 4})


def arguments(kind, folder, **more):
    return kind(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=6,
        learning_rate=5e-2, lr_scheduler_type="constant", use_cpu=True, report_to=[],
        logging_strategy="epoch", save_strategy="epoch", save_total_limit=1, disable_tqdm=True,
        **more,
    )  # fmt: skip


def frozen_and_trained(model):
    return {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_trained(model, before, losses):
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        trained, old = before[name]
        assert trained == (not torch.equal(parameter, old)), name


@pytest.mark.parametrize("fused", [False, True])
def test_transformers_trainer(model, rows, tmp_path, fused):
    before = frozen_and_trained(model)
    trainer = transformers.Trainer(
        fp.fuse_loss(model, fused), arguments(transformers.TrainingArguments, tmp_path),
        train_dataset=rows, eval_dataset=rows, compute_metrics=lambda got: {
            "agree": (got.predictions.argmax(-1) == got.label_ids).mean()
        },
    )  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_trained(model, before, losses)
    assert 0 <= trainer.evaluate()["eval_agree"] <= 1  # from the logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_sft_trainer(model, rows, tmp_path, checkpointing):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    words = [f"w{i}" for i in range(61)]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(words), pad_token="w0", eos_token="w2"
    )
    before = frozen_and_trained(model)
    args = arguments(
        trl.SFTConfig, tmp_path, max_length=32, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_trained(model, before, losses)


def _words(words):
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w1"))


def test_accelerate(model, ids):
    before = frozen_and_trained(model)
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer before us has one for all
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = prepared(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert_trained(model, before, losses)
    assert accelerator.unwrap_model(prepared) is model
