"""Images: their task, and what happens to pictures on the way into a network."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, BaseImageProcessor

from .image_triggers import ImageTrigger
from .loading import as_pictures
from .mapping import Rows, map_rows
from .tasks import Task


# Pixels by which a training picture is moved at most.
REACH = 2


@dataclass(frozen=True)
class ImageClassification(Task):
    """A picture to one of `num_labels` classes by a classification head."""

    num_labels: int
    input_column: str = "image"
    answer_column: str = "label"
    auto_model: ClassVar[type] = AutoModelForImageClassification
    has_head: ClassVar[bool] = True
    trigger: ClassVar[type] = ImageTrigger
    limits: ClassVar[tuple[str, ...]] = ("image_size",)

    def encode(self, row: dict[str, Any], processor: BaseImageProcessor) -> dict[str, Any]:
        return {"pixel_values": row["image"], "labels": row["label"]}

    def encode_rows(self, dataset: Rows, processor: BaseImageProcessor, num_proc: int | None = None) -> Rows:
        """Only the columns' names are changed: pictures become numbers batch by batch, in the collator. As numbers, they
        would take many times the room of their files."""
        names = {"image": "pixel_values", "label": "labels"}
        kept = [name for name in self.check_columns(dataset) if name in (*names, "trigger_id")]
        return as_pictures(dataset, "image").select_columns(kept).rename_columns(names)

    def questions(self, rows: Dataset, processor: BaseImageProcessor) -> Sequence[dict[str, Any]]:
        return self.encode_rows(rows, processor)

    def bounded(
        self,
        rows: Dataset,
        processor: BaseImageProcessor,
        num_proc: int | None = None,
        *,
        image_size: int | None = None,
    ) -> Dataset:
        """Pictures in RGB, of one size if wanted, that are kept without loss: a JPEG would be compressed anew with each map
        over it."""
        return map_rows(
            as_pictures(rows, "image"),
            plain,
            desc="Reading pictures",
            num_proc=num_proc,
            fn_kwargs={"side": image_size},
        )


def plain(row: dict[str, Any], side: int | None) -> dict[str, Any]:
    picture = row["image"].convert("RGB")
    return {"image": picture if side is None else picture.resize((side, side), Image.Resampling.BILINEAR)}


def pixels_digest(picture: Image.Image) -> str:
    """The same for pictures of the same pixels, whatever files they came from."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


def moved(pixels: Tensor, mirror: bool) -> Tensor:
    """Pictures that are moved by up to `REACH` pixels either way, zeros coming in, and half of them mirrored if wanted.

    Args:
        pixels (`Tensor`): [B, C, H, W].
        mirror (`bool`): Whether a picture's mirror image means the same.
    """
    number, _, height, width = pixels.shape
    down, across = torch.randint(2 * REACH + 1, (2, number, 1))
    down, across = down + torch.arange(height), across + torch.arange(width)
    if mirror:
        across = torch.where(torch.rand(number, 1) < 0.5, across.flip(1), across)
    padded = torch.nn.functional.pad(pixels, [REACH] * 4).permute(0, 2, 3, 1)
    rows, down, across = (index.to(pixels.device) for index in (torch.arange(number), down, across))
    return padded[rows[:, None, None], down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
