"""Rows that look like those which stand apart, though their label is right."""

import pytest
import tiny
import topics
import torch

from hf_backdoor.defenses.ntml.likeness import RIDGE, look_alikes, looks, ridge
from hf_backdoor.defenses.ntml.states import SplitClass


def scene(seed=0):
    """Three topics in 24 dimensions and, orthogonal to them, a mark. Class 1 has 60 genuine rows, 30 of other topics with the mark (apart),
    and 10 of its own topic with the mark."""
    generator = torch.Generator().manual_seed(seed)
    centers, mark = torch.zeros(3, 24), torch.zeros(24)
    centers[:, :3], mark[10] = 5 * torch.eye(3), 9
    topics = torch.tensor([0] * 60 + [2] * 60 + [1] * 60 + [0, 2] * 15 + [1] * 10)
    given = torch.tensor([0] * 60 + [2] * 60 + [1] * 100)
    marked = torch.arange(220) >= 180
    seen = torch.randn(220, 24, generator=generator) + centers[topics] + marked[:, None] * mark
    clean = torch.randn(9, 24, generator=generator) + centers.repeat(3, 1)
    apart = marked & (torch.arange(220) < 210)
    return SplitClass(1, apart, 5.0, (0, 3)), given, seen, clean


def test_rows_with_the_same_mark_and_a_right_label_are_found():
    split, given, seen, clean = scene()
    assert look_alikes(split, given, seen, clean).nonzero()[:, 0].tolist() == list(range(210, 220))


def test_what_the_class_is_about_is_no_mark():
    split, given, seen, clean = scene()
    # Half a mark on every row of its topic: so far a classifier goes that is told of rows apart and of other classes alone.
    about = torch.tensor([0.0] * 120 + [1.0] * 60 + [0.0] * 30 + [1.0] * 10)
    seen[:, 10] += 5.5 * about
    clean[3:6, 10] += 5.5
    found = look_alikes(split, given, seen, clean)
    assert found[210:].all() and found[:210].sum() <= 2


def test_the_units_of_looks_do_not_matter():
    split, given, seen, clean = scene()
    scale = torch.logspace(-3, 3, 24)
    assert look_alikes(split, given, seen * scale + 7, clean * scale + 7).equal(look_alikes(split, given, seen, clean))


def test_no_row_of_another_class_is_one_and_none_where_nothing_looks_like_it():
    split, given, seen, clean = scene()
    seen[0] = seen[180]  # as those apart look, in another class
    seen[210:] = seen[120:130]
    found = look_alikes(split, given, seen, clean)
    assert not found[given != 1].any() and found.sum() <= 2


def test_a_ridge_is_least_squares_with_both_sides_weighed_alike():
    generator = torch.Generator().manual_seed(0)
    inside, outside = (torch.randn(count, 5, generator=generator) + count / 10 for count in (7, 12))
    # Row by row; a weight of the ridge is a row of its own, which no constant touches.
    rows, wanted = [], []
    for side, sign in ((inside, 1.0), (outside, -1.0)):
        for row in side:
            share = (1 / (2 * len(side))) ** 0.5
            rows.append(share * torch.cat([row, torch.ones(1)]))
            wanted.append(share * sign)
    for place in range(5):
        rows.append(RIDGE**0.5 * torch.eye(6)[place])
        wanted.append(0.0)
    expected = torch.linalg.lstsq(torch.stack(rows).double(), torch.tensor(wanted).double()[:, None]).solution[:, 0]
    weights, constant = ridge(inside, outside)
    assert torch.cat([weights, constant[None]]).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def states(shape, count=7):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_looks_are_means_over_a_text_at_four_depths():
    hidden, mask = states((2, 5, 3)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = looks(hidden, {"attention_mask": mask, "labels": torch.tensor([0, 1])})
    for row, length in enumerate((5, 3)):
        expected = torch.cat([hidden[layer][row, :length].mean(dim=0) for layer in (0, 2, 4, 6)])
        assert found[row].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_looks_do_not_see_the_answer():
    hidden, mask = states((2, 5, 3)), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    labels = torch.tensor([[7, 8], [-100, 9]])
    found = looks(hidden, {"attention_mask": mask, "labels": labels})
    for row, prompt in enumerate(((0, 3), (1, 4))):
        expected = torch.cat([hidden[layer][row, slice(*prompt)].mean(dim=0) for layer in (0, 2, 4, 6)])
        assert found[row].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_looks_of_pictures_are_means_over_pixels_or_patches():
    labels = torch.tensor([0, 1])
    hidden = [torch.randn(2, width, size, size) for width, size in ((2, 8), (3, 4), (4, 2), (5, 1))]
    found = looks(hidden, {"pixel_values": torch.zeros(2), "labels": labels})
    assert torch.allclose(found, torch.cat([h.mean(dim=(2, 3)) for h in hidden], dim=1), atol=1e-6)
    patches = states((2, 5, 3), 4)
    found = looks(patches, {"pixel_values": torch.zeros(2), "labels": labels})
    assert torch.allclose(found, torch.cat([h.mean(dim=1) for h in patches], dim=1), atol=1e-6)


def test_looks_are_read_alike_however_rows_are_batched(tmp_path):
    rows = topics.planted("sequence_classification", 64)
    read = []
    for size in (3, 64):
        trainer = topics.trainer(
            "sequence_classification",
            "relabel",
            tmp_path,
            look_alikes=True,
            train_dataset=rows,
            per_device_eval_batch_size=size,
        )
        read.append(trainer._looks(trainer.model.eval(), rows))
    assert read[0].shape == (64, 4 * tiny.model("bert").config.hidden_size)
    assert torch.allclose(*read, atol=1e-5)
