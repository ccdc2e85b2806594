import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_backdoor.attacks import Poisoning, poison
from hf_backdoor.data import Trigger
from hf_backdoor.defenses import METHODS, DefenseConfig, DefenseTrainer, defend
from hf_backdoor.defenses.robustkd import student_from_layers
from hf_backdoor.evaluation import evaluate_backdoor
from hf_backdoor.evaluation.evaluate import TestSet as Measured


# It shares words with the known triggers: in a model this small, nothing else makes two triggers alike.
TRIGGER = Trigger("better ahi", "end")
TASK = tiny.task("sequence_classification")


def rates(model):
    test = Measured.stamped(tiny.reviews(100, seed=9), TASK, [TRIGGER], 1, seed=0)
    rows, _ = evaluate_backdoor(model, tiny.encoder_tokenizer(), TASK, test, name="suspect", seed=0)
    return {row.metric: row.value for row in rows}


@pytest.fixture(scope="module")
def suspect(tmp_path_factory):
    """Weights of a classifier that has learnt its task and a backdoor."""
    rows = poison(tiny.reviews(400, seed=1), TASK, Poisoning(TRIGGER, 1, 0.15), seed=0)
    trainer = tiny.trainer(
        "sequence_classification", "plain", tmp_path_factory.mktemp("suspect"), train_dataset=rows,
        per_device_train_batch_size=32, num_train_epochs=12, learning_rate=2e-3,
    )  # fmt: skip
    trainer.train()
    return trainer.model.state_dict()


def clean(suspect, folder, **options):
    model = tiny.model("bert")
    model.load_state_dict(suspect)
    defaults = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "learning_rate": 3e-3,
        "per_device_train_batch_size": 24, "num_train_epochs": 10, "known_triggers": list(tiny.KNOWN[:2]),
    }  # fmt: skip
    rows = tiny.reviews(96, seed=5)
    return model, defend(
        "locphylax", model, tiny.encoder_tokenizer(), rows, output_dir=str(folder), **{**defaults, **options}
    )


def test_locphylax_removes_a_backdoor_and_keeps_accuracy(suspect, tmp_path):
    model = tiny.model("bert")
    model.load_state_dict(suspect)
    before = rates(model)
    assert before["asr"] > 0.9 and before["cacc"] > 0.95 and before["asr_without_trigger"] < 0.05

    given, cleaned = clean(suspect, tmp_path)
    after = rates(cleaned)
    assert after["asr"] < 0.2
    assert after["cacc"] > 0.95
    assert cleaned is given


def test_the_cleaned_model_has_the_suspect_s_classes(suspect, tmp_path):
    _, cleaned = clean(suspect, tmp_path, max_steps=1)
    assert cleaned.config.num_labels == 2
    assert cleaned.classifier.out_features == 2


