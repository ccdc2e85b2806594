"""Fitting a mask: what every trainer owes its user, and what this one is for."""

import functools
import json
import tempfile

import pytest
import robust
import tiny
import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import TrainerCallback

from hf_backdoor.defenses.robustkd import FeatureMask, FeatureMaskConfig, FeatureMaskTrainer
from hf_backdoor.defenses.robustkd.features import captured
from hf_backdoor.defenses.robustkd.losses import feature_variance


EVERY = pytest.mark.parametrize("name", tiny.TASKS)


@functools.cache
def in_batches_of_eight(name):
    with tempfile.TemporaryDirectory() as folder:
        trainer = robust.fitting(name, folder, **robust.PLAIN_STEPS, mask_form="additive", mask_shape="position")
        trainer.train()
        return tiny.parameters(trainer.model), tiny.logged(trainer, "loss/variance")


@EVERY
def test_gradient_accumulation_changes_nothing(name, tmp_path):
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    trainer = robust.fitting(name, tmp_path, **robust.PLAIN_STEPS, **cut, mask_form="additive", mask_shape="position")
    trainer.train()
    parameters, variances = in_batches_of_eight(name)
    assert tiny.largest_difference(parameters, tiny.parameters(trainer.model)) < 1e-5
    assert tiny.logged(trainer, "loss/variance") == pytest.approx(variances, rel=1e-4)


def test_two_processes_change_nothing(tmp_path):
    name = "label_words"

    def work():
        options = {"per_device_train_batch_size": 4, "mask_form": "additive", "mask_shape": "position"}
        trainer = robust.fitting(name, tmp_path, **robust.PLAIN_STEPS, **options)
        trainer.train()
        assert PartialState().num_processes == 2
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        return tiny.parameters(trainer.model), tiny.logged(trainer, "loss/variance")

    parameters, variances = in_batches_of_eight(name)
    there, variances_there = tiny.in_two_processes(work, tmp_path)
    assert tiny.largest_difference(parameters, there) < 1e-5
    assert variances_there == pytest.approx(variances, rel=1e-4)


def test_a_resumed_fit_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "dropout": 0.2}
    whole = robust.fitting("label_words", tmp_path, **options)
    whole.train()
    resumed = robust.fitting("label_words", tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0
    assert tiny.logged(resumed, "loss") == tiny.logged(whole, "loss")


@EVERY
@pytest.mark.parametrize("shape", ["channel", "readout"])
def test_only_the_mask_is_trained_and_saved(name, shape, tmp_path):
    suspect = tiny.model("bert" if name == "sequence_classification" else "llama", dropout=0.3)
    before = {key: value.clone() for key, value in suspect.state_dict().items()}
    trainer = robust.fitting(
        name, tmp_path, suspect=suspect, max_steps=2, save_strategy="steps", save_steps=2, mask_shape=shape
    )
    started = tiny.parameters(trainer.model)
    trainer.train()
    assert tiny.largest_difference(started, tiny.parameters(trainer.model)) > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in suspect.state_dict().items())
    assert not suspect.training and not any(parameter.requires_grad for parameter in suspect.parameters())
    saved = FeatureMask.from_pretrained(tmp_path / "checkpoint-2")
    assert tiny.largest_difference(tiny.parameters(saved), tiny.parameters(trainer.model)) == 0
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size < 10_000


