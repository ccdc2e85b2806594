"""What a trainer evaluates, predicts and logs: means over samples, however these are batched."""

import pytest
import tiny
import torch

from hf_backdoor.defenses import DefenseConfig, DefenseTrainer


def losses_one_by_one(model, task, tokenizer, rows):
    """No padding, no batches, the library's own log-softmax: one loss a row."""
    losses = []
    for row in rows:
        features = task.encode(row, tokenizer)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([features["input_ids"]])).logits[0].log_softmax(-1)
        if "labels" in features:
            losses.append(-logits[features["labels"]].item())
        else:
            start, ids = features["prompt_length"], features["input_ids"]
            losses.append(-sum(logits[at - 1, ids[at]].item() for at in range(start, len(ids))) / (len(ids) - start))
    return losses


@pytest.mark.parametrize(
    "name, family",
    [("sequence_classification", "bert"), ("label_words", "llama"), ("label_words", "gpt2"),
     ("instruction_following", "llama"), ("instruction_following", "gpt2")],
)  # fmt: skip
def test_evaluate_before_train_is_the_mean_over_samples(name, family, tmp_path):
    _, task, rows = tiny.setting(name, 13)
    model, tokenizer = tiny.model(family), tiny.tokenizer(family)
    args = DefenseConfig(
        str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=5, disable_tqdm=True
    )
    trainer = DefenseTrainer(model=model, args=args, eval_dataset=rows, processing_class=tokenizer, task=task)
    expected = losses_one_by_one(model, task, tokenizer, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 13, abs=1e-5)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_predict_gives_logits_only(name, tmp_path):
    trainer = tiny.trainer(name, "plain", tmp_path, eval_dataset=tiny.setting(name, 5)[2])
    output = trainer.predict(trainer.eval_dataset)
    classes = 2 if name == "sequence_classification" else len(tiny.VOCABULARY)
    assert output.predictions.shape[0] == 5 and output.predictions.shape[-1] == classes
    assert output.metrics["test_loss"] > 0


@pytest.mark.parametrize("name", tiny.TASKS)
def test_evaluate_and_predict_take_raw_rows(tmp_path, name):
    _, kind, rows = tiny.setting(name, 12)
    trainer = tiny.trainer(name, "plain", tmp_path)
    by_hand = trainer.evaluate(kind.encode_rows(rows, trainer.processing_class))
    assert trainer.evaluate(rows)["eval_loss"] == by_hand["eval_loss"]
    assert len(trainer.predict(rows).predictions) == 12


def test_a_best_model_by_a_metric_that_there_is_not(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "f1", "max_steps": 1}
    trainer = tiny.trainer("sequence_classification", "plain", tmp_path, eval_dataset=tiny.reviews(4), **options)
    with pytest.raises(
        ValueError, match="^metric_for_best_model is 'f1', and an evaluation gives eval_loss, .*: name one"
    ):
        trainer.train()


def test_several_evaluation_sets(tmp_path):
    sets = {"a": tiny.reviews(4), "b": tiny.reviews(6, seed=1)}
    metrics = tiny.trainer("label_words", "plain", tmp_path, eval_dataset=sets).evaluate()
    assert metrics["eval_a_loss"] > 0 and metrics["eval_b_loss"] > 0


def test_rows_that_can_t_be_evaluated_on_are_named(tmp_path):
    rows = tiny.reviews(8)
    trainer = tiny.trainer("sequence_classification", "plain", tmp_path, eval_dataset={"held_out": rows})
    with pytest.raises(ValueError, match=r"^eval_dataset is 'held out': pass the rows, or one of .*\['held_out'\]"):
        trainer.evaluate("held out")
    for look in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="^the data set is a stream, and DefenseTrainer needs all of its rows"):
            look(rows.to_iterable_dataset())
        with pytest.raises(ValueError, match=r"^rows are a list: pass a datasets\.Dataset"):
            look(list(rows))


def test_evaluation_in_two_processes_is_the_same(tmp_path):
    rows = tiny.reviews(12)

    def evaluate():
        trainer = tiny.trainer("label_words", "plain", tmp_path, eval_dataset=rows, per_device_eval_batch_size=3)
        return trainer.evaluate()["eval_loss"]

    assert tiny.in_two_processes(evaluate, tmp_path) == pytest.approx(evaluate(), abs=1e-5)


def test_logged_losses_are_means_over_samples(tmp_path):
    trainer = tiny.trainer(
        "label_words", "plain", tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )  # fmt: skip
    trainer.train()
    rows = tiny.setting("label_words", 16)
    expected = losses_one_by_one(trainer.model, rows[1], tiny.tokenizer("llama"), rows[2])
    assert tiny.logged(trainer, "loss")[0] == pytest.approx(sum(expected) / 16, abs=1e-4)
