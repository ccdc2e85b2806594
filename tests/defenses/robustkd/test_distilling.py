"""Distilling through a mask: what every trainer owes its user, and what this one is for."""

import functools
import tempfile

import pytest
import robust
import tiny
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_backdoor.defenses.robustkd import (
    METHOD,
    FeatureMask,
    FeatureMaskTrainer,
    RobustKDConfig,
    RobustKDTrainer,
    student_from_layers,
)
from hf_backdoor.defenses.robustkd.features import captured, counterparts
from hf_backdoor.defenses.robustkd.losses import feature_distance, logit_divergence


EVERY = pytest.mark.parametrize("name", tiny.TASKS)


def everything(trainer):
    return tiny.parameters(trainer.model) | {
        f"connectors.{k}": v for k, v in tiny.parameters(trainer.connectors).items()
    }


@functools.cache
def in_batches_of_eight(name):
    with tempfile.TemporaryDirectory() as folder:
        trainer = robust.distilling(name, folder, **robust.PLAIN_STEPS, logit_weight=0.5)
        trainer.train()
        return everything(trainer), tiny.logged(trainer, "loss/feature"), tiny.logged(trainer, "loss/logit")


@EVERY
def test_gradient_accumulation_changes_nothing(name, tmp_path):
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "logit_weight": 0.5}
    trainer = robust.distilling(name, tmp_path, **robust.PLAIN_STEPS, **cut)
    start = tiny.parameters(trainer.model)
    trainer.train()
    parameters, features, logits = in_batches_of_eight(name)
    assert tiny.largest_difference(parameters, everything(trainer)) < 1e-5
    assert tiny.logged(trainer, "loss/feature") == pytest.approx(features, rel=1e-4)
    assert tiny.logged(trainer, "loss/logit") == pytest.approx(logits, rel=1e-3, abs=1e-7)
    assert tiny.largest_difference(start, tiny.parameters(trainer.model)) > 1e-3


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_two_processes_change_nothing(name, tmp_path):
    def work():
        trainer = robust.distilling(
            name, tmp_path, **robust.PLAIN_STEPS, per_device_train_batch_size=4, logit_weight=0.5
        )
        trainer.train()
        assert PartialState().num_processes == 2
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        return everything(trainer), tiny.logged(trainer, "loss/feature"), tiny.logged(trainer, "loss/logit")

    parameters, features, _ = in_batches_of_eight(name)
    there, features_there, _ = tiny.in_two_processes(work, tmp_path)
    assert tiny.largest_difference(parameters, there) < 1e-5
    assert features_there == pytest.approx(features, rel=1e-4)


def test_trained_once_more_it_goes_on_with_its_connectors(tmp_path):
    trainer = robust.distilling("label_words", tmp_path, **robust.PLAIN_STEPS)
    once = robust.distilling("label_words", tmp_path, **robust.PLAIN_STEPS)
    once.train()
    trainer.train()
    connectors, first = trainer.connectors, everything(trainer)
    assert tiny.largest_difference(everything(once), first) == 0
    trainer.train()
    assert trainer.connectors is connectors
    changed = {name: (value - first[name]).abs().max().item() for name, value in everything(trainer).items()}
    assert all(difference > 0 for name, difference in changed.items() if name.startswith("connectors"))


