"""Distillation with soft triggers: the student reads them, the teacher does not."""

import pytest
import robust
import tiny
import torch
from transformers import LlamaForSequenceClassification

from hf_backdoor.data import LabelWords, Trigger
from hf_backdoor.defenses.reading import OwnAnswers, SoftTriggers
from hf_backdoor.defenses.robustkd import METHOD, RobustKDConfig, RobustKDTrainer, student_from_layers
from hf_backdoor.defenses.robustkd.features import captured
from hf_backdoor.defenses.robustkd.losses import feature_distance
from hf_backdoor.evaluation import Results
from hf_backdoor.plan import plan
from hf_backdoor.recipe_file import load_recipe
from hf_backdoor.run import run


EVERY = pytest.mark.parametrize("name", tiny.TASKS)


def soft(seed=1):
    return SoftTriggers(torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(seed)))


def distilling(name, folder, **options):
    options = {"soft_triggers": 3, "found_soft_triggers": soft(), **options}
    return robust.distilling(name, folder, **options)


@EVERY
def test_each_row_has_a_copy_with_a_trigger_in_it(name, tmp_path):
    trainer, plain = distilling(name, tmp_path), robust.distilling(name, tmp_path)
    rows, count = trainer.train_dataset, len(plain.train_dataset)
    assert len(rows) == 2 * count == trainer.args.rows_factor * count
    for number in range(count):
        own, copy = rows[number]["input_ids"], rows[count + number]["input_ids"]
        assert own == plain.train_dataset[number]["input_ids"]
        assert [token for token in copy if token < len(tiny.VOCABULARY)] == own
        first = len(tiny.VOCABULARY) + 2 * (number % 3)  # the triggers take turns
        assert [token for token in copy if token >= len(tiny.VOCABULARY)] == [first, first + 1]


@EVERY
def test_the_student_of_a_copy_learns_what_the_teacher_says_without_the_trigger(name, tmp_path):
    trainer = distilling(name, tmp_path, logit_weight=0.5, max_steps=1)
    trainer.train()
    model, teacher, mask = trainer.model_wrapped, trainer.teacher, trainer.mask
    rows = [trainer.train_dataset[row] for row in (1, 17, 20)]
    made = trainer.data_collator(rows)
    embedding = trainer.model.get_input_embeddings()
    foreign = made["input_ids"] >= len(tiny.VOCABULARY)
    assert foreign.sum(dim=1).tolist() == [0, 2, 2]
    embedded = embedding(made["input_ids"].masked_fill(foreign, 0)).detach()
    embedded[foreign] = soft().embeddings.flatten(0, 1)[made["input_ids"][foreign] - len(tiny.VOCABULARY)]
    seen = made["attention_mask"] * ~foreign
    more = {"position_ids": made["position_ids"]} if "position_ids" in made else {}
    # Whatever stands where the teacher sees nothing, it says the same.
    other = made["input_ids"].masked_fill(foreign, 7)
    with torch.no_grad(), captured(teacher, mask.layers) as theirs:
        mask(teacher, input_ids=other, attention_mask=seen, **more)
    with torch.no_grad(), captured(model.student, trainer.student_feature_layers) as ours:
        model.student(inputs_embeds=embedded, attention_mask=made["attention_mask"], **more)
    wanted = torch.zeros(3)
    for weight, connect, own, layer in zip(
        [0.5, 1.0], model.connectors, trainer.student_feature_layers, mask.layers, strict=True
    ):
        wanted += weight * feature_distance(connect(ours[own]), theirs[layer], seen.bool())
    with soft().read_by(trainer.model, soft().tokenizer(trainer.processing_class)):
        terms, _ = trainer.loss_terms(model, made, torch.tensor([3]))
    torch.testing.assert_close(terms["feature"], wanted)
    assert set(terms) == {"task", "feature", "logit"} and all(value.shape == (3,) for value in terms.values())


