from collections.abc import Mapping

import nibabel as nib
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fastorgan.box import Box
from fastorgan.restore import restore_labels
from fastorgan.volume import Volume, read_volume

Sizes = tuple[int, int, int]


def upright_scan(shape: Sizes) -> Volume:
    """A volume whose file has the cascade's axes in reverse order, (x, y, z); `shape` is (z, y, x)."""
    z, y, x = shape
    return read_volume(nib.Nifti1Image(np.zeros((x, y, z), np.int16), np.eye(4)), "test")


def labels_of(margins: Mapping[int, NDArray[np.float32]], box: Box, volume: Volume) -> NDArray[np.uint8]:
    """Restored labels on (z, y, x)."""
    return restore_labels(margins, box, volume).transpose(2, 1, 0)


def interpolated(margin: NDArray[np.float32], box: Box, shape: Sizes) -> NDArray[np.float64]:
    """Margins at the volume's voxels by the definition: a triangle per axis, minus infinity outside the box."""
    tables, inside = [], []
    for n, start, size, length in zip(shape, box.start, box.size, margin.shape, strict=True):
        scale = length / size
        centres = np.arange(n) + 0.5
        at = np.clip((centres - start) * scale - 0.5, 0, length - 1)
        table = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length)) / max(scale, 1))
        tables.append(table / table.sum(axis=1, keepdims=True))
        inside.append((centres >= start) & (centres < start + size))
    fine = np.einsum("ai,bj,ck,ijk->abc", *tables, margin)
    return np.where(np.einsum("a,b,c->abc", *inside), fine, -np.inf)


# Upright scans


def test_margins_of_the_volumes_own_size_are_compared_with_zero() -> None:
    margin = np.full((2, 3, 4), -1, np.float32)
    margin[0, 1, 2] = margin[1, 2, 3] = 0.5
    margin[1, 1, 1] = 0
    labels = labels_of({3: margin}, Box.whole((2, 3, 4)), upright_scan((2, 3, 4)))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, np.where(margin > 0, 3, 0))


def test_the_border_lies_where_the_interpolated_margin_is_zero() -> None:
    # Four samples over 16 voxels lie at 1.5, 5.5, 9.5 and 13.5; from 3 at 5.5 to -1 at 9.5 zero is at 8.5.
    margin = np.broadcast_to(np.array([3, 3, -1, -1], np.float32), (1, 1, 4))
    labels = labels_of({1: margin}, Box.whole((1, 1, 16)), upright_scan((1, 1, 16)))
    assert labels[0, 0].tolist() == [1] * 9 + [0] * 7


def test_nothing_is_painted_outside_the_box() -> None:
    margin = np.ones((2, 2, 2), np.float32)
    labels = labels_of({2: margin}, Box((1.0, 2.0, 3.0), (3.0, 4.0, 7.0)), upright_scan((5, 6, 9)))
    expected = np.zeros((5, 6, 9), np.uint8)
    expected[1:3, 2:4, 3:7] = 2
    assert np.array_equal(labels, expected)


def test_a_fractional_box_holds_the_voxels_whose_centres_it_holds() -> None:
    margin = np.ones((1, 1, 4), np.float32)
    # The centres 2.5 to 5.5 lie in [1.6, 5.6), 2.5 to 4.5 in [1.5001, 5.5).
    for box, first, last in ((Box((0, 0, 1.6), (1, 1, 5.6)), 2, 6), (Box((0, 0, 1.5001), (1, 1, 5.5)), 2, 5)):
        labels = labels_of({1: margin}, box, upright_scan((1, 1, 9)))
        assert np.flatnonzero(labels[0, 0]).tolist() == list(range(first, last))


def test_thick_slices_take_the_average_of_their_samples() -> None:
    # Six samples a voxel: the first voxel holds one weak no after five strong yeses, the second only weak noes, but
    # within the reach of the kernel of the yeses.
    margin = np.full((1, 1, 18), -0.1, np.float32)
    margin[..., :5] = 10
    box = Box.whole((1, 1, 3))
    expected = interpolated(margin, box, (1, 1, 3)) > 0
    assert expected[0, 0].tolist() == [True, True, False]
    assert np.array_equal(labels_of({1: margin}, box, upright_scan((1, 1, 3))) > 0, expected)


def test_no_organ_leaves_zeros() -> None:
    labels = restore_labels({}, Box.whole((3, 4, 5)), upright_scan((3, 4, 5)))
    assert labels.shape == (5, 4, 3)
    assert labels.flags.f_contiguous
    assert not labels.any()


