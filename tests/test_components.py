import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan.components import largest_components, largest_group

masks = hnp.arrays(bool, st.tuples(*[st.integers(1, 8)] * 3))


def row(*pieces: tuple[int, int], length: int = 60) -> NDArray[np.bool_]:
    """A mask along the last axis with pieces [start, stop)."""
    mask = np.zeros((1, 1, length), bool)
    for start, stop in pieces:
        mask[..., start:stop] = True
    return mask


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
