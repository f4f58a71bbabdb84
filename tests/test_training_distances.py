import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from training.distances import around, beyond_border, signed_distance


def test_distances_are_between_centres_and_borders_half_a_voxel_nearer() -> None:
    mask = np.array([[[False, False, False, True, True]]])
    distance = signed_distance(mask, np.full(3, 2.0), 5.0)
    # The first lies 6 mm away, beyond what is looked at.
    assert distance.tolist() == [[[5, 4, 2, -2, -4]]]
    assert beyond_border(distance, np.array([5.0, 3.0, 2.0])).tolist() == [[[4, 3, 1, -1, -3]]]


@pytest.mark.parametrize(("inside", "distance"), [(True, -7.0), (False, 7.0)])
def test_what_has_no_other_side_is_as_far_as_can_be(inside: bool, distance: float) -> None:
    assert (signed_distance(np.full((2, 3, 4), inside), np.ones(3), 7.0) == distance).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(2, 9), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(*[st.floats(0.5, 6.0)] * 3),
    st.floats(1.0, 20.0),
)
def test_distances_are_scipys_up_to_the_reach(
    seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float], reach: float
) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.2
    mask[0, 0, 0], mask[-1, -1, -1] = True, False
    sizes = np.array(spacing)
    expected = ndimage.distance_transform_edt(~mask, sampling=sizes)
    expected -= ndimage.distance_transform_edt(mask, sampling=sizes)
    assert signed_distance(mask, sizes, reach) == pytest.approx(np.clip(expected, -reach, reach), abs=1e-4)


def test_the_box_about_a_mask_ends_with_the_array() -> None:
    mask = np.zeros((9, 9, 9), bool)
    mask[1, 4, 5:7] = True
    # 5 mm are three voxels of 2 mm.
    assert around(mask, 5, np.full(3, 2.0)) == (slice(0, 5), slice(1, 8), slice(2, 10))
