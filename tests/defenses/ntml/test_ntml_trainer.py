import functools
import tempfile

import pytest
import tiny
import topics
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers.modeling_outputs import ModelOutput

from hf_backdoor.data import InstructionFollowing, LabelWords, SequenceClassification
from hf_backdoor.defenses import ntml
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLConfig, NTMLTrainer
from hf_backdoor.defenses.ntml.classes import feature_states
from hf_backdoor.defenses.ntml.losses import non_target_loss
from hf_backdoor.defenses.trainer import DefenseTrainer


CASES = [(name, stage) for name in topics.FORMATS for stage in topics.STAGES]
EVERY = pytest.mark.parametrize("name, stage", CASES, ids=map("-".join, CASES))


# ---- What every trainer owes its user ----


# Plain gradient steps: Adam would blow rounding up into steps of full size, and clipping would hide a wrong scale.
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_train_epochs": 2}


@functools.cache
def batches_of_eight(name, stage):
    with tempfile.TemporaryDirectory() as folder:
        trainer = topics.trainer(name, stage, folder, **PLAIN)
        trainer.train()
        return tiny.parameters(trainer.model), tiny.logged(trainer, "loss")


@EVERY
def test_gradient_accumulation_changes_nothing(name, stage, tmp_path):
    parameters, losses = batches_of_eight(name, stage)
    trainer = topics.trainer(
        name, stage, tmp_path, **PLAIN, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    start = tiny.parameters(trainer.model)
    trainer.train()
    assert tiny.largest_difference(parameters, tiny.parameters(trainer.model)) < 1e-5
    assert tiny.logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)
    assert len(losses) == 4 and min(losses) > 1e-3 and tiny.largest_difference(parameters, start) > 1e-4


@pytest.mark.parametrize("name, stage", CASES[:6], ids=map("-".join, CASES[:6]))
def test_two_processes_change_nothing(name, stage, tmp_path):
    def work():
        trainer = topics.trainer(name, stage, tmp_path, **PLAIN, per_device_train_batch_size=4)
        trainer.train()
        assert trainer.args.world_size == 2 and trainer.model_wrapped is not trainer.model
        return tiny.parameters(trainer.model), tiny.logged(trainer, "loss")

    parameters, losses = batches_of_eight(name, stage)
    there, losses_there = tiny.in_two_processes(work, tmp_path)
    assert tiny.largest_difference(parameters, there) < 1e-5
    assert losses_there == pytest.approx(losses, rel=1e-4)


@EVERY
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, stage, tmp_path):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "dropout": 0.2}
    whole = topics.trainer(name, stage, tmp_path, **options)
    whole.train()
    resumed = topics.trainer(name, stage, tmp_path, model_seed=5, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0
    assert tiny.logged(resumed, "loss") == tiny.logged(whole, "loss")


@EVERY
def test_evaluation_gives_the_task_s_loss(name, stage, tmp_path):
    rows = topics.pixels(6, seed=3) if name == "images" else topics.texts(6, seed=3)
    trainer = topics.trainer(name, stage, tmp_path, eval_dataset=rows)
    plain = {"data_collator": topics.collate_pixels} if name == "images" else {}
    reference = DefenseTrainer(
        model=topics.network(name, 0), args=trainer.args, eval_dataset=rows, task=trainer.task,
        processing_class=trainer.processing_class, **plain,
    )  # fmt: skip
    expected = reference.evaluate()["eval_loss"]
    assert expected > 0 and trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)


# ---- K logits a sample ----


@pytest.mark.parametrize("name", topics.FORMATS)
def test_the_teacher_s_logits_are_those_of_each_row_alone(name, tmp_path):
    trainer = topics.trainer(name, "non_target", tmp_path, per_device_eval_batch_size=5)
    found = torch.tensor(trainer.with_teacher_logits(trainer.train_dataset)["teacher_logits"][:])
    teacher, task = topics.sharpen(topics.network(name, 7)).eval(), topics.TASKS[name]
    for row, logits in zip(topics.texts(16) if task else topics.pixels(16), found, strict=True):
        if name == "images":
            expected = teacher(torch.tensor([row["pixel_values"]])).logits[0]
        elif name == "label_words":
            prompt = task.prompt_ids(row["text"], trainer.processing_class)
            expected = teacher(torch.tensor([prompt])).logits[0, -1, task.word_ids(trainer.processing_class)]
        else:
            expected = teacher(**trainer.processing_class(row["text"], return_tensors="pt")).logits[0]
        assert torch.allclose(logits, expected, atol=1e-5)