def test_the_loss_is_the_masked_teacher_s_and_the_evaluation_too(tmp_path):
    trainer = robust.fitting("sequence_classification", tmp_path, variance_weight=3.0, eval_dataset=tiny.reviews(7))
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter)
    family, task, rows = tiny.setting("sequence_classification", 7)
    made = robust.batch(family, task, rows)
    teacher, mask = trainer.teacher, trainer.model
    inputs = {key: made[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), captured(teacher, mask.layers) as features:
        logits = mask(teacher, **inputs).logits
    losses = torch.nn.functional.cross_entropy(logits, made["labels"], reduction="none")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert losses.mean().item() != pytest.approx(
        torch.nn.functional.cross_entropy(teacher(**inputs).logits, made["labels"]).item(), abs=1e-4
    )
    terms, _ = trainer.loss_terms(trainer.model.train(), made, torch.tensor([7]))
    variances = [feature_variance(features[layer], made["attention_mask"].bool()) for layer in mask.layers]
    torch.testing.assert_close(terms["task"], losses)
    torch.testing.assert_close(terms["variance"], 3.0 * sum(variances) / len(variances))
    for values in terms.values():
        assert values.shape == (7,)
        mask.zero_grad()
        values.sum().backward(retain_graph=True)
        assert all(parameter.grad.abs().sum() > 0 for parameter in mask.parameters())


def test_the_variance_falls_if_it_is_asked_to(tmp_path):
    options = {"num_train_epochs": 15, "learning_rate": 0.1, "mask_threshold": 0.9, "logging_steps": 1}

    def share(weight):
        trainer = robust.fitting("sequence_classification", tmp_path, variance_weight=weight, **options)
        made = robust.collated(trainer)
        trainer.train()
        with torch.no_grad(), captured(trainer.teacher, trainer.model.layers) as features:
            trainer.model(trainer.teacher, input_ids=made["input_ids"], attention_mask=made["attention_mask"])
        return sum(feature_variance(f, made["attention_mask"].bool()).mean().item() for f in features.values())

    assert share(5.0) < 0.7 * share(0.0)


def test_p_starts_at_the_mean_clean_feature_of_the_training_rows(tmp_path):
    trainer = robust.fitting("sequence_classification", tmp_path, learning_rate=0.0, max_steps=1)
    trainer.train()
    made = robust.collated(trainer)
    with torch.no_grad(), captured(trainer.teacher, trainer.model.layers) as features:
        trainer.teacher(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
    for p, layer in zip(trainer.model.features, trainer.model.layers, strict=True):
        torch.testing.assert_close(
            p.data, features[layer][made["attention_mask"].bool()].mean(0), atol=1e-5, rtol=1e-4
        )


class Start(TrainerCallback):
    """What a mask's training begins with."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.seen.append(tiny.parameters(model))


def test_fitted_once_more_it_goes_on_from_where_it_was(tmp_path):
    start = Start()
    trainer = robust.fitting("label_words", tmp_path, max_steps=2, callbacks=[start])
    trainer.train()
    fitted = tiny.parameters(trainer.model)
    trainer.train()
    assert tiny.largest_difference(fitted, start.seen[1]) == 0
    assert tiny.largest_difference(start.seen[0], start.seen[1]) > 0


def test_noise_on_embeddings_is_not_for_a_mask(tmp_path):
    with_noise = robust.fitting("label_words", tmp_path, max_steps=2, neftune_noise_alpha=5.0)
    without = robust.fitting("label_words", tmp_path, max_steps=2)
    for trainer in (with_noise, without):
        trainer.train()
    assert tiny.largest_difference(tiny.parameters(with_noise.model), tiny.parameters(without.model)) == 0


def test_patience_ends_a_fit_that_gets_no_better(tmp_path):
    options = {"eval_dataset": tiny.reviews(4, seed=1), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 9}
    trainer = robust.fitting("sequence_classification", tmp_path, learning_rate=0.0, mask_patience=2, **options)
    trainer.train()
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match="^mask_patience is 2, and eval_strategy is 'no', .*: set eval_strategy"):
        robust.fitting("sequence_classification", tmp_path, mask_patience=2)


def test_settings_reach_the_mask(tmp_path):
    trainer = robust.fitting("label_words", tmp_path, mask_layers=[-1], mask_form="additive", mask_shape="position", mask_threshold=0.05, mask_positions=9)  # fmt: skip
    trainer.save_model(tmp_path / "mask")
    settings = json.loads((tmp_path / "mask" / "feature_mask.json").read_text())
    assert settings == {
        "form": "additive",
        "shape": "position",
        "threshold": 0.05,
        "sizes": {"model.layers.1": [9, 32]},
    }


def test_an_adapter_is_not_put_on_the_teacher(tmp_path):
    family, task, rows = tiny.setting("label_words", 4)
    trainer = FeatureMaskTrainer(
        model=tiny.model(family), args=FeatureMaskConfig(str(tmp_path), **robust.DEFAULTS, max_steps=1, activation_checkpointing=True),
        train_dataset=rows, processing_class=tiny.tokenizer(family), task=task, peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    assert not any("lora" in key for key in trainer.teacher.state_dict())


@pytest.mark.parametrize("model", [robust.vit, robust.resnet])
@pytest.mark.parametrize("shape", ["channel", "position"])
def test_images(model, shape, tmp_path):
    options = {"mask_shape": shape, "num_train_epochs": 2, "mask_positions": 5}
    trainer = FeatureMaskTrainer(model=model(), **robust.picture_arguments(FeatureMaskConfig, tmp_path, **options))
    before = {key: value.clone() for key, value in trainer.teacher.state_dict().items()}
    trainer.train()
    # Batch norms too: the teacher is never in training mode.
    assert all(torch.equal(value, before[key]) for key, value in trainer.teacher.state_dict().items())
    assert min(tiny.logged(trainer, "loss/variance")) > 0 and trainer.evaluate()["eval_loss"] > 0
    sizes = {len(size) for size in trainer.model.sizes.values()}
    assert sizes == {1 if shape == "channel" else 3 if model is robust.resnet else 2}


@pytest.mark.parametrize(
    "options, line",
    [
        ({"mask_threshold": 0.0}, "mask_threshold is 0.0"),
        ({"mask_form": "mul"}, "mask_form is 'mul': use one of blend, additive"),
        ({"mask_shape": "head"}, "mask_shape is 'head'"),
        ({"mask_positions": 0}, "mask_positions is 0"),
        ({"mask_patience": 0}, "mask_patience is 0"),
        ({"variance_weight": -1.0}, "variance_weight is -1.0: choose 0"),
        ({"variance_axes": "batch"}, "variance_axes is 'batch'"),
        ({"variance_place": "after"}, "variance_place is 'after'"),
        ({"variance_axes": "all"}, "variance_axes is 'all' and variance_place is 'normed'.*is 1 whatever"),
    ],
)
def test_bad_settings_are_refused(options, line, tmp_path):
    with pytest.raises(ValueError, match=f"^{line}"):
        FeatureMaskConfig(str(tmp_path), use_cpu=True, **options)


def test_rows_are_needed(tmp_path):
    with pytest.raises(ValueError, match="^train_dataset is None: pass clean rows"):
        robust.fitting("label_words", tmp_path, train_dataset=None)


def test_patience_goes_on_where_it_stood(tmp_path):
    options = {
        "eval_dataset": tiny.reviews(4, seed=1), "learning_rate": 0.0, "mask_patience": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "max_steps": 9,
    }  # fmt: skip
    whole = robust.fitting("sequence_classification", tmp_path, **options)
    whole.train()
    ended = whole.state.global_step
    assert ended < 9
    for step in range(1, ended + 1):
        resumed = robust.fitting("sequence_classification", tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == ended
