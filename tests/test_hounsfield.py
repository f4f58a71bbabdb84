from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.hounsfield import Rescale, find_rescale
from fastorgan.phantom import make_phantom
from fastorgan.volume import read_volume

AFFINE = np.diag([6.0, 6.0, 6.0, 1.0])


@pytest.fixture(scope="module")
def hu() -> NDArray[np.int16]:
    """A CT's values: air, a body of water with fat around it, bone, and lung."""
    rng = np.random.default_rng(0)
    values = np.full((60, 60, 40), -1000.0)
    values[10:50, 15:45] = -100
    values[12:48, 17:43] = 40
    values[28:32, 38:42] = 700
    values[15:25, 20:30, 30:] = -800
    noisy: NDArray[np.int16] = np.clip(values + rng.normal(0, 12, values.shape), -1024, 3071).astype(np.int16)
    return noisy


def test_hu_are_left_as_they_are(hu: NDArray[np.int16]) -> None:
    assert find_rescale(hu, 1.0, 0.0) == Rescale(1.0, 0.0)
    assert find_rescale((hu + 1024).astype(np.uint16), 1.0, -1024.0) == Rescale(1.0, -1024.0)
    assert find_rescale((hu * 2).astype(np.float64), 0.5, 0.0) == Rescale(0.5, 0.0)


def test_the_phantom_is_in_hu() -> None:
    image, _ = make_phantom()
    assert find_rescale(np.asarray(image.dataobj), 1.0, 0.0).warning is None


def test_padding_does_not_hide_what_values_are(hu: NDArray[np.int16]) -> None:
    padded = hu.copy()
    padded[:8] = -3024
    assert find_rescale(padded, 1.0, 0.0) == Rescale(1.0, 0.0)
    stored = (hu + 1024).astype(np.int16)
    stored[:8] = -2000
    assert find_rescale(stored, 1.0, 0.0).intercept == -1024.0


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i2", "f4"])
def test_a_lost_offset_is_taken_off(hu: NDArray[np.int16], dtype: str) -> None:
    rescale = find_rescale((hu + 1024).astype(dtype), 1.0, 0.0)
    assert (rescale.slope, rescale.intercept) == (1.0, -1024.0)
    assert rescale.warning == "values are 1024 above HU, as stored without their offset; 1024 is taken off"


def test_inverted_values_are_turned_over(hu: NDArray[np.int16]) -> None:
    rescale = find_rescale(-hu, 1.0, 0.0)
    assert (rescale.slope, rescale.intercept) == (-1.0, 0.0)
    assert rescale.warning is not None
    assert "inverted" in rescale.warning


@pytest.mark.parametrize("order", ["<", ">"])
def test_negative_values_taken_for_unsigned_ones_are_negative(hu: NDArray[np.int16], order: str) -> None:
    wrapped = hu.astype(f"{order}i2").view(f"{order}u2")
    rescale = find_rescale(wrapped, 1.0, 0.0)
    assert rescale.wrapped
    volume = read_volume(nib.Nifti1Image(wrapped, AFFINE), "test")
    assert np.array_equal(volume.array, hu.transpose(2, 1, 0))
    assert "65536" in volume.warnings[0]


@pytest.mark.parametrize("tilt", [0, 20])
def test_a_mended_volume_has_the_window_of_the_good_one(hu: NDArray[np.int16], tilt: float) -> None:
    affine = AFFINE.copy()
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    good = read_volume(nib.Nifti1Image(hu, affine), "test")
    assert good.warnings == ()
    for bad in ((hu + 1024).astype(np.uint16), -hu):
        volume = read_volume(nib.Nifti1Image(bad, affine), "test")
        assert len(volume.warnings) == 1
        assert volume.unit(volume.array) == pytest.approx(good.unit(good.array), abs=0.003)


def scaled(hu: NDArray[np.int16], low: float, high: float, dtype: str) -> NDArray[Any]:
    """A window of -160 to 240 HU stretched to [low, high], as for a picture."""
    window = np.clip((hu + 160.0) / 400, 0, 1)
    return (low + window * (high - low)).astype(dtype)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "said"),
    [
        (0, 1, "f4", "between 0 and 1: scaled to a unit range, not HU, so do not trust the result"),
        (-1, 1, "f8", "between -1 and 1: scaled to a unit range"),
        (0, 255, "u1", "between 0 and 255: grey levels of a picture, not HU"),
        (-160, 240, "i2", "between -160 and 240, none is air's or lung's: not HU, or cut to a window"),
        (-100, 100, "i1", "none is air's"),
        (5000, 9000, "i2", "none is air's"),
    ],
)
def test_what_is_no_hu_is_said_and_left(hu: NDArray[np.int16], low: float, high: float, dtype: str, said: str) -> None:
    rescale = find_rescale(scaled(hu, low, high, dtype), 1.0, 0.0)
    assert (rescale.slope, rescale.intercept, rescale.wrapped) == (1.0, 0.0, False)
    assert rescale.warning is not None
    assert said in rescale.warning


def test_no_soft_tissue_is_said() -> None:
    values = np.full((9, 9, 9), -1000)
    values[4] = 1500
    warning = find_rescale(values, 1.0, 0.0).warning
    assert warning == "values lie between -1000 and 1500, none is soft tissue's; is this a CT in HU?"


@pytest.mark.parametrize("value", [0, -1000, 40])
def test_a_constant_volume_is_said(value: int) -> None:
    assert find_rescale(np.full((1, 1, 1), value), 1.0, 0.0).warning == f"every voxel has the value {value}"


def test_labels_are_no_hu_and_nobody_minds(hu: NDArray[np.int16]) -> None:
    volume = read_volume(nib.Nifti1Image((hu > 0).astype(np.uint8), AFFINE), "test", hounsfield=False)
    assert volume.warnings == ()
