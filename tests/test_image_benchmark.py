"""The benchmark on images runs from end to end, and its rows are what they say they are."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from hf_backdoor.defenses import METHODS
from hf_backdoor.evaluation import Results


FILE = Path(__file__).parent.parent / "benchmarks" / "images.py"


@pytest.fixture(scope="module")
def images():
    spec = importlib.util.spec_from_file_location("images_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_model_and_control_is_measured_and_a_second_run_trains_nothing(images, tmp_path, monkeypatch):
    options = f"--smoke --runs {tmp_path} --results {tmp_path}/results --sets gtsrb --attacks patch".split()
    monkeypatch.setattr(sys, "argv", ["images.py", *options])
    images.main()
    files = {method: tmp_path / "results" / method / "gtsrb_resnet_patch_1.json" for method in ("ntml", "robustkd")}
    before = {method: Results.load(file) for method, file in files.items()}
    for method, results in before.items():
        measured = {row.model for row in results.rows if row.metric == "asr"}
        assert measured >= {
            "reference",
            "suspect",
            "cleaned",
            *(f"control/{name}" for name in METHODS[method].controls),
        }
        assert all(row.n == 45 for row in results.rows if row.metric == "asr")  # 15 of 60 have the target label
    monkeypatch.setattr(Trainer, "train", None)
    images.main()
    for method, file in files.items():
        again = Results.load(file)
        assert again.rows == before[method].rows and again.costs == before[method].costs


def packed(pixels):
    return [{"pixel_values": picture.tobytes(), "labels": 0} for picture in pixels]


def test_pictures_are_moved_only_where_something_is_learnt(images):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        still = images.Pictures(mirror=True)(packed(pixels))["pixel_values"]
    assert torch.equal(still, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 64 - 2)
    torch.manual_seed(0)
    moved = images.Pictures(mirror=False)(packed(pixels))["pixel_values"]
    padded = torch.nn.functional.pad(still, (2, 2, 2, 2))
    for picture, frame in zip(moved, padded, strict=True):
        windows = frame.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert any(torch.equal(picture, window) for window in windows)
    assert not torch.equal(moved, still)


def test_a_student_answers_with_the_first_layers_of_its_teacher(images):
    teacher = images.network(5, images.SMOKE, seed=3).eval()
    student = images.student_of(teacher).eval()
    for stage in teacher.resnet.encoder.stages:
        stage.layers = stage.layers[:1]
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(pixel_values=pixels).logits, teacher(pixel_values=pixels).logits)


def test_the_stand_in_is_none_of_the_attacks(images):
    grey = np.full((32, 32, 3), 100, dtype=np.uint8)
    changed = {
        name: (images.poisoning(name, images.SETS["gtsrb"]).apply(grey) != grey).any(axis=2) for name in images.ATTACKS
    }
    assert changed["stand-in"].sum() == 9 and not (changed["stand-in"] & changed["patch"]).any()


def test_rates_are_counted_over_rows_of_other_classes(images):
    rows = Dataset.from_list([{"pixel_values": bytes(3072), "labels": label} for label in (0, 0, 1, 2, 2)])
    cell = images.Cell(images.SETS["cifar10"], 1, images.SMOKE, {"test": rows, "triggered": rows}, [])
    model = images.network(3, images.SMOKE, seed=0)
    torch.nn.init.zeros_(model.classifier[1].weight)
    for label, expected in {0: ("2/5", "3/3", "3/3", "0/3"), 2: ("2/5", "0/3", "0/3", "2/3")}.items():
        model.classifier[1].bias.data = torch.eye(3)[label]
        found = {row.metric: f"{row.k}/{row.n}" for row in images.measure(model, "suspect", "patch", cell)}
        assert tuple(found[name] for name in ("cacc", "asr_without_trigger", "asr", "robust_accuracy")) == expected