def test_compiled_after_another_training_of_such_a_model(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    tiny.trainer("label_words", "plain", tmp_path, **compiled).train()
    losses = []
    for options in (compiled, {"max_steps": 2}):
        trainer = robust.distilling("label_words", tmp_path, mask=False, student=tiny.model("llama"), **options)
        trainer.train()
        losses.append(tiny.logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(adapter, tmp_path):
    def make():
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "dropout": 0.2}
        return robust.distilling("label_words", tmp_path, peft_config=lora, **options)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.largest_difference(everything(whole), everything(resumed)) == 0
    assert tiny.logged(resumed, "loss") == tiny.logged(whole, "loss")


@EVERY
def test_what_is_saved_is_the_bare_student(name, tmp_path):
    trainer = robust.distilling(name, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    assert type(trainer.model) is type(trainer.teacher)
    for folder in ("student", "checkpoint-2"):
        reloaded, report = type(trainer.model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"]
        assert tiny.largest_difference(tiny.parameters(reloaded), tiny.parameters(trainer.model)) == 0
        assert reloaded.config.use_cache is True or name == "sequence_classification"
    assert not any("connector" in key for key in trainer.model.state_dict())
    assert sum(len(module._forward_hooks) for module in trainer.teacher.modules()) == 0


@EVERY
def test_terms_are_what_the_masked_teacher_asks_for(name, tmp_path):
    trainer = robust.distilling(name, tmp_path, feature_weight=2.0, logit_weight=0.5, temperature=3.0, max_steps=1)
    trainer.train()
    model, teacher, mask = trainer.model_wrapped, trainer.teacher, trainer.mask
    family, task, rows = tiny.setting(name, 5)
    made = robust.batch(family, task, rows)
    terms, _ = trainer.loss_terms(model.train(), made, torch.tensor([5]))
    inputs = {key: made[key] for key in ("input_ids", "attention_mask", "position_ids") if key in made}
    with torch.no_grad(), captured(teacher, mask.layers) as theirs:
        lesson = mask(teacher, **inputs)
    with torch.no_grad(), captured(model.student, trainer.student_feature_layers) as ours:
        answer = model.student(**inputs)
    valid = made["attention_mask"].bool()
    wanted = torch.zeros(5)
    for weight, connect, own, layer in zip(
        [0.5, 1.0], model.connectors, trainer.student_feature_layers, mask.layers, strict=True
    ):
        wanted += 2.0 * weight * feature_distance(connect(ours[own]), theirs[layer], valid)
    torch.testing.assert_close(terms["feature"], wanted)
    cut = slice(None) if made["labels"].dim() == 1 else (slice(None), slice(-made["labels"].shape[1] - 1, None))
    divergence = logit_divergence(answer.logits[cut], lesson.logits[cut], made["labels"], 3.0)
    torch.testing.assert_close(terms["logit"], 0.5 * divergence)
    for values in terms.values():
        assert values.shape == (5,)
        model.zero_grad()
        values.sum().backward(retain_graph=True)
        assert (
            sum(parameter.grad.abs().sum() for parameter in model.student.parameters() if parameter.grad is not None)
            > 0
        )
    assert not any(parameter.grad is not None for module in (teacher, mask) for parameter in module.parameters())


def test_the_mask_changes_what_is_learnt_and_no_mask_is_plain_distillation(tmp_path):
    def trained(mask):
        trainer = robust.distilling("sequence_classification", tmp_path, mask=mask, max_steps=2)
        trainer.train()
        return tiny.parameters(trainer.model)

    teacher = tiny.model("bert", seed=3)
    family, task, rows = tiny.setting("sequence_classification", 16)
    made = robust.batch(family, task, rows)
    empty, off = FeatureMask.for_model(teacher, made, form="additive"), robust.mask_for(teacher, made)
    for weight in off.weights:
        weight.data.fill_(-1e4)
    plain = trained(None)
    assert tiny.largest_difference(plain, trained(empty)) < 1e-6
    assert tiny.largest_difference(plain, trained(off)) < 1e-6
    assert tiny.largest_difference(plain, trained(robust.mask_for(teacher, made))) > 1e-4


def test_a_mask_for_the_read_out_position_gets_the_batch_s(tmp_path):
    teacher = tiny.model("llama", seed=3)
    family, task, rows = tiny.setting("label_words", 16)
    mask = robust.mask_for(teacher, robust.batch(family, task, rows), shape="readout")
    trainer = robust.distilling("label_words", tmp_path, mask=mask, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_features_are_learnt(tmp_path):
    trainer = robust.distilling("label_words", tmp_path, num_train_epochs=12, learning_rate=0.01)
    trainer.train()
    losses = tiny.logged(trainer, "loss/feature")
    assert losses[-1] < 0.5 * losses[0]


def test_folders_of_teacher_and_mask_do(tmp_path):
    family, task, rows = tiny.setting("sequence_classification", 16)
    teacher = tiny.model(family, seed=3)
    teacher.save_pretrained(tmp_path / "teacher")
    robust.mask_for(teacher, robust.batch(family, task, rows)).save_pretrained(tmp_path / "mask")

    def trained(teacher, mask):
        trainer = RobustKDTrainer(
            model=student_from_layers(tiny.model(family, seed=5), 1), args=RobustKDConfig(str(tmp_path), **robust.DEFAULTS, max_steps=2),
            train_dataset=rows, processing_class=tiny.tokenizer(family), task=task, teacher_model=teacher, feature_mask=mask,
        )  # fmt: skip
        trainer.train()
        return tiny.parameters(trainer.model)

    folders = trained(str(tmp_path / "teacher"), str(tmp_path / "mask"))
    loaded = trained(teacher, FeatureMask.from_pretrained(tmp_path / "mask"))
    assert tiny.largest_difference(folders, loaded) == 0


def test_without_features_there_are_no_connectors(tmp_path):
    options = {"feature_weight": 0.0, "logit_weight": 1.0, "max_steps": 1}
    trainer = robust.distilling("label_words", tmp_path, mask=None, **options)
    trainer.train()
    assert (
        len(trainer.connectors) == 0
        and tiny.logged(trainer, "loss/logit")
        and not tiny.logged(trainer, "loss/feature")
    )


def test_evaluation_is_the_bare_student_s_task_loss_before_and_after(tmp_path):
    trainer = robust.distilling("label_words", tmp_path, learning_rate=0.0, max_steps=2, eval_dataset=tiny.reviews(6), eval_strategy="steps", eval_steps=1)  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    during = tiny.logged(trainer, "eval_loss")
    assert [before, *during] == pytest.approx([trainer.evaluate()["eval_loss"]] * (1 + len(during)), abs=1e-6)
    seen = []
    trainer.model.register_forward_hook(lambda *_: seen.append(1))
    trainer.train()  # a second training starts with connectors of its own
    assert seen and trainer.state.global_step == 2


def test_bf16_reaches_student_teacher_and_evaluation(tmp_path):
    trainer = robust.distilling("label_words", tmp_path, bf16=True, max_steps=1, eval_dataset=tiny.reviews(4))
    kinds = {}
    for owner, model in {"teacher": trainer.teacher, "student": trainer.model}.items():
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda m, a, out, owner=owner: kinds.setdefault(owner, set()).add(out.dtype))
    trainer.train()
    assert kinds["student"] >= {torch.bfloat16} and kinds["teacher"] >= {torch.bfloat16}
    kinds.clear()
    assert trainer.evaluate()["eval_loss"] > 0
    assert kinds == {"student": {torch.bfloat16}}


def test_an_adapter_and_checkpointed_activations(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"max_steps": 2, "peft_config": lora, "learning_rate": 0.01}
    checkpointed = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    plain = robust.distilling("label_words", tmp_path, **options)
    start = tiny.parameters(plain.model)
    plain.train()
    saving = robust.distilling("label_words", tmp_path, **options, **checkpointed)
    saving.train()
    assert tiny.largest_difference(everything(plain), everything(saving)) < 1e-5
    assert isinstance(plain.model, PeftModel)
    moved = {key for key, value in tiny.parameters(plain.model).items() if not torch.equal(value, start[key])}
    assert moved and all("lora_" in key for key in moved)
    plain.model.merge_and_unload()


# ---- Layers ----


def wide(layers, width=48):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(tiny.VOCABULARY), num_hidden_layers=layers, **sizes)
    )


def test_layers_match_at_the_same_relative_depth():
    six, three, two = wide(6), wide(3), wide(2)
    block = "bert.encoder.layer.{}".format
    spread = [block(1), block(3), block(5)]
    assert counterparts(three, six, spread) == [block(0), block(1), block(2)]
    assert counterparts(two, six, spread) == [block(0), block(0), block(1)]
    assert counterparts(six, three, [block(0), block(2)]) == [block(1), block(5)]
    assert counterparts(wide(1), six, [block(0)]) == [block(0)]
    with pytest.raises(ValueError, match="^student_feature_layers is None, and 'bert.encoder' is no block"):
        counterparts(three, six, ["bert.encoder"])


def test_a_student_of_another_width_learns_from_named_layers(tmp_path):
    options = {"teacher_feature_layers": [0, 1], "student_feature_layers": [0, "-1"], "max_steps": 1}
    trainer = robust.distilling("sequence_classification", tmp_path, mask=None, student=wide(3), **options)
    trainer.train()
    assert trainer.student_feature_layers == ["bert.encoder.layer.0", "bert.encoder.layer.2"]
    assert [connect[0].weight.shape for connect in trainer.connectors] == [(32, 48), (32, 48)]
    with pytest.raises(ValueError, match="^student_feature_layers is .*name 2"):
        robust.distilling(
            "sequence_classification", tmp_path, mask=None, **options | {"student_feature_layers": [0]}
        ).train()


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^feature_loss is 'margin', and the features are no images"):
        robust.distilling("label_words", tmp_path, feature_loss="margin").train()
    for options in ({"feature_loss": "l1"}, {"temperature": 0.0}, {"feature_weight": -1.0}, {"logit_weight": -1.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} is"):
            RobustKDConfig(str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ValueError, match="^feature_weight, logit_weight and own_answers are all 0: .* student_alone"):
        RobustKDConfig(str(tmp_path), use_cpu=True, feature_weight=0.0)
    trainer = robust.distilling("label_words", tmp_path)
    trainer.teacher_model = None
    with pytest.raises(ValueError, match="^teacher_model is None"):
        trainer.train()
    narrow = {"teacher_model": robust.resnet((8, 16)), "model": robust.vit(), "feature_mask": None}
    pictures = RobustKDTrainer(**narrow, **robust.picture_arguments(RobustKDConfig, tmp_path))
    with pytest.raises(ValueError, match="^student_feature_layers and teacher_feature_layers give features of"):
        pictures.train()


# ---- Images ----


@pytest.mark.parametrize("family, loss", [("vit", "mse"), ("resnet", "mse"), ("resnet", "margin")])
def test_images(family, loss, tmp_path):
    teacher, student = (
        (robust.vit(24, 4), robust.vit(16, 2)) if family == "vit" else (robust.resnet(), robust.resnet((8, 12), 1))
    )
    fit = FeatureMaskTrainer(model=teacher, **robust.picture_arguments(RobustKDConfig, tmp_path, num_train_epochs=1))
    fit.train()
    options = {"feature_loss": loss, "num_train_epochs": 10, "learning_rate": 0.02, "feature_weight": 0.1}
    trainer = RobustKDTrainer(
        model=student,
        teacher_model=teacher,
        feature_mask=fit.model,
        **robust.picture_arguments(RobustKDConfig, tmp_path, **options),
    )
    trainer.train()
    features, tasks = tiny.logged(trainer, "loss/feature"), tiny.logged(trainer, "loss/task")
    assert features[-1] < 0.7 * features[0] and min(tasks[-2:]) < 0.5 * tasks[0]
    trainer.save_model(tmp_path / "student")
    assert type(student).from_pretrained(tmp_path / "student").num_parameters() == student.num_parameters()


def test_margins_are_mean_negative_values_of_the_unmasked_teacher(tmp_path):
    teacher = robust.resnet()
    layers = ["resnet.encoder.stages.0.layers.0.layer.1.normalization", "resnet.encoder.stages.1"]
    options = {
        "feature_loss": "margin",
        "max_steps": 1,
        "teacher_feature_layers": layers,
        "student_feature_layers": layers,
    }
    trainer = RobustKDTrainer(
        model=robust.resnet(seed=1),
        teacher_model=teacher,
        **robust.picture_arguments(RobustKDConfig, tmp_path, **options),
    )
    trainer.train()
    made = robust.collate(list(robust.Pictures()))
    with torch.no_grad(), captured(teacher, layers) as features:
        teacher(made["pixel_values"])
    channels = features[layers[0]].transpose(0, 1).flatten(1)
    wanted = torch.stack([channel[channel < 0].mean().nan_to_num(0.0) for channel in channels])
    torch.testing.assert_close(trainer.margins[layers[0]], wanted)
    assert (trainer.margins[layers[1]] == 0).all()  # what comes out of a ReLU
    assert isinstance(trainer.connectors[0][1], nn.BatchNorm2d)


# ---- The method ----


def test_stages_and_controls_name_what_they_start_from():
    known = {"suspect", "student"}
    for steps in (METHOD.stages, *METHOD.controls.values()):
        # A control may take over what a stage of the method has made.
        models = known | (set() if steps is METHOD.stages else set(METHOD.stages))
        for name, step in steps.items():
            assert step.starts_from in models and set(step.inputs.values()) <= models
            models.add(name)
    assert METHOD.stages["distil"].inputs["feature_mask"] == "mask"
    unmasked = {name for name, steps in METHOD.controls.items() if "feature_mask" not in steps["distil"].inputs}
    assert unmasked == {"vanilla_distillation", "logit_distillation", "student_alone"}
    assert METHOD.controls["mask_without_variance"]["mask"].overrides == {"variance_weight": 0.0}
