import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.box import Box
from fastorgan.roi import body_box, locate
from fastorgan.volume import Volume, read_volume

SHAPE = (100, 100, 100)
SPACING = (5.0, 5.0, 5.0)
WHOLE = Box.whole(SHAPE)


def mask(*pieces: tuple[slice, slice, slice], size: int = 50) -> NDArray[np.bool_]:
    """A mask of `size` per axis; of 50 in a volume of 500 mm a sample has 10 mm."""
    foreground = np.zeros((size, size, size), bool)
    for piece in pieces:
        foreground[piece] = True
    return foreground


def cube(first: int, last: int) -> tuple[slice, slice, slice]:
    return (slice(first, last),) * 3


def test_the_box_is_the_frame_of_the_foreground() -> None:
    # 200 to 300 mm; with 20 mm on both sides grown to 180, 200 and 300 mm; in voxels of 5 mm.
    roi = locate(mask(cube(20, 30)), WHOLE, SHAPE, SPACING)
    assert roi.fallback is None
    assert roi.box == Box((32, 30, 20), (68, 70, 80))


def test_samples_and_voxels_may_differ_by_axis() -> None:
    # 20 samples along z, 50 along y, 100 along x of 500, 400 and 600 mm: 25, 8 and 6 mm each.
    foreground = np.zeros((20, 50, 100), bool)
    foreground[8:14, 10:40, 20:80] = True
    roi = locate(foreground, Box.whole((50, 800, 400)), (50, 800, 400), (10.0, 0.5, 1.5))
    # 200 to 350, 80 to 320 and 120 to 480 mm, each 20 wider on both sides.
    assert roi.box.start == pytest.approx((18, 120, 100 / 1.5))
    assert roi.box.stop == pytest.approx((37, 680, 500 / 1.5))


def test_the_box_counts_from_the_part_that_the_net_saw() -> None:
    # 50 samples over the last 250 mm of each axis: 5 mm each; organs from 250 + 50 to 250 + 100 mm.
    seen = Box((50, 50, 50), (100, 100, 100))
    roi = locate(mask(cube(10, 20)), seen, SHAPE, SPACING)
    # 280 to 370 mm with the margin, grown about 325 mm to 180, 200 and 300 mm. Along z the net saw nothing before
    # 250 mm, so that the box is 250 to 430 mm there; in voxels of 5 mm.
    assert roi.box == Box((50, 45, 35), (86, 85, 95))


def test_padding_above_and_below_the_body_is_not_in_the_box() -> None:
    # The body spans 100 to 300 mm of 500 along z, 5 mm a sample; organs from 120 to 290 mm: with the margin 100 to 310.
    seen = Box((20, 0, 0), (60, 100, 100))
    foreground = np.zeros((40, 100, 100), bool)
    foreground[4:38, 20:80, 20:80] = True
    roi = locate(foreground, seen, SHAPE, SPACING)
    # In plane the box may reach beyond the body: 100 to 400 mm and 20 on both sides.
    assert roi.box == Box((20, 16, 16), (60, 84, 84))


def scan(hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> Volume:
    """A volume from (z, y, x) values and spacing."""
    return read_volume(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0])), "test")


def test_the_body_is_found_in_a_wide_field_of_view() -> None:
    hu = np.full((10, 60, 80), -1000, np.int16)
    hu[:, 20:40, 30:61] = 40
    # At 5, 2 and 1 mm every, every second and every fourth voxel is looked at; the box is one step wider.
    box = body_box(scan(hu, (5.0, 2.0, 1.0)))
    assert box == Box((0, 18, 28), (10, 42, 68))


def test_fat_belongs_to_the_body_and_air_does_not() -> None:
    hu = np.full((30, 30, 30), -250, np.int16)
    hu[10:20, 10:20, 10:20] = -100
    assert body_box(scan(hu, (4.0, 4.0, 4.0))) == Box((10, 9, 9), (20, 21, 21))


def test_the_body_ends_where_the_first_and_last_slice_hold_it() -> None:
    # Every fourth slice of 1 mm is looked at, of which 8 and 12 hold the body; it spans 6 to 14.
    hu = np.full((24, 30, 30), -1000, np.int16)
    hu[6:15, 10:20, 10:20] = 40
    box = body_box(scan(hu, (1.0, 4.0, 4.0)))
    assert (box.start[0], box.stop[0]) == (6, 15)


def test_without_a_body_the_whole_volume_is_seen() -> None:
    assert body_box(scan(np.full((3, 4, 5), -1000, np.int16), (4.0, 4.0, 4.0))) == Box.whole((3, 4, 5))


@pytest.mark.parametrize(("axis", "bridge"), [(0, 4), (1, 6), (2, 14)])
def test_a_near_piece_belongs_to_the_organs_and_a_far_one_does_not(axis: int, bridge: int) -> None:
    # 200, 220 and 300 mm of organs; the bridge is 40, 60 and 140 mm; a sample has 10 mm, a voxel 5.
    organs = (slice(2, 22), slice(2, 24), slice(2, 32))
    last = organs[axis].stop

    def stop(gap: int) -> float:
        piece = list(organs)
        piece[axis] = slice(last + gap, last + gap + 2)
        return locate(mask(organs, (piece[0], piece[1], piece[2])), WHOLE, SHAPE, SPACING).box.stop[axis]

    assert stop(bridge) == pytest.approx(min(10 * (last + bridge + 2) + 20, 500) / 5)
    assert stop(bridge + 1) == pytest.approx((10 * last + 20) / 5)


def test_nothing_found_takes_the_whole_volume_and_says_so() -> None:
    roi = locate(mask(), WHOLE, SHAPE, SPACING)
    assert roi.box == Box.whole(SHAPE)
    assert roi.fallback == "only 0 ml of organs found at low resolution"


def test_too_little_found_takes_the_whole_volume() -> None:
    # 19 samples of 1 ml are too little, 20 are enough.
    few = mask((slice(20, 22), slice(20, 23), slice(20, 23)), (slice(22, 23), slice(20, 21), slice(20, 21)))
    assert few.sum() == 19
    roi = locate(few, WHOLE, SHAPE, SPACING)
    assert roi.box == Box.whole(SHAPE)
    assert roi.fallback == "only 19 ml of organs found at low resolution"
    few[22, 20, 21] = True
    assert locate(few, WHOLE, SHAPE, SPACING).fallback is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_thin_sheet_takes_the_whole_volume(axis: int) -> None:
    piece = [slice(10, 40)] * 3
    piece[axis] = slice(20, 21)
    roi = locate(mask((piece[0], piece[1], piece[2])), WHOLE, SHAPE, SPACING)
    assert roi.box == Box.whole(SHAPE)
    assert roi.fallback == "organs found at low resolution are only 10 mm thick"
    piece[axis] = slice(20, 22)
    assert locate(mask((piece[0], piece[1], piece[2])), WHOLE, SHAPE, SPACING).fallback is None


def test_crumbs_far_apart_do_not_add_up() -> None:
    # Four pieces of 8 ml, 80 mm apart in height and so out of reach.
    crumbs = mask(cube(0, 2), cube(10, 12), cube(20, 22), cube(30, 32))
    assert locate(crumbs, WHOLE, SHAPE, SPACING).fallback == "only 8 ml of organs found at low resolution"
