"""Which rows stand apart, by the states of a network that has learnt the backdoor."""

import pytest
import torch

from hf_backdoor.defenses.ntml.states import avoided, best_cut, main_direction, split_class


def scene(counts, clean, seed=0):
    """Three classes of rows in 24 dimensions; in class 1, `counts[1]` genuine rows and `counts[3]` that stand elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(4, 24, generator=generator)

    def around(center, count):
        return torch.randn(count, 24, generator=generator) + center

    states = torch.cat([around(center, count) for center, count in zip(centers, counts, strict=True)])
    given = torch.tensor([0] * counts[0] + [1] * counts[1] + [2] * counts[2] + [1] * counts[3])
    clean_states = torch.cat([around(center, clean) for center in centers[:3]])
    return states, given, torch.ones(len(given)), clean_states, torch.arange(3).repeat_interleave(clean)


@pytest.mark.parametrize("poisoned", [30, 100, 300], ids=["few", "half", "most of the class"])
def test_the_attacker_s_rows_are_those_where_clean_rows_are_rarer(poisoned):
    states, given, likelihood, clean_states, clean_labels = scene((100, 100, 100, poisoned), 4)
    split = split_class(states, given, likelihood, clean_states, clean_labels)
    assert split.label == 1 and split.clean == (0, 4)
    assert split.apart.tolist() == [False] * 300 + [True] * poisoned


def test_the_units_of_states_do_not_matter():
    states, given, likelihood, clean_states, clean_labels = scene((100, 100, 100, 50), 4)
    scale = torch.logspace(-3, 3, 24)
    first = split_class(states, given, likelihood, clean_states, clean_labels)
    second = split_class(states * scale + 7, given, likelihood, clean_states * scale + 7, clean_labels)
    assert first.apart.equal(second.apart) and second.separation == pytest.approx(first.separation, rel=1e-3)


def test_a_class_of_few_rows_does_not_win_by_chance():
    # Three rows are always cut well: two of them lie close together.
    states, given, likelihood, clean_states, clean_labels = scene((100, 100, 100, 50), 4)
    few = torch.tensor([[0.0] * 24, [0.1] * 24, [30.0] * 24])
    states, given = torch.cat([states, few]), torch.cat([given, torch.full((3,), 3)])
    likelihood = torch.ones(len(given))
    clean_states, clean_labels = torch.cat([clean_states, few[:1]]), torch.cat([clean_labels, torch.tensor([3])])
    assert split_class(states, given, likelihood, clean_states, clean_labels).label == 1


def test_rows_that_fall_in_one_group_are_no_attacker_s():
    states, given, likelihood, clean_states, clean_labels = scene((100, 100, 100, 0), 20)
    assert split_class(states, given, likelihood, clean_states, clean_labels) is None


def test_groups_that_clean_rows_fall_in_too_are_no_attacker_s():
    states, given, likelihood, clean_states, clean_labels = scene((100, 100, 100, 50), 20)
    both = torch.cat([clean_states, states[300:310]]), torch.cat([clean_labels, given[300:310]])
    assert split_class(states, given, likelihood, *both) is None


@pytest.mark.parametrize("attacker_s", [True, False])
def test_without_clean_rows_of_a_class_its_surer_group_is_taken(attacker_s):
    states, given, likelihood, clean_states, clean_labels = scene((100, 100, 100, 50), 4)
    known, elsewhere = clean_labels != 1, torch.arange(350) >= 300
    likelihood[elsewhere == attacker_s] = 0.9
    likelihood[elsewhere != attacker_s] = 0.8
    split = split_class(states, given, likelihood, clean_states[known], clean_labels[known])
    expected = elsewhere if attacker_s else (given == 1) & ~elsewhere
    assert split.label == 1 and split.clean == (0, 0) and split.apart.equal(expected)


@pytest.mark.parametrize(
    ("inside", "clean", "share", "expected"),
    [
        (0, 43, 0.7, True),
        (0, 4, 0.5, True),
        (1, 4, 0.4, True),  # four rows can't tell: fewer than its share is enough
        (2, 4, 0.4, False),
        (5, 52, 0.13, False),  # fewer, but by chance, and there are enough to tell
        (51, 61, 0.93, False),  # fewer by more than chance, but far from avoided
        (0, 0, 0.5, False),
    ],
)
def test_clean_rows_avoid_a_group_by_more_than_chance(inside, clean, share, expected):
    assert avoided(inside, clean, share) == expected


def test_a_cut_leaves_the_least_variance():
    places = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()

    def explained(threshold):
        parts = [places[places > threshold], places[places <= threshold]]
        return 1 - sum(((part - part.mean()) ** 2).sum() for part in parts) / ((places - places.mean()) ** 2).sum()

    ordered = places.sort().values
    by_hand = max(explained((a + b) / 2) for a, b in zip(ordered, ordered[1:], strict=False))
    threshold, share = best_cut(places)
    assert share == pytest.approx(float(by_hand)) and float(explained(threshold)) == pytest.approx(share)


def test_one_group_explains_what_a_normal_distribution_does():
    _, share = best_cut(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert share == pytest.approx(2 / torch.pi, abs=0.005)


def test_states_that_are_all_the_same_are_cut_somewhere():
    threshold, share = best_cut(torch.ones(5))
    assert (threshold, share) == (1.0, 0.0)


def test_the_direction_is_that_of_the_largest_singular_value():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 5, 1, 1, 1, 1])
    rows = rows - rows.mean(dim=0)
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    found = main_direction(rows)
    assert abs(float(found @ expected)) == pytest.approx(1, abs=1e-4)
