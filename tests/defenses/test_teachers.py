"""A second model beside the one that is trained: another one, and one that it can be compared with."""

import pytest
import robust
import tiny
import topics
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_backdoor.defenses import METHODS, DefenseTrainer
from hf_backdoor.defenses.locphylax import LocphylaxTrainer
from hf_backdoor.defenses.ntml import NTMLTrainer
from hf_backdoor.defenses.reading import OwnAnswersTrainer
from hf_backdoor.defenses.robustkd import FeatureMaskTrainer, RobustKDConfig, RobustKDTrainer


LORA = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
NAME = "sequence_classification"


def student(teacher, folder, name=NAME, model=None, **options):
    family, task, rows = tiny.setting(name, 16)
    args = RobustKDConfig(str(folder), **{**robust.DEFAULTS, "max_steps": 1, **options})
    return RobustKDTrainer(
        model=model or tiny.model(family), args=args, teacher_model=teacher, train_dataset=rows, task=task, processing_class=tiny.tokenizer(family),
    )  # fmt: skip


# ---- Another one ----


@pytest.mark.parametrize(
    "method, argument",
    [
        ("student", "teacher_model"),
        ("distil", "teacher_model"),
        ("non_target", "teacher_model"),
        ("mutual", "target_model"),
        ("relabel", "teacher_model"),
        ("relabel", "poisoned_model"),
    ],
)
@pytest.mark.parametrize("adapter", [False, True], ids=["itself", "its base"])
def test_a_model_is_not_its_own_teacher(method, argument, adapter, tmp_path):
    own = tiny.model("bert", num_labels=4 if method in topics.STAGES else 2)
    models = {"model": get_peft_model(own, LORA) if adapter else own, argument: own}
    with pytest.raises(ValueError, match=f"^{argument} is the model that is trained, or shares weights with it: pass"):
        if method == "student":
            student(own, tmp_path, model=models["model"])
        elif method == "distil":
            tiny.trainer(NAME, method, tmp_path, **models)
        else:
            topics.trainer(NAME, method, tmp_path, **models)


def test_a_model_s_folder_may_be_a_path(tmp_path):
    for seed in (7, topics.POISONED):
        topics.network(NAME, seed).save_pretrained(tmp_path / str(seed))
    options = {"poisoned_model": tmp_path / str(topics.POISONED), "teacher_model": tmp_path / "7"}
    topics.trainer(NAME, "relabel", tmp_path, max_steps=1, **options).train()
    topics.trainer(NAME, "mutual", tmp_path, max_steps=1, target_model=tmp_path / "7").train()


@pytest.mark.parametrize(
    ("stage", "argument"),
    [
        ("distil", "teacher_model"),
        ("relabel", "teacher_model"),
        ("relabel", "poisoned_model"),
        ("mutual", "target_model"),
    ],
)
def test_a_folder_that_is_not_there_is_refused_before_training(stage, argument, tmp_path):
    make = tiny.trainer if stage == "distil" else topics.trainer
    for folder in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(ValueError, match=f"^{argument} is '{tmp_path}/none', where no folder is: pass a model's"):
            make(NAME, stage, tmp_path, **{argument: folder})


@pytest.mark.parametrize(
    "argument, wish, file",
    [
        ("found_triggers", "searched_triggers", "found_triggers.json"),
        ("found_soft_triggers", "soft_triggers", "soft_triggers.safetensors"),
        ("found_answers", "own_answers", "own_answers.safetensors"),
    ],
)
def test_a_folder_in_which_nothing_was_found_is_refused_by_name(argument, wish, file, tmp_path):
    """It ended in an error of the system's, or of safetensors', and `found_triggers="cf"` is such a folder."""
    with pytest.raises(ValueError, match=f"^{argument} is 'cf', where no {file} is: pass the folder that"):
        tiny.trainer("sequence_classification", "recover", tmp_path, **{wish: 1, argument: "cf"})


def test_a_teacher_that_would_not_be_asked_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^teacher_model is given, and stages is .*: leave it out, or set stages"):
        tiny.trainer("label_words", "mbtsad", tmp_path, teacher_model=tiny.model("llama", 7))


@pytest.mark.parametrize(
    "trainer", [DefenseTrainer, LocphylaxTrainer, FeatureMaskTrainer, OwnAnswersTrainer, NTMLTrainer]
)
def test_a_trainer_that_asks_no_teacher_takes_none(trainer, tmp_path):
    args = trainer.config_class()(str(tmp_path), use_cpu=True)
    with pytest.raises(
        ValueError, match=f"^teacher_model is given, and {trainer.__name__} would not read it: leave it out"
    ):
        trainer(tiny.model("bert"), args, processing_class=tiny.tokenizer("bert"), teacher_model=tiny.model("bert", 7))


def test_a_teacher_beside_the_adapter_that_teaches_is_refused(tmp_path):
    model = get_peft_model(tiny.model("bert"), LORA)
    model.add_adapter("teacher", LORA)
    tiny.trainer(NAME, "distil", tmp_path, model=model, teacher_model=None)
    with pytest.raises(ValueError, match="^teacher_model is given, and model has an adapter named 'teacher', which"):
        tiny.trainer(NAME, "distil", tmp_path, model=model, teacher_model=tiny.model("bert", 7))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_stage_or_control_is_given_a_teacher_that_it_would_not_ask(method):
    steps = [*method.stages.values(), *(step for control in method.controls.values() for step in control.values())]
    assert all(step.trainer.takes_teacher for step in steps if "teacher_model" in step.inputs)


