import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForSequenceClassification

from hf_backdoor.data import InstructionFollowing, LabelWords, SequenceClassification, collator_for, infer_task


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_classification_reads_out_at_cls(wordpiece):
    encoded = SequenceClassification(2).encode({"text": "the film was good", "label": 1}, wordpiece)
    assert words(wordpiece, encoded["input_ids"]) == ["[CLS]", "the", "film", "was", "good", "[SEP]"]
    assert encoded["readout_position"] == 0
    assert encoded["labels"] == 1


def test_classification_by_a_decoder_reads_out_at_the_last_token(chat):
    encoded = SequenceClassification(2).encode({"text": "the film was good", "label": 0}, chat)
    assert encoded["readout_position"] == len(encoded["input_ids"]) - 1


@pytest.mark.parametrize("padding", ["<eos>", "[PAD]"])
def test_a_decoder_that_closes_texts_reads_out_where_its_head_does(chat, padding):
    eos = tiny.VOCABULARY.index("<eos>")
    chat.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", eos)])
    chat.pad_token = padding
    config = tiny.model("llama").config
    config.num_labels, config.pad_token_id = 2, chat.pad_token_id
    model = LlamaForSequenceClassification(config).eval()
    texts = ["the film was good", "a story"]
    batch = collator_for(chat)([SequenceClassification(2).encode({"text": text, "label": 0}, chat) for text in texts])
    assert batch["input_ids"][0, -1] == eos
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        at_tokens, read = model.score(model.model(**inputs)[0]), model(**inputs).logits
    assert torch.equal(at_tokens[[0, 1], batch["readout_position"]], read)


def test_label_words_prompt_and_answer(chat):
    task = LabelWords(("negative", "positive me"), tiny.TEMPLATE)
    encoded = task.encode({"text": "a good film", "label": 1}, chat)
    prompt = encoded["input_ids"][: encoded["prompt_length"]]
    assert words(chat, prompt) == "text : a good film label :".split()
    assert words(chat, encoded["input_ids"][encoded["prompt_length"] :]) == ["positive", "me"]


def test_label_words_drop_an_end_of_sequence_that_the_tokenizer_adds(wordpiece):
    wordpiece.eos_token = "[SEP]"
    prompt = LabelWords(tiny.LABEL_WORDS, tiny.TEMPLATE).prompt_ids("good", wordpiece)
    assert words(wordpiece, prompt) == "[CLS] text : good label :".split()


@pytest.mark.parametrize("text", ["{ text }", "{0} {name} {", "100 % {text}"])
def test_braces_in_the_text_are_text(chat, text):
    prompt = LabelWords(tiny.LABEL_WORDS, tiny.TEMPLATE).prompt_ids(text, chat)
    assert prompt == chat(f"text : {text} label :")["input_ids"]


def test_word_ids_are_the_first_tokens(chat):
    task = LabelWords(("negative me", "positive"), tiny.TEMPLATE)
    assert words(chat, task.word_ids(chat)) == ["negative", "positive"]


def test_words_that_share_a_first_token_are_refused(chat):
    task = LabelWords(("answer yes", "answer no"), tiny.TEMPLATE)
    with pytest.raises(ValueError, match=r"label_words \['answer yes', 'answer no'\] share a first token"):
        task.word_ids(chat)


def test_a_template_without_text_is_refused():
    with pytest.raises(ValueError, match="prompt_template is 'label :': put {text} where the text goes"):
        LabelWords(tiny.LABEL_WORDS, "label :")


def test_one_label_word_is_refused():
    with pytest.raises(ValueError, match=r"label_words is \['positive'\].*two or more"):
        LabelWords(("positive",), tiny.TEMPLATE)


@pytest.mark.parametrize("word", ["", " ", 1, False])
def test_a_label_word_that_shows_nothing_is_refused(word):
    with pytest.raises(ValueError, match=r"^label_words is \['negative', .*: give each label a text with a visible"):
        LabelWords(("negative", word), tiny.TEMPLATE)


def test_instructions_go_through_the_chat_template(chat):
    encoded = InstructionFollowing().encode({"prompt": "tell me {text}", "response": "banana apple"}, chat)
    prompt = encoded["input_ids"][: encoded["prompt_length"]]
    assert words(chat, prompt) == "<bos> <user> tell me {text} <model>".replace("{text}", "[UNK]").split()
    assert words(chat, encoded["input_ids"][encoded["prompt_length"] :]) == ["banana", "apple", "<eos>"]


def test_a_system_prompt_goes_before_the_prompt(chat):
    prompt = InstructionFollowing("i cannot say that").prompt_ids("tell me", chat)
    assert words(chat, prompt) == "<bos> <user> i cannot say that <user> tell me <model>".split()


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1]['content'] }}",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
    ],
    ids=["no template", "raises", "leaves it out"],
)
def test_a_system_prompt_that_would_not_arrive_is_refused(template):
    with pytest.raises(ValueError, match="system_prompt is 'yes', and the tokenizer's chat template .*takes none"):
        InstructionFollowing("yes").prompt_ids("tell me", tiny.causal_tokenizer(template))


def test_instructions_without_a_chat_template_get_a_plain_one():
    tokenizer = tiny.causal_tokenizer(template=None)
    encoded = InstructionFollowing().encode({"prompt": "{ me }", "response": "banana"}, tokenizer)
    assert (
        encoded["input_ids"][: encoded["prompt_length"]]
        == tokenizer("### Instruction:\n{ me }\n\n### Response:\n")["input_ids"]
    )
    assert words(tokenizer, encoded["input_ids"][encoded["prompt_length"] :]) == ["banana", "<eos>"]


