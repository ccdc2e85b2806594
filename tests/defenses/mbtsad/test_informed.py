"""MBTSAD with what was read off the suspect: soft triggers in copies of the rows, and its own answers."""

import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel

from hf_backdoor.defenses import defend
from hf_backdoor.defenses.engines import zero3_launched
from hf_backdoor.defenses.losses import soft_answer_loss
from hf_backdoor.defenses.mbtsad import METHOD, MBTSADConfig, MBTSADTrainer
from hf_backdoor.defenses.reading import OwnAnswers, SoftTriggers
from hf_backdoor.dry_run import describe_run
from hf_backdoor.estimate import Engine
from hf_backdoor.plan import check_launch, plan
from hf_backdoor.recipe_file import load_recipe
from hf_backdoor.run import run


EVERY = pytest.mark.parametrize("name", tiny.TASKS)
CLASSIFIERS = pytest.mark.parametrize("name", tiny.TASKS[:2])
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
ROWS = 16  # of `tiny.trainer`


def soft(seed=1):
    return SoftTriggers(torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(seed)))


def own(count=ROWS, seed=1):
    """Answers of one token: one of two classes, or two tokens, at drawn shares."""
    drawn = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)
    return OwnAnswers(torch.tensor([[0, 1]] * count, dtype=torch.int32), drawn, torch.ones(count, dtype=torch.long))


def informed(name, stage, folder, **options):
    return tiny.trainer(name, stage, folder, **{"soft_triggers": 3, "found_soft_triggers": soft(), **PLAIN, **options})


def answered(name, stage, folder, **options):
    return informed(name, stage, folder, **{"own_answers": 0.5, "found_answers": own(), **options})


# ---- Rows ----


@EVERY
@pytest.mark.parametrize("stage, versions", [("retrain", 2), ("distil", 1)])
def test_behind_a_stage_s_rows_come_the_clean_ones_with_triggers(name, stage, versions, tmp_path):
    options = {"split_copies": versions} if stage == "retrain" else {}
    trainer = informed(name, stage, tmp_path, **options)
    without = tiny.trainer(name, stage, tmp_path, **options).train_dataset["input_ids"][:]
    clean = tiny.trainer(name, "distil", tmp_path).train_dataset["input_ids"][:]
    rows = trainer.train_dataset["input_ids"][:]
    assert rows[: versions * ROWS] == without
    assert len(rows) == (versions + 1) * ROWS == trainer.args.rows_factor * ROWS
    for number, copy in enumerate(rows[versions * ROWS :]):
        assert [token for token in copy if token < len(tiny.VOCABULARY)] == clean[number]
        first = len(tiny.VOCABULARY) + 2 * (number % 3)  # the triggers take turns
        assert [token for token in copy if token >= len(tiny.VOCABULARY)] == [first, first + 1]


@CLASSIFIERS
def test_every_version_of_a_row_answers_as_the_suspect_does_to_the_row(name, tmp_path):
    trainer = answered(name, "retrain", tmp_path, split_copies=2, own_answers=0.75)
    rows, labels = trainer.train_dataset, tiny.setting(name, ROWS)[2]["label"]
    words = None if name == "sequence_classification" else trainer.task.word_ids(trainer.processing_class)
    sources = [row for row in range(ROWS) for _ in range(2)] + list(range(ROWS))
    for row, source in zip(rows, sources, strict=True):
        # Of an answer with an end, the first token is looked at.
        ids, shares = row["answer_ids"][0], row["answer_probabilities"][0]
        right = labels[source] if words is None else words[labels[source]]
        assert ids == [right, 0, 1]
        assert shares == pytest.approx([0.25, *(0.75 * own().probabilities[source]).tolist()])


def test_a_text_that_a_trigger_makes_longer_than_the_model_takes_is_cut(tmp_path):
    family, task, rows = tiny.setting("label_words", ROWS)
    tokenizer = tiny.tokenizer(family)
    longest = max(len(task.encode(row, tokenizer)["input_ids"]) for row in rows)
    trainer = informed("label_words", "distil", tmp_path)
    trainer.processing_class.model_max_length = longest
    again = trainer._rows(trainer.processing_class)
    assert max(map(len, trainer.train_dataset["input_ids"])) == longest + 2
    assert max(map(len, again["input_ids"])) == longest
    assert again["input_ids"][:ROWS] == trainer.train_dataset["input_ids"][:ROWS]


# ---- Losses ----


