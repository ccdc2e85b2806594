"""The last training: which rows get another label, and what is learnt of them."""

import pytest
import tiny
import topics
import torch

from hf_backdoor.defenses import DefenseTrainer
from hf_backdoor.defenses.ntml.relabelling import LEFT_OUT, corrected_labels, outlying_classes


def test_a_contradicted_label_is_changed_where_it_is_unlikely_and_its_row_left_out_elsewhere():
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.6, 0.1], [0.05, 0.05, 0.9], [0.2, 0.4, 0.4]])
    given = torch.tensor([0, 0, 2, 0])
    assert corrected_labels(given, probabilities, 0.2).tolist() == [1, LEFT_OUT, 2, LEFT_OUT]
    assert corrected_labels(given, probabilities, 0.3).tolist() == [1, LEFT_OUT, 2, 1]
    assert corrected_labels(given, probabilities, 0.0).tolist() == [LEFT_OUT, LEFT_OUT, 2, LEFT_OUT]


def test_outside_of_the_class_that_stands_out_no_row_gets_another_label():
    # Class 0: 3 of 4 rows denied; class 1: 1 of 4 denied and one doubted; class 2: 1 of 4 denied.
    sure, doubted, denied = [0.9, 0.06, 0.04], [0.35, 0.4, 0.25], [0.1, 0.8, 0.1]

    def turned(row, label):
        return row[-label:] + row[:-label] if label else row

    rows = {0: [denied, denied, denied, sure], 1: [denied, doubted, sure, sure], 2: [denied, sure, sure, sure]}
    given = torch.tensor([label for label in rows for _ in rows[label]])
    probabilities = torch.tensor([turned(row, label) for label in rows for row in rows[label]])
    assert corrected_labels(given, probabilities, 0.2).tolist() == [
        1, 1, 1, 0, LEFT_OUT, 1, 1, 1, LEFT_OUT, 2, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("denied", "outlying"),
    [
        ([3, 1, 1, 1], [True, False, False, False]),
        ([2, 1, 1, 1], [True] * 4),  # twice as many don't stand out: any class may be meant
        ([0, 0, 0, 0], [True] * 4),
        ([4, 4, 1, 1], [True, True, False, False]),
        ([1, 0, 0, 0], [True, False, False, False]),
    ],
)
def test_a_class_stands_out_by_the_share_of_its_rows_that_is_denied(denied, outlying):
    given = torch.arange(4).repeat_interleave(8)
    flags = torch.cat([torch.arange(8) < number for number in denied])
    assert outlying_classes(given, flags, 4).tolist() == outlying
    # Classes without rows count for nothing.
    assert outlying_classes(given, flags, 9)[:4].tolist() == outlying


def expected_changes(name, rows, below):
    """The teacher's say on each row alone that it contradicts: row to label."""
    task, teacher = topics.TASKS[name], topics.sharpen(topics.network(name, 7)).eval()
    said = []
    for row in rows:
        if name == "images":
            given, logits = row["labels"], teacher(torch.tensor([row["pixel_values"]])).logits[0]
        elif name == "label_words":
            tokenizer = tiny.tokenizer("llama")
            prompt = task.prompt_ids(row["text"], tokenizer)
            given, logits = row["label"], teacher(torch.tensor([prompt])).logits[0, -1, task.word_ids(tokenizer)]
        else:
            given, logits = row["label"], teacher(**tiny.tokenizer("bert")(row["text"], return_tensors="pt")).logits[0]
        likely = logits.softmax(dim=0)
        said.append((given, likely.argmax().item(), likely[given].item() < below))
    share = {}
    for label in {given for given, _, _ in said}:
        denied = [own and best != label for given, best, own in said if given == label]
        share[label] = sum(denied) / len(denied)
    median = sorted(share.values())[(len(share) - 1) // 2]
    outlying = [label for label in share if share[label] > 2 * median] or list(share)
    changes = {}
    for number, (given, best, unlikely) in enumerate(said):
        if best != given and given in outlying:
            changes[number] = best if unlikely else LEFT_OUT
        elif best != given and unlikely:
            changes[number] = LEFT_OUT
    return changes


@pytest.mark.parametrize("name", topics.FORMATS)
def test_it_trains_as_plain_training_does_on_the_corrected_rows(name, tmp_path):
    rows = topics.pixels(16) if name == "images" else topics.texts(16)
    changes = expected_changes(name, rows, 0.2)
    left_out = [row for row, label in changes.items() if label == LEFT_OUT]
    assert 0 < len(changes) < 16
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
