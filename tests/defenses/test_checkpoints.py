"""What comes back from a checkpoint, and what a stream that ends in the middle of a step leaves in the log."""

import pytest
import tiny
import torch
from datasets import IterableDataset
from torch import nn


def with_own_head(seed):
    model = tiny.model("bert", seed)
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2))
    return model


OPTIONS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}


def test_a_head_of_the_user_s_own_comes_back(tmp_path):
    torch.manual_seed(0)
    whole = tiny.trainer("sequence_classification", "plain", tmp_path, model=with_own_head(0), **OPTIONS)
    whole.train()
    resumed = tiny.trainer("sequence_classification", "plain", tmp_path, model=with_own_head(5), **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0


def test_a_checkpoint_of_another_head_is_refused(tmp_path):
    tiny.trainer("sequence_classification", "plain", tmp_path, model=with_own_head(0), **OPTIONS).train()
    other = tiny.model("bert", 0)
    other.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 2))
    trainer = tiny.trainer("sequence_classification", "plain", tmp_path, model=other, **OPTIONS)
    with pytest.raises(
        ValueError, match="^'.*checkpoint-2' and the model differ in .'classifier.0.bias', .*: pass the"
    ) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs/checkpoint-500", "/none"])
def test_a_checkpoint_that_is_not_there_is_refused(name, tmp_path):
    trainer = tiny.trainer("sequence_classification", "plain", tmp_path)
    with pytest.raises(ValueError, match=f"^resume_from_checkpoint is '{name}', and no such folder is there: pass"):
        trainer.train(resume_from_checkpoint=name)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_step_that_a_stream_s_end_cuts_off_is_in_no_loss(strategy, tmp_path):
    """24 rows are three batches of 8: one step of two, and a batch that is thrown away."""
    rows = tiny.reviews(24)
    stream = IterableDataset.from_generator(lambda: iter(list(rows)), features=rows.features)
    trainer = tiny.trainer(
        "sequence_classification", "plain", tmp_path, train_dataset=stream, max_steps=4, gradient_accumulation_steps=2,
        learning_rate=1e-9, logging_strategy=strategy,
    )  # fmt: skip
    result = trainer.train()
    first = list(rows.select(range(16)))
    whole = tiny.trainer(
        "sequence_classification", "plain", tmp_path / "first", train_dataset=rows.from_list(first), max_steps=1,
        per_device_train_batch_size=16, learning_rate=1e-9, train_sampling_strategy="sequential",
    )  # fmt: skip
    expected = whole.train().training_loss
    assert tiny.logged(trainer, "loss") == pytest.approx([expected] * 4, rel=1e-3)
    assert result.training_loss == pytest.approx(expected, rel=1e-3)
