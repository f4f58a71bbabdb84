import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan.components import label, largest_components, largest_group

masks = hnp.arrays(bool, st.tuples(*[st.integers(1, 8)] * 3))


def row(*pieces: tuple[int, int], length: int = 60) -> NDArray[np.bool_]:
    """A mask along the last axis with pieces [start, stop)."""
    mask = np.zeros((1, 1, length), bool)
    for start, stop in pieces:
        mask[..., start:stop] = True
    return mask


# Pieces


@given(mask=masks)
def test_pieces_are_scipys(mask: NDArray[np.bool_]) -> None:
    pieces, sizes = label(mask)
    expected, count = ndimage.label(mask)
    assert np.array_equal(pieces, expected)
    assert sizes.tolist() == [0, *np.bincount(expected.ravel(), minlength=count + 1)[1:]]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.35, 0.6, 0.97])
def test_pieces_of_noise_are_scipys(share: float) -> None:
    mask = np.random.default_rng(0).random((40, 50, 60)) < share
    assert np.array_equal(label(mask)[0], ndimage.label(mask)[0])
    turned = mask.transpose(2, 0, 1)
    assert np.array_equal(label(turned)[0], ndimage.label(turned)[0])


def test_a_spiral_is_one_piece() -> None:
    # Every run of it but the ends touches two others far away in number.
    mask = np.zeros((1, 41, 41), bool)
    mask[0, ::2] = True
    mask[0, 1::4, -1] = mask[0, 3::4, 0] = True
    assert label(mask)[1].tolist() == [0, mask.sum()]
    assert label(mask.transpose(0, 2, 1))[1].tolist() == [0, mask.sum()]


@given(mask=masks, reach=st.tuples(*[st.integers(0, 4)] * 3))
def test_groups_are_those_of_a_widened_mask(mask: NDArray[np.bool_], reach: tuple[int, int, int]) -> None:
    near = ndimage.maximum_filter(mask, size=[2 * r + 1 for r in reach], mode="constant")
    groups, count = ndimage.label(near)
    sizes = np.bincount(groups[mask], minlength=count + 1)
    expected = mask & (groups == sizes.argmax()) if mask.any() else mask
    bridge = (2.0 * reach[0], 2.0 * reach[1], 2.0 * reach[2])
    assert np.array_equal(largest_group(mask, (1.0, 1.0, 1.0), bridge), expected)


# Groups


@pytest.mark.parametrize(
    ("size", "gap", "together"),
    # In voxels of 10, 15 and 30 mm a gap of 60 mm is bridged, and the next wider one is not.
    [(10.0, 6, True), (10.0, 7, False), (15.0, 4, True), (15.0, 5, False), (30.0, 2, True), (30.0, 3, False)],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pieces_within_the_bridge_are_one_group(size: float, gap: int, together: bool, axis: int) -> None:
    mask = np.moveaxis(row((5, 10), (10 + gap, 12 + gap)), 2, axis)
    voxel = [1.0, 1.0, 1.0]
    voxel[axis] = size
    bridge = [0.0, 0.0, 0.0]
    bridge[axis] = 60.0
    kept = largest_group(mask, tuple(voxel), (bridge[0], bridge[1], bridge[2]))
    assert kept.sum() == (7 if together else 5)


def test_two_near_pieces_outweigh_a_larger_one_far_away() -> None:
    mask = row((0, 4), (8, 12), (40, 46))
    assert np.array_equal(largest_group(mask, (1.0, 1.0, 10.0), (0.0, 0.0, 60.0)), row((0, 4), (8, 12)))


def test_a_piece_is_measured_without_its_surroundings() -> None:
    # In the middle five rows of one voxel each have more space about them than the block in the corner.
    mask = np.zeros((1, 30, 30), bool)
    mask[0, :3, :3] = True
    mask[0, 10:26:3, 15] = True
    kept = largest_group(mask, (1.0, 1.0, 1.0), (4.0, 4.0, 4.0))
    assert kept[0, :3, :3].all()
    assert kept.sum() == 9


def test_nothing_stays_nothing() -> None:
    empty = np.zeros((3, 4, 5), bool)
    assert not largest_group(empty, (1.0, 1.0, 1.0), (60.0, 60.0, 60.0)).any()
    assert not largest_components(empty, 2, 1.0).any()


@given(masks, st.tuples(*[st.floats(0, 12)] * 3))
def test_a_group_is_made_of_whole_pieces_and_holds_the_largest(
    mask: NDArray[np.bool_], bridge: tuple[float, float, float]
) -> None:
    before = mask.copy()
    kept = largest_group(mask, (1.0, 2.0, 3.0), bridge)
    assert np.array_equal(mask, before)
    pieces, count = ndimage.label(mask)
    shares = [set(kept[pieces == piece].tolist()) for piece in range(1, count + 1)]
    assert all(len(share) == 1 for share in shares)
    assert kept.sum() >= max((int((pieces == piece).sum()) for piece in range(1, count + 1)), default=0)


# Pieces


@pytest.mark.parametrize(("keep", "least", "left"), [(1, 1, [4]), (2, 1, [4, 3]), (9, 1, [4, 3, 1]), (9, 3, [4, 3])])
def test_the_largest_pieces_are_kept(keep: int, least: float, left: list[int]) -> None:
    mask = row((0, 3), (10, 14), (20, 21))
    lengths = {3: (0, 3), 4: (10, 14), 1: (20, 21)}
    assert np.array_equal(largest_components(mask, keep, least), row(*(lengths[n] for n in left)))


def test_the_least_size_may_be_a_fraction() -> None:
    mask = row((0, 3), (10, 14))
    assert largest_components(mask, 2, 3.5).sum() == 4
    assert not largest_components(mask, 2, 4.5).any()


def test_pieces_that_touch_by_an_edge_are_two() -> None:
    mask = np.zeros((2, 2, 3), bool)
    mask[0, 0, :] = mask[1, 1, 0] = True
    kept = largest_components(mask, 1, 1)
    assert kept[0, 0].all()
    assert kept.sum() == 3


@given(masks, st.integers(1, 4), st.floats(0, 10))
def test_kept_pieces_are_whole_and_no_smaller_than_those_dropped(
    mask: NDArray[np.bool_], keep: int, least: float
) -> None:
    kept = largest_components(mask, keep, least)
    assert not (kept & ~mask).any()
    pieces, count = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    expected = sorted((n for n in sizes if n >= least), reverse=True)[:keep]
    _, kept_count = ndimage.label(kept)
    assert kept_count == len(expected)
    assert kept.sum() == sum(expected)


def test_parts_that_hang_together_within_another_mask_are_one_piece() -> None:
    mask, within = row((0, 3), (10, 12), (20, 24)), row((0, 12), (20, 24))
    # 3 + 2 voxels are more than 4; what lies between them is not kept.
    assert np.array_equal(largest_components(mask, 1, 1, within), row((0, 3), (10, 12)))
    assert largest_components(mask, 1, 5, within).any()
    assert not largest_components(mask, 1, 5.5, within).any()


def test_what_lies_in_the_other_mask_alone_is_no_piece() -> None:
    mask, within = row((10, 12), (20, 23)), row((5, 12), (13, 18), (20, 23))
    assert np.array_equal(largest_components(mask, 1, 1, within), row((20, 23)))
    assert np.array_equal(largest_components(mask, 3, 1, within), mask)
    assert not largest_components(row(), 1, 1, within).any()
