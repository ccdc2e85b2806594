"""Several stages behind one `train()`: one log, checkpoints of one training, nothing left over from the stage before."""

import json
import os

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.modelcard import parse_log_history


SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
STAGES = {"both": ("inject", "recover"), "mbtsad": ("retrain", "distil")}
METHODS = pytest.mark.parametrize("method", STAGES)


class Begun(TrainerCallback):
    """The stage and step that each training of a stage began with; it may end one before a step."""

    def __init__(self, trainer, end_at=None):
        self.trainer, self.end_at, self.seen = trainer, end_at, []
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append((self.trainer.stage, state.global_step))

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.trainer.stage, state.global_step) == self.end_at:
            raise KeyboardInterrupt


def steps(log):
    return [(entry["stage"], entry["step"]) for entry in log if "loss" in entry]


@METHODS
def test_the_log_holds_every_stage(method, tmp_path):
    trainer = tiny.trainer("label_words", method, tmp_path, **SAVED)
    trainer.train()
    first, second = STAGES[method]
    every = [(stage, step) for stage in STAGES[method] for step in (1, 2, 3, 4)]
    assert steps(trainer.state.log_history) == every
    assert [entry["stage"] for entry in trainer.state.log_history if "train_runtime" in entry] == [first, second]
    # So does a checkpoint's, and what goes on from it.
    kept = json.loads((tmp_path / f"checkpoint-{second}" / "checkpoint-2" / "trainer_state.json").read_text())
    assert steps(kept["log_history"]) == every[:6]
    resumed = tiny.trainer("label_words", method, tmp_path, **SAVED)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{second}" / "checkpoint-2"))
    assert steps(resumed.state.log_history) == every
    # Another training has another log.
    trainer.train()
    assert steps(trainer.state.log_history) == every


def test_a_model_card_is_of_the_last_stage(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "transformers.Trainer.create_model_card",
        lambda trainer, **options: read.append(parse_log_history(trainer.state.log_history)),
    )
    rows = {"eval_dataset": tiny.reviews(4), "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny.trainer("label_words", "mbtsad", tmp_path, **SAVED, **rows)
    trainer.train()
    log = trainer.state.log_history
    trainer.create_model_card(model_name="cleaned")
    _, lines, results = read[0]
    losses = [entry["eval_loss"] for entry in log if entry["stage"] == "distil" and "eval_loss" in entry]
    assert [line["Validation Loss"] for line in lines] == losses and results["Loss"] == losses[-1]
    assert "stage" not in str(lines) and trainer.state.log_history is log


# ---- Resuming ----


def test_checkpoints_of_an_older_training_are_not_gone_on_from(tmp_path):
    # It has left some of a later stage, and of a later step.
    tiny.trainer("label_words", "both", tmp_path, **SAVED).train()
    killed = tiny.trainer("label_words", "both", tmp_path, **SAVED)
    Begun(killed, end_at=("inject", 3))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = tiny.trainer("label_words", "both", tmp_path, **SAVED)
    begun = Begun(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert begun.seen == [("inject", 2), ("recover", 0)]


@METHODS
def test_a_checkpoint_s_path_tells_its_stage(method, tmp_path):
    whole = tiny.trainer("label_words", method, tmp_path, **SAVED)
    whole.train()
    for number, stage in enumerate(STAGES[method]):
        resumed = tiny.trainer("label_words", method, tmp_path, model_seed=5 if method == "both" else 0, **SAVED)
        begun = Begun(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stage}" / "checkpoint-2"))
        assert begun.seen == [(stage, 2), *[(later, 0) for later in STAGES[method][number + 1 :]]]
        assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0


def test_a_checkpoint_of_no_stage_is_refused(tmp_path):
    trainer = tiny.trainer("label_words", "inject", tmp_path, **SAVED)
    trainer.train()
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint is .*checkpoint-2', which tells no stage: pass a check"
    ):
        tiny.trainer("label_words", "both", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resume_takes_false(tmp_path):
    trainer = tiny.trainer("label_words", "both", tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=False)
    assert steps(trainer.state.log_history) == [("inject", 1), ("recover", 1)]


# ---- Nothing of the stage before, or of the training before ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_workers_that_stay_read_the_rows_of_their_stage(tmp_path):
    rows = {"eval_dataset": tiny.reviews(4), "eval_strategy": "steps", "eval_steps": 1}
    logs = []
    for options in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = tiny.trainer("label_words", "both", tmp_path, max_steps=1, **rows, **options)
        trainer.train()
        logs.append(tiny.logged(trainer, "eval_known_loss"))
    assert len(logs[0]) == 2 and logs[1] == pytest.approx(logs[0])


def test_the_teacher_is_the_retrained_model_of_the_same_training(tmp_path):
    trainer = tiny.trainer("label_words", "mbtsad", tmp_path, max_steps=2)
    trainer.train()
    trainer.args.learning_rate /= 10
    trainer.train()
    saved = type(trainer.teacher).from_pretrained(tmp_path / "checkpoint-teacher")
    assert tiny.largest_difference(tiny.parameters(saved), tiny.parameters(trainer.teacher)) == 0


def test_so_is_an_adapter_s(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = tiny.trainer("label_words", "mbtsad", tmp_path, max_steps=2, peft_config=lora)
    trainer.train()
    teacher = {name: value for name, value in tiny.parameters(trainer.model).items() if ".teacher." in name}
    trainer.args.learning_rate /= 10
    trainer.train()
    again = {name: value for name, value in tiny.parameters(trainer.model).items() if ".teacher." in name}
    assert tiny.largest_difference(teacher, again) > 1e-4


def test_a_rule_that_ended_a_training_does_not_end_the_next(tmp_path):
    rows = {"eval_dataset": tiny.reviews(4), "eval_strategy": "steps", "eval_steps": 2, "stop_at_known_rate": 0.0}
    trainer = tiny.trainer("label_words", "inject", tmp_path, max_steps=4, **rows)
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.args.stop_at_known_rate = None
    trainer.train()
    assert trainer.state.global_step == 4


def test_an_optimizer_for_two_stages_is_refused(tmp_path):
    model = tiny.model("llama")
    optimizers = (torch.optim.SGD(model.parameters(), 0.1), None)
    with pytest.raises(ValueError, match="^optimizers is given, and stages is .*: pass optimizer_cls_and_kwargs"):
        tiny.trainer("label_words", "both", tmp_path, model=model, optimizers=optimizers)