@st.composite
def boxes(draw: st.DrawFn, shape: Sizes) -> Box:
    starts, stops = [], []
    for n in shape:
        start = draw(st.floats(0, n - 0.5))
        starts.append(start)
        stops.append(draw(st.floats(start + 0.5, n)))
    return Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))


def random_margins(seed: int, shape: Sizes) -> NDArray[np.float32]:
    """A few strong yeses among noes that are weak, so that a single sample decides far from itself."""
    random = np.random.default_rng(seed)
    margin = random.uniform(-0.2, -0.01, shape).astype(np.float32)
    for _ in range(random.integers(1, 4)):
        margin[tuple(random.integers(0, shape))] = 5
    return margin


@given(st.data(), st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 24)] * 3), st.integers(0, 99))
def test_painting_part_by_part_equals_interpolating_everything(
    data: st.DataObject, shape: Sizes, samples: Sizes, seed: int
) -> None:
    box = data.draw(boxes(shape))
    margins = {code: random_margins(seed + code, samples) for code in (1, 4)}
    fine = {code: interpolated(margin, box, shape) for code, margin in margins.items()}
    expected = np.where(fine[4] > 0, 4, np.where(fine[1] > 0, 1, 0))
    # A voxel whose centre lies on the box's face, or its margin at 0, may fall to either side.
    sure = np.all([np.abs(f) > 1e-4 for f in fine.values()], axis=0)
    for axis in range(3):
        centres = np.arange(shape[axis]) + 0.5
        near = np.isclose(centres, box.start[axis], atol=1e-6) | np.isclose(centres, box.stop[axis], atol=1e-6)
        sure &= ~np.expand_dims(near, [a for a in range(3) if a != axis])
    labels = labels_of(margins, box, upright_scan(shape))
    assert np.array_equal(labels[sure], expected[sure])


# Oblique scans


def oblique_scan(shape: Sizes, turn: Rotation, spacing: tuple[float, float, float]) -> Volume:
    """A volume of `shape` (i, j, k) whose grid is turned."""
    affine = np.eye(4)
    affine[:3, :3] = turn.as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (-30, 12, 50)
    return read_volume(nib.Nifti1Image(np.zeros(shape, np.int16), affine), "test")


@given(
    st.integers(0, 99),
    st.sampled_from([0, 1, 2]),
    st.floats(10, 30),
    st.tuples(*[st.floats(0.8, 3)] * 3),
    st.tuples(*[st.integers(3, 9)] * 3),
)
def test_an_oblique_grid_takes_the_margin_at_each_centre(
    seed: int, axis: int, degrees: float, spacing: tuple[float, float, float], samples: Sizes
) -> None:
    shape = (9, 11, 8)
    volume = oblique_scan(shape, Rotation.from_rotvec(np.radians(degrees) * np.eye(3)[axis]), spacing)
    assert volume.grid.upright is not None
    box = Box((1.25, 0.5, 2.0), (volume.shape[0] - 0.75, volume.shape[1] - 1.0, float(volume.shape[2])))
    margin = random_margins(seed, samples)
    # Where every voxel centre lies among the samples.
    indices = np.moveaxis(np.indices((shape[2], shape[1], shape[0])), 0, -1)
    upright = indices @ volume.grid.upright[:3, :3].T + volume.grid.upright[:3, 3]
    at = (upright + 0.5 - box.start) * np.divide(samples, box.size) - 0.5
    fine = ndimage.map_coordinates(margin, np.moveaxis(at, -1, 0), order=1, mode="nearest")
    inside = ((at > -0.5) & (at < np.subtract(samples, 0.5))).all(axis=-1)
    near_face = (np.isclose(at, -0.5, atol=1e-4) | np.isclose(at, np.subtract(samples, 0.5), atol=1e-4)).any(axis=-1)
    sure = (np.abs(fine) > 1e-4) & ~near_face
    labels = labels_of({2: margin}, box, volume)
    assert np.array_equal(labels[sure] > 0, ((fine > 0) & inside)[sure])


def test_an_oblique_scan_is_labelled_up_to_its_ends() -> None:
    volume = oblique_scan((12, 12, 12), Rotation.from_euler("x", 20, degrees=True), (2.0, 2.0, 2.0))
    samples = np.ones((4, 4, 4), np.float32)
    assert restore_labels({1: samples}, Box.whole(volume.shape), volume).all()
