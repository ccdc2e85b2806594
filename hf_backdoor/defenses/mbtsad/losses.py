"""MBTSAD's distillation losses on materialised attention maps and hidden states, and which entries they compare.

The paper (https://huggingface.co/papers/2501.02754) adds to the classification loss a difference L_a of attention
matrices and a difference L_h of hidden states. Which norm L_a takes we could not find, so both likely readings are here:
squared differences of the softmax maps, and of maps as Neural Attention Distillation
(https://huggingface.co/papers/2101.05930) makes them. `attention.py` computes the same two without building a map.
"""

import torch
from torch import Tensor


# Keeps a map's division by its norm finite; the value of the authors' code, https://github.com/bboylyg/NAD.
NORM_EPSILON = 1e-6


def valid_entries(attention_mask: Tensor, causal: bool, sliding_window: int | None = None) -> Tensor:
    """Entries of an attention map that mean something: a real token's attention to a real token in its reach.

    Args:
        attention_mask (`Tensor`): [B, T], nonzero for real tokens.
        causal (`bool`): Whether a query sees no later keys.
        sliding_window (`int`, *optional*): A query sees its own position and `sliding_window - 1` before it (and as
            many behind it if not causal).

    Returns:
        `Tensor`: [B, T, T] of bool, query by key.
    """
    real = attention_mask.bool()
    length = real.shape[1]
    back = length if sliding_window is None else sliding_window - 1
    position = torch.arange(length, device=real.device)
    offset = position - position[:, None]
    return real[:, :, None] & real[:, None, :] & (offset >= -back) & (offset <= (0 if causal else back))


def eager_attention_map_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """L_a of one layer as squared differences of softmax maps: the mean over heads and valid entries, in float32.

    Args:
        student, teacher (`Tensor`): [B, H, T, T], attention maps (`outputs.attentions` of eager attention; with
            attention dropout they are what dropout left of them, where `attention.py` compares the maps before it).
        valid (`Tensor`): [B, T, T], from [`valid_entries`].

    Returns:
        `Tensor`: [B].
    """
    valid = valid[:, None]
    squares = (student.float() - teacher.float()).square().masked_fill(~valid, 0)
    return squares.sum(dim=(1, 2, 3)) / (student.shape[1] * valid.sum(dim=(1, 2, 3))).clamp(min=1)


def eager_nad_map_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """L_a of one layer as NAD has it: squared differences of normalised maps, the mean over valid entries, in float32.

    A map is the sum over heads of the squared attention (p = 2), divided by its L2 norm over the sample's valid
    entries.

    Args:
        student, teacher (`Tensor`): [B, H, T, T], attention maps.
        valid (`Tensor`): [B, T, T], from [`valid_entries`].

    Returns:
        `Tensor`: [B].
    """
    maps = [
        attention.float().square().sum(dim=1).masked_fill(~valid, 0).flatten(1) for attention in (student, teacher)
    ]
    student, teacher = (each / (each.norm(dim=1, keepdim=True) + NORM_EPSILON) for each in maps)
    return (student - teacher).square().sum(dim=1) / valid.sum(dim=(1, 2)).clamp(min=1)


def hidden_state_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """L_h of one layer: squared differences of hidden states, the mean over real tokens and width, in float32.

    Args:
        student, teacher (`Tensor`): [B, T, D].
        attention_mask (`Tensor`): [B, T], nonzero for real tokens.

    Returns:
        `Tensor`: [B].
    """
    real = attention_mask.bool()
    # The difference alone is kept for the backward pass; of 16-bit states `F.mse_loss` would keep two float32 copies.
    squares = (student.float() - teacher.float()).square().mean(dim=2).masked_fill(~real, 0)
    return squares.sum(dim=1) / real.sum(dim=1).clamp(min=1)