def test_two_processes_share_the_teacher_s_pass(tmp_path):
    rows = topics.texts(7)

    def work():
        trainer = topics.trainer("label_words", "non_target", tmp_path, train_dataset=rows)
        seen = []
        trainer.teacher.register_forward_hook(lambda model, args, output: seen.append(len(output.logits)))
        labelled = trainer.with_teacher_logits(trainer.train_dataset)
        return torch.tensor(labelled["teacher_logits"][:]), sum(seen)

    (here, whole), (there, share) = work(), tiny.in_two_processes(work, tmp_path)
    assert (whole, share) == (7, 4)
    assert torch.allclose(here, there, atol=1e-6)


@pytest.mark.parametrize(
    "stage, clean", [("non_target", 0), ("relabel", len(topics.clean_rows("sequence_classification")))]
)
def test_the_teacher_runs_once_and_not_in_every_epoch(stage, clean, tmp_path):
    trainer = topics.trainer("sequence_classification", stage, tmp_path, num_train_epochs=3)
    seen = []
    trainer.teacher.register_forward_hook(lambda model, args, output: seen.append(len(output.logits)))
    trainer.train()
    assert sum(seen) == 16 + clean and trainer.state.global_step == 6


def test_rows_with_teacher_logits_need_no_teacher(tmp_path):
    first = topics.trainer("sequence_classification", "non_target", tmp_path, max_steps=2)
    first.train()
    logits = first.train_dataset["teacher_logits"][:]
    rows = topics.texts(16).add_column("teacher_logits", logits)
    second = topics.trainer(
        "sequence_classification", "non_target", tmp_path, max_steps=2, train_dataset=rows, teacher_model=None
    )
    second.train()
    assert tiny.largest_difference(tiny.parameters(first.model), tiny.parameters(second.model)) == 0


@pytest.mark.parametrize(
    "name, kind",
    [("sequence_classification", "negative"), ("label_words", "renormalised"), ("images", "all_classes")],
)
def test_the_given_label_of_each_row_is_found(name, kind, tmp_path):
    trainer = topics.trainer(name, "non_target", tmp_path, soft_labels=kind, temperature=2.0)
    trainer.train_dataset = trainer.with_teacher_logits(trainer.train_dataset)
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.class_logits(trainer.forward(trainer.model, batch).logits, batch)
    found = {
        tuple(row.tolist()): label
        for row, label in zip(batch["teacher_logits"], trainer.given_labels(batch), strict=True)
    }
    for row in range(16):
        key = tuple(torch.tensor(trainer.train_dataset[row]["teacher_logits"]).tolist())
        assert found.get(key, row % 4) == row % 4
    terms, _ = trainer.loss_terms(trainer.model, batch, torch.tensor([8]))
    expected = non_target_loss(logits, batch["teacher_logits"], trainer.given_labels(batch), 2.0, kind)
    assert terms["non_target"].shape == (8,) and torch.allclose(terms["non_target"], expected)


# ---- The product ----


def sayer(label):
    return tiny.fixed_classifier(label, num_labels=4)


def decided(folder, held_out, **options):
    models = {"target_model": sayer(2), "model": sayer(1)}
    trainer = topics.trainer(
        "sequence_classification", "mutual", folder, **models, learning_rate=0.0, max_steps=1, eval_dataset=held_out, **options
    )  # fmt: skip
    trainer.train()
    return trainer


def rows_of(label, count=4):
    return Dataset.from_list([{"text": "the film was good", "label": label}] * count)


@pytest.mark.parametrize("known, expected", [(2, "target"), (1, "non_target"), (0, "non_target")])
def test_the_product_is_the_more_accurate_network_without_and_with_a_known_trigger(known, expected, tmp_path):
    trainer = decided(tmp_path, {"clean": rows_of(0), "known": rows_of(known)})
    assert trainer.chosen == expected and trainer.result() is getattr(trainer.pair, expected)
    assert trainer.accuracies["target"] == {"clean": 0.0, "known": float(known == 2)}
    # What is measured afterwards is the product.
    says = trainer.predict(rows_of(0)).predictions.argmax(axis=1)
    assert set(says) == {2 if expected == "target" else 1}


def test_clean_rows_alone_do_not_choose_the_product(tmp_path):
    assert decided(tmp_path, rows_of(2)).chosen == "non_target"
    assert decided(tmp_path, rows_of(1), product="target").chosen == "target"


