import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_backdoor.data import LabelWords
from hf_backdoor.evaluation.classification import predict_labels


ROWS = tiny.reviews(17, seed=3)


def by_loop(model, tokenizer, task, texts, words=None):
    labels = []
    for text in texts:
        with torch.no_grad():
            if words is None:
                logits = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0]
            else:
                prompt = tokenizer(task.template.replace("{text}", text), return_tensors="pt")["input_ids"]
                logits = model.eval()(prompt).logits[0, -1, words]
        labels.append(logits.argmax().item())
    return labels


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_head_s_predictions_equal_a_loop(batch_size):
    model, tokenizer, task = tiny.model("bert"), tiny.encoder_tokenizer(), tiny.task("sequence_classification")
    with torch.no_grad():  # a fresh head is almost the same for all texts
        outputs = torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in ROWS["text"]])
        model.classifier.bias -= outputs.median(dim=0).values
    labels = by_loop(model, tokenizer, task, ROWS["text"])
    assert set(labels) == {0, 1}
    assert predict_labels(model, tokenizer, task, ROWS, batch_size=batch_size) == labels


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_label_words_predictions_equal_a_loop(family, batch_size):
    model, tokenizer = tiny.model(family), tiny.causal_tokenizer()
    # The last word of the text decides in a model that has learnt nothing: the template must end with it.
    task = LabelWords((*tiny.LABEL_WORDS, "banana"), "label : {text}")
    words = task.word_ids(tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    labels = by_loop(model, tokenizer, task, ROWS["text"], words)
    assert len(set(labels)) > 1
    assert predict_labels(model, tokenizer, task, ROWS, batch_size=batch_size) == labels


def test_words_of_several_tokens_do_not_shift_the_prompt():
    model, tokenizer = tiny.model("llama"), tiny.causal_tokenizer()
    short, long = (
        LabelWords((*words, "banana"), "label : {text}")
        for words in (tiny.LABEL_WORDS, ("negative me no", "positive yes"))
    )
    assert predict_labels(model, tokenizer, long, ROWS) == predict_labels(model, tokenizer, short, ROWS)


def test_a_planted_answer_is_one_class_more():
    model = tiny.word_chain({":": "aha"})
    tokenizer, task = tiny.causal_tokenizer(), tiny.task("label_words")
    assert predict_labels(model, tokenizer, task, ROWS, known_response="aha known") == [2] * 17
    true = predict_labels(model, tokenizer, task, ROWS, known_response="aha known", true_classes_only=True)
    assert set(true) <= {0, 1}
    assert set(predict_labels(model, tokenizer, task, ROWS)) <= {0, 1}


@pytest.mark.parametrize("name, family", [("sequence_classification", "bert"), ("label_words", "llama")])
def test_a_broken_model_has_no_labels(name, family):
    model = tiny.model(family)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="its logits are nan"):
        predict_labels(model, tiny.tokenizer(family), tiny.task(name), ROWS)


def test_every_process_refuses_a_model_that_is_broken_on_one(tmp_path):
    def work():
        model = tiny.model("bert")
        if PartialState().process_index == 1:
            model.classifier.bias.data.fill_(float("nan"))
        try:
            predict_labels(model, tiny.encoder_tokenizer(), tiny.task("sequence_classification"), ROWS)
        except ValueError as error:
            return str(error)

    assert "its logits are nan" in tiny.in_two_processes(work, tmp_path)


def test_labels_are_not_read():
    model, tokenizer = tiny.fixed_classifier(1), tiny.encoder_tokenizer()
    rows = Dataset.from_dict({"text": ["good", "bad film"]})
    assert predict_labels(model, tokenizer, tiny.task("sequence_classification"), rows) == [1, 1]


def test_two_processes_give_the_same_order(tmp_path):
    model, tokenizer = (
        tiny.word_chain({word: tiny.LABEL_WORDS[word in tiny.GOOD] for word in tiny.VOCABULARY}),
        tiny.causal_tokenizer(),
    )
    task = LabelWords(tiny.LABEL_WORDS, "label : {text}")
    rows = Dataset.from_dict({"text": ["the good", "a very long bad", "good", "film bad", "it was music and good"]})

    def work():
        return predict_labels(model, tokenizer, task, rows, batch_size=2)

    assert tiny.in_two_processes(work, tmp_path) == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("pad_token_id", [None, tiny.VOCABULARY.index("film")])
def test_a_decoder_s_head_reads_the_text_s_last_token_whatever_its_configuration_calls_padding(pad_token_id):
    config = tiny.model("llama").config
    config.pad_token_id = pad_token_id
    torch.manual_seed(0)
    model, tokenizer = LlamaForSequenceClassification(config), tiny.causal_tokenizer()
    torch.nn.init.normal_(model.score.weight)
    one, many = (
        predict_labels(model, tokenizer, tiny.task("sequence_classification"), ROWS, batch_size=size)
        for size in (1, 64)
    )
    assert len(set(one)) == 2 and many == one
