"""Each objective's loss against a loop over single sequences of the plain model."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    TrainingArguments,
)

from fusedpeft import ops
from fusedpeft.data.rows import ASPECTS
from fusedpeft.errors import InputError
from fusedpeft.layers import LoRA, attach
from fusedpeft.train import Measure, Pro, Reward, RewardModel, Sft, TokenLogprobs, Trainer
from fusedpeft.train.chat import encode
from fusedpeft.train.metrics import combine
from fusedpeft.train.objectives import collator, encode_rows, pad


def batch_of(objective, tokenizer, rows):
    examples = encode_rows(objective, tokenizer, rows, max_length=96, truncate=False)
    return collator(tokenizer.pad_token_id)(examples)


def plain_logprobs(model, tokenizer, row, answer):
    """(sum, tokens) of log p of the answer, by the model's own logits, unpadded."""
    (tokens,) = encode(tokenizer, row["prompt"], [answer], max_length=None, truncate=False)
    ids = torch.tensor([tokens.ids])
    logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    said = logp[tokens.prompt_length - 1 :]
    return said.sum(), len(said)


def test_padding_and_labels(tokenizer, lists):
    examples = encode_rows(Pro(), tokenizer, lists[:2], max_length=None, truncate=False)
    sequences = [s for e in examples for s in e.sequences]
    batch = pad(sequences, 0)
    for i, (ids, start) in enumerate(sequences):
        n = len(ids)
        assert batch["input_ids"][i, :n].tolist() == ids
        assert batch["attention_mask"][i].sum() == n and batch["attention_mask"][i, :n].all()
        assert batch["labels"][i, start:n].tolist() == ids[start:]
        assert (batch["labels"][i] != -100).sum() == n - start


def test_sft_loss(tokenizer, make_model, lists):
    model = make_model()
    rows = [{"prompt": r["prompt"], "response": r["responses"][-1]} for r in lists[:5]]
    batch = batch_of(Sft(), tokenizer, rows)
    got = Sft().loss(TokenLogprobs(model), batch)
    sums, counts = zip(
        *(plain_logprobs(model, tokenizer, r, r["response"]) for r in rows), strict=True
    )
    torch.testing.assert_close(got, -sum(sums) / sum(counts))
    total = Sft().loss(TokenLogprobs(model), batch, 2 * sum(counts))
    torch.testing.assert_close(total, got / 2)  # tokens of the whole step, not of this batch
    assert Measure(tokenizer, batch_size=2).sft_loss(model, rows) == pytest.approx(got.item(), 1e-5)


def test_pro_loss_takes_all_candidates_in_one_pass(tokenizer, make_model, lists):
    model = make_model()
    module, calls = TokenLogprobs(model), []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    got = Pro(0.1).loss(module, batch_of(Pro(), tokenizer, lists[:4]))
    assert len(calls) == 1
    sums, counts, rewards, group = [], [], [], []
    for i, row in enumerate(lists[:4]):
        for answer, reward in zip(row["responses"], row["rewards"], strict=True):
            s, n = plain_logprobs(model, tokenizer, row, answer)
            sums.append(s), counts.append(n), rewards.append(reward), group.append(i)
    want = ops.pro_loss_ref(
        torch.stack(sums), torch.tensor(counts), torch.tensor(rewards), torch.tensor(group),
        sft_weight=0.1,
    )  # fmt: skip
    torch.testing.assert_close(got, want)


def test_reward_scores_the_last_real_token_and_the_rows_head(tokenizer, make_model, pairs):
    model = RewardModel(make_model())
    batch = batch_of(Reward(), tokenizer, pairs[:3])
    losses = []
    for row in pairs[:3]:
        scores = []
        for answer in (row["chosen"], row["rejected"]):
            (tokens,) = encode(tokenizer, row["prompt"], [answer], max_length=None, truncate=False)
            h = model.model.base_model(torch.tensor([tokens.ids])).last_hidden_state[0, -1]
            both = model.heads(h)
            scores.append({"helpful": both[0], "safe": both[1], None: both.sum()}[row["aspect"]])
        losses.append(-F.logsigmoid(scores[0] - scores[1]))
    torch.testing.assert_close(Reward().loss(model, batch), torch.stack(losses).mean())


def test_only_the_rows_head_learns(tokenizer, make_model, pairs):
    model = RewardModel(make_model())
    rows = [{**p, "aspect": "safe"} for p in pairs]
    Reward().loss(model, batch_of(Reward(), tokenizer, rows)).backward()
    assert model.heads.weight.grad[0].abs().max() == 0 < model.heads.weight.grad[1].abs().max()


def train(tmp_path, model, tokenizer, objective, rows, **kwargs):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 40} | kwargs
    args = TrainingArguments(
        output_dir=str(tmp_path), save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, logging_steps=1, **settings,
    )  # fmt: skip
    trainer = Trainer(model, tokenizer, objective, rows, rows, args)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["sft", "reward", "pro"])
