"""Rows that are not there, or that have no right answer: refused before the first step."""

import pytest
import robust
import tiny
import topics
from datasets import IterableDataset

from hf_backdoor.data import SequenceClassification
from hf_backdoor.defenses.reading import OwnAnswersTrainer, ReadingConfig


NAME = "sequence_classification"


def made(method, folder, **options):
    if method in topics.STAGES:
        return topics.trainer(NAME, method, folder, **options)
    kinds = {"mask": robust.fitting, "student": robust.distilling}
    return kinds[method](NAME, folder, **options) if method in kinds else tiny.trainer(NAME, method, folder, **options)


EVERY = pytest.mark.parametrize("method", ["plain", "both", "mbtsad", "distil", "mask", "student", *topics.STAGES])


@EVERY
def test_no_rows_are_refused(method, tmp_path):
    none = tiny.reviews(2).select([])
    with pytest.raises(ValueError, match="^train_dataset has no rows: pass some"):
        made(method, tmp_path, train_dataset=none)
    with pytest.raises(ValueError, match="^eval_dataset has no rows: pass some"):
        made(method, tmp_path, eval_dataset=none)


def test_sets_of_a_dictionary_are_named(tmp_path):
    with pytest.raises(ValueError, match="^eval_dataset other has no rows"):
        made("plain", tmp_path, eval_dataset={"one": tiny.reviews(2), "other": tiny.reviews(2).select([])})
    with pytest.raises(ValueError, match="^eval_dataset has no rows"):
        made("plain", tmp_path, eval_dataset={})


@EVERY
def test_an_evaluation_without_rows_is_refused(method, tmp_path):
    with pytest.raises(ValueError, match="^eval_strategy is 'steps', and eval_dataset is None: pass held-out rows"):
        made(method, tmp_path, eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("stage", ["non_target", "relabel"])
def test_training_without_a_set_is_refused(stage, tmp_path):
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        made(stage, tmp_path, train_dataset=None).train()


def test_reading_without_a_set_is_refused(tmp_path):
    args = ReadingConfig(str(tmp_path), use_cpu=True, report_to="none", own_answers=1.0)
    trainer = OwnAnswersTrainer(model=tiny.model("bert"), args=args, processing_class=tiny.encoder_tokenizer())
    with pytest.raises(ValueError, match="^train_dataset is None: pass clean rows to read"):
        trainer.train()


def test_clean_rows_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^clean_dataset has no rows: pass a few"):
        made("relabel", tmp_path, clean_dataset=topics.texts(2).select([]))


@pytest.mark.parametrize("count", [0, 3])
def test_a_stream_too_short_for_a_step_is_refused(count, tmp_path):
    rows = tiny.reviews(4)
    stream = IterableDataset.from_generator(lambda: iter(list(rows)[:count]), features=rows.features)
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = tiny.trainer(NAME, "plain", tmp_path, max_steps=2, train_dataset=stream, **batches)
    with pytest.raises(ValueError, match="^train_dataset ends before the first optimizer step: it needs more rows"):
        trainer.train()


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
@pytest.mark.parametrize("method", ["plain", "inject", "student"])
def test_rows_that_fill_no_batch_are_refused(method, length, tmp_path):
    trainer = made(method, tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True, **length)
    line = r"^dataloader_drop_last is True, and train_dataset has \d+ rows, fewer than one batch of 64 on each of 1 processes"
    with pytest.raises(ValueError, match=line):
        trainer.train()


# ---- Answers ----


@pytest.mark.parametrize("label", [-100, 2, None])
@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_classes_that_are_none_are_refused(where, label, tmp_path):
    """Of -100 the loss is 0, and nothing would be learnt."""
    rows = SequenceClassification(2).encode_rows(tiny.reviews(8), tiny.encoder_tokenizer())
    rows = rows.remove_columns("labels").add_column("labels", [label] * 8)
    with pytest.raises(ValueError, match=f"^{where} has labels from {label} to {label}, and the model has 2 classes"):
        made("plain", tmp_path, **{where: rows})


def test_one_row_without_a_label_is_enough(tmp_path):
    rows = topics.pixels(8)
    rows = rows.remove_columns("labels").add_column("labels", [0, 1, 2, -100] * 2)
    with pytest.raises(ValueError, match="^train_dataset has labels from -100 to 2, and the model has 4 classes"):
        topics.trainer("images", "mutual", tmp_path, train_dataset=rows)


def test_an_empty_answer_is_refused(tmp_path):
    rows = tiny.task("label_words").encode_rows(tiny.reviews(8), tiny.causal_tokenizer())
    rows = rows.map(lambda row, number: {"prompt_length": len(row["input_ids"]) - (number != 5)}, with_indices=True)
    with pytest.raises(ValueError, match=r"^train_dataset has 1 rows whose prompt_length .*\(row 5 is the first\)"):
        tiny.trainer("label_words", "plain", tmp_path, train_dataset=rows)


@pytest.mark.parametrize("stage", ["non_target", "mutual"])
def test_batches_without_labels_are_refused(stage, tmp_path):
    rows = topics.pixels(8).remove_columns("labels")
    with pytest.raises(ValueError, match="^a batch has pixel_values and no labels: pass rows with labels"):
        topics.trainer("images", stage, tmp_path, max_steps=1, train_dataset=rows).train()
