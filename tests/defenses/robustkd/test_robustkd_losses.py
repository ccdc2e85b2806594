import pytest
import torch

from hf_backdoor.defenses.robustkd.losses import (
    feature_distance,
    feature_variance,
    layer_weights,
    logit_divergence,
    margin_distance,
)


def sequences():
    torch.manual_seed(0)
    valid = torch.tensor(
        [[True, True, True, False, False], [False, False, True, True, True], [True, False, False, False, False]]
    )
    return 3 * torch.randn(3, 5, 4) + 1, valid


def by_hand(tokens, axes, place):
    """[N, D] of one sample's valid tokens."""
    if place == "normed":
        centred = tokens - tokens.mean(1, keepdim=True)
        tokens = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    if axes == "all":
        return tokens.var(correction=0)
    return torch.stack([channel.var(correction=0) for channel in tokens.T]).mean()


@pytest.mark.parametrize("axes, place", [("tokens", "raw"), ("tokens", "normed"), ("all", "raw")])
def test_variance_is_that_of_the_valid_tokens(axes, place):
    feature, valid = sequences()
    found = feature_variance(feature, valid, axes, place)
    wanted = [by_hand(tokens[mask], axes, place) for tokens, mask in zip(feature, valid, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted))
    assert feature_variance(feature.bfloat16(), valid, axes, place).dtype == torch.float32


def test_a_picture_s_positions_are_its_tokens():
    picture = torch.randn(2, 4, 3, 5)
    tokens = picture.permute(0, 2, 3, 1).reshape(2, 15, 4)
    for axes, place in [("tokens", "raw"), ("tokens", "normed"), ("all", "raw")]:
        wanted = torch.stack([by_hand(sample, axes, place) for sample in tokens])
        torch.testing.assert_close(feature_variance(picture, None, axes, place), wanted)


def test_a_constant_leaves_the_raw_variance_over_tokens_and_no_other_as_it_is():
    """Why the place and the axes of the variance matter to a per-channel additive mask."""
    feature, valid = sequences()
    constant = torch.randn(4, requires_grad=True)

    def change(axes, place):
        (gradient,) = torch.autograd.grad(feature_variance(feature + constant, valid, axes, place).sum(), constant)
        return gradient.abs().max().item()

    assert change("tokens", "raw") < 1e-4
    assert change("tokens", "normed") > 1e-2
    assert change("all", "raw") > 1e-2


def test_a_blend_cuts_the_raw_variance_over_tokens():
    feature, valid = sequences()
    blended = 0.5 * feature + 0.5 * torch.randn(4)
    torch.testing.assert_close(
        feature_variance(blended, valid, "tokens", "raw"), feature_variance(feature, valid, "tokens", "raw") / 4
    )


def test_the_variance_of_all_normed_entries_says_nothing():
    feature, valid = sequences()
    torch.testing.assert_close(feature_variance(feature, valid, "all", "normed"), torch.ones(3), atol=1e-4, rtol=0)


def test_feature_distance_is_the_mean_over_valid_tokens_and_channels():
    feature, valid = sequences()
    student = torch.randn(3, 5, 4)
    normed = torch.nn.functional.layer_norm(feature, (4,))
    wanted = [(s[v] - t[v]).square().mean() for s, t, v in zip(student, normed, valid, strict=True)]
    torch.testing.assert_close(feature_distance(student, feature, valid), torch.stack(wanted))
    torch.testing.assert_close(
        feature_distance(student, 100 * feature + 7, valid), torch.stack(wanted), atol=1e-4, rtol=1e-4
    )


def test_margin_distance_by_a_loop():
    torch.manual_seed(1)
    student, teacher, margin = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.tensor([-0.3, -1.0, 0.0])
    found = margin_distance(student, teacher, margin)
    for sample in range(2):
        total = 0.0
        for channel in range(3):
            for s, t in zip(student[sample, channel].flatten(), teacher[sample, channel].flatten(), strict=True):
                t = max(t, margin[channel])
                if s > t or t > 0:
                    total += (s - t) ** 2
        assert found[sample].item() == pytest.approx(total.item() / 1000, rel=1e-5)


def test_margin_distance_leaves_a_student_alone_that_stays_below_a_negative_target():
    teacher, margin = torch.full((1, 1, 1, 1), -5.0), torch.tensor([-1.0])
    assert margin_distance(torch.tensor([[[[-3.0]]]]), teacher, margin).item() == 0
    assert margin_distance(torch.tensor([[[[0.5]]]]), teacher, margin).item() == pytest.approx(1.5**2 / 1000)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logit_divergence_is_the_kl_of_softened_distributions(temperature):
    torch.manual_seed(2)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    wanted = (p * (p / q).log()).sum(1) * temperature**2
    torch.testing.assert_close(
        logit_divergence(student, teacher, torch.zeros(4, dtype=torch.long), temperature), wanted
    )
    assert logit_divergence(teacher, teacher, torch.zeros(4, dtype=torch.long), temperature).abs().max() < 1e-6


def test_logit_divergence_of_a_causal_lm_is_the_mean_over_answer_tokens():
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    flat = logit_divergence(student.flatten(0, 1), teacher.flatten(0, 1), torch.zeros(8, dtype=torch.long), 2.0).view(
        2, 4
    )
    wanted = torch.stack([flat[0, 1:3].mean(), flat[1, 2]])
    torch.testing.assert_close(logit_divergence(student, teacher, labels, 2.0), wanted)


def test_layer_weights_halve_downwards():
    assert layer_weights(3) == [0.25, 0.5, 1.0]