def test_training_improves_what_is_measured(tmp_path, tokenizer, make_model, lists, pairs, name):
    measure, base = Measure(tokenizer), attach(make_model(), LoRA(rank=4))
    frozen = {k: v.clone() for k, v in base.state_dict().items() if "lora_" not in k}
    if name == "sft":
        rows = [{"prompt": r["prompt"], "response": r["responses"][0]} for r in lists]
        before = measure.sft_loss(base, rows)
        train(tmp_path, base, tokenizer, Sft(), rows)
        assert measure.sft_loss(base, rows) < 0.5 * before
    elif name == "reward":
        model = RewardModel(base)
        train(tmp_path, model, tokenizer, Reward(), pairs)
        assert measure.reward_accuracy(model, pairs) == {"overall": 1, "helpful": 1, "safe": 1}
    else:
        lists = [{**row, "rewards": row["rewards"][::-1]} for row in lists]  # the longer the better
        train(tmp_path, base, tokenizer, Pro(), lists)
        assert measure.ranking_accuracy(base, lists) > 0.95
    for key, value in base.state_dict().items():
        if key in frozen:
            assert torch.equal(value, frozen[key]), key


def all_three(lists, pairs):
    sft = [
        {"prompt": r["prompt"], "response": r["responses"][i % 2] * (1 + i)}
        for i, r in enumerate(lists)
    ]
    return {"sft": (Sft(), sft), "reward": (Reward(), pairs), "pro": (Pro(), lists)}


@pytest.mark.parametrize("name", ["sft", "reward", "pro"])
@pytest.mark.parametrize("splits", [((4, 1), (1, 4)), ((3, 1), (2, 2))])  # the second: 2 + 1
def test_accumulated_steps_equal_one_large_batch(
    tmp_path, tokenizer, make_model, lists, pairs, name, splits
):
    """Of rows with different numbers of tokens, and batches of different numbers of rows: a mean of
    means would differ."""
    objective, rows = all_three(lists, pairs)[name]
    weights = []
    for size, steps in splits:
        model = attach(make_model(), LoRA(rank=4))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    p.normal_(std=0.1)
        module = RewardModel(model) if name == "reward" else model
        train(
            tmp_path, module, tokenizer, objective, rows[: splits[0][0]], max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd",
            learning_rate=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        weights.append([p.detach() for p in module.parameters() if p.requires_grad])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sft", "reward", "pro"])
def test_the_held_out_loss_is_a_mean_over_all(tmp_path, tokenizer, make_model, lists, pairs, name):
    """Not of batches, of which the last is short and each has its own number of tokens."""
    objective, rows = all_three(lists, pairs)[name]
    model = RewardModel(make_model()) if name == "reward" else make_model()
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=3,
        disable_tqdm=True,
    )  # fmt: skip
    got = Trainer(model, tokenizer, objective, rows[:1], rows[:7], args).evaluate()["eval_loss"]
    module = model if name == "reward" else TokenLogprobs(model)
    with torch.no_grad():
        want = objective.loss(module, batch_of(objective, tokenizer, rows[:7])).item()
    assert got == pytest.approx(want, 1e-5)
    if name == "sft":
        assert got == pytest.approx(Measure(tokenizer).sft_loss(model, rows[:7]), 1e-5)


