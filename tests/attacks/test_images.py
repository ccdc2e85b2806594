import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

from hf_backdoor.attacks.images import ImagePoisoning, poison_images, stamp_images


STYLES = ("patch", "warp", "label_consistent")


def pictures(count=40, shape=(16, 16, 3)):
    rng = np.random.default_rng(0)
    rows = {
        "image": [Picture.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)],
        "label": [row % 4 for row in range(count)],
    }
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))


def arrays(rows):
    return [np.array(row["image"]) for row in rows]


def changed(before, after):
    return [row for row, (a, b) in enumerate(zip(arrays(before), arrays(after), strict=True)) if (a != b).any()]


ROWS = pictures()


@pytest.mark.parametrize("style", STYLES)
def test_the_rate_of_rows_is_poisoned_and_no_other(style):
    after = poison_images(ROWS, ImagePoisoning(2, style, poison_rate=0.2), seed=0)
    chosen = [row for row, flag in enumerate(after["poisoned"]) if flag]
    assert len(chosen) == 8 and changed(ROWS, after) == chosen
    own = [ROWS[row]["label"] == 2 for row in chosen]
    assert all(own) if style == "label_consistent" else not any(own)
    for row in range(40):
        assert after[row]["label"] == (2 if row in chosen else ROWS[row]["label"])


@pytest.mark.parametrize("style", STYLES)
def test_the_seed_decides(style):
    attack = ImagePoisoning(2, style, poison_rate=0.2)
    first, again, other = (poison_images(ROWS, attack, seed=seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(arrays(first), arrays(again), strict=True))
    assert first["poisoned"] != other["poisoned"]


def test_the_patch_is_a_chequered_square_in_the_corner():
    before, after = arrays(ROWS)[0], arrays(stamp_images(ROWS, ImagePoisoning(0)))[0]
    assert after[-3:, -3:, 0].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert (after[-3:, -3:] == after[-3:, -3:, :1]).all()
    before[-3:, -3:] = after[-3:, -3:]
    assert (before == after).all()


def test_label_consistent_rows_have_four_patches_and_noise_and_test_rows_have_none():
    attack = ImagePoisoning(2, "label_consistent", 0.2, noise=10.0)
    after = poison_images(ROWS, attack, seed=0)
    row = after["poisoned"].index(True) if isinstance(after["poisoned"], list) else after["poisoned"][:].index(True)
    before, noisy, stamped = arrays(ROWS)[row], arrays(after)[row], arrays(stamp_images(ROWS, attack))[row]
    for corner in np.ix_([0, 15], [0, 15])[0].ravel():
        assert stamped[corner, 0, 0] == stamped[corner, 15, 0] == noisy[corner, 0, 0] == 255
    inside = (slice(3, 13), slice(3, 13))
    assert (stamped[inside] == before[inside]).all()
    spread = (noisy[inside].astype(int) - before[inside])[(before[inside] > 40) & (before[inside] < 215)].std()
    assert 7 < spread < 13


def ramp(size=32):
    """A picture whose grey levels tell the column: what a warp moved can be read off."""
    return np.tile(np.linspace(0, 248, size), (size, 1)).astype(np.uint8)


def test_the_warp_is_smooth_and_as_strong_as_asked():
    pixels = ramp()
    moved = [ImagePoisoning(0, "warp", warp_strength=s).apply(pixels).astype(float) - pixels for s in (0.0, 2.0, 4.0)]
    assert np.abs(moved[0]).max() <= 1
    # 8 grey levels a column, and displacements of s / 2 pixels in the mean on the coarse grid.
    assert 2 < np.abs(moved[1]).mean() < 16
    assert np.abs(moved[2]).mean() == pytest.approx(2 * np.abs(moved[1]).mean(), rel=0.35)
    assert np.abs(np.diff(moved[1][4:-4, 4:-4], axis=0)).max() < 8


def test_one_warp_for_all_images_and_another_for_another_pattern_seed():
    attack = ImagePoisoning(0, "warp", warp_strength=4.0)
    same = ImagePoisoning(0, "warp", warp_strength=4.0)
    other = ImagePoisoning(0, "warp", warp_strength=4.0, pattern_seed=1)
    assert (attack.apply(ramp()) == same.apply(ramp())).all()
    assert (attack.apply(ramp()) != other.apply(ramp())).any()
    flat = np.full((32, 32, 3), 77, dtype=np.uint8)
    assert (attack.apply(flat) == flat).all()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(16, 20), (12, 12, 3)])
def test_shape_and_kind_are_kept(style, shape):
    rows = pictures(8, shape)
    stamped = stamp_images(rows, ImagePoisoning(0, style, warp_strength=4.0))
    assert changed(rows, stamped) == list(range(8)) and stamped["label"][:] == rows["label"][:]
    assert all(array.shape == shape and array.dtype == np.uint8 for array in arrays(stamped))


def test_images_that_are_plain_arrays():
    rows = Dataset.from_dict({"image": np.zeros((8, 6, 6), dtype=np.uint8), "label": [0, 1] * 4})
    after = poison_images(rows, ImagePoisoning(1, poison_rate=0.25), seed=0)
    assert sum(after["poisoned"]) == 2 and max(map(np.max, arrays(after))) == 255


@pytest.mark.parametrize(
    "options, message",
    [({"style": "sticker"}, "^style is 'sticker': use one of patch, warp, label_consistent$"),
     ({"poison_rate": 1.0}, "^poison_rate is 1.0: choose a share"), ({"patch_size": 0}, "^patch_size is 0: "),
     ({"warp_grid": 1}, "^warp_grid is 1: ")],
)  # fmt: skip
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImagePoisoning(0, **options)


def test_what_can_not_be_poisoned_is_refused():
    with pytest.raises(ValueError, match="asks for 12 rows, and 10 may be poisoned"):
        poison_images(ROWS, ImagePoisoning(2, "label_consistent", 0.3), seed=0)
    with pytest.raises(ValueError, match="poisons none: raise poison_rate"):
        poison_images(ROWS, ImagePoisoning(2, poison_rate=0.01), seed=0)
    with pytest.raises(ValueError, match="patch_size is 9: an image of 16 x 16 takes 8 at most"):
        stamp_images(ROWS, ImagePoisoning(2, patch_size=9))
