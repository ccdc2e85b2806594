"""RobustKD's losses (Applied Soft Computing 2024, https://doi.org/10.1016/j.asoc.2024.111907), one value a sample."""

import torch
from torch import Tensor

from ..losses import mean_over_answers, normed, softened_divergence
from .features import as_tokens


def feature_variance(
    feature: Tensor, valid: Tensor | None = None, axes: str = "tokens", place: str = "normed"
) -> Tensor:
    """How much a sample's feature varies: L_f, what the mask is to make small.

    The paper leaves the axes open. A constant that is added to every token does not change the raw variance over
    tokens, Var(F + c) = Var(F): there a per-channel additive mask can only act through the layers above. Raw variance can
    be cut by mere scaling, which the next norm undoes; hence the norm.

    Args:
        feature (`Tensor`): [B, T, D], or [B, C, H, W], whose positions count as tokens.
        valid (`Tensor`, *optional*): [B, T] of booleans: which tokens count. All of them by default.
        axes (`str`): `"tokens"`: the variance of each channel over tokens, averaged over channels. `"all"`: over all
            (token, channel) entries.
        place (`str`): `"normed"`: after a layer norm without parameters. `"raw"`: as it is.

    Returns:
        `Tensor`: [B], population variances in float32.
    """
    tokens = as_tokens(feature)
    tokens = normed(tokens) if place == "normed" else tokens.float()
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    weight = valid[..., None].float()
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (tokens * weight).sum(dim=1, keepdim=True) / count
    if axes == "all":
        mean = mean.mean(dim=2, keepdim=True)
    return (((tokens - mean).square() * weight).sum(dim=1, keepdim=True) / count).mean(dim=(1, 2))


def feature_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of the connected student feature and the teacher's normed one.

    The norm makes the loss of order 1 whatever the teacher's scale is, and keeps the few huge channels that decoders
    have from being all of it.

    Args:
        student, teacher (`Tensor`): [B, T, D], or [B, C, H, W].
        valid (`Tensor`, *optional*): [B, T] of booleans: which tokens count.

    Returns:
        `Tensor`: [B], float32.
    """
    squares = (as_tokens(student).float() - normed(as_tokens(teacher))).square().mean(dim=2)
    if valid is None:
        return squares.mean(dim=1)
    return (squares * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def margin_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The partial distance of "A Comprehensive Overhaul of Feature Distillation"
    (https://huggingface.co/papers/1904.01866), which the paper distils with: the target is max(F, margin), and where
    both it and a smaller student's value are negative, nothing is asked of the student. Summed over all entries and
    divided by 1,000 as there.

    Args:
        student, teacher (`Tensor`): [B, C, H, W].
        margin (`Tensor`): [C], each channel's mean negative value, 0 or less.

    Returns:
        `Tensor`: [B], float32.
    """
    student, target = student.float(), torch.maximum(teacher.float(), margin[:, None, None])
    counted = (student > target) | (target > 0)
    return ((student - target).square() * counted).sum(dim=(1, 2, 3)) / 1000


def logit_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's softened distribution from the teacher's, times temperature squared.

    Args:
        student, teacher (`Tensor`): [B, K]; or [B, A + 1, V] of a causal LM.
        labels (`Tensor`): [B]; or [B, A], -100 where it is not the answer: the mean over a sample's answer tokens.

    Returns:
        `Tensor`: [B], in nats.
    """
    if labels.dim() == 1:
        return softened_divergence(student, teacher, temperature)
    answer = labels != -100
    tokens = softened_divergence(student[:, :-1][answer], teacher[:, :-1][answer], temperature)
    return mean_over_answers(tokens, answer)


def layer_weights(count: int) -> list[float]:
    """..., 1/4, 1/2, 1: the last layer counts fully."""
    return [0.5 ** (count - 1 - layer) for layer in range(count)]
