"""Which of a sample's states a loss on representations reads."""

import torch
from torch import Tensor


def check_states(hidden: Tensor, inputs: dict[str, Tensor]) -> None:
    """
    Raises:
        `ValueError`: if a text's hidden states are not one for each token (Funnel pools them, Gemma 3n has several).
    """
    if "input_ids" in inputs and (hidden.dim() != 3 or hidden.shape[:2] != inputs["input_ids"].shape):
        raise ValueError(
            f"hidden states have shape {tuple(hidden.shape)}, and input_ids {tuple(inputs['input_ids'].shape)}: the model gives no state "
            "for each token, which this method reads; set the weight of that loss to 0, or use another method"
        )


def readout_states(hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """One state of each sample, [B, D]: what the answer is read from.

    Args:
        hidden (`Tensor`): [B, T, D], or [B, D, H, W] of a convolutional network.
        inputs (`dict[str, Tensor]`): The batch. Where it has no `readout_position`, a state is the mean over positions
            (padding aside) or pixels.
    """
    check_states(hidden, inputs)
    if "readout_position" in inputs:
        return hidden[torch.arange(len(hidden), device=hidden.device), inputs["readout_position"]]
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.flatten(2).mean(dim=2)