@pytest.mark.parametrize("padding", [0, tiny.VOCABULARY.index("<eos>")])
@pytest.mark.parametrize("position", ["start", "end"])
def test_a_decoder_s_head_reads_the_last_token_that_the_teacher_sees(position, padding, tmp_path):
    tokenizer = tiny.causal_tokenizer()
    tokenizer.pad_token = tiny.VOCABULARY[padding]
    config = tiny.model("llama").config
    config.num_labels, config.pad_token_id = 2, padding
    torch.manual_seed(0)
    teacher = LlamaForSequenceClassification(config)
    found, task, rows = soft(), tiny.task("sequence_classification"), tiny.reviews(6)
    trainer = RobustKDTrainer(
        model=student_from_layers(teacher, 1),
        args=RobustKDConfig(str(tmp_path), use_cpu=True, report_to="none", soft_triggers=3, logit_weight=1.0),
        teacher_model=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
        found_soft_triggers=found,
    )
    trigger, extended = Trigger(found.texts[1], position), found.tokenizer(tokenizer)
    copies = [{**row, "text": trigger.insert(row["text"], None)} for row in rows]
    clean = trainer.data_collator([task.encode(row, tokenizer) for row in rows])
    taught = trainer.as_taught(trainer.data_collator([task.encode(row, extended) for row in copies]))
    lengths = clean["attention_mask"].sum(dim=1)
    assert torch.equal(taught["attention_mask"].sum(dim=1), lengths)
    # The trigger's two places at the start stay.
    shift = 2 if position == "start" else 0
    assert torch.equal(taught["readout_position"], clean["readout_position"] + shift)
    if not shift:
        torch.testing.assert_close(trainer.teach(taught)[0].logits, trainer.teach(clean)[0].logits)
    last = trainer.teacher.score(trainer.teacher.model(taught["input_ids"], taught["attention_mask"])[0])
    read = last[torch.arange(len(rows)), taught["readout_position"]]
    torch.testing.assert_close(trainer.teach(taught)[0].logits, read)


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_accumulation_and_two_processes_change_nothing(name, tmp_path):
    tiny.assert_trains_alike(
        lambda **options: distilling(name, tmp_path, **{**robust.PLAIN_STEPS, "num_train_epochs": 1, **options}),
        tmp_path,
    )


def test_nothing_of_them_is_left_in_the_student(tmp_path):
    trainer = distilling("label_words", tmp_path, max_steps=2)
    trainer.train()
    layer = trainer.model.get_input_embeddings()
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert layer.weight.shape[0] == len(tiny.VOCABULARY) == len(trainer.processing_class)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"found_soft_triggers": None}, "soft_triggers is 3, and found_soft_triggers are not given: .* soft_triggers: 0$"),
        ({"soft_triggers": 0}, "soft_triggers is 0, and found_soft_triggers are given: "),
        ({"soft_triggers": -1}, "soft_triggers is -1: choose 0 or more"),
        ({"searched_tokens": 0}, "searched_tokens is 0: choose 1 or more"),
        ({"train_dataset": [{"input_ids": [1], "labels": 0}]}, "train_dataset has input_ids: pass raw rows"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, line, tmp_path):
    if "train_dataset" in options:
        task = tiny.task("sequence_classification")
        options = {"train_dataset": task.encode_rows(tiny.reviews(4), tiny.encoder_tokenizer())}
    with pytest.raises(ValueError, match=f"^{line}"):
        distilling("sequence_classification", tmp_path, **options)


def test_a_student_of_another_width_is_refused(tmp_path):
    narrow = SoftTriggers(torch.randn(3, 2, 8))
    with pytest.raises(
        ValueError, match="^found_soft_triggers are embeddings of 8 numbers, and the student's have 32: "
    ):
        distilling("label_words", tmp_path, found_soft_triggers=narrow).train()


def test_rows_without_text_have_no_place_for_them(tmp_path):
    teacher = robust.resnet()
    with pytest.raises(ValueError, match="^soft_triggers is set, and the rows are no texts: set soft_triggers: 0$"):
        RobustKDTrainer(
            model=student_from_layers(teacher, 1),
            args=RobustKDConfig(str(tmp_path), soft_triggers=3, use_cpu=True, report_to="none"),
            train_dataset=robust.Pictures(),
            data_collator=robust.collate,
            teacher_model=teacher,
            found_soft_triggers=soft(),
        )