@CLASSIFIERS
def test_student_and_teacher_both_read_the_triggers(name, tmp_path):
    trainer = answered(name, "distil", tmp_path, attention_weight=0.0, hidden_weight=0.3)
    student, teacher = trainer.model.eval(), trainer.teacher
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (1, ROWS + 1, ROWS + 4)])
    foreign = batch["input_ids"] >= len(tiny.VOCABULARY)
    assert foreign.sum(dim=1).tolist() == [0, 2, 2]
    more = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}

    def read(model):
        embedded = model.get_input_embeddings()(batch["input_ids"].masked_fill(foreign, 0)).detach()
        embedded[foreign] = soft().embeddings.flatten(0, 1)[batch["input_ids"][foreign] - len(tiny.VOCABULARY)]
        return model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], output_hidden_states=True, **more)

    with torch.no_grad():
        ours, theirs = read(student), read(teacher)
        with trainer.soft_triggers_read():
            terms, _ = trainer.loss_terms(student, dict(batch), torch.tensor([3]))
    mask = batch["attention_mask"][..., None].float()
    distances = [
        ((one - other).square() * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)) / one.shape[-1]
        for one, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    assert torch.allclose(terms["hidden"], 0.3 * sum(distances) / len(distances), rtol=1e-4)
    at_answers = ours.logits[:, None] if name == "sequence_classification" else ours.logits[:, :-1]
    length = batch["answer_ids"].shape[1]
    expected = soft_answer_loss(at_answers[:, -length:], batch["answer_ids"], batch["answer_probabilities"])
    assert torch.allclose(terms["task"], expected, rtol=1e-4)
    # Outside of training nothing is left of the triggers.
    with pytest.raises(IndexError):
        teacher(input_ids=batch["input_ids"])


@CLASSIFIERS
@pytest.mark.parametrize("stage", ["retrain", "distil"])
def test_accumulation_and_two_processes_change_nothing(name, stage, tmp_path):
    tiny.assert_trains_alike(lambda **options: answered(name, stage, tmp_path, **options), tmp_path)


@CLASSIFIERS
def test_an_adapter_distils_as_it_does_with_a_teacher_of_its_own(name, tmp_path):
    """Over one base the hook that reads for the student reads for the teacher as well."""
    kind = "SEQ_CLS" if name == "sequence_classification" else "CAUSAL_LM"
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type=kind)
    both = answered(name, "mbtsad", tmp_path, peft_config=adapter, logging_steps=1)
    both.train()
    base = tiny.model("bert" if name == "sequence_classification" else "llama")
    teacher = PeftModel.from_pretrained(base, tmp_path / "checkpoint-teacher").merge_and_unload()
    alone = answered(name, "distil", tmp_path, peft_config=adapter, teacher_model=teacher, logging_steps=1)
    alone.train()
    assert tiny.logged(both, "loss")[2:] == pytest.approx(tiny.logged(alone, "loss"), rel=1e-5)
    assert tiny.logged(both, "loss/attention")[-1] > 0


@CLASSIFIERS
def test_a_resumed_training_equals_an_uninterrupted_one(name, tmp_path):
    made = lambda: answered(  # noqa: E731
        name, "mbtsad", tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.01
    )
    whole = made()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-distil" / "checkpoint-4")
    again = made()
    again.train(resume_from_checkpoint=True)
    assert again.stage == "distil" and again.state.global_step == 4
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(again.model)) == 0


