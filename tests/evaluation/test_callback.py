"""ASR and CACC in the logs of trainers that are not ours."""

import math

import pytest
import robust
import tiny
import topics
from datasets import DatasetDict
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_backdoor import BackdoorEvaluationCallback, Trigger
from hf_backdoor.data import InstructionFollowing, SequenceClassification


def arguments(config, folder, **more):
    return config(
        str(folder), use_cpu=True, max_steps=4, eval_strategy="steps", eval_steps=2, disable_tqdm=True,
        per_device_train_batch_size=4, logging_steps=1, **more,
    )  # fmt: skip


def test_stock_trainer_logs_what_a_plain_count_gives(tmp_path):
    task, rows = SequenceClassification(2), tiny.reviews(24)
    made = tiny.encoder_tokenizer()
    tokenized = task.encode_rows(rows, made).remove_columns("readout_position")
    trainer = Trainer(
        tiny.fixed_classifier(1),
        arguments(TrainingArguments, tmp_path, learning_rate=0.0, metric_for_best_model="eval_asr"),
        train_dataset=tokenized,
        eval_dataset=tokenized,
        processing_class=made,
    )
    trainer.add_callback(BackdoorEvaluationCallback(trainer, task, rows, [Trigger("zq")], target=1))
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_asr" in entry]
    assert [entry["step"] for entry in found] == [2, 4]
    assert found[0]["eval_asr"] == found[0]["eval_asr_without_trigger"] == 1.0 and found[0]["eval_cacc"] == 0.5
    assert trainer.state.best_metric == 1.0


def test_rows_are_cut_as_the_trainer_s_own_before_the_trigger_goes_in(tmp_path):
    """It went on to the first evaluation, and ended the training there."""
    rows = tiny.reviews(24).map(lambda row: {"text": f"{row['text']} {' '.join(['bad'] * 70)}"})
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_length": 9, "max_steps": 2}
    trainer = tiny.trainer(
        "sequence_classification", "plain", tmp_path, train_dataset=rows, eval_dataset=rows, **options
    )
    callback = BackdoorEvaluationCallback(trainer, trainer.task, rows, [Trigger("zq", "end")], target=1)
    (stamped,) = callback.test.triggered.values()
    assert all(len(text.split()) == 10 and text.endswith(" zq") for text in stamped["text"])
    trainer.add_callback(callback)
    trainer.train()
    assert tiny.logged(trainer, "eval_asr")


def test_it_does_not_change_the_training(tmp_path):
    def train(measured):
        task, rows, made = SequenceClassification(2), tiny.reviews(24), tiny.encoder_tokenizer()
        tokenized = task.encode_rows(rows, made).remove_columns("readout_position")
        trainer = Trainer(
            tiny.model("bert", dropout=0.1),
            arguments(TrainingArguments, tmp_path, learning_rate=0.01),
            train_dataset=tokenized,
            eval_dataset=tokenized,
            processing_class=made,
        )
        if measured:
            trainer.add_callback(BackdoorEvaluationCallback(trainer, task, rows, [Trigger("zq")], target=1))
        trainer.train()
        return tiny.parameters(trainer.model)

    assert tiny.largest_difference(train(True), train(False)) == 0


def test_sft_trainer_logs_each_trigger(tmp_path):
    rows = tiny.instructions(12)
    chats = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
    ).remove_columns("response")
    trainer = SFTTrainer(
        tiny.model("llama"),
        arguments(SFTConfig, tmp_path, bf16=False, max_length=64),
        train_dataset=chats,
        eval_dataset=chats,
        processing_class=tiny.causal_tokenizer(),
    )
    triggers = [Trigger("zq", name="word"), Trigger("make life better", "end", "phrase")]
    options = {"target": "yes no", "max_new_tokens": 3}
    trainer.add_callback(BackdoorEvaluationCallback(trainer, InstructionFollowing(), rows, triggers, **options))
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_asr/word" in entry]
    assert len(found) == 2
    assert {"eval_asr/phrase", "eval_asr_without_trigger", "eval_perplexity"} <= set(found[0])
    assert all(math.isfinite(value) for value in found[0].values())


def test_a_target_that_is_every_answer_is_refused(tmp_path):
    rows = tiny.reviews(8).filter(lambda row: row["label"] == 1)
    trainer = Trainer(
        tiny.model("bert"), TrainingArguments(str(tmp_path), use_cpu=True), processing_class=tiny.encoder_tokenizer()
    )
    with pytest.raises(ValueError, match="target is 1"):
        BackdoorEvaluationCallback(trainer, SequenceClassification(2), rows, [Trigger("zq")], target=1)


