"""Whole runs on tiny pictures and a tiny ResNet from scratch."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer

from hf_backdoor.cli import main
from hf_backdoor.defenses import METHODS
from hf_backdoor.dry_run import describe_run
from hf_backdoor.evaluation import Results
from hf_backdoor.model_files import without_weights
from hf_backdoor.models import load_model
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run, run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a network's configuration and pictures."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny.resnet_config().save_pretrained(folder / "net")
    pictures = tiny.pictures(60)
    pictures.select(range(42)).to_parquet(folder / "train.parquet")
    pictures.select(range(42, 60)).to_parquet(folder / "test.parquet")
    return folder


def settings(folder, output, **changes):
    values = {
        "model_name_or_path": str(folder / "net"), "task": "image_classification", "output_dir": str(output),
        "dataset_name": str(folder / "train.parquet"), "test_dataset_name": str(folder / "test.parquet"),
        "attack_trigger": "patch", "poison_rate": 0.2, "target_label": 0, "reference": "train", "max_train_samples": 24,
        "clean_fraction": 0.5, "method": "ntml", "controls": [],
        "per_device_train_batch_size": 8, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-2,
        "augmentation": "shift_and_mirror", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def execute(values):
    return Run(make_recipe(values)).execute()


@pytest.fixture(scope="module")
def ntml_run(workshop):
    controls = list(METHODS["ntml"].controls)
    values = settings(workshop, workshop / "run", controls=controls, relabel_below=0.2, look_alikes=True)
    return values, run(make_recipe(values))


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_every_model_and_control_is_measured(ntml_run):
    values, results = ntml_run
    folder = Path(values["output_dir"])
    assert Results.load(folder / "results.json") == results
    models = {"reference", "suspect", "cleaned"}
    models |= {f"stage/{name}" for name in ("early_target", "non_target", "mutual", "relabel")}
    models |= {f"control/{name}" for name in METHODS["ntml"].controls}
    assert {row.model for row in results.rows} == models
    for model in models:
        counted = {row.metric: (row.n, row.trigger) for row in results.rows if row.model == model}
        # 6 of the 18 test rows have the target label.
        assert counted == {
            "cacc": (18, None), "asr_without_trigger": (12, None), "target_recall": (6, None), "asr": (12, "patch"),
            "robust_accuracy": (12, "patch"),
        }  # fmt: skip
    assert {name: entry["rows"] for name, entry in results.data.items()} == {
        "attack": 24, "clean": 12, "test": 18, "test with patch": 12,
    }  # fmt: skip
    assert all(cost["tokens"] is None for cost in results.costs)
    doubted = Dataset.from_parquet(str(folder / "mutual" / "suspicion.parquet"))
    assert doubted.num_rows <= 24
    assert (folder / "report" / "index.html").is_file()


def test_what_is_saved_is_a_whole_model_with_its_image_processor(ntml_run):
    folder = Path(ntml_run[0]["output_dir"]) / "cleaned"
    assert AutoModelForImageClassification.from_pretrained(folder).config.num_labels == 3
    assert AutoImageProcessor.from_pretrained(folder).do_resize is False


def test_a_control_of_which_nothing_is_left_is_refused(workshop, tmp_path):
    values = settings(workshop, tmp_path / "run", controls=["states_alone"])
    with pytest.raises(
        ValueError, match="^controls has 'states_alone', of which nothing is left where relabel_below is 0"
    ):
        execute(values)
    assert not (tmp_path / "run" / "suspect").exists()


def test_poison_is_kept_without_loss_and_nothing_else_is_touched(ntml_run, workshop):
    kept = Dataset.from_parquet(str(Path(ntml_run[0]["output_dir"]) / "data" / "poisoned.parquet"))
    known = {picture.tobytes() for picture in Dataset.from_parquet(str(workshop / "train.parquet"))["image"]}
    assert [picture.tobytes() in known for picture in kept["image"]] == [not flag for flag in kept["poisoned"]]


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_twice_goes_on_to_the_same_results(ntml_run, tmp_path, monkeypatch):
    values = {**ntml_run[0], "output_dir": str(tmp_path), "controls": []}
    made, original = [], Trainer.training_step

    def counted(self, *args, **kwargs):
        made.append(self.state.global_step)
        # Seven stages of two steps: in the second step of the suspect, and in that of mutual learning.
        if len(made) in (4, 11):
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    for _ in range(2):
        with pytest.raises(Killed):
            execute(values)
    again = execute(values)
    # Each time it went on from the checkpoint after the first step.
    assert made == [0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1]
    assert again.rows == [row for row in ntml_run[1].rows if not row.model.startswith("control")]
    assert weights(tmp_path / "cleaned") == weights(Path(ntml_run[0]["output_dir"]) / "cleaned")


def test_robustkd_distils_into_a_student_of_the_suspect_s_layers(workshop, tmp_path):
    values = settings(
        workshop, tmp_path, method="robustkd", controls=["vanilla_distillation"], student_layers=1, max_steps=1,
        feature_loss="margin", mask_shape="position", attack_trigger="corners", poison_style="clean_label", reference=None,
    )  # fmt: skip
    results = execute(values)
    assert {row.model for row in results.rows} == {"suspect", "cleaned", "control/vanilla_distillation"}
    assert json.loads((tmp_path / "cleaned" / "config.json").read_text())["depths"] == [1, 1]
    assert results.data["test with corners"]["rows"] == 12


def test_suspect_rows_of_one_s_own_and_a_trigger_of_the_defender(workshop, tmp_path):
    values = settings(
        workshop, tmp_path, controls=[], reference=None, attack_trigger=None, target_label=None, poison_rate=None, clean_fraction=None,
        dataset_name=str(workshop / "train.parquet"), clean_dataset_name=str(workshop / "test.parquet"), max_steps=1,
        test_dataset_name=str(workshop / "train.parquet"), evaluate_stages=False,
        held_out_samples=6, known_trigger="corners", eval_strategy="epoch",
    )  # fmt: skip
    results = execute(values)
    assert {row.metric for row in results.rows} == {"cacc"} and results.data["clean"]["rows"] == 12


def test_a_dry_run_counts_parameters_and_says_what_it_leaves_out(workshop, tmp_path):
    values = settings(workshop, tmp_path, method="robustkd", controls=[], student_layers=1)
    described = describe_run(make_recipe(values))
    parameters = sum(parameter.numel() for parameter in tiny.resnet().parameters())
    assert f"{parameters / 1e6:.1f}M parameters" in described and "rows     test with patch: 12" in described
    assert "stage    suspect: DefenseTrainer" in described and "2 steps of 8 rows, learning rate" in described
    device, disk = described.splitlines()[-2:]
    assert device.endswith("; activations not counted") and "FLOP" not in described
    assert disk.startswith("disk     4 models, ")  # reference, suspect, student, cleaned
    assert not list(tmp_path.iterdir())


def test_a_suspect_that_is_given_needs_weights(workshop, tmp_path):
    values = settings(
        workshop, tmp_path, method="robustkd", controls=[], student_layers=1, attack_trigger=None, target_label=None, clean_fraction=None,
        poison_rate=None, reference=None,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="^model_name_or_path is .*net', a suspect without weights: name one that has"
    ):
        execute(values)


def test_a_configuration_gives_the_network_of_a_seed(workshop, tmp_path):
    task = make_recipe(settings(workshop, tmp_path)).task_class
    first, again, other = (
        load_model(str(workshop / "net"), task, num_labels=4, seed=seed, from_scratch=True).state_dict()
        for seed in (1, 1, 2)
    )
    assert first["classifier.1.weight"].shape[0] == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    tiny.resnet().save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="no file named model.safetensors .*: copy its weights there"):
        load_model(str(workshop / "net"), task)
    assert without_weights(str(workshop / "net")) and not without_weights(str(tmp_path / "trained"))


def test_a_model_is_measured_from_the_command_line(ntml_run, workshop, tmp_path, capsys):
    folder = Path(ntml_run[0]["output_dir"])
    options = ["--clean", str(workshop / "test.parquet"), "--trigger", "patch", "--target_label", "0"]
    assert main(["evaluate", str(folder / "suspect"), *options, "--output", str(tmp_path / "results.json")]) == 0
    measured = {(row.metric, row.k, row.n) for row in Results.load(tmp_path / "results.json").rows}
    output = ["--output", str(tmp_path / "other.json")]
    assert main(["evaluate", str(folder / "suspect"), *options, "--max_length", "4", *output]) == 2
    assert "--max_length is 4, and the task is image_classification: leave it out" in capsys.readouterr().err
    assert measured == {(row.metric, row.k, row.n) for row in ntml_run[1].rows if row.model == "suspect"}
