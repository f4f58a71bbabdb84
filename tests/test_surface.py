import warnings
from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from evaluation.surface import INSIDE, Spacing, neighbour_codes, surface_dice, surfel_areas

Mask = NDArray[np.bool_]

CUBIC = (1.0, 1.0, 1.0)


def voxel(*at: int) -> Mask:
    mask = np.zeros((7, 7, 7), bool)
    mask[at] = True
    return mask


@pytest.mark.parametrize(
    ("code", "area"),
    [
        (0b00000000, 0.0),
        (0b00000001, sqrt(3) / 8),  # one corner: triangle with sides √½
        (0b00000011, sqrt(0.5)),  # an edge: 1 x √½
        (0b00000110, sqrt(3) / 4),  # two corners across a face
        (0b00011000, sqrt(3) / 4),  # two opposite corners
        (0b00000111, 0.5 + 3 * sqrt(3) / 8),  # three corners of a face
        (0b00001111, 1.0),  # a face
        (0b00010111, 3 * sqrt(3) / 4),  # a corner and its neighbours: hexagon with sides √½
        (0b00011011, sqrt(3) / 2 + sqrt(0.5)),  # a chain of four around the cube
        (0b00111100, 2 * sqrt(0.5)),  # two opposite edges
        (0b01101001, sqrt(3) / 2),  # every other corner
        (0b00011110, 0.5 + sqrt(3) / 2),  # three of a face and the corner opposite to their middle
    ],
)
def test_area_of_a_shape_and_of_its_complement(code: int, area: float) -> None:
    areas = surfel_areas(CUBIC)
    assert areas[code] == pytest.approx(area, rel=1e-12)
    assert areas[255 - code] == pytest.approx(area, rel=1e-12)


def test_area_follows_the_spacing() -> None:
    areas = surfel_areas((3.0, 4.0, 5.0))
    assert areas[0b00001111] == pytest.approx(4 * 5)  # face across the first axis
    assert areas[0b00110011] == pytest.approx(3 * 5)  # across the second
    assert areas[0b01010101] == pytest.approx(3 * 4)  # across the third
    assert areas[0b00000011] == pytest.approx(5 * 2.5)  # edge along the third axis, 3-4-5 triangle halved
    assert areas[0b00000001] == pytest.approx(sqrt(20**2 + 15**2 + 12**2) / 8)


def test_codes_of_one_voxel() -> None:
    codes = neighbour_codes(np.ones((1, 1, 1), bool))
    np.testing.assert_array_equal(codes, [[[1, 2], [4, 8]], [[16, 32], [64, 128]]])


def test_codes_inside_and_outside() -> None:
    codes = neighbour_codes(np.pad(np.ones((2, 2, 2), bool), 2))
    assert codes.shape == (7, 7, 7)
    assert codes[3, 3, 3] == INSIDE
    assert codes[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("spacing", "axis", "tolerance", "share"),
    [
        (CUBIC, 0, 0.0, 0.5),  # of eight points four are common
        (CUBIC, 0, 0.99, 0.5),
        (CUBIC, 0, 1.0, 1.0),
        ((1.0, 1.0, 2.5), 2, 1.0, 0.5),
        ((1.0, 1.0, 2.5), 2, 2.5, 1.0),
        ((1.0, 1.0, 2.5), 1, 1.0, 1.0),
        ((2.5, 0.1, 1.0), 0, 2.49, 0.5),
    ],
)
def test_voxel_shifted_by_one(spacing: Spacing, axis: int, tolerance: float, share: float) -> None:
    one = voxel(3, 3, 3)
    assert surface_dice(one, np.roll(one, 1, axis), spacing, tolerance) == pytest.approx(share)


@pytest.mark.parametrize(("tolerance", "share"), [(1.9, 0.0), (2.0, 0.5), (2.9, 0.5), (3.0, 1.0)])
def test_voxels_apart(tolerance: float, share: float) -> None:
    assert surface_dice(voxel(1, 3, 3), voxel(4, 3, 3), CUBIC, tolerance) == pytest.approx(share)


def test_tenth_of_a_millimetre_ten_times_is_within_one() -> None:
    one = np.zeros((1, 1, 30), bool)
    one[..., 7] = True
    assert surface_dice(one, np.roll(one, 10, 2), (0.1, 0.1, 0.1), 1.0) == 1.0


def test_cube_shifted_by_one() -> None:
    cube = np.zeros((12, 12, 12), bool)
    cube[3:7, 3:7, 3:7] = True
    corner, edge = sqrt(3) / 8, sqrt(0.5)
    total = 8 * corner + 12 * 3 * edge + 6 * 9
    # Of each cube's points the sides' are common, but for one end; the far end gives its rim alone.
    common = 3 * (4 * edge + 12) + (4 * corner + 12 * edge)
    shifted = np.roll(cube, 1, 0)
    assert surface_dice(cube, shifted, CUBIC, 0.0) == pytest.approx(common / total)
    assert surface_dice(cube, shifted, CUBIC, 1.0) == 1.0


def test_a_cut_at_the_volume_end_is_a_surface() -> None:
    whole = np.ones((4, 4, 4), bool)
    less = whole.copy()
    less[0] = False
    assert surface_dice(whole, less, CUBIC, 1.0) == 1.0
    assert surface_dice(whole, less, CUBIC, 0.0) < 1.0


def test_empty_masks() -> None:
    one, empty = voxel(3, 3, 3), np.zeros((7, 7, 7), bool)
    assert surface_dice(one, empty, CUBIC, 100.0) == 0.0
    assert surface_dice(empty, one, CUBIC, 100.0) == 0.0
    assert isnan(surface_dice(empty, empty, CUBIC, 100.0))