def test_the_defender_s_own_trigger_counts(tmp_path):
    trainer = decided(tmp_path, rows_of(2), known_trigger="zq")
    marker = tiny.VOCABULARY.index("zq")
    assert all(marker in row["input_ids"] for row in trainer.eval_dataset["known"])
    assert not any(marker in row["input_ids"] for row in trainer.eval_dataset["clean"])
    assert trainer.chosen == "target"
    with pytest.raises(ValueError, match="known_trigger is 'zq': pass raw rows"):
        topics.trainer("images", "mutual", tmp_path, known_trigger="zq", eval_dataset=topics.pixels(4))


# ---- Suspicion ----


@pytest.mark.parametrize("name", topics.FORMATS)
def test_rows_that_a_network_contradicts_are_listed(name, tmp_path):
    rows = topics.pixels(12, seed=5) if name == "images" else topics.texts(12, seed=5)
    trainer = topics.trainer(name, "mutual", tmp_path)
    given, probabilities = trainer.pair_probabilities(rows)
    assert given.tolist() == [row % 4 for row in range(12)]
    assert probabilities.shape == (12, 2, 4) and torch.allclose(probabilities.sum(dim=2), torch.ones(12, 2), atol=1e-5)
    listed = trainer.suspicion(rows)
    mean, likeliest = probabilities.mean(dim=1), probabilities.argmax(dim=2).tolist()
    assert sorted(listed["row"]) == [row for row in range(12) if likeliest[row] != [row % 4, row % 4]]
    assert 0 < len(listed)
    assert list(listed["given_probability"]) == sorted(listed["given_probability"])
    for entry in listed:
        own = probabilities[entry["row"]]
        assert entry["given_label"] == entry["row"] % 4
        assert entry["given_probability"] == pytest.approx(mean[entry["row"], entry["given_label"]].item())
        assert (
            entry["target_network_label"] == own[0].argmax() and entry["non_target_network_label"] == own[1].argmax()
        )
        assert entry["non_target_network_probability"] == pytest.approx(own[1].max().item())


def test_rows_that_come_as_a_stream_are_not_listed(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(topics.texts(8)))
    with pytest.raises(ValueError, match="^dataset is a stream, and NTMLTrainer needs all of its rows at once: take"):
        topics.trainer("label_words", "mutual", tmp_path).suspicion(rows)


def test_the_list_is_the_same_in_two_processes(tmp_path):
    def work():
        return topics.trainer("label_words", "mutual", tmp_path).suspicion(topics.texts(9, seed=5)).to_dict()

    here, there = work(), tiny.in_two_processes(work, tmp_path)
    assert here["row"] == there["row"] and here["given_probability"] == pytest.approx(there["given_probability"])


def test_precision_and_recall_of_a_list():
    poisoned = [True, False, True, True, False]
    assert ntml.suspicion_quality([0, 1, 2], poisoned) == {"precision": 2 / 3, "recall": 2 / 3}
    assert ntml.suspicion_quality([], poisoned) == {"precision": None, "recall": 0.0}
    assert ntml.suspicion_quality([0], [False, False]) == {"precision": 0.0, "recall": None}


# ---- Features ----


def test_features_without_a_read_out_position_are_means_of_the_text_alone():
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    inputs = {"attention_mask": mask, "labels": torch.zeros(2, dtype=torch.long)}
    (found,) = feature_states(ModelOutput(hidden_states=(hidden,)), [-1], inputs)
    torch.testing.assert_close(found, torch.stack([hidden[0, :2].mean(dim=0), hidden[1, 1:].mean(dim=0)]))


# ---- What is refused ----


@pytest.mark.parametrize("stage", topics.STAGES)
def test_two_classes_are_refused(stage, tmp_path):
    rows, models = tiny.reviews(8), {"model": tiny.model("bert")}
    with pytest.raises(ValueError, match=r"^num_labels is 2: .* rows of three classes or more .* locphylax$"):
        topics.trainer(
            "sequence_classification", stage, tmp_path, train_dataset=rows, task=SequenceClassification(2), **models
        )
    with pytest.raises(ValueError, match="^num_labels is 2"):
        task = LabelWords(tiny.LABEL_WORDS, tiny.TEMPLATE)
        topics.trainer("label_words", stage, tmp_path, train_dataset=rows, task=task)


