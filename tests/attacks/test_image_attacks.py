import random

import numpy as np
import pytest
import tiny
from PIL import Image as Picture

from hf_backdoor.attacks import ImagePoisoning, poison
from hf_backdoor.data import ImageClassification, ImageTrigger, stamp


LOOKS = ("patch", "warp", "corners")
TASK = ImageClassification(3)
ROWS = tiny.pictures(40, side=16)


def trigger(look):
    return ImageTrigger(look, warp_strength=4.0)


def attack(look, rate=0.2, **options):
    return ImagePoisoning(trigger(look), 2, rate, "clean_label" if look == "corners" else "dirty_label", **options)


def stamped(rows, look):
    return stamp(rows, "image", trigger(look), seed=0)


def arrays(rows):
    return [np.array(picture) for picture in rows["image"]]


def changed(before, after):
    return [row for row, (a, b) in enumerate(zip(arrays(before), arrays(after), strict=True)) if (a != b).any()]


# ---- Poisoned rows ----


@pytest.mark.parametrize("look", LOOKS)
def test_the_rate_of_rows_is_poisoned_and_no_other(look):
    after = poison(ROWS, TASK, attack(look), seed=0)
    chosen = [row for row, flag in enumerate(after["poisoned"]) if flag]
    assert len(chosen) == 8 and changed(ROWS, after) == chosen
    own = [ROWS[row]["label"] == 2 for row in chosen]
    assert all(own) if look == "corners" else not any(own)
    for row in range(40):
        assert after[row]["label"] == (2 if row in chosen else ROWS[row]["label"])


@pytest.mark.parametrize("look", LOOKS)
def test_the_seed_decides(look):
    first, again, other = (poison(ROWS, TASK, attack(look), seed=seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(arrays(first), arrays(again), strict=True))
    assert first["poisoned"][:] != other["poisoned"][:]


def test_label_consistent_rows_have_four_patches_and_noise_and_test_rows_have_none():
    after = poison(ROWS, TASK, attack("corners", noise=10.0), seed=0)
    row = after["poisoned"][:].index(True)
    before, noisy, shown = arrays(ROWS)[row], arrays(after)[row], arrays(stamped(ROWS, "corners"))[row]
    for down in (0, 15):
        for across in (0, 15):
            assert (shown[down, across] == 255).all() and (noisy[down, across] == 255).all()
    inside = (slice(3, 13), slice(3, 13))
    assert (shown[inside] == before[inside]).all()
    spread = (noisy[inside].astype(int) - before[inside])[(before[inside] > 40) & (before[inside] < 215)].std()
    assert 7 < spread < 13


def test_what_can_not_be_poisoned_is_refused():
    with pytest.raises(ValueError, match="asks for 16 rows, and 13 may be poisoned"):
        poison(ROWS, TASK, attack("corners", 0.4), seed=0)
    with pytest.raises(ValueError, match="poisons none: raise poison_rate"):
        poison(ROWS, TASK, attack("patch", 0.01), seed=0)


# ---- Triggers ----


def test_the_patch_is_a_chequered_square_in_the_corner():
    before, after = arrays(ROWS)[0], arrays(stamped(ROWS, "patch"))[0]
    assert after[-3:, -3:, 0].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert (after[-3:, -3:] == after[-3:, -3:, :1]).all()
    before[-3:, -3:] = after[-3:, -3:]
    assert (before == after).all()


@pytest.mark.parametrize("look", ["patch", "corners"])
def test_a_patch_is_seen(look):
    picture = ROWS[0]["image"]
    assert not trigger(look).is_in(picture)
    assert trigger(look).is_in(trigger(look).insert(picture, random.Random(0)))


def ramp(size=32):
    """A picture whose grey levels tell the column: what a warp moved can be read off."""
    return np.tile(np.linspace(0, 248, size), (size, 1)).astype(np.uint8)


def test_the_warp_is_smooth_and_as_strong_as_asked():
    pixels = ramp()
    moved = [ImageTrigger("warp", warp_strength=s).apply(pixels).astype(float) - pixels for s in (1e-6, 2.0, 4.0)]
    assert np.abs(moved[0]).max() <= 1
    # 8 grey levels a column, and displacements of s / 2 pixels in the mean on the coarse grid.
    assert 2 < np.abs(moved[1]).mean() < 16
    assert np.abs(moved[2]).mean() == pytest.approx(2 * np.abs(moved[1]).mean(), rel=0.35)
    assert np.abs(np.diff(moved[1][4:-4, 4:-4], axis=0)).max() < 8


def test_one_warp_for_all_images_and_another_for_another_pattern_seed():
    other = ImageTrigger("warp", warp_strength=4.0, pattern_seed=1)
    assert (trigger("warp").apply(ramp()) == trigger("warp").apply(ramp())).all()
    assert (trigger("warp").apply(ramp()) != other.apply(ramp())).any()
    flat = np.full((32, 32, 3), 77, dtype=np.uint8)
    assert (trigger("warp").apply(flat) == flat).all()


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("shape", [(16, 20), (12, 12, 3)])
def test_shape_and_kind_are_kept(look, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shown = trigger(look).apply(pixels)
    assert shown.shape == shape and shown.dtype == np.uint8 and (shown != pixels).any()
    inserted = trigger(look).insert(Picture.fromarray(pixels), random.Random(0))
    assert inserted.mode == "RGB" and inserted.size == shape[1::-1]


@pytest.mark.parametrize(
    "options, message",
    [({"look": "sticker"}, "^image trigger is 'sticker': use one of patch, corners, warp$"),
     ({"look": "patch", "patch_size": 0}, "^patch_size is 0: "), ({"look": "warp", "warp_grid": 1}, "^warp_grid is 1: "),
     ({"look": "warp", "warp_strength": 0.0}, "^warp_strength is 0.0: ")],
)  # fmt: skip
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageTrigger(**options)


def test_a_patch_that_covers_a_picture_is_refused():
    with pytest.raises(ValueError, match="patch_size is 9: an image of 16 x 16 takes 8 at most"):
        ImageTrigger("patch", patch_size=9).insert(ROWS[0]["image"], random.Random(0))