def test_resumed_training_equals_the_uninterrupted(tmp_path, tokenizer, make_model, lists):
    rows = [{"prompt": r["prompt"], "response": r["responses"][0]} for r in lists]

    def run(folder, resume=None):
        torch.manual_seed(3)
        model = attach(make_model(), LoRA(rank=4, dropout=0.2))
        args = TrainingArguments(
            output_dir=str(folder), save_steps=3, max_steps=8, report_to="none", disable_tqdm=True,
            use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
        )  # fmt: skip
        trainer = Trainer(model, tokenizer, Sft(), rows, rows, args)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-6"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    files = {p.name for p in (tmp_path / "a" / "checkpoint-6").iterdir()}
    assert "trainable.safetensors" in files and "model.safetensors" not in files


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, tokenizer, make_model, lists):
    rows = [{"prompt": r["prompt"], "response": r["responses"][0]} for r in lists]
    args = dict(output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True)
    model = attach(make_model(), LoRA(rank=4, targets=["q_proj"]))
    Trainer(model, tokenizer, Sft(), rows, rows, TrainingArguments(**args)).train()
    other = attach(make_model(), LoRA(rank=4, targets=["v_proj"]))
    trainer = Trainer(other, tokenizer, Sft(), rows, rows, TrainingArguments(**args))
    with pytest.raises(InputError, match="belongs to another adapter"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_reward_model_comes_back_whole(tmp_path, tokenizer, make_model, pairs):
    model = RewardModel(attach(make_model(), LoRA(rank=4)), ("safe",))
    train(tmp_path / "t", model, tokenizer, Reward(), pairs, max_steps=3)
    model.save(tmp_path / "rm")
    again = RewardModel.load(tmp_path / "rm", make_model())
    assert again.trained == ("safe",)
    answers = [[p["chosen"], p["rejected"]] for p in pairs]
    measure = Measure(tokenizer)
    for a, b in zip(measure.scores(model.eval(), pairs, answers),
                    measure.scores(again, pairs, answers), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="expected a reward model's .*there is none"):
        RewardModel.load(tmp_path, make_model())
    (tmp_path / "rm" / "reward_head.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="is damaged"):
        RewardModel.load(tmp_path / "rm", make_model())


def test_rewards_of_answers_are_relative_to_the_responses(tokenizer, make_model, lists):
    measure = Measure(tokenizer)

    def rewards(judge, answers, rows=lists):
        return measure.rewards(judge, rows, answers, measure.spread(judge, lists))

    judge = RewardModel(make_model())
    best = [row["responses"][0] for row in lists]
    got = rewards(judge, best)
    shifted = RewardModel(make_model())
    with torch.no_grad():  # another unit for one head changes nothing
        shifted.heads.weight.copy_(judge.heads.weight * torch.tensor([[3.0], [0.5]]))
    assert rewards(shifted, best) == pytest.approx(got, abs=1e-4)
    mean = [rewards(judge, [r["responses"][i % len(r["responses"])] for r in lists])
            for i in range(2)]  # fmt: skip
    two = [i for i, r in enumerate(lists) if len(r["responses"]) == 2]
    assert sum(mean[0][i] + mean[1][i] for i in two) == pytest.approx(0, abs=1e-5)
    # A few of the rows are measured in the same unit as all of them.
    assert rewards(judge, best[:3], lists[:3]) == pytest.approx(got[:3], abs=1e-4)


def test_rewards_where_the_responses_do_not_differ(tokenizer, make_model, lists):
    judge, measure = RewardModel(make_model()), Measure(tokenizer, batch_size=2)
    rows = [{**row, "responses": ["yes"] * 3} for row in lists[:3]]
    spread = measure.spread(judge, rows)
    assert spread.tolist() == [1.0, 1.0]
    answers = ["no", "maybe", "please"]
    got = measure.rewards(judge, rows, answers, spread)
    scores = measure.scores(judge, rows, [["yes", a] for a in answers])
    want = [combine(s[1:] - s[:1], r["aspect"], ASPECTS) for r, s in zip(rows, scores, strict=True)]
    assert got == pytest.approx([float(w) for w in want], abs=1e-4)


def test_measures_of_a_broken_model_are_not_finite(tokenizer, make_model, lists, pairs):
    """Comparisons with NaN are all false: that is no accuracy of 0."""
    model, measure = make_model(), Measure(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert math.isnan(measure.ranking_accuracy(model, lists))
    found = measure.reward_accuracy(RewardModel(model), pairs)
    assert len(found) == 3 and all(math.isnan(value) for value in found.values())


def test_measuring_changes_nothing(tokenizer, make_model, lists):
    model = make_model()
    for mode in (True, False):
        model.train(mode)
        state = torch.get_rng_state()
        Measure(tokenizer).ranking_accuracy(model, lists)
        assert model.training is mode and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "config, settings",
    [
        (Gemma2Config, {"final_logit_softcapping": 0.5}),
        (CohereConfig, {"logit_scale": 3.0}),
        (GraniteConfig, {"logits_scaling": 0.25}),
    ],
)
def test_what_a_model_does_to_its_logits_is_done_here(config, settings):
    """Capped or scaled: each such model's own log-probabilities, and not those without."""
    size = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0)
    torch.manual_seed(0)
    made = config(**size, **heads, initializer_range=0.3, **settings)
    model = AutoModelForCausalLM.from_config(made).eval()
    ids = torch.randint(1, 50, (2, 7))
    ours = TokenLogprobs(model)
    got = ours(ids, torch.ones_like(ids), ids)
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got, want)
    for name in settings:
        setattr(model.config, name, None if name == "final_logit_softcapping" else 1.0)
    assert not torch.allclose(got, ours(ids, torch.ones_like(ids), ids), atol=1e-2)


def test_an_adapted_head_is_refused(make_model):
    adapted = attach(make_model(), LoRA(targets=["lm_head"]))
    with pytest.raises(InputError, match="leave the head out of the adapter's targets"):
        TokenLogprobs(adapted)


def test_too_long_for_the_model(tmp_path, tokenizer, make_model):
    rows = [
        {"prompt": [{"role": "user", "content": "a" * 200}], "response": "b", "where": "f row 1"}
    ]
    args = TrainingArguments(output_dir=str(tmp_path / "x"), report_to="none", use_cpu=True)
    with pytest.raises(InputError, match="f row 1: expected at most 96 tokens"):
        Trainer(make_model(), tokenizer, Sft(), rows, rows, args)
    with pytest.raises(InputError, match="max_length: the model takes at most 96 tokens, got 97"):
        Trainer(make_model(), tokenizer, Sft(), rows, rows, args, max_length=97)
    assert not (tmp_path / "x").exists()
