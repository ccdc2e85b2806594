import pytest
import torch

from hf_backdoor.defenses.locphylax.losses import balance, clustering_loss, trigger_centres


def batch(num_triggers, size=14, width=5):
    torch.manual_seed(num_triggers)
    ids = torch.arange(size) % (num_triggers + 1)
    return torch.randn(size, width, dtype=torch.float64), ids[torch.randperm(size)]


def by_loop(states, ids, centres):
    """The paper's sums, over its index sets I_k; cross terms by K - 1."""
    total, triggers = 0.0, range(1, len(centres) + 1)
    for k in triggers:
        members = [state for state, trigger in zip(states, ids, strict=True) if trigger == k]
        for state in members:
            total += ((state - centres[k - 1]) ** 2).sum() / len(members)
            for other in triggers:
                if other != k:
                    total += ((state - centres[other - 1]) ** 2).sum() / len(members) / (len(centres) - 1)
    return total


def summed(states, ids, centres):
    counts = torch.bincount(ids)[ids]
    return (clustering_loss(states, ids, centres) / counts).sum()


@pytest.mark.parametrize("num_triggers", [2, 3])
def test_clustering_loss_equals_the_paper_s_sums(num_triggers):
    states, ids = batch(num_triggers)
    centres = torch.randn(num_triggers, 5, dtype=torch.float64)
    torch.testing.assert_close(summed(states, ids, centres), by_loop(states, ids, centres))


@pytest.mark.parametrize("num_triggers", [2, 3])
def test_clean_samples_give_nothing(num_triggers):
    states, ids = batch(num_triggers)
    loss = clustering_loss(states, ids, torch.randn(num_triggers, 5, dtype=torch.float64))
    assert loss.shape == ids.shape
    assert (loss[ids == 0] == 0).all() and (loss[ids > 0] > 0).all()


def test_with_in_batch_means_it_is_two_variances_and_the_distance_of_the_centres():
    states, ids = batch(2)
    states = states.float().double()
    one, two = states[ids == 1], states[ids == 2]
    means = torch.stack([one.mean(0), two.mean(0)])
    variances = sum(((group - group.mean(0)) ** 2).sum(1).mean() for group in (one, two))
    expected = 2 * (variances + ((means[0] - means[1]) ** 2).sum())
    torch.testing.assert_close(summed(states, ids, means), expected)


def test_centres_are_means_and_zeros_where_there_is_nothing():
    states, ids = batch(2)
    states = states.float()
    centres = trigger_centres(states, ids, 3)
    torch.testing.assert_close(centres[0], states[ids == 1].mean(0))
    torch.testing.assert_close(centres[1], states[ids == 2].mean(0))
    assert (centres[2] == 0).all()


@pytest.mark.parametrize(
    "injection, clustering, alpha",
    [
        (5.0, 3.0, 1.0),
        (0.7, 350.0, 1e-3),
        (42.0, 0.5, 10.0),
        (1.0, 0.0999, 10.0),
        (9.99, 10.0, 0.1),
        (8.0, 1200.0, 1e-3),
        (1e-9, 1.1e3, 1e-13),
    ],
)
def test_balance_is_a_power_of_ten(injection, clustering, alpha):
    assert balance(injection, clustering) == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize(
    "injection, clustering, alpha",
    [
        (5.0, 3.0, 1.0),  # floors 0 and 0
        (3.0, 5.0, 1.0),  # 0 and 0; of the ratio -1
        (0.7, 350.0, 1e-3),  # -1 and 2
        (1.2, 980.0, 1e-2),  # 0 and 2; of the ratio -3
        (42.0, 0.5, 100.0),  # 1 and -1; of the ratio 1
        (0.0, 5.0, 1.0),
    ],
)
def test_the_published_alpha_floors_each_loss_by_itself(injection, clustering, alpha):
    assert balance(injection, clustering, published=True) == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize("injection, clustering", [(1.01, 9.9), (9.9, 1.01), (7.3, 700.0), (3.0, 3.0)])
def test_clustering_never_outweighs_injection(injection, clustering):
    assert injection / 10 < balance(injection, clustering) * clustering <= injection


@pytest.mark.parametrize("losses", [(0.0, 5.0), (5.0, 0.0), (0.0, 0.0)])
def test_balance_of_a_zero_loss_is_one(losses):
    assert balance(*losses) == 1.0
