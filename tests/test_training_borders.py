import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("torch")

import torch
from torch import Tensor

from fastorgan.labels import IGNORE
from training.borders import MOST, Borders
from training.sampling import codes_at

CPU = torch.device("cpu")


def places(voxels: list[tuple[float, float, float]], shape: tuple[int, ...]) -> Tensor:
    """A grid (1, 1, 1, n, 3) of places (z, y, x) in voxels, whose centres are whole numbers."""
    edges = (torch.tensor(voxels, dtype=torch.float64) + 0.5) * 2 / torch.tensor(shape) - 1
    return edges.float().flip(-1)[None, None, None]


def settled(labels: NDArray[np.uint8], spacing: NDArray[np.float64], grid: Tensor) -> list[int]:
    found: list[int] = (
        Borders.of(labels, spacing, CPU).settle(codes_at(torch.from_numpy(labels), grid), grid).flatten().tolist()
    )
    return found


def step() -> NDArray[np.uint8]:
    """Two slices 4 mm apart, of 1 mm in plane: liver up to column 4 in the one, up to column 10 in the other."""
    labels = np.zeros((2, 3, 20), np.uint8)
    labels[0, :, :4] = labels[1, :, :10] = 1
    return labels


STEP_MM = np.array([4.0, 1.0, 1.0])


def test_a_border_runs_straight_from_slice_to_slice() -> None:
    # Edges at 4 and 10, so midway at 7; a quarter of the way the first slice's column u, of a centre at u + .5, is
    # outside by u - 3.5 mm, but no more than 3.5, half a voxel less than to the next slice; and column 5, say, inside
    # the second by 3.5: .75 * 1.5 - .25 * 3.5 > 0, and column 4 .75 * .5 - .25 * 3.5 < 0.
    columns = [3, 4, 5, 6, 7, 8, 9, 10]
    middle = places([(0.5, 1, x) for x in columns], (2, 3, 20))
    assert settled(step(), STEP_MM, middle) == [1, 1, 1, 1, 0, 0, 0, 0]
    quarter = places([(0.25, 1, x) for x in columns], (2, 3, 20))
    assert codes_at(torch.from_numpy(step()), quarter).flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert settled(step(), STEP_MM, quarter) == [1, 1, 0, 0, 0, 0, 0, 0]


def test_an_organ_recedes_where_the_next_slice_shows_less_of_it() -> None:
    # Three quarters of the way column 8 is inside by 1.5 and outside by 3.5 mm: .75 * 1.5 - .25 * 3.5 > 0; column 9
    # by .5.
    near_second = places([(0.75, 1, x) for x in (7, 8, 9)], (2, 3, 20))
    assert settled(step(), STEP_MM, near_second) == [1, 1, 0]


def test_other_structures_and_the_unknown_stay_where_no_organ_comes() -> None:
    labels = step()
    labels[:, :, 12:14] = 7
    labels[:, :, 14:] = IGNORE
    labels[0, :, 4] = IGNORE
    labels[0, :, 5] = 8
    grid = places([(0, 1, 12), (0, 1, 15), (0.25, 1, 4), (0.25, 1, 5), (0.45, 1, 5), (0.75, 1, 9)], (2, 3, 20))
    # What is unknown stays so even where liver comes; another structure gives way to it.
    assert settled(labels, STEP_MM, grid) == [7, IGNORE, IGNORE, 8, 1, 0]


def test_labels_without_organs_stay_as_they_are() -> None:
    labels = np.full((2, 3, 4), 9, np.uint8)
    borders = Borders.of(labels, np.ones(3), CPU)
    assert (borders.distances == MOST).all()
    assert not borders.near.any()
    assert settled(labels, np.ones(3), places([(0.3, 1.2, 2.4)], labels.shape)) == [9]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.tuples(*[st.floats(0.5, 8.0)] * 3),
)
def test_voxels_keep_their_own_labels(
    seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    labels = np.random.default_rng(seed).choice(np.array([0, 1, 2, 3, 4, 6, IGNORE], np.uint8), shape)
    centres = [tuple(float(n) for n in index) for index in np.ndindex(shape)]
    grid = places([(z, y, x) for z, y, x in centres], shape)
    assert settled(labels, np.array(spacing), grid) == labels.flatten().tolist()
