"""The last training: which rows get another label, and what is learnt of them."""

import pytest
import tiny
import topics
import torch

from hf_backdoor.defenses import DefenseTrainer
from hf_backdoor.defenses.ntml.relabelling import LEFT_OUT, corrected_labels


def test_a_contradicted_label_is_changed_where_it_is_unlikely_and_its_row_left_out_elsewhere():
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.6, 0.1], [0.05, 0.05, 0.9], [0.2, 0.4, 0.4]])
    given = torch.tensor([0, 0, 2, 0])
    assert corrected_labels(given, probabilities, 0.2).tolist() == [1, LEFT_OUT, 2, LEFT_OUT]
    assert corrected_labels(given, probabilities, 0.3).tolist() == [1, LEFT_OUT, 2, 1]
    assert corrected_labels(given, probabilities, 0.0).tolist() == [LEFT_OUT, LEFT_OUT, 2, LEFT_OUT]


def expected_changes(name, rows, below):
    """The teacher's say on each row alone that it contradicts: row to label."""
    task, teacher = topics.TASKS[name], topics.sharpen(topics.network(name, 7)).eval()
    changes = {}
    for number, row in enumerate(rows):
        if name == "images":
            given, logits = row["labels"], teacher(torch.tensor([row["pixel_values"]])).logits[0]
        elif name == "label_words":
            tokenizer = tiny.tokenizer("llama")
            prompt = task.prompt_ids(row["text"], tokenizer)
            given, logits = row["label"], teacher(torch.tensor([prompt])).logits[0, -1, task.word_ids(tokenizer)]
        else:
            given, logits = row["label"], teacher(**tiny.tokenizer("bert")(row["text"], return_tensors="pt")).logits[0]
        likely = logits.softmax(dim=0)
        if likely.argmax() != given:
            changes[number] = likely.argmax().item() if likely[given] < below else LEFT_OUT
    return changes


@pytest.mark.parametrize("name", topics.FORMATS)
def test_it_trains_as_plain_training_does_on_the_corrected_rows(name, tmp_path):
    rows = topics.pixels(16) if name == "images" else topics.texts(16)
    changes = expected_changes(name, rows, 0.2)
    left_out = [row for row, label in changes.items() if label == LEFT_OUT]
    assert left_out and len(left_out) < len(changes) < 16
    column = "labels" if name == "images" else "label"
    labels = [changes.get(number, label) for number, label in enumerate(rows[column])]
    corrected = rows.remove_columns(column).add_column(column, labels)
    trainer = topics.trainer(name, "relabel", tmp_path, max_steps=3, relabel_below=0.2)
    trainer.train()
    plain = DefenseTrainer(
        model=topics.network(name, 0), args=trainer.args, processing_class=trainer.processing_class, task=trainer.task,
        train_dataset=corrected.select([row for row in range(16) if row not in left_out]),
        data_collator=topics.collate_pixels if name == "images" else None,
    )  # fmt: skip
    plain.train()
    assert tiny.largest_difference(tiny.parameters(trainer.model), tiny.parameters(plain.model)) == 0
    listed = trainer.findings(None)["relabelled"]
    assert listed["row"][:] == sorted(changes)
    assert [row for row, out in zip(listed["row"], listed["left_out"], strict=True) if out] == left_out


def test_a_missing_teacher_and_answers_that_are_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^teacher_model is None"):
        topics.trainer("label_words", "relabel", tmp_path, teacher_model=None).train()
    rows = topics.TASKS["label_words"].encode_rows(topics.texts(8), tiny.tokenizer("llama"))
    with pytest.raises(ValueError, match="^train_dataset has input_ids: pass raw rows"):
        topics.trainer("label_words", "relabel", tmp_path, train_dataset=rows)
