"""What autocast copies for nothing: what LoRA layers read, and the weights of frozen models."""

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


@contextlib.contextmanager
def inputs_as_they_are(model: nn.Module, autocast: bool) -> Iterator[None]:
    """Under autocast, LoRA layers read their input as it is, forward and (where blocks are run again) backward.

    By default peft turns it into the adapter's float32, and autocast turns that copy back into 16 bits: without dropout
    nothing is gained, bit for bit, and each linear layer keeps a copy of its own of what it could share (one twelfth of
    an 8B model's memory, and as much of its time). Without autocast the copy is needed, so it is made again afterwards.
    Variants of LoRA (DoRA) compute more with it, and keep it.

    Args:
        model (`nn.Module`): May hold no LoRA layer.
        autocast (`bool`): Whether it runs under autocast.
    """
    layers = []
    if autocast:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.lora_variant]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def keep_as_multiplied(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps a frozen model's linear layers in what autocast multiplies them in: the same numbers, bit for bit, in half the
    memory, and no copy in each step. What others read too (embeddings that are tied to the head) stays as it is.

    Args:
        model (`nn.Module`): Runs under autocast only, from then on.
        dtype (`torch.dtype`): Autocast's.
    """
    linear = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    others = {
        id(each) for module in model.modules() if module not in linear for each in module.parameters(recurse=False)
    }
    for layer in linear:
        if others.isdisjoint(map(id, layer.parameters())):
            layer.to(dtype)
