"""Where a model's features are: what comes out of its blocks, and batches to look at.

A feature is what a block gives: [B, T, D] of a sequence, or [B, C, H, W] of an image.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ...data import base_model, find_blocks


# The paper's three blocks.
NUM_LAYERS = 3
# Clean rows that a mean feature is taken over.
MEASURED_ROWS = 256


def spread(number: int, count: int) -> list[int]:
    """`count` of `number` blocks, evenly spread, the last one among them."""
    count = min(count, number)
    return [(at + 1) * number // count - 1 for at in range(count)]


def layer_names(model: nn.Module, layers: Sequence[str | int] | None, field: str = "layers") -> list[str]:
    """Names of the modules that `layers` means.

    Args:
        model (`nn.Module`): The model, with or without an adapter.
        layers (`Sequence[str | int]`, *optional*): Block numbers (negative ones from the top) or module names; by
            default three blocks, evenly spread.
        field (`str`): What an error calls them.

    Raises:
        `ValueError`: if there is no such block or module.
    """
    if layers is None:
        blocks = find_blocks(model)
        return [blocks[number] for number in spread(len(blocks), NUM_LAYERS)]
    modules = dict(base_model(model).named_modules())
    names = []
    for layer in map(str, layers):
        if layer.removeprefix("-").isdigit():
            blocks = find_blocks(model)
            if not -len(blocks) <= int(layer) < len(blocks):
                raise ValueError(f"{field} has {layer}: the model has blocks 0 to {len(blocks) - 1}")
            layer = blocks[int(layer)]
        elif layer not in modules:
            raise ValueError(
                f"{field} has {layer!r}: no such module; use a block's number, or a name of named_modules()"
            )
        names.append(layer)
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"{field} is {list(layers)}: name one layer or more, each once")
    return names


def counterparts(student: nn.Module, teacher: nn.Module, layers: Sequence[str]) -> list[str]:
    """The student's blocks at the same relative depth as the teacher's `layers`.

    Raises:
        `ValueError`: if a layer is none of the teacher's blocks.
    """
    blocks, own = find_blocks(teacher), find_blocks(student)
    if strange := [layer for layer in layers if layer not in blocks]:
        raise ValueError(
            f"student_feature_layers is None, and {strange[0]!r} is no block of the teacher: name student_feature_layers"
        )
    depths = [(blocks.index(layer) + 1) / len(blocks) for layer in layers]
    return [own[max(round(depth * len(own)), 1) - 1] for depth in depths]


@contextlib.contextmanager
def captured(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The features of the named modules, of the last forward pass in the block: masked ones where a mask is on."""
    features: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        features[name] = output if isinstance(output, Tensor) else output[0]

    handles = []
    try:
        for name in dict.fromkeys(layers):
            module = base_model(model).get_submodule(name)
            handles.append(module.register_forward_hook(partial(keep, name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def check_features(
    model: nn.Module, layers: Sequence[str], features: dict[str, Tensor], inputs: dict[str, Tensor]
) -> None:
    """
    Raises:
        `ValueError`: if a module has given nothing, or of texts anything else than a state for each token (Funnel pools them,
            Longformer pads them by itself).
    """
    for name in layers:
        if not isinstance(features.get(name), Tensor):
            raise ValueError(
                f"layer {name!r} of {type(base_model(model)).__name__} gives no feature: name other modules"
            )
        shape = tuple(features[name].shape)
        if "input_ids" in inputs and (len(shape) != 3 or shape[:2] != inputs["input_ids"].shape):
            raise ValueError(
                f"layer {name!r} of {type(base_model(model)).__name__} gives features of shape {shape} for input_ids of "
                f"{tuple(inputs['input_ids'].shape)}: name modules that give a state for each token (a model that pads texts by "
                "itself wants pad_to_multiple_of)"
            )


def valid_tokens(inputs: dict[str, Tensor]) -> Tensor | None:
    """[B, T] of booleans, or nothing where all of a feature is valid (images)."""
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def as_tokens(feature: Tensor) -> Tensor:
    """[B, N, D]: an image's positions in the place of tokens."""
    return feature.flatten(2).transpose(1, 2) if feature.dim() == 4 else feature


def model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model's `forward` takes, labels aside."""
    takes = inspect.signature(base_model(model).forward).parameters
    return {name: value for name, value in batch.items() if name in takes and name != "labels"}


def clean_batches(trainer: Trainer, rows: int = MEASURED_ROWS) -> Iterator[dict[str, Any]]:
    """Batches of up to `rows` of the trainer's training rows, the same ones on every process."""
    dataset = trainer.train_dataset
    if dataset is None:
        raise ValueError("train_dataset is None: pass clean rows")
    # The data set may be sorted by label: take every k-th row.
    numbers = range(0, len(dataset), max(-(-len(dataset) // rows), 1))
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    size = trainer.args.eval_batch_size
    for start in range(0, len(numbers), size):
        yield trainer._prepare_inputs(collate([dataset[row] for row in numbers[start : start + size]]))


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Forward passes that leave nothing behind: in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
