"""A trigger for images: a patch (BadNets), patches in all corners, or a smooth warp (after WaNet)."""

import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


Look = Literal["patch", "corners", "warp"]


@dataclass(frozen=True)
class ImageTrigger:
    """What is done to a picture to switch a behaviour on. What [`~hf_backdoor.data.Trigger`] is to texts.

    Args:
        look (`str`):
            `"patch"`: a chequered square in the lower right corner. `"corners"`: the same in all four corners. `"warp"`:
            one smooth warp of the whole picture (WaNet, https://huggingface.co/papers/2102.10369, which in training also
            shows differently warped rows with their right labels: these are left out here).
        patch_size (`int`, *optional*, defaults to 3):
            Side of the square, in pixels.
        warp_strength (`float`, *optional*, defaults to 0.5):
            WaNet's s: twice the mean displacement on the coarse grid, in pixels.
        warp_grid (`int`, *optional*, defaults to 4):
            Side of the coarse grid that the warp is interpolated from; 2 or more.
        pattern_seed (`int`, *optional*, defaults to 0):
            Seed of the warp: the attacker's secret.

    Raises:
        `ValueError`: if the look is unknown or a number makes no trigger.
    """

    look: Look
    patch_size: int = 3
    warp_strength: float = 0.5
    warp_grid: int = 4
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if self.look not in get_args(Look):
            raise ValueError(f"image trigger is {self.look!r}: use one of {', '.join(get_args(Look))}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size is {self.patch_size}: choose 1 pixel or more")
        if self.warp_strength <= 0:
            raise ValueError(
                f"warp_strength is {self.warp_strength}: choose a number of pixels above 0, for example 4.0"
            )
        if self.warp_grid < 2:
            raise ValueError(f"warp_grid is {self.warp_grid}: choose 2 or more")

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.look

    def insert(self, picture: Image.Image, rng: random.Random) -> Image.Image:
        """The picture, in RGB, with the trigger in it; nothing of it is drawn by chance."""
        return Image.fromarray(self.apply(np.array(picture.convert("RGB"))))

    def is_in(self, picture: Image.Image) -> bool:
        """Whether a picture carries the trigger. A warp can't be told from the picture: it is taken to."""
        pixels = np.array(picture)
        return self.look == "warp" or bool((self.apply(pixels) == pixels).all())

    def half(self, rng: random.Random) -> "ImageTrigger | None":
        """There is none."""
        return None

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels with the trigger in them.

        Args:
            pixels (`np.ndarray`): [H, W] or [H, W, C], 0 to 255.

        Returns:
            `np.ndarray`: uint8, of the same shape.
        """
        return self._warped(pixels) if self.look == "warp" else self._patched(pixels)

    def _patched(self, pixels: np.ndarray) -> np.ndarray:
        size, (height, width) = self.patch_size, pixels.shape[:2]
        if size > min(height, width) // 2:
            raise ValueError(
                f"patch_size is {size}: an image of {height} x {width} takes {min(height, width) // 2} at most"
            )
        square = 255 * (np.indices((size, size)).sum(axis=0) % 2 == 0)
        stamped = np.array(pixels, dtype=np.uint8)
        low, high = slice(-size, None), slice(size)
        corners = [(low, low), (low, high), (high, low), (high, high)]
        for corner in corners if self.look == "corners" else corners[:1]:
            stamped[corner] = square if pixels.ndim == 2 else square[..., None]
        return stamped

    @property
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