def test_ignored_voxels_are_out_of_both_masks() -> None:
    one, two = voxel(1, 1, 1), voxel(1, 1, 1) | voxel(5, 5, 5)
    assert surface_dice(one, two, CUBIC, 1.0) == pytest.approx(2 / 3)
    assert surface_dice(one, two, CUBIC, 1.0, ignore=voxel(5, 5, 5)) == 1.0


def test_surfels_at_ignored_voxels_have_no_weight() -> None:
    # Points 2 and 3 along the last axis against 3 and 4; those at 4 and 5 touch the ignored voxel.
    share = surface_dice(voxel(3, 3, 2), voxel(3, 3, 3), CUBIC, 0.0, ignore=voxel(3, 3, 4))
    assert share == pytest.approx((4 + 4) / (8 + 4))


def test_nothing_known_is_nan() -> None:
    one = voxel(3, 3, 3)
    around = ndimage.binary_dilation(one, np.ones((3, 3, 3), bool)) & ~one
    assert isnan(surface_dice(one, one, CUBIC, 1.0, ignore=around))


@pytest.mark.parametrize(
    ("shapes", "spacing", "tolerance"),
    [
        (((3, 3, 3), (3, 3, 4)), CUBIC, 1.0),
        (((3, 3), (3, 3)), CUBIC, 1.0),
        (((3, 3, 3), (3, 3, 3)), (1.0, 1.0), 1.0),
        (((3, 3, 3), (3, 3, 3)), (1.0, 0.0, 1.0), 1.0),
        (((3, 3, 3), (3, 3, 3)), (1.0, float("nan"), 1.0), 1.0),
        (((3, 3, 3), (3, 3, 3)), CUBIC, -1.0),
        (((3, 3, 3), (3, 3, 3)), CUBIC, float("nan")),
    ],
)
def test_refuses(shapes: tuple[tuple[int, ...], tuple[int, ...]], spacing: Spacing, tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"shape|spacing|tolerance"):
        surface_dice(np.ones(shapes[0], bool), np.ones(shapes[1], bool), spacing, tolerance)


def test_refuses_an_ignore_mask_of_another_shape() -> None:
    one = voxel(3, 3, 3)
    with pytest.raises(ValueError, match="one shape"):
        surface_dice(one, one, CUBIC, 1.0, ignore=np.zeros((7, 7, 8), bool))


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Mask, Mask, Spacing, float]:
    """Two blobs that are not empty, with a spacing and a tolerance that distances meet exactly."""
    shape = draw(st.tuples(*[st.integers(1, 9)] * 3))
    noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smooth = draw(st.sampled_from([0.0, 0.7, 1.5]))
    masks = []
    for _ in range(2):
        field = ndimage.gaussian_filter(noise.random(shape), smooth)
        masks.append(field >= np.quantile(field, draw(st.floats(0.2, 1.0))))
    spacing = draw(st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.5, 2.5])] * 3))
    return masks[0], masks[1], spacing, draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))


@settings(deadline=None, max_examples=60)
@given(mask_pairs())
def test_equals_the_distance_transform(pair: tuple[Mask, Mask, Spacing, float]) -> None:
    truth, prediction, spacing, tolerance = pair
    codes = [neighbour_codes(truth), neighbour_codes(prediction)]
    surfaces = [(code > 0) & (code < INSIDE) for code in codes]
    areas = [surfel_areas(spacing)[code] for code in codes]
    maps = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    within = sum(areas[i][surfaces[i] & (maps[1 - i] <= tolerance)].sum() for i in range(2))
    total = areas[0].sum() + areas[1].sum()
    assert surface_dice(truth, prediction, spacing, tolerance) == pytest.approx(within / total, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(mask_pairs(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_axes_and_sides_do_not_matter(
    pair: tuple[Mask, Mask, Spacing, float], order: list[int], flips: tuple[bool, ...]
) -> None:
    truth, prediction, spacing, tolerance = pair
    flipped = tuple(axis for axis in range(3) if flips[axis])
    turned = [np.flip(mask.transpose(order), flipped) for mask in (prediction, truth)]
    first, second, third = (spacing[axis] for axis in order)
    share = surface_dice(truth, prediction, spacing, tolerance)
    assert 0.0 <= share <= 1.0
    assert surface_dice(turned[0], turned[1], (first, second, third), tolerance) == pytest.approx(share, abs=1e-9)
    assert surface_dice(truth, truth, spacing, tolerance) == 1.0


@pytest.mark.parametrize("spacing", [CUBIC, (0.7, 0.8, 2.5), (3.0, 0.1, 1.0)])
def test_areas_equal_the_reference(spacing: Spacing) -> None:
    tables = pytest.importorskip("surface_distance.lookup_tables")
    expected = tables.create_table_neighbour_code_to_surface_area(spacing)
    np.testing.assert_allclose(surfel_areas(spacing), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(mask_pairs())
def test_equals_the_reference(pair: tuple[Mask, Mask, Spacing, float]) -> None:
    metrics = pytest.importorskip("surface_distance.metrics")
    truth, prediction, spacing, tolerance = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = metrics.compute_surface_distances(truth, prediction, spacing)
    expected = metrics.compute_surface_dice_at_tolerance(distances, tolerance)
    assert surface_dice(truth, prediction, spacing, tolerance) == pytest.approx(expected, abs=1e-9)
