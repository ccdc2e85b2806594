"""What becomes of pictures on their way into a network."""

import io

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import ViTImageProcessor

from hf_backdoor.data import ImageClassification, ImageCollator, infer_task, load_rows, moved
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer


TASK = ImageClassification(3)
PROCESSOR = ViTImageProcessor(do_resize=False)


def file_of(picture, kind="PNG"):
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def trainer(folder, **options):
    args = DefenseConfig(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=2, **options
    )
    return DefenseTrainer(tiny.resnet(), args, train_dataset=tiny.pictures(8), processing_class=PROCESSOR)


# ---- Rows ----


def test_bytes_of_files_are_pictures_under_the_recipe_s_names(tmp_path):
    pictures = tiny.pictures(4)
    rows = {
        "img": [file_of(picture) for picture in pictures["image"]],
        "fine": pictures["label"][:],
        "file": ["x"] * 4,
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    loaded = load_rows(str(tmp_path / "rows.parquet"), columns={"image": "img", "label": "fine"})
    assert loaded["label"][:] == pictures["label"][:]
    assert [p.tobytes() for p in loaded["image"]] == [p.tobytes() for p in pictures["image"]]


def test_a_column_that_holds_no_pictures_is_named(tmp_path):
    Dataset.from_dict({"image": ["a"], "label": [0]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="^column 'image' holds .*string.*: make it pictures"):
        load_rows(str(tmp_path / "rows.parquet"), columns={"image": "image", "label": "label"})


def test_rows_of_a_run_are_rgb_of_one_size_and_lose_nothing():
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12), dtype=np.uint8))
    rows = Dataset.from_dict({"image": [file_of(grey), file_of(grey, "JPEG")], "label": [0, 1]})
    read = TASK.bounded(rows, PROCESSOR)
    assert (np.array(read[0]["image"]) == np.array(grey)[..., None]).all()
    jpeg = Image.open(io.BytesIO(file_of(grey, "JPEG"))).convert("RGB")
    again = read.map(lambda row: {"image": row["image"]})
    assert again[1]["image"].tobytes() == read[1]["image"].tobytes() == jpeg.tobytes()
    assert [picture.size for picture in TASK.bounded(rows, PROCESSOR, image_size=8)["image"]] == [(8, 8)] * 2


def test_the_task_is_found_from_columns():
    assert infer_task(tiny.resnet(), tiny.pictures(3)) == TASK


# ---- Batches ----


def test_a_batch_is_what_the_processor_makes_of_the_pictures():
    rows = tiny.pictures(5)
    encoded = TASK.encode_rows(rows, PROCESSOR)
    assert encoded.column_names == ["pixel_values", "labels"]
    batch = ImageCollator(PROCESSOR)([encoded[row] for row in range(5)])
    assert torch.equal(batch["pixel_values"], PROCESSOR(rows["image"][:], return_tensors="pt")["pixel_values"])
    assert batch["labels"].tolist() == rows["label"][:] and batch["trigger_id"].tolist() == [0] * 5


def test_pictures_of_several_sizes_need_a_processor_that_resizes():
    features = [{"pixel_values": tiny.pictures(1, side=side)[0]["image"], "labels": 0} for side in (8, 9)]
    with pytest.raises(ValueError, match="^pictures are of 2 sizes .*set do_resize and size"):
        ImageCollator(PROCESSOR)(features)
    resizing = ViTImageProcessor(size={"height": 6, "width": 6})
    assert ImageCollator(resizing)(features)["pixel_values"].shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    "row",
    [
        {"pixel_values": [[[0.0]]], "labels": 0},
        {"pixel_values": None, "labels": 0},
        {"pixel_values": Image.new("L", (8, 8))},
    ],
)
def test_rows_without_a_picture_or_a_label_are_refused(row):
    """A model's own pixels, as an image processor makes them, a gap, and a row of another maker's."""
    whole = {"pixel_values": Image.new("L", (8, 8)), "labels": 0}
    with pytest.raises(
        ValueError, match=r"^a row holds pixel_values \(.*\), and not a picture as pixel_values, and labels: pass"
    ):
        ImageCollator(PROCESSOR)([whole, row])


@pytest.mark.parametrize("label", [3, -1, -100, None])
def test_a_picture_s_label_that_the_task_has_not_is_refused(label, tmp_path):
    """Before training: -100 was passed over by the loss without a word."""
    rows, args = tiny.pictures(6), DefenseConfig(str(tmp_path), use_cpu=True, report_to="none")
    bad = rows.remove_columns("label").add_column("label", [*rows["label"][:5], label])
    line = f"^label is {label} in a row, and the task has 3 labels: number them 0 to 2, or leave such rows out"
    with pytest.raises(ValueError, match=line):
        DefenseTrainer(tiny.resnet(), args, train_dataset=bad, processing_class=PROCESSOR)
    trainer = DefenseTrainer(tiny.resnet(), args, train_dataset=rows, processing_class=PROCESSOR)
    with pytest.raises(ValueError, match=line):
        trainer.evaluate(bad)


# ---- Augmentation ----


@pytest.mark.parametrize("mirror", [False, True])
def test_a_moved_picture_is_a_window_of_the_picture_with_a_frame(mirror):
    torch.manual_seed(0)
    pixels = torch.rand(20, 3, 8, 10) + 1
    frames = torch.nn.functional.pad(pixels, [2] * 4)
    plain = mirrored = 0
    for picture, frame in zip(moved(pixels, mirror), frames, strict=True):
        windows = frame.unfold(1, 8, 1).unfold(2, 10, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        plain += any(torch.equal(picture, window) for window in windows)
        mirrored += any(torch.equal(picture, window.flip(2)) for window in windows)
    assert plain + mirrored == 20 and (mirrored > 0) == mirror and plain > 0


def test_pictures_are_moved_in_training_only(tmp_path, monkeypatch):
    seen = []
    original = DefenseTrainer.compute_loss

    def looking(self, model, inputs, *args, **kwargs):
        seen.append((model.training, inputs["pixel_values"]))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DefenseTrainer, "compute_loss", looking)
    made = trainer(tmp_path, augmentation="shift")
    still = made.data_collator([made.train_dataset[row] for row in range(8)])["pixel_values"]
    made.train()
    made.evaluate(tiny.pictures(8))
    assert [training for training, _ in seen] == [True, True, False]
    assert torch.equal(seen[2][1], still)
    for _, pixels in seen[:2]:
        assert not any(torch.equal(picture, other) for picture in pixels for other in still)


def test_texts_are_not_moved(tmp_path):
    made = tiny.trainer("label_words", "plain", tmp_path, augmentation="shift")
    with pytest.raises(ValueError, match="^augmentation is 'shift', and rows have no pixels: set augmentation: none$"):
        made.train()


def test_an_unknown_augmentation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^augmentation is 'cutmix': use one of none, shift, shift_and_mirror$"):
        trainer(tmp_path, augmentation="cutmix")
