"""The small scan and the tiles that a page's viewer cuts up."""

import base64
import io
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastorgan.preview import ShownCase
from fastorgan.viewer import CODE_STEP, MOST_PIXELS, MOST_SLICES, page_pictures, shrink
from fastorgan.volume import read_volume


def shown(hu: NDArray[np.int16], codes: NDArray[np.uint8], affine: NDArray[np.float64]) -> ShownCase:
    return ShownCase.of(read_volume(nib.Nifti1Image(hu, affine), "case"), codes, None)


def corner_case(affine: NDArray[np.float64]) -> ShownCase:
    """All of it is body; a liver voxel stands at the patient's right, front and top: the far end of RAS axes."""
    hu, codes = np.full((8, 6, 5), 50, np.int16), np.zeros((8, 6, 5), np.uint8)
    codes[7, 5, 4], codes[0, 0, 0] = 1, 3
    hu[7, 5, 4] = 300
    return shown(hu, codes, affine)


def test_the_right_is_left_the_front_up_and_the_feet_first() -> None:
    scan = shrink(corner_case(np.diag([2.0, 2.0, 2.0, 1.0])))
    assert scan.grey.shape == scan.codes.shape == (5, 6, 8)
    assert np.argwhere(scan.codes == 1).tolist() == [[4, 0, 0]]
    assert np.argwhere(scan.codes == 3).tolist() == [[0, 5, 7]]
    assert np.argwhere(scan.grey == 255).tolist() == [[4, 0, 0]]
    assert scan.grey[0, 0, 0] == 128  # 50 HU in the window -200 to 300
    assert scan.spacing == (2.0, 2.0, 2.0)


def test_large_scans_shrink_and_keep_their_extent() -> None:
    hu, codes = np.full((600, 300, 200), 50, np.int16), np.zeros((600, 300, 200), np.uint8)
    codes[100:300, 100:200, 20:180] = 1
    scan = shrink(shown(hu, codes, np.diag([0.8, 0.8, 1.0, 1.0])))
    slices, rows, columns = scan.grey.shape
    assert (slices, columns) == (MOST_SLICES, MOST_PIXELS)
    assert rows * scan.spacing[1] == pytest.approx(240)
    assert columns * scan.spacing[2] == pytest.approx(480)
    # The organ and 40 mm beyond it, cut by the scan: all of its 200 mm.
    assert slices * scan.spacing[0] == pytest.approx(200)
    voxel_ml = np.prod(scan.spacing) / 1000
    assert (scan.codes == 1).sum() * voxel_ml == pytest.approx(200 * 100 * 160 * 0.64 / 1000, rel=0.03)


def test_tiles_hold_the_slices_in_order() -> None:
    case = corner_case(np.diag([2.0, 2.0, 2.0, 1.0]))
    content = page_pictures(case, Image.new("RGB", (100, 50)))
    assert content["preview_size"] == (1100, 550)
    kind, _, text = content["labels"].partition(",")
    assert kind == "data:image/png;base64"
    sheet: Any = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    slices, rows, columns = content["shape"]
    across = content["across"]
    for z in range(slices):
        top, left = z // across * rows, z % across * columns
        tile = sheet[top : top + rows, left : left + columns]
        assert np.array_equal(tile, shrink(case).codes[z] * CODE_STEP)


def test_a_scan_of_one_voxel_is_no_trouble() -> None:
    content = page_pictures(
        shown(np.zeros((1, 1, 1), np.int16), np.zeros((1, 1, 1), np.uint8), np.eye(4)), Image.new("RGB", (10, 10))
    )
    assert content["shape"] == [1, 1, 1]
    assert content["first"] == [0, 0, 0]


def test_the_viewer_begins_at_the_fullest_slices() -> None:
    hu, codes = np.full((9, 8, 7), 50, np.int16), np.zeros((9, 8, 7), np.uint8)
    codes[2, 3, 5] = 1
    codes[2:5, 3, 4] = 2
    content = page_pictures(shown(hu, codes, np.diag([2.0, 2.0, 2.0, 1.0])), Image.new("RGB", (10, 10)))
    # From the feet; from the front, so 7 - 3; from the right, so 8 - 2.
    assert content["first"] == [4, 4, 6]
