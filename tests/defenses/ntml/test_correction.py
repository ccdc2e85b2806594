"""What becomes of suspect rows' labels: pure functions of what networks say of the rows."""

import pytest
import torch

from hf_backdoor.defenses.ntml.correction import LEFT_OUT, corrected_labels, outlying_classes, rightly_labelled
from hf_backdoor.defenses.ntml.states import SplitClass


def test_in_the_attacker_s_class_alone_labels_change():
    agreed, doubted, denied = [0.9, 0.06, 0.04], [0.35, 0.4, 0.25], [0.1, 0.8, 0.1]
    turned = [row[-1:] + row[:-1] for row in (agreed, doubted, denied)]  # the same of class 1
    probabilities = torch.tensor([agreed, doubted, denied] * 2 + turned)
    given = torch.tensor([0] * 6 + [1] * 3)
    apart = torch.tensor([False] * 3 + [True] * 3 + [False] * 3)
    split = SplitClass(0, apart, 5.0, (0, 4))
    assert corrected_labels(given, probabilities, 0.2, split).tolist() == [
        0, LEFT_OUT, 1,  # in the group of the clean rows
        LEFT_OUT, 1, 1,  # apart
        1, 1, 1,  # another class
    ]  # fmt: skip
    assert corrected_labels(given, probabilities, 0.0, split).tolist() == [
        0, LEFT_OUT, LEFT_OUT, LEFT_OUT, 1, 1, 1, 1, 1,
    ]  # fmt: skip
    assert corrected_labels(given, probabilities, 0.4, split).tolist() == [0, 1, 1, LEFT_OUT, 1, 1, 1, 1, 1]


def test_labels_are_right_that_are_found_half_as_often_as_in_the_rest_of_the_class():
    agreed, denied = [0.9, 0.06, 0.04], [0.1, 0.8, 0.1]
    given = torch.tensor([0] * 8 + [2])
    split = SplitClass(0, torch.tensor([True] * 4 + [False] * 5), 5.0, (0, 4))

    def right(apart, rest):
        said = [agreed] * apart + [denied] * (4 - apart) + [agreed] * rest + [denied] * (4 - rest) + [denied]
        return rightly_labelled(given, torch.tensor(said), split)

    # A class that the network hardly knows at all can be a right one.
    assert [right(apart, 4) for apart in range(5)] == [False, False, True, True, True]
    assert [right(apart, 3) for apart in range(5)] == [False, False, True, True, True]
    assert [right(apart, 2) for apart in range(5)] == [False, True, True, True, True]
    assert not rightly_labelled(given, torch.tensor([agreed] * 9), None)


def test_without_a_split_a_contradicted_label_is_changed_where_it_is_unlikely_and_its_row_left_out_elsewhere():
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.6, 0.1], [0.05, 0.05, 0.9], [0.2, 0.4, 0.4]])
    given = torch.tensor([0, 0, 2, 0])
    assert corrected_labels(given, probabilities, 0.2, None).tolist() == [1, LEFT_OUT, 2, LEFT_OUT]
    assert corrected_labels(given, probabilities, 0.3, None).tolist() == [1, LEFT_OUT, 2, 1]
    assert corrected_labels(given, probabilities, 0.0, None).tolist() == [LEFT_OUT, LEFT_OUT, 2, LEFT_OUT]


def test_without_a_split_no_row_outside_of_the_class_that_stands_out_gets_another_label():
    # Class 0: 3 of 4 rows denied; class 1: 1 of 4 denied and one doubted; class 2: 1 of 4 denied.
    sure, doubted, denied = [0.9, 0.06, 0.04], [0.35, 0.4, 0.25], [0.1, 0.8, 0.1]

    def turned(row, label):
        return row[-label:] + row[:-label] if label else row

    rows = {0: [denied, denied, denied, sure], 1: [denied, doubted, sure, sure], 2: [denied, sure, sure, sure]}
    given = torch.tensor([label for label in rows for _ in rows[label]])
    probabilities = torch.tensor([turned(row, label) for label in rows for row in rows[label]])
    assert corrected_labels(given, probabilities, 0.2, None).tolist() == [
        1, 1, 1, 0, LEFT_OUT, 1, 1, 1, LEFT_OUT, 2, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("denied", "outlying"),
    [
        ([3, 1, 1, 1], [True, False, False, False]),
        ([2, 1, 1, 1], [True] * 4),  # twice as many don't stand out: any class may be meant
        ([0, 0, 0, 0], [True] * 4),
        ([4, 4, 1, 1], [True, True, False, False]),
        ([1, 0, 0, 0], [True, False, False, False]),
    ],
)
def test_a_class_stands_out_by_the_share_of_its_rows_that_is_denied(denied, outlying):
    given = torch.arange(4).repeat_interleave(8)
    flags = torch.cat([torch.arange(8) < number for number in denied])
    assert outlying_classes(given, flags, 4).tolist() == outlying
    # Classes without rows count for nothing.
    assert outlying_classes(given, flags, 9)[:4].tolist() == outlying
