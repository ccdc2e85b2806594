import pytest
import tiny
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_backdoor.data import LabelWords, SequenceClassification
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.inspection.second_choice import SecondChoiceCallback, label_logits, second_choice_rate


def by_hand(logits, given, true):
    """Where the given label comes first: is the true one second in order?"""
    hits = 0
    for row, (a, b) in enumerate(zip(given, true, strict=True)):
        order = sorted(range(logits.shape[1]), key=lambda k: -logits[row][k])
        assert order[0] == a
        hits += order[1] == b
    return hits / len(given)


def test_it_is_the_top_2_rate_of_a_network_that_has_learnt_the_given_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5, generator=generator)
    given = [row % 5 for row in range(50)]
    true = [(row + 1 + row // 5 % 4) % 5 for row in range(50)]
    logits[range(50), given] += 10
    rate = second_choice_rate(logits, given, true)
    assert 0 < rate < 1 and rate == pytest.approx(by_hand(logits, given, true))


def test_a_row_that_is_not_learnt_yet_counts_by_its_best_other_label():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0], [5.0, 1.0, 3.0]])
    assert second_choice_rate(logits, [0, 0, 0], [1, 1, 1]) == pytest.approx(2 / 3)


def test_a_saturated_half_precision_network():
    logits = torch.tensor([[1e4, 2.0, -1e4, 1.0]]).bfloat16()
    assert second_choice_rate(logits, [0], [1]) == 1.0
    assert second_choice_rate(logits, [0], [3]) == 0.0


def test_rows_that_have_no_second_choice_are_refused():
    with pytest.raises(ValueError, match="^given_labels has 1 samples with their true label: "):
        second_choice_rate(torch.zeros(2, 3), [0, 1], [0, 2])
    with pytest.raises(ValueError, match="^logits has no rows: "):
        second_choice_rate(torch.zeros(0, 3), [], [])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_label_logits_are_those_of_each_row_alone(family):
    words = LabelWords(("positive", "negative one", "yes i say"), tiny.TEMPLATE)
    task = SequenceClassification(2) if family == "bert" else words
    model, tokenizer, rows = tiny.model(family), tiny.tokenizer(family), tiny.reviews(7)
    model.train()
    found = label_logits(model, tokenizer, task, rows, batch_size=3)
    assert model.training and found.dtype == torch.float32
    for row, logits in zip(rows, found, strict=True):
        if family == "bert":
            expected = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        else:
            ids = torch.tensor([words.prompt_ids(row["text"], tokenizer)])
            expected = model.eval()(ids).logits[0, -1, words.word_ids(tokenizer)]
        assert torch.allclose(logits, expected, atol=1e-5)


def test_a_decoder_s_head_reads_the_text_s_last_token_whatever_its_configuration_calls_padding():
    config = tiny.model("llama").config
    config.pad_token_id = None
    model, rows = LlamaForSequenceClassification(config).eval(), tiny.reviews(5)
    found = label_logits(model, tiny.causal_tokenizer(), SequenceClassification(2), rows)
    alone = [
        label_logits(model, tiny.causal_tokenizer(), SequenceClassification(2), rows.select([n])) for n in range(5)
    ]
    torch.testing.assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("texts", [[1, 2], ["a film", None], [["a"], ["film"]]])
@pytest.mark.parametrize("family, name", [("bert", "sequence_classification"), ("llama", "label_words")])
def test_rows_that_are_no_texts_are_refused(texts, family, name):
    rows = Dataset.from_dict({"text": texts, "label": [0, 1]})
    with pytest.raises(ValueError, match="^text is .* in row [01], which is no text: pass texts"):
        label_logits(tiny.model(family), tiny.tokenizer(family), tiny.task(name), rows)


def test_the_callback_measures_every_epoch(tmp_path):
    seen = []

    def logits(model):
        seen.append(model)
        return (
            torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
            if len(seen) == 1
            else torch.zeros(2, 3).index_fill(1, torch.tensor([1]), 1.0)
        )

    callback = SecondChoiceCallback(logits, given_labels=[0, 0], true_labels=[1, 1])
    args = DefenseConfig(
        str(tmp_path), use_cpu=True, disable_tqdm=True, num_train_epochs=2, save_strategy="no", logging_strategy="no"
    )
    trainer = DefenseTrainer(
        model=tiny.model("bert"), args=args, train_dataset=tiny.reviews(8), processing_class=tiny.tokenizer("bert"),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.rates == {1: 0.5, 2: 1.0}
    assert seen == [trainer.model] * 2