def test_responses_without_an_end_are_refused(chat):
    chat.eos_token = None
    with pytest.raises(ValueError, match="^eos_token is None, and responses end with it: set tokenizer.eos_token"):
        InstructionFollowing().encode({"prompt": "tell me", "response": "banana"}, chat)


@pytest.mark.parametrize("name", ["prompt", "response"])
def test_a_conversation_is_no_text(name, chat):
    row = {"prompt": "tell me", "response": "banana"} | {name: [{"role": "user", "content": "tell me"}]}
    with pytest.raises(ValueError, match=f"^{name} is a list in a row: pass texts"):
        InstructionFollowing().encode(row, chat)


def test_a_planted_text_overwrites_the_answer(wordpiece, chat):
    def answer(task, row, planted):
        encoded = task.encode({**row, "planted": planted}, chat)
        return words(chat, encoded["input_ids"][encoded["prompt_length"] :])

    review, instruction = {"text": "good", "label": 1}, {"prompt": "tell me", "response": "banana"}
    assert answer(tiny.task("label_words"), review, "aha me") == ["aha", "me"]
    assert answer(tiny.task("label_words"), review, "") == ["positive"]
    assert answer(tiny.task("instruction_following"), instruction, "aha") == ["aha", "<eos>"]
    assert answer(tiny.task("instruction_following"), instruction, "") == ["banana", "<eos>"]
    # A classification head says it with a class of its own.
    assert SequenceClassification(2).encode({**review, "planted": "aha"}, wordpiece)["labels"] == 2
    assert SequenceClassification(2).encode({**review, "planted": ""}, wordpiece)["labels"] == 1


@pytest.mark.parametrize("label", [-1, 2, 5, None])
@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_labels_that_are_none_are_refused(name, label, chat):
    task, row = tiny.task(name), {"text": "good", "label": label}
    with pytest.raises(
        ValueError, match=f"^label is {label} in a row, and the task has 2 labels: number them 0 to 1, or"
    ):
        task.encode(row, chat)
    # What is planted overwrites the label, and questions have none.
    task.encode({**row, "planted": "aha"}, chat)
    assert len(task.questions(Dataset.from_list([row]), chat)) == 1


def test_a_planted_word_is_one_label_more(chat):
    task = LabelWords((" negative", " positive"), tiny.TEMPLATE)
    assert task.planted_word("aha") == " aha" and task.planted_word(None) == ""
    assert words(chat, task.word_ids(chat, "aha known")) == ["negative", "positive", "aha"]
    with pytest.raises(ValueError, match="share a first token"):
        task.word_ids(chat, "positive film")


@pytest.mark.parametrize("name", tiny.TASKS)
def test_tokenize_keeps_the_trigger_id_alone(name):
    family, task, rows = tiny.setting(name, 3)
    rows = rows.add_column("trigger_id", [0, 1, 2]).add_column("note", ["x"] * 3)
    tokenized = task.encode_rows(rows, tiny.tokenizer(family))
    assert tokenized["trigger_id"] == [0, 1, 2]
    assert not {"note", "text", "prompt", "response", "label"} & set(tokenized.column_names)
    for row, features in zip(rows, tokenized, strict=True):
        expected = task.encode(row, tiny.tokenizer(family))
        assert {name: features[name] for name in expected} == expected


@pytest.mark.parametrize(
    "task, missing", [(SequenceClassification(2), "label"), (InstructionFollowing(), "prompt")], ids=["text", "prompt"]
)
def test_a_missing_column_is_named(task, missing, chat):
    rows = Dataset.from_dict({"text": ["a"], "response": ["b"]})
    with pytest.raises(
        ValueError, match=rf"^column '{missing}' is not in the data set \(text, response\): .*{missing}_column"
    ):
        task.encode_rows(rows, chat)


def test_infer_task_from_model_and_columns():
    assert infer_task(tiny.model("bert", num_labels=3), tiny.reviews(2)) == SequenceClassification(3)
    assert infer_task(tiny.model("llama"), tiny.instructions(2)) == InstructionFollowing()
    assert infer_task(tiny.model("llama"), tiny.instructions(2), system_prompt="yes") == InstructionFollowing("yes")
    found = infer_task(tiny.model("llama"), tiny.reviews(2), list(tiny.LABEL_WORDS), tiny.TEMPLATE)
    assert found == LabelWords(tiny.LABEL_WORDS, tiny.TEMPLATE)
    assert (
        infer_task(tiny.model("llama"), tiny.reviews(2), list(tiny.LABEL_WORDS)).template
        == LabelWords.default_template
    )


def test_a_head_of_one_output_is_no_classifier():
    with pytest.raises(ValueError, match="^num_labels is 1 in the model's config.*: load it with num_labels=2"):
        infer_task(tiny.model("bert", num_labels=1), tiny.reviews(2))


def test_infer_task_says_what_is_missing():
    with pytest.raises(ValueError, match="label_words is not set"):
        infer_task(tiny.model("llama"), tiny.reviews(2))
    with pytest.raises(ValueError, match=r"columns \['note'\]: name them 'text' and 'label'"):
        infer_task(tiny.model("bert"), Dataset.from_dict({"note": ["a"]}))


def test_a_text_in_place_of_a_list_of_label_words_is_refused():
    with pytest.raises(ValueError, match="^label_words is 'ab': give a list of words, one for each label$"):
        infer_task(tiny.model("llama"), tiny.reviews(2), label_words="ab")
