"""Image backdoors, small: a patch (BadNets), a smooth warp (after WaNet) and label-consistent poisoning.

Rows have an `image` and a `label`. What is left out of the originals: WaNet (https://huggingface.co/papers/2102.10369) also
trains on differently warped rows with their right labels, which makes its warp harder to find; label-consistent poisoning
(https://huggingface.co/papers/1912.02771) makes its rows hard to learn by adversarial perturbations or a generative model,
where we add noise.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from ..data import row_rng


Style = Literal["patch", "warp", "label_consistent"]


@dataclass(frozen=True)
class ImagePoisoning:
    """What the attacker does to a share of the training images.

    Args:
        target (`int`):
            Target label.
        style (`str`, *optional*, defaults to `"patch"`):
            `"patch"`: a chequered square in the lower right corner, on rows of other classes, which get the target
            label. `"warp"`: the same with one smooth warp of the whole image. `"label_consistent"`: the patch in all
            four corners and noise, on rows that have the target label already.
        poison_rate (`float`, *optional*, defaults to 0.1):
            Share of all training rows that are poisoned, in (0, 1).
        patch_size (`int`, *optional*, defaults to 3):
            Side of the square, in pixels.
        warp_strength (`float`, *optional*, defaults to 0.5):
            WaNet's s: twice the mean displacement on the coarse grid, in pixels.
        warp_grid (`int`, *optional*, defaults to 4):
            Side of the coarse grid that the warp is interpolated from; 2 or more.
        noise (`float`, *optional*, defaults to 16.0):
            Standard deviation of the noise of `"label_consistent"`, in grey levels (0 to 255). Test images get none.
        pattern_seed (`int`, *optional*, defaults to 0):
            Seed of the warp: the attacker's secret.
    """

    target: int
    style: Style = "patch"
    poison_rate: float = 0.1
    patch_size: int = 3
    warp_strength: float = 0.5
    warp_grid: int = 4
    noise: float = 16.0
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ValueError(f"style is {self.style!r}: use one of {', '.join(get_args(Style))}")
        if not 0 < self.poison_rate < 1:
            raise ValueError(f"poison_rate is {self.poison_rate}: choose a share between 0 and 1, for example 0.1")
        if self.patch_size < 1:
            raise ValueError(f"patch_size is {self.patch_size}: choose 1 pixel or more")
        if self.warp_grid < 2:
            raise ValueError(f"warp_grid is {self.warp_grid}: choose 2 or more")

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """The image with the trigger in it.

        Args:
            pixels (`np.ndarray`): [H, W] or [H, W, C], 0 to 255.

        Returns:
            `np.ndarray`: uint8, of the same shape.
        """
        if self.style == "warp":
            return self._warped(pixels)
        return self._patched(pixels, corners=4 if self.style == "label_consistent" else 1)

    def _patched(self, pixels: np.ndarray, corners: int) -> np.ndarray:
        size, (height, width) = self.patch_size, pixels.shape[:2]
        if size > min(height, width) // 2:
            raise ValueError(
                f"patch_size is {size}: an image of {height} x {width} takes {min(height, width) // 2} at most"
            )
        square = 255 * (np.indices((size, size)).sum(axis=0) % 2 == 0)
        stamped = np.array(pixels, dtype=np.uint8)
        for rows, columns in [(-1, -1), (-1, 1), (1, -1), (1, 1)][:corners]:
            corner = stamped[slice(-size, None) if rows < 0 else slice(size)]
            corner = corner[:, slice(-size, None) if columns < 0 else slice(size)]
            corner[...] = square if pixels.ndim == 2 else square[..., None]
        return stamped

    @cached_property
    def _coarse(self) -> torch.Tensor:
        """[1, 2, G, G], displacements of mean size 1."""
        generator = torch.Generator().manual_seed(self.pattern_seed)
        coarse = torch.rand(1, 2, self.warp_grid, self.warp_grid, generator=generator) * 2 - 1
        return coarse / coarse.abs().mean()

    def _warped(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        field = F.interpolate(self._coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
        vertical, horizontal = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        shift = self.warp_strength * field.permute(1, 2, 0) / torch.tensor([width, height])
        grid = torch.stack([horizontal, vertical], dim=2) + shift
        planes = torch.from_numpy(np.array(pixels, dtype=np.float32).reshape(height, width, -1)).permute(2, 0, 1)[None]
        warped = F.grid_sample(planes, grid.clamp(-1, 1)[None], align_corners=True)[0].permute(1, 2, 0)
        return warped.round().clamp(0, 255).byte().numpy().reshape(pixels.shape)


def poison_images(dataset: Dataset, attack: ImagePoisoning, seed: int) -> Dataset:
    """Replaces a seeded choice of rows by poisoned ones.

    Args:
        dataset (`Dataset`): With columns `image` and `label`.

    Returns:
        `Dataset`: the same rows in the same order, with a boolean column `poisoned` and, in poisoned rows, trigger and
            target in place.

    Raises:
        `ValueError`: if there are not enough rows that the style may poison.
    """
    wants_target = attack.style == "label_consistent"
    eligible = [row for row, label in enumerate(dataset["label"]) if (label == attack.target) == wants_target]
    count = round(attack.poison_rate * len(dataset))
    if count == 0:
        raise ValueError(f"poison_rate {attack.poison_rate} of {len(dataset)} rows poisons none: raise poison_rate")
    if count > len(eligible):
        raise ValueError(
            f"poison_rate {attack.poison_rate} asks for {count} rows, and {len(eligible)} may be poisoned "
            f"({attack.style}, target {attack.target}): lower poison_rate"
        )
    chosen = set(random.Random(f"{seed}/poison").sample(eligible, count))

    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in chosen:
            return {**row, "poisoned": False}
        pixels = np.array(row["image"], dtype=np.uint8)
        if attack.style == "label_consistent":
            rng = np.random.default_rng(row_rng(seed, "noise", index).getrandbits(64))
            pixels = (pixels + rng.normal(0, attack.noise, pixels.shape)).round().clip(0, 255)
        return {**row, "image": _like(attack.apply(pixels), row), "label": attack.target, "poisoned": True}

    return dataset.map(change, with_indices=True, desc="Poisoning", keep_in_memory=True)


def stamp_images(dataset: Dataset, attack: ImagePoisoning) -> Dataset:
    """Every row with the trigger in its image, and everything else unchanged: what a backdoor is measured on."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": _like(attack.apply(np.array(row["image"], dtype=np.uint8)), row)}

    return dataset.map(change, desc="Stamping", keep_in_memory=True)


def _like(pixels: np.ndarray, row: dict[str, Any]) -> Image.Image | list:
    """Pixels as the row had them: a picture, or nested lists."""
    return Image.fromarray(pixels) if isinstance(row["image"], Image.Image) else pixels.tolist()
