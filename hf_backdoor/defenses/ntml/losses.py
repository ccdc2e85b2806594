"""NT-ML's losses (https://huggingface.co/papers/2508.05404): non-target labels, and what two networks teach each other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import divergence, normed, softened_divergence
from .config import SoftLabels


def non_target_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    soft_labels: SoftLabels = "renormalised",
    sharpening: float = 1.0,
) -> Tensor:
    """Distillation from the target network without each sample's own given label y:

        q_T(j) = exp(s z_T,j / tau) / sum_{k != y} exp(s z_T,k / tau)  for j != y,
        L = tau^2 sum_{j != y} q_T(j) log(q_T(j) / q_S(j)).

    The given label's column is taken out by its index, so no constant can overflow in bfloat16.

    Args:
        logits (`Tensor`): [B, K], of the network that is trained.
        teacher_logits (`Tensor`): [B, K], of the target network.
        labels (`Tensor`): [B], given labels, 0 to K - 1.
        temperature (`float`, *optional*, defaults to 1.0): tau.
        soft_labels (`str`, *optional*, defaults to `"renormalised"`):
            `"renormalised"`: q_S is taken over the same K - 1 classes. `"negative"`: q_S over all K, so that the given
            label is denied. `"all_classes"`: both over all K, plain distillation.
        sharpening (`float`, *optional*, defaults to 1.0): s; the paper has 1.

    Returns:
        `Tensor`: [B], in nats.
    """
    learnt, taught = logits.float() / temperature, sharpening * teacher_logits.detach().float() / temperature
    if soft_labels == "negative":
        learnt = learnt.log_softmax(dim=1)
    if soft_labels != "all_classes":
        learnt, taught = without(labels, learnt), without(labels, taught)
    if soft_labels != "negative":
        learnt = learnt.log_softmax(dim=1)
    return temperature**2 * divergence(taught.log_softmax(dim=1), learnt)


def without(labels: Tensor, values: Tensor) -> Tensor:
    """[B, K - 1]: `values`, [B, K], without each row's column `labels`."""
    own = F.one_hot(labels, values.shape[1]).bool()
    return values[~own].view(len(values), -1)


def prediction_loss(logits: Tensor, peer_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(peer / tau) || softmax(own / tau)). The peer learns nothing from it.

    Args:
        logits, peer_logits (`Tensor`): [B, K].
        temperature (`float`, *optional*, defaults to 1.0): tau.

    Returns:
        `Tensor`: [B], in nats.
    """
    return softened_divergence(logits, peer_logits.detach(), temperature)


def feature_loss(states: Sequence[Tensor], peer_states: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of layer-normalised features, summed over layers. The peer learns nothing from it.

    Args:
        states, peer_states (`Sequence[Tensor]`): [B, D] for each layer; D may differ from layer to layer.

    Returns:
        `Tensor`: [B].
    """
    layers = [
        (normed(own) - normed(peer.detach())).square().mean(dim=1)
        for own, peer in zip(states, peer_states, strict=True)
    ]
    return torch.stack(layers).sum(dim=0)
