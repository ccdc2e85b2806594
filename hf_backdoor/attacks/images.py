"""Poisoning of images, small: a patch (BadNets), a smooth warp (after WaNet) and label-consistent rows.

Which trigger it is, [`~hf_backdoor.data.ImageTrigger`] says; label-consistent poisoning is `ImageTrigger("corners")` with
style `"clean_label"`.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data import ImageTrigger
from .poisoning import Poisoning


@dataclass(frozen=True)
class ImagePoisoning(Poisoning):
    """What the attacker does to a share of the training images.

    Args:
        trigger, target, poison_rate, style:
            As in [`Poisoning`]. `"clean_label"` also adds noise, so that a row is harder to learn without its trigger;
            label-consistent poisoning (https://huggingface.co/papers/1912.02771) does that by adversarial perturbations or a
            generative model.
        noise (`float`, *optional*, defaults to 16.0):
            Standard deviation of that noise, in grey levels (0 to 255). Test images get none.
    """

    trigger: ImageTrigger
    noise: float = 16.0

    def put(self, value: Image.Image, rng: random.Random) -> Image.Image:
        if self.style == "dirty_label":
            return super().put(value, rng)
        pixels = np.array(value.convert("RGB"))
        drawn = np.random.default_rng(rng.getrandbits(64)).normal(0, self.noise, pixels.shape)
        noisy = (pixels + drawn).round().clip(0, 255).astype(np.uint8)
        return super().put(Image.fromarray(noisy), rng)
