import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fastorgan.box import LEAST_MM, MARGIN_MM, Box, extent_mm, frame, side_areas

Triple = tuple[float, float, float]

MM = (1.0, 1.0, 1.0)


def framed(start: Triple, stop: Triple, shape: tuple[int, int, int], spacing: Triple = MM) -> Box:
    return frame(np.array(start), np.array(stop), Box.whole(shape), spacing)


# Boxes


def test_a_whole_box_has_the_volumes_size() -> None:
    box = Box.whole((4, 5, 6))
    assert box == Box((0.0, 0.0, 0.0), (4.0, 5.0, 6.0))
    assert box.size == (4.0, 5.0, 6.0)


def test_a_box_may_be_fractional() -> None:
    assert Box((0.5, 1.25, 2.0), (1.0, 4.0, 6.0)).size == (0.5, 2.75, 4.0)


# Extents


def test_extent_runs_from_edge_to_edge() -> None:
    mask = np.zeros((4, 5, 6), bool)
    mask[1, 2, 3] = mask[2, 4, 3] = True
    start, stop = extent_mm(mask, (2.0, 3.0, 0.5))
    assert start.tolist() == [2.0, 6.0, 1.5]
    assert stop.tolist() == [6.0, 15.0, 2.0]


def test_an_empty_mask_has_no_extent() -> None:
    with pytest.raises(ValueError, match="empty"):
        extent_mm(np.zeros((2, 2, 2), bool), MM)


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)))
def test_extent_is_the_tightest_box(mask: NDArray[np.bool_]) -> None:
    assume(mask.any())
    start, stop = (edges.astype(int) for edges in extent_mm(mask, MM))
    inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert mask[inside].sum() == mask.sum()
    for axis in range(3):
        along = np.moveaxis(mask[inside], axis, 0)
        assert along[0].any()
        assert along[-1].any()


# Sides


def test_areas_of_the_sides_by_hand() -> None:
    margin = np.full((3, 4, 5), -1, np.float32)
    margin[0, :2, :3] = 1
    margin[1, 3, 4] = 0.5
    margin[2, 2, 2] = 0
    # Samples of 2 x 3 x 4 mm: sides of 12, 8 and 6 mm2 a sample.
    areas = side_areas(margin, np.array([2.0, 3.0, 4.0]))
    assert areas.tolist() == [[6 * 12, 0], [3 * 8, 1 * 8], [2 * 6, 1 * 6]]


# Framing: the margin is 12 mm, the least extent 150 x 170 x 250 mm


def test_large_organs_get_the_margin_alone() -> None:
    box = framed((100, 90, 80), (260, 290, 380), (400, 400, 500))
    assert box == Box((88, 78, 68), (272, 302, 392))


def test_small_organs_get_the_least_extent_around_them() -> None:
    box = framed((150, 150, 150), (250, 250, 250), (400, 400, 400))
    assert box == Box((125, 115, 75), (275, 285, 325))


def test_growth_cut_off_at_one_end_goes_to_the_other() -> None:
    # 100 mm of organs and 24 of margin lack 26, 46 and 126 mm; ends at 20 and 370 leave 8 and 18 mm beyond the margin.
    box = framed((20, 270, 150), (120, 370, 250), (400, 400, 400))
    assert box == Box((0, 230, 75), (150, 400, 325))


def test_a_margin_cut_off_is_made_up_for_too() -> None:
    box = framed((0, 300, 10), (100, 400, 110), (400, 400, 400))
    assert box == Box((0, 230, 0), (150, 400, 250))


def test_a_volume_smaller_than_the_least_extent_is_taken_whole() -> None:
    assert framed((40, 60, 80), (60, 80, 100), (100, 150, 250)) == Box.whole((100, 150, 250))


def test_boxes_are_in_voxels() -> None:
    # As with 1 mm, in other units.
    box = framed((100, 90, 80), (260, 290, 380), (80, 800, 250), (5.0, 0.5, 2.0))
    assert box == Box((17.6, 156, 34), (54.4, 604, 196))


spans = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: (min(pair), max(pair)))


@given(
    st.tuples(*[st.integers(1, 700)] * 3),
    st.tuples(*[st.floats(0.3, 10)] * 3),
    st.tuples(spans, spans, spans),
)
def test_a_frame_lies_inside_holds_the_organs_and_is_large_enough(
    shape: tuple[int, int, int], spacing: Triple, shares: tuple[tuple[float, float], ...]
) -> None:
    extent = np.multiply(shape, spacing)
    start = np.array([a for a, _ in shares]) * extent
    stop = np.array([b for _, b in shares]) * extent
    box = frame(start, stop, Box.whole(shape), spacing)
    low, high = np.multiply(box.start, spacing), np.multiply(box.stop, spacing)
    close = 1e-6 * (1 + extent)
    assert (np.array(box.start) >= 0).all()
    assert (np.array(box.stop) <= np.array(shape) * (1 + 1e-12)).all()
    assert (low <= np.maximum(0, start - MARGIN_MM) + close).all()
    assert (high >= np.minimum(extent, stop + MARGIN_MM) - close).all()
    assert (high - low >= np.minimum(extent, LEAST_MM) - close).all()
    # Nothing beyond what is asked for.
    asked = np.minimum(extent, stop + MARGIN_MM) - np.maximum(0, start - MARGIN_MM)
    assert (high - low <= np.maximum(asked, np.minimum(extent, LEAST_MM)) + close).all()


def test_corners_are_points_for_an_affine() -> None:
    corners = Box((0.0, 1.0, 2.5), (4.0, 5.0, 6.0)).corners()
    assert corners.shape == (8, 4)
    assert corners[0].tolist() == [0.0, 1.0, 2.5, 1.0]
    assert corners[-1].tolist() == [4.0, 5.0, 6.0, 1.0]
    assert sorted(set(corners[:, 2])) == [2.5, 6.0]
