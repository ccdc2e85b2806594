"""Losses that all methods share. Each gives a value for each sample: the trainer takes the mean, see `trainer.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a classification head, in float32.

    Args:
        logits (`Tensor`): [B, K].
        labels (`Tensor`): [B], class numbers.

    Returns:
        `Tensor`: [B], in nats.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def answer_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a causal LM on each sample's answer: the mean over its own tokens, in float32.

    The mean is taken in each sample, so that a long answer does not outweigh a short one and the batch's loss does not
    depend on how it is cut into micro-batches.

    Args:
        logits (`Tensor`): [B, A + 1, V], of the last A + 1 positions.
        labels (`Tensor`): [B, A], the last A tokens, -100 where they are not the answer.

    Returns:
        `Tensor`: [B], in nats a token.
    """
    answer = labels != -100
    # The head's vocabulary is wide and short answers leave most columns empty: go on with the answer's rows only.
    tokens = F.cross_entropy(logits[:, :-1][answer].float(), labels[answer], reduction="none")
    return mean_over_answers(tokens, answer)


def soft_answer_loss(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy with an answer that is a distribution: the mean over a sample's answer tokens, in float32 (ours).

    Args:
        logits (`Tensor`): [B, A, V] at the answer's tokens; [B, 1, K] of a classification head.
        ids (`Tensor`): [B, A, k], tokens or classes.
        probabilities (`Tensor`): [B, A, k], of each; summing to 1, or all 0 where there is no answer.

    Returns:
        `Tensor`: [B], in nats a token.
    """
    answer = probabilities.sum(dim=-1) > 0
    likely = logits[answer].float().log_softmax(dim=-1).gather(1, ids[answer].long())
    tokens = -(likely * probabilities[answer]).sum(dim=1)
    return mean_over_answers(tokens, answer)


def softened_divergence(own: Tensor, other: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(other / tau) || softmax(own / tau)) of each row, in float32.

    Args:
        own, other (`Tensor`): [N, K], logits of what learns and of what it learns from.
        temperature (`float`): tau.

    Returns:
        `Tensor`: [N], in nats.
    """
    own = (own.float() / temperature).log_softmax(dim=1)
    other = (other.float() / temperature).log_softmax(dim=1)
    return temperature**2 * divergence(other, own)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, [N], from [N, K]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def normed(values: Tensor) -> Tensor:
    """A layer norm over the last dimension without parameters, in float32: models differ in scale, which is not worth learning."""
    return F.layer_norm(values.float(), values.shape[-1:])


def mean_over_answers(tokens: Tensor, answer: Tensor) -> Tensor:
    """Mean of each sample's answer tokens, [B], 0 for a sample without any.

    Args:
        tokens (`Tensor`): [S], a value for each answer token, sample after sample.
        answer (`Tensor`): [B, A], bool, S of them true.
    """
    sums = torch.zeros(len(answer), device=tokens.device).index_add(0, answer.nonzero()[:, 0], tokens)
    return sums / answer.sum(dim=1).clamp(min=1)
