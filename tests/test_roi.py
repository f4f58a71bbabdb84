import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.box import Box
from fastorgan.roi import body_box, locate, widen
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
    # 200 to 300 mm; with 12 mm on both sides grown to 150, 170 and 250 mm; in voxels of 5 mm.
    roi = locate(mask(cube(20, 30)), WHOLE, SHAPE, SPACING)
    assert roi.fallback is None
    assert roi.box == Box((35, 33, 25), (65, 67, 75))


def test_samples_and_voxels_may_differ_by_axis() -> None:
    # 20 samples along z, 50 along y, 100 along x of 500, 400 and 600 mm: 25, 8 and 6 mm each.
    foreground = np.zeros((20, 50, 100), bool)
    foreground[8:14, 10:40, 20:80] = True
    roi = locate(foreground, Box.whole((50, 800, 400)), (50, 800, 400), (10.0, 0.5, 1.5))
    # 200 to 350, 80 to 320 and 120 to 480 mm, each 12 wider on both sides.
    assert roi.box.start == pytest.approx((18.8, 136, 72))
    assert roi.box.stop == pytest.approx((36.2, 664, 328))


def test_the_box_counts_from_the_part_that_the_net_saw() -> None:
    # 50 samples over the last 250 mm of each axis: 5 mm each; organs from 250 + 30 to 250 + 80 mm.
    seen = Box((50, 50, 50), (100, 100, 100))
    roi = locate(mask(cube(6, 16)), seen, SHAPE, SPACING)
    # 268 to 342 mm with the margin, grown about 305 mm to 150, 170 and 250 mm. Along z the net saw nothing before
    # 250 mm, so that the box is 250 to 400 mm there; in voxels of 5 mm.
    assert roi.box == Box((50, 44, 36), (80, 78, 86))


def test_padding_above_and_below_the_body_is_not_in_the_box() -> None:
    # The body spans 100 to 300 mm of 500 along z, 5 mm a sample; organs from 110 to 290 mm: with the margin 98 to 302.
    seen = Box((20, 0, 0), (60, 100, 100))
    foreground = np.zeros((40, 100, 100), bool)
    foreground[2:38, 20:80, 20:80] = True
    roi = locate(foreground, seen, SHAPE, SPACING)
    # In plane the box may reach beyond the body: 100 to 400 mm and 12 on both sides.
    assert roi.box == Box((20, 17.6, 17.6), (60, 82.4, 82.4))


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

    assert stop(bridge) == pytest.approx(min(10 * (last + bridge + 2) + 12, 500) / 5)
    assert stop(bridge + 1) == pytest.approx((10 * last + 12) / 5)


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


# Organs that go out of the box


def margins_of(*places: tuple[int | slice, ...]) -> dict[int, NDArray[np.float32]]:
    """A margin of 10 x 20 x 25 samples for the liver, above 0 in the places alone."""
    margin = np.full((10, 20, 25), -1, np.float32)
    for place in places:
        margin[place] = 1
    return {1: margin}


# In a scan of 500 mm: samples of 20, 10 and 8 mm, so that the sides consist of 80, 160 and 200 mm2 each.
BOX = Box((30, 25, 35), (70, 65, 75))
SCAN = scan(np.zeros(SHAPE, np.int16), SPACING)
INSIDE = (slice(1, -1),) * 3
TWO = slice(5, 7)


def test_a_box_that_holds_its_organs_stays() -> None:
    assert widen(BOX, margins_of(INSIDE), WHOLE, SCAN) is None
    assert widen(BOX, {}, WHOLE, SCAN) is None


@pytest.mark.parametrize(
    ("place", "wider"),
    [
        ((0, TWO, TWO), Box((25, 25, 35), (70, 65, 75))),
        ((-1, TWO, TWO), Box((30, 25, 35), (75, 65, 75))),
        ((TWO, 0, TWO), Box((30, 20, 35), (70, 65, 75))),
        ((TWO, -1, TWO), Box((30, 25, 35), (70, 70, 75))),
        ((TWO, TWO, 0), Box((30, 25, 30), (70, 65, 75))),
        ((TWO, TWO, -1), Box((30, 25, 35), (70, 65, 80))),
    ],
)
def test_a_side_that_an_organ_reaches_moves_out(place: tuple[int | slice, ...], wider: Box) -> None:
    # By 25 mm, 5 voxels.
    assert widen(BOX, margins_of(place), WHOLE, SCAN) == wider
    margins = margins_of(INSIDE)
    assert widen(BOX, margins | {4: margins_of(place)[1]}, WHOLE, SCAN) == wider


def test_a_touch_is_not_enough() -> None:
    # 100 mm2 are less than one and a half samples of 80.
    assert widen(BOX, margins_of((0, 5, 5)), WHOLE, SCAN) is None
    assert widen(BOX, margins_of((0, 5, slice(5, 7))), WHOLE, SCAN) == Box((25, 25, 35), (70, 65, 75))


def test_a_box_grows_to_the_end_of_what_was_seen() -> None:
    seen = Box((26, 30, 40), (70, 60, 70))
    reached = margins_of((slice(None), TWO, TWO), (TWO, TWO, slice(None)))
    # In plane the organ may go on beyond what the ROI net saw.
    assert widen(BOX, reached, seen, SCAN) == Box((26, 25, 30), (70, 65, 80))
    assert widen(Box.whole(SHAPE), reached, WHOLE, SCAN) is None