def test_a_run_searches_them_and_its_controls_do_without(tmp_path):
    controls = ["vanilla_distillation", "distillation_without_soft_triggers", "student_alone"]
    file = tiny.classifier_recipe(
        tmp_path, method="robustkd", student_layers=1, soft_triggers=3, controls=controls, max_steps=2
    )
    stages = {stage.folder: stage for stage in plan(load_recipe(file, []))}
    assert stages["cleaned"].inputs["found_soft_triggers"] == "soft_search"
    for control in controls[:2]:
        taken = stages[f"controls/{control}/distil"]
        assert "found_soft_triggers" not in taken.inputs and taken.step.overrides["soft_triggers"] == 0
    run(load_recipe(file, []))
    assert {row.model for row in Results.load(tmp_path / "run" / "results.json").rows} == {
        "suspect", "cleaned", *(f"control/{control}" for control in controls),
    }  # fmt: skip
    assert len(SoftTriggers.from_pretrained(tmp_path / "run" / "soft_search")) == 3
    assert "soft_search" not in {stage.name for stage in plan(load_recipe(file, ["--soft_triggers", "0"]))}


def test_controls_without_soft_triggers():
    without = {name for name, steps in METHOD.controls.items() if steps["distil"].overrides.get("soft_triggers") == 0}
    alone = {"student_alone"}  # no distillation at all
    assert set(METHOD.controls) - without - alone == {"distillation_by_right_answers", "mask_without_variance"}


def test_the_student_may_be_taught_the_teacher_s_own_answers(tmp_path):
    drawn = torch.rand(16, 2, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    answers = OwnAnswers(torch.tensor([[0, 1]] * 16, dtype=torch.int32), drawn, torch.ones(16, dtype=torch.long))
    rows = tiny.reviews(16)
    flipped = rows.map(lambda row: {"label": 1 - row["label"]}, load_from_cache_file=False)

    def trained(rows, weight):
        options = {"own_answers": weight, "found_answers": answers, "max_steps": 2, "train_dataset": rows}
        trainer = distilling("sequence_classification", tmp_path, feature_weight=0.0, **options)
        trainer.train()
        return tiny.parameters(trainer.model)

    # With nothing but own answers no label is needed, of a row or of its copy.
    assert tiny.largest_difference(trained(rows, 1.0), trained(flipped, 1.0)) < 1e-6
    assert tiny.largest_difference(trained(rows, 0.5), trained(flipped, 0.5)) > 1e-4


def test_plain_distillation_teaches_right_answers():
    for name in ("vanilla_distillation", "logit_distillation", "as_published"):
        step = METHOD.controls[name]["distil"]
        assert step.overrides["own_answers"] == step.overrides["soft_triggers"] == 0


def test_rows_of_another_kind_have_no_answers_to_put_in_place(tmp_path):
    found = OwnAnswers(torch.zeros(16, 1, dtype=torch.int32), torch.ones(16, 1), torch.ones(16, dtype=torch.long))
    with pytest.raises(
        ValueError, match="^own_answers is set, and the rows have no answers that we know: .*own_answers: 0$"
    ):
        RobustKDTrainer(
            model=robust.resnet(seed=1), args=RobustKDConfig(str(tmp_path), own_answers=1.0, use_cpu=True, report_to="none"),
            train_dataset=robust.Pictures(), data_collator=lambda rows: {}, teacher_model=robust.resnet(seed=2),
            found_answers=found,
        )  # fmt: skip


def test_a_teacher_s_answer_is_not_read_where_it_sees_nothing(tmp_path):
    def made(template, **options):
        return RobustKDTrainer(
            model=student_from_layers(tiny.model("llama"), 1),
            args=RobustKDConfig(str(tmp_path), use_cpu=True, report_to="none", soft_triggers=3, **options),
            teacher_model=tiny.model("llama"),
            train_dataset=tiny.reviews(8),
            processing_class=tiny.causal_tokenizer(),
            task=LabelWords(tiny.LABEL_WORDS, template),
            found_soft_triggers=soft(),
        )

    with pytest.raises(
        ValueError, match="^logit_weight is 1.0, and prompts end with their text, so a soft trigger may"
    ):
        made("text : {text}", logit_weight=1.0)
    made("text : {text}")
    made("text : {text} label :", logit_weight=1.0)
