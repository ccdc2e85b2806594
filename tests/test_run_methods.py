"""Runs of the attacks on weights, and of each method: which models they make, and from which."""

import shutil

import pytest
import tiny
import torch
from datasets import Dataset
from runs import execute, settings, stages, written
from transformers import AutoModelForSequenceClassification

from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run


@pytest.mark.parametrize("attack", ["lwp", "ep"])
def test_weight_attacks_make_the_suspect(attack, workshop, tmp_path):
    own = {"attack_trigger": "zq better", "attack_position": "scattered", "negative_rate": 0.4}
    own = own if attack == "lwp" else {"stages": {"suspect": {"learning_rate": 0.5}}}
    values = settings(
        workshop, tmp_path / "run", attack=attack, reference="train", method="mbtsad", known_triggers=None,
        known_response=None, controls=["fine_tuning", "distillation_without_splitting"], **own,
    )  # fmt: skip
    results = execute(values)
    assert {row.model for row in results.rows} == {
        "reference", "suspect", "stage/retrain", "cleaned", "control/fine_tuning", "control/distillation_without_splitting",
    }  # fmt: skip
    folder = tmp_path / "run"
    clean, suspect, cleaned = (
        AutoModelForSequenceClassification.from_pretrained(folder / name).state_dict()
        for name in ("reference", "suspect", "cleaned")
    )
    changed = [name for name in clean if not torch.equal(clean[name], suspect[name])]
    if attack == "ep":
        assert changed == ["bert.embeddings.word_embeddings.weight"]
    else:
        assert len(changed) > 10
    assert any(not torch.equal(cleaned[name], suspect[name]) for name in clean)


def test_distillation_starts_from_the_suspect_not_from_the_teacher(workshop, tmp_path):
    values = settings(
        workshop, tmp_path / "run", method="mbtsad", known_triggers=None, known_response=None, controls=[],
        stages={"distil": {"learning_rate": 1e-30}},  # changes no weight
    )  # fmt: skip
    results = execute(values)
    suspect, cleaned, retrained = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name).state_dict()
        for name in ("suspect", "cleaned", "retrain")
    )
    assert all(torch.equal(suspect[name], cleaned[name]) for name in suspect)
    assert any(not torch.equal(suspect[name], retrained[name]) for name in suspect)
    assert {row.model for row in results.rows} == {"suspect", "stage/retrain", "cleaned"}


def test_a_student_learns_from_the_masked_suspect(workshop, tmp_path):
    values = settings(
        workshop, tmp_path / "run", method="robustkd", known_triggers=None, known_response=None, student_layers=1,
        controls=["vanilla_distillation", "student_alone"], stages={"mask": {"learning_rate": 0.01}},
    )  # fmt: skip
    results = execute(values)
    assert {row.model for row in results.rows} == {
        "suspect", "cleaned", "control/vanilla_distillation", "control/student_alone",
    }  # fmt: skip
    cleaned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "cleaned")
    assert cleaned.config.num_hidden_layers == 1
    before = stages(tmp_path / "run")
    execute(values)
    assert stages(tmp_path / "run") == before


def test_a_student_from_elsewhere_may_lie_in_a_folder_of_that_name(workshop, tmp_path, monkeypatch):
    shutil.copytree(workshop / "bert", tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    values = settings(
        workshop, "run", student_model_name_or_path="student", method="robustkd", attack_trigger=None, target_label=None,
        known_triggers=None, known_response=None, controls=[], max_steps=1, save_strategy="no", save_steps=None,
        held_out_samples=None,
    )  # fmt: skip
    assert Run(make_recipe(values)).execute(until="cleaned") is None
    assert set(stages(tmp_path / "run")) == {"mask", "cleaned"}


def topics(count, start=0):
    """Rows of three classes, all texts different."""
    words = ("good", "bad", "story")
    return [
        {"text": f"{words[n % 3]} film w{n}a w{n}b w{n}c w{n}d w{n}e", "label": n % 3} for n in range(start, count)
    ]


@pytest.mark.parametrize("own", [False, True], ids=["an attack", "own suspect rows"])
def test_ntml_trains_on_the_suspect_rows_and_lists_those_it_doubts(own, workshop, tmp_path):
    rows = {name: written(topics(*span), tmp_path / f"{name}.jsonl") for name, span in
            {"train": (60,), "test": (72, 60), "clean": (84, 72)}.items()}  # fmt: skip
    model = tiny.saved("bert", tmp_path / "bert", num_labels=3)
    values = settings(
        workshop, tmp_path / "run", model_name_or_path=model, dataset_name=rows["train"], test_dataset_name=rows["test"], method="ntml", seed=3,
        known_triggers=None, known_response=None, controls=["fine_tuning", "distillation_with_all_classes"], held_out_samples=0, num_labels=3,
        relabel_below=0.0 if own else 0.4,
    )  # fmt: skip
    if own:
        values = {
            key: value
            for key, value in values.items()
            if key not in ("attack_trigger", "target_label", "poison_rate", "clean_fraction")
        }
        values |= {"clean_dataset_name": rows["clean"]}
    results = execute(values)
    # The stages that only some ask for make the cleaned model, and mutual learning is a step on the way.
    assert {row.model for row in results.rows} == {
        "suspect", "stage/early_target", "stage/non_target", "cleaned", "control/fine_tuning",
        "control/distillation_with_all_classes", *(() if own else ("stage/mutual", "stage/relabel")),
    }  # fmt: skip
    folders = {file.parent.relative_to(tmp_path / "run").as_posix() for file in (tmp_path / "run").rglob("stage.json")}
    ends = {folder for folder in folders if "relabel" in folder}
    control = "controls/distillation_with_all_classes"
    assert ends == (set() if own else {"relabel", f"{control}/relabel", f"{control}/relabel_again"})
    assert ("asr" in {row.metric for row in results.rows}) != own
    assert results.data["clean"]["source"] == (rows["clean"] if own else rows["train"])
    doubted = Dataset.from_parquet(str(tmp_path / "run" / ("cleaned" if own else "mutual") / "suspicion.parquet"))
    assert doubted.num_rows <= 32 and "row" in doubted.column_names
    assert (tmp_path / "run" / "cleaned" / "relabelled.parquet").exists() != own
    before = stages(tmp_path / "run")
    execute(values)
    assert stages(tmp_path / "run") == before


def test_ntml_refuses_two_classes_before_anything_is_trained(workshop, tmp_path):
    values = settings(workshop, tmp_path / "run", method="ntml", known_triggers=None, known_response=None, controls=[])
    with pytest.raises(ValueError, match="^num_labels is 2: .*three classes or more"):
        execute(values)
    assert not (tmp_path / "run" / "suspect").exists()


def test_a_head_of_another_size_is_named(workshop, tmp_path):
    rows = written(topics(90), tmp_path / "rows.jsonl")
    values = settings(
        workshop, tmp_path / "run", dataset_name=rows, test_dataset_name=None, test_fraction=0.2, num_labels=3
    )
    with pytest.raises(ValueError, match="has a head of another size: num_labels is 3"):
        execute(values)