def test_a_teacher_runs_in_the_precision_that_the_student_is_trained_in(tmp_path):
    trainer = tiny.trainer("sequence_classification", "distil", tmp_path, bf16=True, max_steps=1)
    seen = []
    layer = trainer.teacher.get_submodule("bert.encoder.layer.0.intermediate.dense")
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_teacher_from_a_folder_teaches_the_same_in_less_memory(tmp_path, precision):
    teacher = tiny.model("llama", 7)
    teacher.save_pretrained(tmp_path / "teacher")
    trained = {}
    for given in (teacher, str(tmp_path / "teacher")):
        trainer = tiny.trainer(
            "label_words", "distil", tmp_path / "run", teacher_model=given, max_steps=2, **precision
        )
        trainer.train()
        trained[type(given)] = tiny.parameters(trainer.model), next(trainer.teacher.model.layers.parameters()).dtype
    (by_model, own), (by_folder, read) = trained.values()
    assert tiny.largest_difference(by_model, by_folder) == 0
    assert own == torch.float32 and read == (torch.bfloat16 if precision else torch.float32)


# ---- Alike ----


def wide(size, family="llama", **options):
    model = tiny.model(family, 3, **options)
    model.resize_token_embeddings(size)
    return model


# Of NT-ML's stages: what stands beside the model that is trained.
BESIDE = [
    ("non_target", "teacher_model"),
    ("mutual", "target_model"),
    ("relabel", "teacher_model"),
    ("relabel", "poisoned_model"),
]


@pytest.mark.parametrize("method, argument", BESIDE)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_networks_of_other_classes_are_refused(method, argument, classes, tmp_path):
    other = {argument: tiny.model("bert", 3, num_labels=classes)}
    with pytest.raises(
        ValueError, match=f"^num_labels is {classes} in {argument}, and 4 in the model, and logits are"
    ):
        topics.trainer(NAME, method, tmp_path, max_steps=1, **other).train()


def test_networks_of_another_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^vocab_size is 80 in teacher_model, and 65 in the model"):
        topics.trainer("label_words", "non_target", tmp_path, teacher_model=wide(80)).train()


@pytest.mark.parametrize("method, argument", BESIDE)
def test_networks_that_can_t_read_the_model_s_tokens_are_refused(method, argument, tmp_path):
    """With heads of as many classes it was an IndexError from their embeddings."""
    other = {argument: wide(60, "bert", num_labels=4)}
    with pytest.raises(ValueError, match=f"^vocab_size is 60 in {argument}, and 65 in the model, whose tokenizer has"):
        topics.trainer(NAME, method, tmp_path, max_steps=1, **other).train()


@pytest.mark.parametrize(
    "name, teacher, line",
    [
        (NAME, lambda: tiny.model("bert", 3, num_labels=3), "num_labels is 3 in teacher_model, and 2"),
        ("label_words", lambda: wide(80), "vocab_size is 80 in teacher_model, and 65"),
    ],
)
def test_distilled_logits_are_of_the_same_answers(name, teacher, line, tmp_path):
    with pytest.raises(ValueError, match=f"^{line} in the model, .* or set logit_weight: 0"):
        student(teacher(), tmp_path, name, logit_weight=1.0).train()
    student(teacher(), tmp_path, name).train()  # features alone need no such thing


def test_a_teacher_that_can_t_read_the_student_s_tokens_is_refused(tmp_path):
    """It was an IndexError from its embeddings. One that is padded less far reads them all."""
    with pytest.raises(
        ValueError, match="^vocab_size is 60 in teacher_model, and 65 in the model, whose tokenizer has 65"
    ):
        student(wide(60), tmp_path, "label_words").train()
    student(wide(65), tmp_path, "label_words", model=wide(72)).train()


def test_a_deeper_teacher_is_none_of_the_suspect(tmp_path):
    """Layer 1 of four is not layer 1 of two, though their maps are of one size."""
    teacher = tiny.model("llama", 7)
    config = type(teacher.config)(**{**teacher.config.to_dict(), "num_hidden_layers": 4})
    with pytest.raises(ValueError, match="^num_hidden_layers is 4 in teacher_model, and 2 in the model, and layers"):
        tiny.trainer("label_words", "distil", tmp_path, teacher_model=type(teacher)(config), max_steps=1).train()


# ---- Both of a pair are trained ----


def adapted(folder, **options):
    get_peft_model(tiny.model("bert", 1, num_labels=4), LORA).save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(tiny.model("bert", 1, num_labels=4), folder / "adapter", **options)


def test_a_network_of_a_pair_that_would_not_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^no weight of the model has requires_grad, .*is_trainable=True"):
        topics.trainer(NAME, "mutual", tmp_path, model=adapted(tmp_path))


@pytest.mark.parametrize("trainable", [False, True])
def test_of_a_target_with_an_adapter_the_adapter_is_trained(trainable, tmp_path):
    models = {"model": adapted(tmp_path, is_trainable=True), "target_model": adapted(tmp_path, is_trainable=trainable)}
    trainer = topics.trainer(NAME, "mutual", tmp_path, **models)
    trained = [name for name, value in trainer.pair.target.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in name or "classifier" in name for name in trained)