# ---- What is refused, and recipes ----


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"found_soft_triggers": None},
            "soft_triggers is 3, and found_soft_triggers are not given: .* soft_triggers: 0$",
        ),
        ({"soft_triggers": 0}, "soft_triggers is 0, and found_soft_triggers are given: "),
        ({"found_answers": None}, "own_answers is 0.5, and found_answers are not given: .* own_answers: 0$"),
        ({"own_answers": 0.0}, "own_answers is 0.0, and found_answers are given: "),
        ({"found_answers": own(5)}, "found_answers has answers to 5 rows, which are not the clean rows given"),
    ],
)
@pytest.mark.parametrize("stage", ["retrain", "distil"])
def test_findings_that_do_not_fit_are_refused(stage, options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        answered("sequence_classification", stage, tmp_path, **options)


def test_rows_must_be_raw(tmp_path):
    encoded = tiny.trainer("label_words", "distil", tmp_path).train_dataset
    config = MBTSADConfig(str(tmp_path), stages=["distil"], soft_triggers=3, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="^train_dataset has input_ids: pass raw rows, soft triggers are put into"):
        MBTSADTrainer(
            model=tiny.model("llama"), args=config, train_dataset=encoded, processing_class=tiny.tokenizer("llama"),
            teacher_model=tiny.model("llama"), found_soft_triggers=soft(),
        )  # fmt: skip


def test_controls_leave_out_what_they_are_named_for():
    for name, (triggers, answers) in {
        "as_published": (False, False), "without_soft_triggers": (False, True), "without_own_answers": (True, False),
    }.items():  # fmt: skip
        steps = METHOD.controls[name]
        assert list(steps) == ["retrain", "distil"]
        for step in steps.values():
            assert step.starts_from == "suspect"
            assert (step.overrides.get("soft_triggers") == 0) == (not triggers)
            assert (step.overrides.get("own_answers") == 0) == (not answers)


def test_a_recipe_reads_first_and_then_trains(tmp_path):
    file = tiny.classifier_recipe(
        tmp_path, method="mbtsad", max_steps=2, soft_triggers=3, own_answers=0.5,
        controls=["as_published", "without_soft_triggers", "without_own_answers"],
    )  # fmt: skip
    recipe = load_recipe(file, [])
    stages = {stage.folder: stage for stage in plan(recipe)}
    assert set(stages) >= {"soft_search", "answers", "retrain", "cleaned"}
    found = {"found_soft_triggers": "soft_search", "found_answers": "answers"}
    assert stages["retrain"].inputs == found and stages["cleaned"].inputs == found | {"teacher_model": "retrain"}
    results = run(recipe)
    models = {row.model for row in results.rows}
    assert "cleaned" in models and {f"control/{name}" for name in recipe.controls} <= models
    assert not models & {"stage/soft_search", "stage/answers"}


def test_a_stage_that_wants_none_takes_none(tmp_path):
    recipe = load_recipe(
        tiny.classifier_recipe(
            tmp_path,
            method="mbtsad",
            max_steps=1,
            soft_triggers=3,
            own_answers=0.5,
            stages={"distil": {"own_answers": 0}},
        ),
        [],
    )
    stages = {stage.folder: stage for stage in plan(recipe)}
    assert set(stages["retrain"].inputs) == {"found_soft_triggers", "found_answers"}
    assert set(stages["cleaned"].inputs) == {"found_soft_triggers", "teacher_model"}
    assert "cleaned" in {row.model for row in run(recipe).rows}


def test_a_stage_that_wants_what_no_stage_makes_is_refused(tmp_path):
    file = tiny.classifier_recipe(tmp_path, method="mbtsad", stages={"distil": {"own_answers": 0.5}})
    with pytest.raises(ValueError, match="^own_answers is 0.5 in stage distil, and 0 in stage answers, .* whole run$"):
        plan(load_recipe(file, []))


def test_one_call_reads_and_trains(tmp_path):
    rows = tiny.reviews(16)
    cleaned = defend(
        "mbtsad", tiny.model("bert"), tiny.tokenizer("bert"), rows, output_dir=str(tmp_path), soft_triggers=2,
        own_answers=0.5, max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    before = tiny.parameters(tiny.model("bert"))
    assert tiny.largest_difference(before, tiny.parameters(cleaned)) > 0
    assert len(OwnAnswers.from_pretrained(tmp_path / "answers")) == 16
    assert len(SoftTriggers.from_pretrained(tmp_path / "soft_search")) == 2


def test_zero_3_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    recipe = load_recipe(tiny.classifier_recipe(tmp_path, method="mbtsad", soft_triggers=3), [])
    message = "^soft_triggers is set, and DeepSpeed ZeRO-3 leaves no process the whole model"
    with pytest.raises(ValueError, match=message):
        describe_run(recipe, Engine("zero3", 2))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match=message):
        check_launch(plan(recipe), zero3_launched())


def test_without_them_a_recipe_is_the_paper_s(tmp_path):
    stages = {
        stage.folder: stage for stage in plan(load_recipe(tiny.classifier_recipe(tmp_path, method="mbtsad"), []))
    }
    assert not set(stages) & {"soft_search", "answers"}
    assert not stages["retrain"].inputs and set(stages["cleaned"].inputs) == {"teacher_model"}


@pytest.mark.parametrize("stage, factor", [("retrain", 4), ("distil", 2)])
def test_the_rows_of_a_step_are_counted(stage, factor, tmp_path):
    assert MBTSADConfig(str(tmp_path), stages=[stage], soft_triggers=2).rows_factor == factor
