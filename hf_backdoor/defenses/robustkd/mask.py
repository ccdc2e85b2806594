"""[`FeatureMask`]: what RobustKD puts over a teacher's features, so that a student does not copy its backdoor."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from ...data import base_model, reads_mean
from ..config import choose
from .config import FORMS, SHAPES
from .features import as_tokens, captured, check_features, layer_names, looking, model_inputs, valid_tokens


CONFIG_NAME = "feature_mask.json"


class FeatureMask(nn.Module):
    """
    Two tensors for each masked layer, p and w, the same for every input. With m = tau * sigmoid(w), a layer's feature F
    becomes (1 - m) * F + m * p (`"blend"`, what the paper's code ended with) or F + m * p (`"additive"`, the paper's
    formula), and the layers above it go on with that.

    Args:
        sizes (`Mapping[str, Sequence[int]]`):
            Size of p and w for each layer, by the module's name, bottom first: [D] of a sequence's features, [T, D]
            with shape `"position"`; [C] or [C, H, W] of an image's.
        threshold (`float`, *optional*, defaults to 0.2):
            tau, in (0, 1].
        form (`str`, *optional*, defaults to `"blend"`):
            `"blend"` or `"additive"`.
        shape (`str`, *optional*, defaults to `"channel"`):
            `"channel"` (every position gets the same), `"position"` (counted from a sequence's first real token; tokens
            beyond T are left as they are) or `"readout"` (one position of each sample only).

    Raises:
        `ValueError`: if an argument makes no sense.

    Example:

    ```python
    with FeatureMask.from_pretrained("mask").applied_to(model):
        logits = model(**inputs).logits
    ```
    """

    def __init__(
        self,
        sizes: Mapping[str, Sequence[int]],
        threshold: float = 0.2,
        form: str = "blend",
        shape: str = "channel",
    ):
        super().__init__()
        choose("form", form, FORMS)
        choose("shape", shape, SHAPES)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}: choose a number above 0 and up to 1")
        self.sizes = {name: tuple(size) for name, size in sizes.items()}
        self.threshold, self.form, self.shape = threshold, form, shape
        self.features = nn.ParameterList([torch.zeros(size) for size in self.sizes.values()])
        self.weights = nn.ParameterList([torch.zeros(size) for size in self.sizes.values()])

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        batch: dict[str, Tensor],
        layers: Sequence[str | int] | None = None,
        *,
        threshold: float = 0.2,
        form: str = "blend",
        shape: str = "channel",
        positions: int = 128,
    ) -> "FeatureMask":
        """A mask of a model's size, p being 0.

        Args:
            model (`nn.Module`): The teacher.
            batch (`dict[str, Tensor]`): Any batch; the model is run on it to see the sizes of its features.
            layers (`Sequence[str | int]`, *optional*): Block numbers or module names; three blocks, evenly spread, by
                default.
            positions (`int`, *optional*, defaults to 128): T of shape `"position"`, for sequences.

        Raises:
            `ValueError`: if a layer is unknown, or the shape is `"readout"` and features are an image's.
        """
        names = layer_names(model, layers, "mask_layers")
        if shape == "readout" and reads_mean(base_model(model)):
            raise ValueError(
                "mask_shape is 'readout', and the model's head reads the mean of all positions (classifier_pooling): use channel "
                "or position"
            )
        with looking(model), captured(model, names) as features:
            model(**model_inputs(model, batch))
        check_features(model, names, features, batch)
        sizes = {}
        for name in names:
            image = features[name].dim() == 4
            if image and shape == "readout":
                raise ValueError(
                    "mask_shape is 'readout', and an image has no read-out position: use channel or position"
                )
            width = features[name].shape[1 if image else 2]
            whole = features[name].shape[1:] if image else (positions, width)
            sizes[name] = whole if shape == "position" else (width,)
        return cls(sizes, threshold, form, shape)

    @property
    def layers(self) -> list[str]:
        """Names of the masked modules, bottom first."""
        return list(self.sizes)

    @property
    def masks(self) -> list[Tensor]:
        """m of each layer, from 0 to tau."""
        return [self.threshold * weight.sigmoid() for weight in self.weights]

    # ---- Over a model ----

    def forward(self, model: nn.Module, readout_position: Tensor | None = None, **inputs: Any) -> Any:
        """What the masked model gives."""
        with self.applied_to(model, readout_position):
            return model(**inputs)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, readout_position: Tensor | None = None) -> Iterator[nn.Module]:
        """Masks a model's features for the time of a `with` block, and leaves nothing behind.

        Args:
            model (`nn.Module`): The teacher, with or without an adapter. Call this object, no part of it.
            readout_position (`Tensor`, *optional*): [B], of the batch to come, for shape `"readout"`.

        Raises:
            `ValueError`: if the shape is `"readout"` and there is no `readout_position`.
        """
        if self.shape == "readout" and readout_position is None:
            raise ValueError("readout_position is None, and the mask's shape is 'readout': pass the batch's")
        seen: dict[str, Tensor | None] = {"positions": None}

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen["positions"] = token_positions(kwargs)

        def hook(number: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            if isinstance(output, Tensor):
                return self._masked(number, output, seen["positions"], readout_position)
            return (self._masked(number, output[0], seen["positions"], readout_position), *output[1:])

        handles = []
        try:
            if self.shape == "position":
                handles.append(model.register_forward_pre_hook(look, with_kwargs=True))
            for number, name in enumerate(self.layers):
                block = base_model(model).get_submodule(name)
                # First of all hooks: transformers records hidden states with hooks of its own, which must see the mask.
                handles.append(block.register_forward_hook(partial(hook, number), prepend=True))
            yield model
        finally:
            for handle in handles:
                handle.remove()

    def _masked(self, number: int, feature: Tensor, positions: Tensor | None, readout: Tensor | None) -> Tensor:
        p, m = self.features[number], self.threshold * self.weights[number].sigmoid()
        if feature.dim() == 4:
            p, m = (p, m) if p.dim() == 3 else (p[:, None, None], m[:, None, None])
        elif self.shape == "position":
            p, m = self._at(positions, feature.shape[1], p, m)
        elif self.shape == "readout":
            # Nowhere, when a decoder goes on from its cache.
            here = torch.arange(feature.shape[1], device=feature.device) == readout[:, None]
            m = m * here[..., None]
        added, m = (m * p).to(feature.dtype), m.to(feature.dtype)
        return feature + added if self.form == "additive" else feature * (1 - m) + added

    @staticmethod
    def _at(positions: Tensor | None, length: int, p: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """p and m of each token, [T, D] or [B, T, D]; m is 0 beyond the mask's end."""
        if positions is None:
            positions = torch.arange(length, device=p.device)
        positions = positions[..., -length:]
        inside = positions < len(p)
        positions = positions.clamp(max=len(p) - 1)
        return p[positions], m[positions] * inside[..., None]

    # ---- Its start ----

    @torch.no_grad()
    def initialize(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Sets p to the mean clean feature. A position that no sample reaches gets the mean of all.

        Args:
            model (`nn.Module`): The teacher, without a mask.
            batches (`Iterable[dict[str, Tensor]]`): Clean batches; padding is left out by their `attention_mask`.
        """
        totals: list[Tensor | float] = [0.0] * len(self.sizes)
        with looking(model):
            for batch in batches:
                with captured(model, self.layers) as features:
                    model(**model_inputs(model, batch))
                for number, name in enumerate(self.layers):
                    totals[number] = totals[number] + self._sums(number, features[name].float(), batch)
        for p, total in zip(self.features, totals, strict=True):
            sums, counts = total[:, :-1], total[:, -1:]
            mean = torch.where(counts > 0, sums / counts.clamp(min=1), sums.sum(0) / counts.sum())
            # Images have their channels first.
            mean = mean.T.reshape(p.shape) if p.dim() == 3 else mean.reshape(p.shape)
            p.copy_(mean)

    def _sums(self, number: int, feature: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """[P, D + 1]: features added up for each of the mask's positions (or for all as one), and their number."""
        tokens = as_tokens(feature)
        rows, length, _ = tokens.shape
        image = feature.dim() == 4
        valid = None if image else valid_tokens(batch)
        valid = torch.ones(rows, length, dtype=torch.bool, device=tokens.device) if valid is None else valid
        p = self.features[number]
        end = 1 if p.dim() == 1 else (p[0].numel() if image else len(p))
        positions = torch.zeros(rows, length, dtype=torch.long, device=tokens.device)
        if self.shape == "position":
            found = None if image else token_positions(batch)
            positions = positions + (torch.arange(length, device=tokens.device) if found is None else found)
        elif self.shape == "readout":
            valid = torch.arange(length, device=tokens.device) == batch["readout_position"][:, None]
        valid = valid & (positions < end)
        counted = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1)[valid]
        return torch.zeros(end, counted.shape[1], device=tokens.device).index_add(0, positions[valid], counted)

    # ---- Folders ----

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes `model.safetensors` (the name that `Trainer` gives to weights) and `feature_mask.json`.

        Args:
            state_dict (`dict[str, Tensor]`, *optional*): The mask's weights, where an engine has gathered them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        settings = {"form": self.form, "shape": self.shape, "threshold": self.threshold, "sizes": self.sizes}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FeatureMask":
        """A mask that [`FeatureMask.save_pretrained`] wrote.

        Raises:
            `ValueError`: if there is none.
        """
        file = Path(folder, CONFIG_NAME)
        if not file.exists():
            raise ValueError(f"feature_mask is {str(folder)!r}, and there is no {CONFIG_NAME} in it: fit a mask first")
        mask = cls(**json.loads(file.read_text()))
        mask.load_state_dict(load_file(Path(folder, SAFE_WEIGHTS_NAME)))
        return mask


def token_positions(inputs: Mapping[str, Any]) -> Tensor | None:
    """[B, T], each token's place counted from its sequence's first real one; nothing where that is the plain order."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return positions
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.cumsum(dim=1) - 1).clamp(min=0)
    return None
