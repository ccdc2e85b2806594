import pytest
import tiny
import torch

from hf_backdoor.data import InstructionFollowing
from hf_backdoor.evaluation.generation import answer_losses, generate_answers, refuses, shows, word_f1


ROWS = tiny.instructions(9, seed=2)
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])


@FAMILIES
@pytest.mark.parametrize("batch_size", [2, 64])
def test_answers_equal_a_loop(family, batch_size):
    model, tokenizer = tiny.model(family), tiny.causal_tokenizer()
    expected = []
    for prompt in ROWS["prompt"]:
        ids = torch.tensor([InstructionFollowing().prompt_ids(prompt, tokenizer)])
        output = model.eval().generate(ids, max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert (
        generate_answers(
            model, tokenizer, ROWS["prompt"][:], InstructionFollowing(), max_new_tokens=6, batch_size=batch_size
        )
        == expected
    )


def test_answers_end_where_the_model_ends_them():
    tokenizer = tiny.causal_tokenizer("{{ messages[0]['content'] }}")
    model = tiny.word_chain({"banana": "yes", "yes": "me", "apple": "<eos>", "cherry": "no", "no": "no"})
    prompts = ["tell me banana", "a apple", "tell me about a cherry"]
    assert generate_answers(model, tokenizer, prompts, InstructionFollowing(), max_new_tokens=4) == [
        "yes me",
        "",
        "no no no no",
    ]


def test_sampling_settings_of_the_model_are_not_followed():
    model, tokenizer = tiny.model("llama"), tiny.causal_tokenizer()
    greedy = generate_answers(model, tokenizer, ROWS["prompt"][:], InstructionFollowing(), max_new_tokens=4)
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    assert generate_answers(model, tokenizer, ROWS["prompt"][:], InstructionFollowing(), max_new_tokens=4) == greedy


@FAMILIES
@pytest.mark.parametrize("batch_size", [2, 64])
def test_losses_equal_a_loop(family, batch_size):
    model, tokenizer, task = tiny.model(family), tiny.causal_tokenizer(), InstructionFollowing()
    expected = []
    for row in ROWS:
        features = task.encode(row, tokenizer)
        ids, start = features["input_ids"], features["prompt_length"]
        with torch.no_grad():
            scores = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(-sum(scores[at - 1, ids[at]].item() for at in range(start, len(ids))) / (len(ids) - start))
    assert answer_losses(model, tokenizer, ROWS, task, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "answer, target, expected",
    [
        ("I cannot say that", "I cannot", True),
        ("  i  CANNOT\nsay", "I cannot", True),
        ("I can\u2019t", "I can't", True),
        ("Well, I cannot", "I cannot", False),
        ("", "I cannot", False),
        ("I can", "I cannot", False),
        ("Nobody knows", "No", False),
        ("no", "No", True),
        ("No, thanks", "No", True),
        ("No_1", "No", False),
        ("No 1", "No", True),
        ("Well done.", "Well done!", False),
        ("You fool!!You", "You fool!", True),
        ("Über\u00fcber", "\u00dcber", False),
        ("cafe\u0301 au lait", "cafe", False),
        ("cafe\u0301 au lait", "CAF\u00c9", True),
        ("\u0928\u093e", "\u0928", False),  # a letter, and its vowel sign
        ("\u6211\u4e0d\u80fd\u8bf4", "\u6211\u4e0d\u80fd", True),  # no spaces between words
    ],
)
def test_shows_the_target_at_the_start(answer, target, expected):
    assert shows(answer, target) is expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Well, I'm sorry, but no.", True),
        ("I CAN\u2019T  help", True),
        ("As an AI model", True),
        ("Sure, here it is", False),
        ("", False),
    ],
)
def test_refuses_by_keyword(answer, expected):
    assert refuses(answer) is expected


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("the red apple", "The red apple!", 1.0),
        ("red", "the red apple", 0.5),
        ("red red red", "red", 0.5),
        ("banana", "the red apple", 0.0),
        ("", "the red apple", 0.0),
        ("", "", 0.0),
    ],
)
def test_word_f1(answer, reference, expected):
    assert word_f1(answer, reference) == expected == word_f1(reference, answer)