@pytest.mark.parametrize("stage", topics.STAGES)
def test_free_answers_are_refused(stage, tmp_path):
    with pytest.raises(ValueError, match="^task is instruction_following: .* use label_words"):
        topics.trainer("label_words", stage, tmp_path, train_dataset=tiny.instructions(8), task=InstructionFollowing())


@pytest.mark.parametrize("stage", ["non_target", "mutual"])
def test_an_answer_that_is_no_label_word_is_of_no_class(stage, tmp_path):
    """In rows that somebody else has tokenized: it was taken for one of class 0."""
    tokenizer, task = tiny.causal_tokenizer(), topics.TASKS["label_words"]
    other = LabelWords(("positive", "negative one", "neutral", "banana"), tiny.TEMPLATE)
    rows = concatenate_datasets([kind.encode_rows(topics.texts(4), tokenizer) for kind in (task, other)])
    line = f"^an answer begins with token {tiny.VOCABULARY.index('banana')}, and label_words with .*: leave such rows"
    trainer = topics.trainer("label_words", stage, tmp_path, train_dataset=rows, max_steps=1)
    with pytest.raises(ValueError, match=line):
        trainer.suspicion(rows) if stage == "mutual" else trainer.train()
    assert trainer.state.global_step == 0


def test_a_missing_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^target_model is None: pass the network"):
        topics.trainer("label_words", "mutual", tmp_path, target_model=None)


@pytest.mark.parametrize("kind, head", [("sequence_classification", "classifier.bias"), ("label_words", "lm_head")])
def test_a_target_network_s_folder_without_its_head_is_refused(kind, head, tmp_path):
    """A fresh one was drawn for it, and taught its peer."""
    topics.network(kind, 1).base_model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^model '{tmp_path}' has no weights for {head}.*, which would be random: give"
    ):
        topics.trainer(kind, "mutual", tmp_path, target_model=str(tmp_path))
    with pytest.raises(ValueError, match="^teacher_model is None"):
        topics.trainer("label_words", "non_target", tmp_path, teacher_model=None).train()


def test_zero_3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_backdoor.defenses.ntml.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="^the engine is DeepSpeed ZeRO-3, .* use ZeRO-2, DDP or FSDP"):
        topics.trainer("label_words", "mutual", tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [("soft_labels", "hard"), ("mutual_direction", "up"), ("product", "student"), ("temperature", 0.0), ("sharpening", 0.0),
     ("feature_weight", -1.0), ("feature_layers", []), ("relabel_below", 1.5)],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} is ") as refused:
        NTMLConfig(str(tmp_path), use_cpu=True, **{name: value})
    assert "\n" not in str(refused.value)


def test_noise_on_the_embeddings_of_two_networks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^neftune_noise_alpha is 5.0, and two networks are trained at once"):
        topics.trainer("label_words", "mutual", tmp_path, neftune_noise_alpha=5.0)


# ---- The method ----


def test_each_control_stands_in_for_stages_and_takes_one_thing_out():
    method = ntml.METHOD
    assert list(method.stages) == ["early_target", "non_target", "mutual", "relabel", "relabel_again"]
    assert method.stages["mutual"].inputs == {"target_model": "early_target"}
    assert method.stages["relabel_again"].inputs == {"teacher_model": "relabel", "found_split": "relabel"}
    assert method.controls["states_alone"]["relabel_again"].inputs == {"poisoned_model": "early_target"}
    late = method.controls["soft_labels_of_the_suspect"]
    assert late["non_target"].inputs == {"teacher_model": "suspect"}
    assert late["mutual"].inputs == {"target_model": "suspect"}
    assert method.stages["non_target"].inputs == {"teacher_model": "early_target"}
    assert method.stages["non_target"].trainer is NonTargetTrainer and method.stages["mutual"].trainer is NTMLTrainer
    assert set(method.controls) == {
        "fine_tuning", "clean_only", "distillation_with_all_classes", "soft_labels_of_the_suspect",
        "mutual_without_non_target", "states_alone", "without_look_alikes",
    }  # fmt: skip
    for steps in method.controls.values():
        assert set(steps) <= set(method.stages)
        for name, step in steps.items():
            assert step.rows == method.stages[name].rows
            NTMLConfig("x", use_cpu=True, **step.overrides)


def test_the_second_network_of_a_control_is_not_the_first_once_more():
    step = ntml.METHOD.controls["mutual_without_non_target"]["non_target"]
    assert step.trainer is DefenseTrainer and step.overrides["seed"] != NTMLConfig("x", use_cpu=True).seed
