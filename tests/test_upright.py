import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fastorgan.box import Box
from fastorgan.restore import restore_labels
from fastorgan.upright import AIR_HU, ROOM_MM, set_upright
from fastorgan.volume import FileGrid, Volume

SPACING = np.array([2.5, 2.0, 2.0])


def turned(degrees: float) -> NDArray[np.float64]:
    """Affine (z, y, x) of a grid turned about x."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ np.diag(SPACING)
    return affine


def padded_slab(
    affine: NDArray[np.float64], shape: tuple[int, int, int], ends: tuple[float, float]
) -> NDArray[np.int16]:
    """A patient of 40 HU between two heights in mm, and padding."""
    z = (np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3])[..., 0]
    return np.where((z >= ends[0]) & (z <= ends[1]), 40, -1024).astype(np.int16)


def test_padding_does_not_mix_with_the_patient() -> None:
    affine = turned(20)
    array = padded_slab(affine, (40, 40, 12), (0, 60))
    upright, forth, dense = set_upright(array, affine, (1.0, 0.0), "test")
    assert set(np.unique(upright)) == {-1024, 40}
    assert np.array_equal(dense, array == 40)
    # Every voxel of the patient is shown at its place.
    there = np.argwhere(dense) @ forth[:3, :3].T + forth[:3, 3]
    assert (upright[tuple(np.rint(there).astype(int).T)] == 40).all()
    # And nothing is shown farther beyond the ends than a voxel.
    back = np.linalg.inv(forth)
    z = ((np.argwhere(upright == 40) @ back[:3, :3].T + back[:3, 3]) @ affine[:3, :3].T + affine[:3, 3])[:, 0]
    assert z.min() > -2.5
    assert z.max() < 62.5


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (-1.0, 0.0), (0.5, -1000.0)])
def test_stored_values_need_not_be_hu(slope: float, intercept: float) -> None:
    affine = turned(20)
    hu = padded_slab(affine, (40, 40, 12), (0, 60))
    stored = np.rint((hu - intercept) / slope).astype(np.int16)
    upright, _, dense = set_upright(stored, affine, (slope, intercept), "test")
    assert set(np.unique(np.asarray(upright, float) * slope + intercept)) == {AIR_HU, 40}
    assert np.array_equal(dense, hu == 40)


def test_the_upright_grid_holds_the_patient_with_room_in_plane_and_no_more() -> None:
    affine = turned(30)
    shape = (160, 200, 12)
    array = padded_slab(affine, shape, (0, 60))
    y = (np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T)[..., 1]
    array[(y < 100) | (y > 200)] = -1024
    upright, _, dense = set_upright(array, affine, (1.0, 0.0), "test")
    tall, deep, _ = np.ptp(np.argwhere(dense) @ affine[:3, :3].T, axis=0)
    # At either end up to 5, 4 and 4 mm along the grid's axes are passed over in the search.
    assert tall <= upright.shape[0] * 2.5 <= tall + 2 * 13 + 5
    assert deep + 2 * ROOM_MM - 2 * 13 <= upright.shape[1] * 2.0 <= deep + 2 * ROOM_MM + 4


def test_of_a_scan_of_nothing_all_is_shown() -> None:
    affine = turned(30)
    upright, forth, dense = set_upright(np.full((20, 20, 4), -1024, np.int16), affine, (1.0, 0.0), "test")
    assert not dense.any()
    assert (upright == -1024).all()
    corners = np.array([[z, y, x] for z in (0, 19) for y in (0, 19) for x in (0, 3)]) @ forth[:3, :3].T + forth[:3, 3]
    assert corners.min() > -1e-6
    assert (corners.max(axis=0) < np.array(upright.shape) - 1 + 1e-6).all()


def test_padding_is_never_labelled() -> None:
    affine = turned(20)
    array = padded_slab(affine, (40, 40, 12), (0, 60))
    upright, forth, dense = set_upright(array, affine, (1.0, 0.0), "test")
    grid = FileGrid((12, 40, 40), np.array([[0.0, 1], [1, 1], [2, 1]]), forth, dense)
    volume = Volume(upright, (2.5, 2.0, 2.0), 1.0, 0.0, grid)
    labels = restore_labels({3: np.ones((4, 4, 4), np.float32)}, Box.whole(volume.shape), volume)
    assert np.array_equal(labels.transpose(2, 1, 0) == 3, array == 40)


def test_deep_in_the_patient_less_is_blurred_than_linearly() -> None:
    affine = turned(20)
    shape = (24, 40, 40)

    def waves(mm: NDArray[np.float64]) -> NDArray[np.float64]:
        # Twelve millimetres long.
        result: NDArray[np.float64] = 100 * np.sin(np.pi / 6 * mm).sum(axis=-1)
        return result

    places = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    array = waves(places).astype(np.float32)
    upright, forth, _ = set_upright(array, affine, (1.0, 0.0), "test")
    back = np.linalg.inv(forth)
    there = np.moveaxis(np.indices(upright.shape), 0, -1) @ back[:3, :3].T + back[:3, 3]
    deep = ((there > 4) & (there < np.array(shape) - 5)).all(axis=-1)
    assert deep.sum() > 1000
    expected = waves(there[deep] @ affine[:3, :3].T + affine[:3, 3])
    linear = ndimage.map_coordinates(array, there[deep].T, order=1)
    off = np.sqrt(np.mean((np.asarray(upright)[deep] - expected) ** 2))
    assert off < 0.25 * np.sqrt(np.mean((linear - expected) ** 2))


def test_infinite_and_absurd_numbers_stay_where_they_are() -> None:
    affine = turned(20)
    array = np.full((24, 40, 40), 40.0, np.float32)
    array[12, 20, 20] = 3e38
    upright, forth, _ = set_upright(array, affine, (1.0, 0.0), "test")
    place = forth[:3, :3] @ (12, 20, 20) + forth[:3, 3]
    far = np.abs(np.moveaxis(np.indices(upright.shape), 0, -1) - place).max(axis=-1) > 8
    dense = np.asarray(upright) > -1000
    assert np.abs(np.asarray(upright)[far & dense] - 40).max() < 5


@pytest.mark.parametrize("metal", [3000, 20000])
def test_beside_metal_nothing_rings(metal: int) -> None:
    affine = turned(20)
    array = np.full((24, 40, 40), 40, np.int16)
    array[10:14, 18:22, 18:22] = metal
    upright, forth, _ = set_upright(array, affine, (1.0, 0.0), "test")
    hu = np.asarray(upright, int)
    # Splines would swing by a tenth of the step. What is left of that comes of metal three voxels away.
    assert hu[hu > -1000].min() >= 30
    back = np.linalg.inv(forth)
    there = np.moveaxis(np.indices(hu.shape), 0, -1) @ back[:3, :3].T + back[:3, 3]
    beyond = np.maximum((9, 17, 17) - there, there - (14, 22, 22)).max(axis=-1) >= 0
    assert hu[beyond].max() <= 50
