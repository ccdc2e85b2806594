"""Each loss against one that is written out in loops."""

import math

import pytest
import torch

from hf_backdoor.defenses.ntml.losses import feature_loss, non_target_loss, prediction_loss


B, K = 5, 4
generator = torch.Generator().manual_seed(0)
LOGITS, TAUGHT = (3 * torch.randn(B, K, generator=generator) for _ in range(2))
LABELS = torch.tensor([0, 3, 1, 1, 2])


def softmax(values, temperature):
    exponentials = [math.exp(value / temperature) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_hand(kind, temperature, sharpening=1.0):
    losses = []
    for own, taught, label in zip(LOGITS.tolist(), TAUGHT.tolist(), LABELS.tolist(), strict=True):
        others = [k for k in range(K) if kind == "all_classes" or k != label]
        p = softmax([sharpening * taught[k] for k in others], temperature)
        if kind == "negative":
            whole = softmax(own, temperature)
            q = [whole[k] for k in others]
        else:
            q = softmax([own[k] for k in others], temperature)
        losses.append(temperature**2 * divergence(p, q))
    return losses


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["renormalised", "negative", "all_classes"])
def test_non_target_loss(kind, temperature):
    losses = non_target_loss(LOGITS, TAUGHT, LABELS, temperature, kind)
    assert losses.tolist() == pytest.approx(by_hand(kind, temperature), rel=1e-5)
    sharper = non_target_loss(LOGITS, TAUGHT, LABELS, temperature, kind, 2.0)
    assert sharper.tolist() == pytest.approx(by_hand(kind, temperature, 2.0), rel=1e-4)


def test_the_given_label_takes_no_part_in_the_renormalised_loss():
    logits = LOGITS.clone().requires_grad_()
    non_target_loss(logits, TAUGHT, LABELS).sum().backward()
    own = torch.nn.functional.one_hot(LABELS, K).bool()
    assert logits.grad[own].abs().max() == 0 and (logits.grad[~own] != 0).all()
    changed = TAUGHT + 100 * own
    assert torch.equal(non_target_loss(LOGITS, changed, LABELS), non_target_loss(LOGITS, TAUGHT, LABELS))


def test_the_negative_loss_denies_the_given_label():
    logits = torch.zeros(B, K, requires_grad=True)
    for _ in range(200):
        (grad,) = torch.autograd.grad(non_target_loss(logits, TAUGHT, LABELS, soft_labels="negative").sum(), logits)
        logits = (logits - grad).detach().requires_grad_()
    probabilities = logits.softmax(dim=1)
    assert probabilities.gather(1, LABELS[:, None]).max() < 0.02


def test_the_teacher_learns_nothing():
    logits, taught = LOGITS.clone().requires_grad_(), TAUGHT.clone().requires_grad_()
    (non_target_loss(logits, taught, LABELS).sum() + prediction_loss(logits, taught).sum()).backward()
    assert taught.grad is None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["renormalised", "negative", "all_classes"])
def test_a_saturated_bfloat16_teacher_gives_finite_losses_and_gradients(kind):
    taught = torch.full((2, K), -1e30).bfloat16()
    taught[:, 1] = 1e30
    taught[1] = torch.tensor([1e4, -1e4, 0.0, 5.0])
    logits = torch.randn(2, K).bfloat16().requires_grad_()
    losses = non_target_loss(logits, taught, torch.tensor([1, 0]), soft_labels=kind)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_prediction_loss(temperature):
    expected = [
        temperature**2 * divergence(softmax(peer, temperature), softmax(own, temperature))
        for own, peer in zip(LOGITS.tolist(), TAUGHT.tolist(), strict=True)
    ]
    assert prediction_loss(LOGITS, TAUGHT, temperature).tolist() == pytest.approx(expected, rel=1e-5)


def normalised(values):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


def test_feature_loss():
    shapes = [(B, 6), (B, 9)]
    own, peer = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    expected = [0.0] * B
    for ours, theirs in zip(own, peer, strict=True):
        for row in range(B):
            a, b = normalised(ours[row].tolist()), normalised(theirs[row].tolist())
            expected[row] += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    assert feature_loss(own, peer).tolist() == pytest.approx(expected, rel=1e-4)


def test_features_are_compared_without_their_scale_and_teach_one_side():
    own, peer = torch.randn(B, 8, requires_grad=True), torch.randn(B, 8, requires_grad=True)
    feature_loss([own], [peer]).sum().backward()
    assert peer.grad is None and own.grad.abs().sum() > 0
    assert feature_loss([own], [own * 7 + 3]).max() < 1e-3
