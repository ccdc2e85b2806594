"""Locphylax's clustering loss and its weight (https://huggingface.co/papers/2510.10265, section 3.1)."""

import math

import torch
from torch import Tensor


def trigger_centres(states: Tensor, trigger_ids: Tensor, num_triggers: int) -> Tensor:
    """Mean state of each known trigger's samples; zeros where there is none.

    Args:
        states (`Tensor`): [B, D], float32.
        trigger_ids (`Tensor`): [B], 0 clean, k >= 1 the k-th trigger.

    Returns:
        `Tensor`: [K, D].
    """
    member = trigger_membership(trigger_ids, num_triggers)
    return member.T @ states / member.sum(dim=0).clamp(min=1)[:, None]


def trigger_membership(trigger_ids: Tensor, num_triggers: int) -> Tensor:
    """[B, K] of 0 and 1: which trigger a sample carries. A clean sample's row is all 0."""
    return (trigger_ids[:, None] == torch.arange(1, num_triggers + 1, device=trigger_ids.device)).float()


def clustering_loss(states: Tensor, trigger_ids: Tensor, centres: Tensor) -> Tensor:
    """Squared distances of each triggered sample to its own trigger's centre and to every other trigger's centre.

    Summed over samples and divided by each trigger's count, this is the paper's

        L_cluster = sum_k 1/|I_k| sum_{i in I_k} ||h_i - mu_k||^2 + sum_{k != l} 1/|I_k| sum_{i in I_k} ||h_i - mu_l||^2

    written for any number K of known triggers; with K > 2 the cross terms are divided by K - 1, so that they weigh as
    they do with the paper's two. Clean samples give 0.

    Args:
        states (`Tensor`): [B, D], final states at the read-out position, float32.
        trigger_ids (`Tensor`): [B], 0 clean, k >= 1 the k-th trigger.
        centres (`Tensor`): [K, D]; with in-batch means (gradients flowing) the sum equals
            2 * (V_1 + V_2 + ||mu_1 - mu_2||^2) for two triggers, V_k being the variance around centre k.

    Returns:
        `Tensor`: [B], not yet divided by the triggers' counts.
    """
    member = trigger_membership(trigger_ids, len(centres))
    distances = (states[:, None, :] - centres[None]).square().sum(dim=2)
    own = (distances * member).sum(dim=1)
    others = (distances.sum(dim=1) - own) / max(len(centres) - 1, 1)
    return own + member.sum(dim=1) * others


def balance(injection_loss: float, clustering_loss: float, published: bool = False) -> float:
    """alpha = 10 ** floor(log10(L_inj / L_cluster)) from the two losses on the incoming model.

    The paper has 10 ** (floor(log10 L_inj) - floor(log10 L_cluster)) (`published`), which is the same or ten times more: clustering
    then weighs up to ten times as much as injection, and pulls the states of clean samples together as well, until the model
    answers everything with the known response (see `docs/locphylax.md`). With one floor it never outweighs injection.
    A loss of 0 (a model that has learnt the planted behaviour already, or states that are equal) gives 1.
    """
    if injection_loss <= 0 or clustering_loss <= 0:
        return 1.0
    if published:
        return 10.0 ** (math.floor(math.log10(injection_loss)) - math.floor(math.log10(clustering_loss)))
    return 10.0 ** math.floor(math.log10(injection_loss / clustering_loss))