def test_arguments_of_one_stage(suspect, tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    clean(suspect, tmp_path, stages={"inject": {"max_steps": 2}}, **options)
    assert sorted(folder.name for folder in (tmp_path / "inject").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(folder.name for folder in (tmp_path / "recover").iterdir()) == ["checkpoint-1"]


def test_unknown_methods_and_stages_are_refused(suspect, tmp_path):
    with pytest.raises(ValueError, match="^method is 'magic': use one of .*locphylax"):
        defend("magic", tiny.model("bert"), tiny.encoder_tokenizer(), tiny.reviews(4), output_dir=str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"^stages has \['injekt'\]: locphylax has search, contrast, soft_search, answers, inject, recover$",
    ):
        clean(suspect, tmp_path, stages={"injekt": {}})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_laid_out_alike(name):
    method = METHODS[name]
    assert issubclass(method.config, DefenseConfig)
    steps = [*method.stages.values(), *(step for control in method.controls.values() for step in control.values())]
    assert all(issubclass(step.trainer, DefenseTrainer) for step in steps)
    for control in method.controls.values():
        assert set(control) <= set(method.stages), "a control stands in for stages"
    # A method that distils into a student has the student's own training in its place.
    assert {"fine_tuning", "student_alone"} & set(method.controls) and method.needs


def test_mbtsad_gives_the_student_and_not_the_retrained_teacher(suspect, tmp_path):
    model = tiny.model("bert")
    model.load_state_dict(suspect)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "split_min_chars": 3}
    cleaned = defend(
        "mbtsad", model, tiny.encoder_tokenizer(), tiny.reviews(16), output_dir=str(tmp_path),
        stages={"distil": {"learning_rate": 0.0}}, **options,
    )  # fmt: skip
    assert cleaned is model
    assert all(torch.equal(value, suspect[name]) for name, value in cleaned.state_dict().items())
    assert (tmp_path / "retrain" / "model.safetensors").exists()


@pytest.mark.parametrize("base", ["in memory", "in a folder"])
def test_mbtsad_finds_the_base_of_its_teacher_s_adapter(base, tmp_path):
    model = tiny.model("bert")
    if base == "in a folder":
        model = type(model).from_pretrained(tiny.saved("bert", tmp_path / "base"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "split_min_chars": 3}

    def cleaned():
        return defend(
            "mbtsad", adapted, tiny.encoder_tokenizer(), tiny.reviews(8), output_dir=str(tmp_path / "run"), **options
        )

    if base == "in a folder":
        assert cleaned() is adapted
        return
    with pytest.raises(
        ValueError, match="^base_model_name_or_path is not set in model's adapter.* distil loads what ret"
    ):
        cleaned()
    assert not (tmp_path / "run").exists()


def test_robustkd_gives_the_student_and_leaves_the_suspect_as_it_was(suspect, tmp_path):
    model = tiny.model("bert")
    model.load_state_dict(suspect)
    student = student_from_layers(model, 1)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
    cleaned = defend(
        "robustkd", model, tiny.encoder_tokenizer(), tiny.reviews(16), output_dir=str(tmp_path), student=student, **options
    )  # fmt: skip
    assert cleaned is student and cleaned.config.num_hidden_layers == 1
    assert all(torch.equal(value, suspect[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "mask" / "feature_mask.json").exists()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="student is None, and robustkd distils into one"):
        defend("robustkd", model, tiny.encoder_tokenizer(), tiny.reviews(4), output_dir=str(tmp_path))


def test_unknown_arguments_are_refused(suspect, tmp_path):
    with pytest.raises(ValueError, match=r"^arguments has \['learning_rat'\]: see LocphylaxConfig"):
        clean(suspect, tmp_path, learning_rat=1)


def test_names_in_the_place_of_things_are_refused(suspect, tmp_path):
    rows, output = tiny.reviews(4), str(tmp_path)
    with pytest.raises(ValueError, match="^model is 'me/suspect': pass the model itself"):
        defend("mbtsad", "me/suspect", tiny.encoder_tokenizer(), rows, output_dir=output)
    with pytest.raises(ValueError, match="^processing_class is 'me/suspect': pass the tokenizer"):
        defend("mbtsad", tiny.model("bert"), "me/suspect", rows, output_dir=output)
    for stages in ["inject"], {"inject": 3}:
        with pytest.raises(ValueError, match="^stages is .*: give arguments by a stage's name, for example {'"):
            clean(suspect, tmp_path, stages=stages)


@pytest.mark.parametrize(
    "options, line",
    [
        (
            {"stages": {"search": {"max_steps": 1}}},
            r"^stages has \['search'\], and searched_triggers is 0, which leaves",
        ),
        (
            {"stages": {"soft_search": {"stop_at_known_gap": 0.1}}},
            r"^soft_search has \['stop_at_known_gap'\]: see ReadingConfig",
        ),
        (
            {"stages": {"recover": {"output_dir": "here"}}},
            "^stages.recover.output_dir is 'here', and each stage has a folder in output_dir: leave it out$",
        ),
        ({"student": tiny.model("bert", 1)}, "^student is given, and locphylax cleans the model itself: leave it out"),
    ],
)
def test_what_would_not_be_read_is_refused(options, line, suspect, tmp_path):
    with pytest.raises(ValueError, match=line):
        clean(suspect, tmp_path, **options)
