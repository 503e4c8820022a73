"""Conversations as tokens: templates, the plain form, cutting, greedy answers."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fusedpeft.errors import InputError
from fusedpeft.train.chat import encode, encode_prompt, generate_answers

PROMPT = [{"role": "user", "content": "hello 안녕"}]


@pytest.fixture
def plain(tokenizer):
    """A base model's tokenizer: no chat template, a token before and one after."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = None
    found.bos_token = "<|system|>"
    return found


def text(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_with_a_template(tokenizer):
    (tokens,) = encode(tokenizer, PROMPT, ["yes"], max_length=None, truncate=False)
    assert text(tokenizer, tokens.ids) == "<|user|>hello 안녕<|end|><|assistant|>yes<|end|>"
    assert tokens.ids[: tokens.prompt_length] == encode_prompt(tokenizer, PROMPT)


def test_without_a_template(plain):
    turns = [*PROMPT, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why"}]
    (tokens,) = encode(plain, turns, ["yes"], max_length=None, truncate=False)
    asked = "<|system|>\n\nHuman: hello 안녕\n\nAssistant: no\n\nHuman: why\n\nAssistant:"
    assert text(plain, tokens.ids) == asked + " yes<|end|>"
    assert text(plain, tokens.ids[: tokens.prompt_length]) == asked


def test_no_second_space_from_a_tokenizer_that_sets_one_before_a_text():
    """SentencePiece's prefix space, as Llama's tokenizers have it."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("HumanAssistant:\n"),
        show_progress=False,
    )
    model.train_from_iterator(["hello", "yes"], trainer)
    spaced = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    prompt = [{"role": "user", "content": "hello"}]
    (tokens,) = encode(spaced, prompt, ["yes"], max_length=None, truncate=False)
    asked, said = tokens.ids[: tokens.prompt_length], tokens.ids[tokens.prompt_length :]
    assert asked == encode_prompt(spaced, prompt)
    whole = "<s>\n\nHuman: hello\n\nAssistant: yes</s>"
    assert tokens.ids == spaced(whole, add_special_tokens=False)["input_ids"]
    assert "".join(spaced.convert_ids_to_tokens(said)) == "▁yes</s>"


def test_a_template_that_rewrites_the_past_ends_answers_with_the_end_token(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ messages|length }}{% if add_generation_prompt %}>{% endif %}"
    (tokens,) = encode(odd, PROMPT, ["yes"], max_length=None, truncate=False)
    assert text(odd, tokens.ids) == "1>yes<|end|>"


def test_the_prompts_tokens_do_not_depend_on_the_answer(tokenizer):
    found = encode(tokenizer, PROMPT, ["yes", " no", "안"], max_length=None, truncate=False)
    starts = {tuple(t.ids[: t.prompt_length]) for t in found}
    assert len(starts) == 1


def test_too_long_is_an_error_that_names_the_row_or_is_cut(tokenizer):
    with pytest.raises(
        InputError, match="f row 7: expected at most 8 tokens, got .*truncate: true"
    ):
        encode(tokenizer, PROMPT, ["yes " * 9], max_length=8, truncate=False, where="f row 7")
    whole = encode(tokenizer, PROMPT, ["yes " * 9, "y"], max_length=None, truncate=False)
    cut = encode(tokenizer, PROMPT, ["yes " * 9, "y"], max_length=8, truncate=True)
    long, short = cut
    assert len(long.ids) == 8 and long.prompt_length == 4
    asked = whole[0].ids[: whole[0].prompt_length]
    assert long.ids == asked[-4:] + whole[0].ids[whole[0].prompt_length :][:4]
    answer = whole[1].ids[whole[1].prompt_length :]
    assert short.ids == (asked + answer)[-8:]  # a short answer is whole, end and all


def test_a_refusing_template_is_one_line(tokenizer):
    with pytest.raises(InputError, match="chat template refuses.*expected the role"):
        encode_prompt(tokenizer, [{"role": "tool", "content": "x"}])


def test_greedy_answers_do_not_depend_on_the_batch(tokenizer, make_model):
    model = make_model().train()
    prompts = [[{"role": "user", "content": "hello " * n}] for n in (1, 5, 2, 9)]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    assert model.training
    alone = [generate_answers(model, tokenizer, [p], max_new_tokens=8)[0] for p in prompts]
    assert together == alone
    ids = torch.tensor([encode_prompt(tokenizer, prompts[0])])
    model.eval()
    for _ in range(8):  # the definition
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    start = len(encode_prompt(tokenizer, prompts[0]))
    assert alone[0] == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_greedy_is_greedy_whatever_the_base_says(tokenizer, make_model):
    model = make_model()
    prompts = [[{"role": "user", "content": "hello " * n}] for n in (1, 4)]
    want = generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    first = tokenizer(want[0], add_special_tokens=False)["input_ids"][0]
    for setting in (
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [first]},
        {"forced_eos_token_id": first},
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
    ):
        own = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **setting)
        model.generation_config = own
        assert generate_answers(model, tokenizer, prompts, max_new_tokens=12) == want, setting
        assert model.generation_config is own


def test_answers_longer_than_the_model_takes(tokenizer, make_model):
    with pytest.raises(InputError, match="less than the 96 tokens"):
        generate_answers(make_model(), tokenizer, [PROMPT], max_new_tokens=96)
    long = [{"role": "user", "content": "hello " * 200}]
    assert isinstance(generate_answers(make_model(), tokenizer, [long], max_new_tokens=4)[0], str)