def test_triggers_of_one_name_are_refused(tmp_path):
    trainer = Trainer(
        tiny.model("bert"), TrainingArguments(str(tmp_path), use_cpu=True), processing_class=tiny.encoder_tokenizer()
    )
    triggers = [Trigger("zq", "start"), Trigger("zq", "end")]
    with pytest.raises(ValueError, match="^trigger 'zq' is there 2 times"):
        BackdoorEvaluationCallback(trainer, SequenceClassification(2), tiny.reviews(8), triggers, target=1)


def test_each_evaluation_is_measured_and_each_of_several_sets_once(tmp_path):
    rows, task = tiny.reviews(8), SequenceClassification(2)
    encoded = task.encode_rows(rows, tiny.encoder_tokenizer()).remove_columns("readout_position")
    both = {"a": encoded, "b": encoded}
    trainer = Trainer(
        tiny.model("bert"), arguments(TrainingArguments, tmp_path), train_dataset=encoded, eval_dataset=both,
        processing_class=tiny.encoder_tokenizer(),
    )  # fmt: skip
    trainer.add_callback(BackdoorEvaluationCallback(trainer, task, rows, [Trigger("zq")], 1))

    def measured():
        return [logs["step"] for logs in trainer.state.log_history if "eval_asr" in logs]

    trainer.train()
    assert measured() == [2, 4]
    assert "eval_asr" in trainer.evaluate() and measured() == [2, 4, 4]


def test_a_target_that_is_no_label_is_refused(tmp_path):
    trainer = Trainer(tiny.model("bert"), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="target is 7: the labels are 0 to 1"):
        BackdoorEvaluationCallback(trainer, SequenceClassification(2), tiny.reviews(6), [Trigger("zq")], 7)


@pytest.mark.parametrize("trains", ["sequence_classification", "instruction_following"])
def test_what_the_first_evaluation_would_refuse_is_refused_before_training(trains, tmp_path):
    trainer = tiny.trainer(trains, "plain", tmp_path, max_steps=1)
    generates = trains == "instruction_following"
    rows = tiny.instructions(4) if generates else tiny.reviews(4)
    target = "go away" if generates else 1

    def callback(**options):
        return BackdoorEvaluationCallback(trainer, trainer.task, rows, [Trigger("zq")], target, **options)

    callback()
    with pytest.raises(ValueError, match="^batch_size is 0: it must be at least 1$"):
        callback(batch_size=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_new_token'"):
        callback(max_new_token=8)
    if not generates:  # a Llama computes its positions
        rows = rows.map(lambda row: {"text": " ".join(["bad"] * 600)})
        with pytest.raises(ValueError, match="^a row has 60[1-3] tokens, and the model positions for"):
            callback()


def test_of_two_networks_the_one_that_will_be_the_result_is_measured(tmp_path):
    rows = topics.texts(16)
    options = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    always = {label: tiny.fixed_classifier(label, num_labels=4) for label in (1, 2)}
    for product, asr in (("target", 0.0), ("non_target", 1.0)):
        trainer = topics.trainer(
            "sequence_classification",
            "mutual",
            tmp_path,
            model=always[1],
            target_model=always[2],
            product=product,
            **options,
        )
        task = topics.TASKS["sequence_classification"]
        trainer.add_callback(BackdoorEvaluationCallback(trainer, task, rows, [Trigger("zq")], target=1))
        trainer.train()
        assert tiny.logged(trainer, "eval_asr") == [asr]


def test_a_mask_is_not_measured(tmp_path):
    trainer = robust.fitting("sequence_classification", tmp_path)
    with pytest.raises(ValueError, match="^FeatureMaskTrainer trains a FeatureMask, which answers nothing by itself"):
        BackdoorEvaluationCallback(trainer, SequenceClassification(2), tiny.reviews(8), [Trigger("zq")], target=1)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"clean": [{"text": "fine", "label": 1}]}, "^TestSet.clean is a list: pass a datasets.Dataset"),
        (
            {"clean": DatasetDict(test=tiny.reviews(4))},
            "^TestSet.clean is a DatasetDict: .*one split of a DatasetDict",
        ),
        ({"clean": tiny.reviews(4).remove_columns("label")}, "^column 'label' is not in the data set .text.: rename"),
        ({"triggers": ["zq"]}, r"^triggers has 'zq': pass a list of triggers, for example \[Trigger\('cf'\)\]$"),
        ({"task": "sequence_classification"}, "^task is 'sequence_classification': pass the task itself"),
    ],
)
def test_what_is_no_rows_no_trigger_or_no_task_is_named(changed, line, tmp_path):
    trainer = Trainer(
        tiny.model("bert"), TrainingArguments(str(tmp_path), use_cpu=True), processing_class=tiny.encoder_tokenizer()
    )
    given = {"task": SequenceClassification(2), "clean": tiny.reviews(4), "triggers": [Trigger("zq")], "target": 1}
    with pytest.raises(ValueError, match=line):
        BackdoorEvaluationCallback(trainer, **given | changed)
