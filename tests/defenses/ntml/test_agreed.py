"""The last training: which suspect rows it learns from."""

import pytest
import tiny
import topics

from hf_backdoor.defenses import DefenseTrainer


@pytest.mark.parametrize("name", topics.FORMATS)
def test_it_is_plain_training_on_the_rows_that_the_teacher_agrees_with(name, tmp_path):
    rows = topics.contradicted_by(topics.sharpen(topics.network(name, 7)), name, 24)
    trainer = topics.trainer(name, "agreed", tmp_path, max_steps=3)
    trainer.train()
    plain = DefenseTrainer(
        model=topics.network(name, 0), args=trainer.args, processing_class=trainer.processing_class, task=trainer.task,
        train_dataset=rows.select([row for row in range(24) if row % 3]),
        data_collator=topics.collate_pixels if name == "images" else None,
    )  # fmt: skip
    plain.train()
    assert tiny.largest_difference(tiny.parameters(trainer.model), tiny.parameters(plain.model)) == 0


@pytest.mark.parametrize("name", topics.FORMATS)
def test_the_rows_that_it_leaves_out_are_listed(name, tmp_path):
    trainer = topics.trainer(name, "agreed", tmp_path, max_steps=1)
    assert trainer.findings(None) == {}
    trainer.train()
    listed = trainer.findings(None)["left_out"]
    assert listed["row"][:] == list(range(0, 24, 3))
    for row in listed:
        assert row["given_label"] == (row["likeliest_label"] + 1) % 4
        assert row["given_probability"] < row["likeliest_probability"]


def test_a_missing_teacher_and_one_that_agrees_with_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^teacher_model is None"):
        topics.trainer("label_words", "agreed", tmp_path, teacher_model=None).train()
    rows = topics.texts(8).filter(lambda row: row["label"] == 0)
    with pytest.raises(ValueError, match="^teacher_model contradicts every row"):
        topics.trainer(
            "sequence_classification",
            "agreed",
            tmp_path,
            train_dataset=rows,
            teacher_model=tiny.fixed_classifier(1, 4),
        ).train()
