import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fastorgan import cascade as module
from fastorgan.box import Box
from fastorgan.cascade import Cascade
from fastorgan.errors import VolumeError, WeightsError
from fastorgan.intensity import to_network, to_unit
from fastorgan.labels import CLASSES, ORGANS
from fastorgan.resample import resize
from fastorgan.runtime import Network
from fastorgan.volume import load_image, read_volume
from fastorgan.weights import Weights

Blocks = tuple[nib.Nifti1Image, NDArray[np.uint8]]
CascadeMaker = Callable[[Network, Network], Cascade]


def codes_of(image: nib.Nifti1Image) -> NDArray[np.uint8]:
    return np.asarray(image.dataobj)


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def nothing(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """A ROI net that finds nothing."""
    return np.full((1, *x.shape), -5, np.float32)


# Labels


def test_every_organ_is_labelled_where_it_is(by_hu: Cascade, blocks: Blocks) -> None:
    image, truth = blocks
    labels = codes_of(by_hu.segment(image))
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
    for organ in ORGANS:
        block = truth == organ.code
        found = labels == organ.code
        assert not (found & ~block).any(), f"{organ.name} outside its block"
        assert not (ndimage.binary_erosion(block) & ~found).any(), f"{organ.name} missing inside its block"


@pytest.mark.parametrize(
    "axes", ["".join(codes) for codes in itertools.product("LR", "AP", "IS")] + ["SAR", "PIR", "ILP"]
)
def test_the_axes_of_the_file_do_not_matter(by_hu: Cascade, blocks: Blocks, axes: str) -> None:
    image, _ = blocks
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    turned = image.as_reoriented(turn)
    assert "".join(nib.aff2axcodes(turned.affine)) == axes
    labels = by_hu.segment(turned)
    assert labels.shape == turned.shape
    assert np.array_equal(labels.affine, turned.affine)
    back: Any = nib.as_closest_canonical(labels)
    assert np.array_equal(codes_of(back), codes_of(by_hu.segment(image)))


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (0.5, 0.0), (10.0, -1000.0), (-1.0, 0.0)])
def test_slope_and_intercept_do_not_matter(
    by_hu: Cascade, blocks: Blocks, tmp_path: Path, slope: float, intercept: float
) -> None:
    image, _ = blocks
    stored = np.rint((np.asarray(image.dataobj) - intercept) / slope).astype(np.int16)
    scaled = nib.Nifti1Image(stored, image.affine)
    scaled.header.set_slope_inter(slope, intercept)
    nib.save(scaled, tmp_path / "ct.nii")
    read: Any = nib.load(tmp_path / "ct.nii")
    assert np.array_equal(read.get_fdata(), np.asarray(image.dataobj))
    labels = by_hu.segment(read)
    assert np.array_equal(codes_of(labels), codes_of(by_hu.segment(image)))
    assert labels.header.get_slope_inter() == (1.0, 0.0)


@pytest.mark.parametrize("dtype", ["u2", ">i2", "i4", "f4", "f8"])
def test_the_type_of_the_voxels_does_not_matter(by_hu: Cascade, blocks: Blocks, dtype: str) -> None:
    image, _ = blocks
    # All HU at least 0, for unsigned types; the networks clip at -200.
    values = np.maximum(np.asarray(image.dataobj) + 60, 0).astype(dtype)
    moved = nib.Nifti1Image(values.astype("i2"), image.affine)
    same = nib.Nifti1Image(values, image.affine, dtype=values.dtype)
    assert np.array_equal(codes_of(by_hu.segment(same)), codes_of(by_hu.segment(moved)))


def blob_on(affine: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """HU of a smooth, crooked body about (10, -5, 20) mm, from 250 HU inside to -100 far off."""
    x, y, z = np.moveaxis(np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    x, y, z = x - 10, y + 5, z - 20
    distance = (x / 75) ** 2 + (y / 55 + x / 200) ** 2 + (z / 60 - (x / 150) ** 2) ** 2
    hu: NDArray[np.float32] = (350 * np.exp(-distance) - 100).astype(np.float32)
    return hu


def threshold(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """An organ net that takes everything above 50 HU, the middle of the window, for liver."""
    logits = np.full((CLASSES, *x.shape), -9, np.float32)
    # So steep that it nowhere hesitates.
    logits[0], logits[1] = -100 * x, 100 * x
    return logits


@settings(max_examples=12)
@given(
    st.sampled_from([0, 1, 2]),
    st.floats(10, 30) | st.floats(-30, -10),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.permutations([0, 1, 2]),
    st.sampled_from([(4.0, 4.0, 4.0), (3.0, 4.0, 6.0), (5.0, 2.5, 4.0)]),
)
def test_oblique_scans_are_labelled_as_upright_ones(
    make_cascade: CascadeMaker,
    axis: int,
    degrees: float,
    flips: tuple[int, int, int],
    order: list[int],
    spacing: tuple[float, float, float],
) -> None:
    affine = np.eye(4)
    turn = Rotation.from_rotvec(np.radians(degrees) * np.eye(3)[axis]).as_matrix()
    affine[:3, :3] = turn @ np.diag(np.multiply(spacing, flips))[:, order]
    steps = np.array(spacing)[order]
    i, j, k = (int(n) for n in np.ceil(280 / steps))
    affine[:3, 3] = -affine[:3, :3] @ np.array([i, j, k]) / 2
    image = nib.Nifti1Image(blob_on(affine, (i, j, k)), affine)
    labels = make_cascade(threshold_roi, threshold).segment(image)
    found, truth = codes_of(labels) == 1, blob_on(affine, (i, j, k)) > 50
    assert truth.sum() * np.prod(steps) > 300_000
    assert dice(found, truth) > 0.97
    assert np.array_equal(labels.affine, image.affine)


def threshold_roi(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x[None]


def test_an_oblique_scan_that_cuts_an_organ_is_labelled_to_its_last_slice(make_cascade: CascadeMaker) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix() * 4.0
    shape = (60, 60, 40)
    # The scan's last slice goes through the middle of the body.
    affine[:3, 3] = np.array([10, -5, 20]) - affine[:3, :3] @ (30, 30, 39)
    hu = blob_on(affine, shape)
    found = codes_of(make_cascade(threshold_roi, threshold).segment(nib.Nifti1Image(hu, affine))) == 1
    for k in (39, 38, 36):
        assert dice(found[..., k], hu[..., k] > 50) > 0.95


# The two stages


def test_the_networks_see_the_window_upright(make_cascade: CascadeMaker) -> None:
    seen: dict[str, NDArray[np.float32]] = {}

    def roi(x: NDArray[np.float32]) -> NDArray[np.float32]:
        seen["roi"] = x.copy()
        # A block of 12 x 16 x 20 samples.
        logits = np.full((1, *x.shape), -0.01, np.float32)
        logits[0, 10:22, 12:28, 14:34] = 0.01
        return logits

    def organs(x: NDArray[np.float32]) -> NDArray[np.float32]:
        seen["organs"] = x.copy()
        return np.zeros((CLASSES, *x.shape), np.float32)

    # 480 mm along each axis, 10 mm per ROI sample; brighter to the head, the front and the right.
    i, j, k = np.indices((60, 60, 60))
    hu = (2 * i + 3 * j + 4 * k - 250).astype(np.int16)
    image = nib.Nifti1Image(hu, np.diag([8.0, 8.0, 8.0, 1.0]))
    flipped = image.as_reoriented(np.array([[2, -1], [1, -1], [0, 1]]))
    volume = read_volume(flipped, "test")
    found = make_cascade(roi, organs).find_organs(volume)
    assert seen["roi"].shape == (48, 48, 48)
    assert seen["organs"].shape == (48, 64, 96)
    for x in seen.values():
        assert x.dtype == np.float32
        assert x.min() >= -1
        assert x.max() <= 1
        for axis in range(3):
            # But for rounding.
            assert (np.diff(x, axis=axis) > -1e-6).all()
    # 100 to 220, 120 to 280 and 140 to 340 mm; with 12 mm on both sides, grown to 150 and 250 mm along z and x.
    assert found.roi.fallback is None
    assert found.roi.box.start == pytest.approx(np.array([85, 108, 115]) / 8)
    assert found.roi.box.stop == pytest.approx(np.array([235, 292, 365]) / 8)
    upright = hu.transpose(2, 1, 0)
    assert seen["roi"] == pytest.approx(
        to_network(resize(upright, Box.whole(upright.shape), (48, 48, 48), to_unit)), abs=1e-5
    )
    assert seen["organs"] == pytest.approx(to_network(resize(upright, found.roi.box, (48, 64, 96), to_unit)), abs=1e-5)


def test_nothing_is_labelled_outside_the_box(make_cascade: CascadeMaker) -> None:
    def roi(x: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = np.full((1, *x.shape), -0.01, np.float32)
        logits[0, 10:22, 12:28, 14:34] = 0.01
        return logits

    image = nib.Nifti1Image(np.full((60, 60, 60), 200, np.int16), np.diag([8.0, 8.0, 8.0, 1.0]))
    labels = codes_of(make_cascade(roi, threshold).segment(image))
    # The box of the test above, once 25 mm wider; voxels whose centres lie inside.
    x, y, z = ((np.arange(60) + 0.5) * 8,) * 3
    inside = ((x >= 90) & (x < 390))[:, None, None] & ((y >= 83) & (y < 317))[:, None] & ((z >= 60) & (z < 260))
    assert np.array_equal(labels == 1, inside)


def test_what_the_roi_net_missed_of_an_organ_is_found(make_cascade: CascadeMaker) -> None:
    boxes: list[NDArray[np.float32]] = []

    def roi(x: NDArray[np.float32]) -> NDArray[np.float32]:
        # Of the organ, which spans samples 8 to 28 along z, the upper part is missed.
        logits = np.full((1, *x.shape), -0.01, np.float32)
        logits[0, 8:25, 12:28, 14:34] = 0.01
        return logits

    def organs(x: NDArray[np.float32]) -> NDArray[np.float32]:
        boxes.append(x)
        return threshold(x)

    # Voxels of 5 mm; a sample of the ROI net has 10 mm.
    hu = np.full((96, 96, 96), -100, np.int16)
    hu[28:68, 24:56, 16:56] = 200
    volume = read_volume(nib.Nifti1Image(hu, np.diag([5.0, 5.0, 5.0, 1.0])), "test")
    found = make_cascade(roi, organs).find_organs(volume)
    assert len(boxes) == 2
    # 80 to 250 mm with 12 mm on both sides, and 25 mm more above.
    assert (found.roi.box.start[0], found.roi.box.stop[0]) == pytest.approx((68 / 5, 287 / 5))
    assert dice(found.labels == 1, hu == 200) > 0.97
    # As it is where the ROI net misses nothing.
    boxes.clear()
    make_cascade(lambda x: np.maximum(roi(x), threshold_roi(x)), organs).find_organs(volume)
    assert len(boxes) == 1


def test_where_nothing_is_found_the_whole_volume_is_searched(make_cascade: CascadeMaker, blocks: Blocks) -> None:
    image, truth = blocks
    volume = read_volume(image, "test")
    found = make_cascade(nothing, threshold).find_organs(volume)
    assert found.roi.fallback is not None
    assert found.roi.box == Box.whole(volume.shape)
    # The largest of what has more than 50 HU is the spleen.
    assert dice(found.labels == 1, truth == 3) > 0.9


def test_a_scan_without_organs_gets_zeros(by_hu: Cascade) -> None:
    air = nib.Nifti1Image(np.full((20, 21, 22), -1000, np.int16), np.diag([5.0, 5.0, 5.0, 1.0]))
    found = by_hu.find_organs(read_volume(air, "test"))
    assert found.roi.fallback is not None
    assert found.labels.shape == (20, 21, 22)
    assert not found.labels.any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 40, 1), (1, 40, 40), (3, 200, 2)])
def test_odd_volumes_are_labelled(by_hu: Cascade, shape: tuple[int, int, int]) -> None:
    image = nib.Nifti1Image(np.full(shape, 50, np.int16), np.diag([6.0, 6.0, 6.0, 1.0]))
    assert by_hu.segment(image).shape == shape


def test_stages_are_timed_in_their_order(by_hu: Cascade, blocks: Blocks) -> None:
    found = by_hu.find_organs(read_volume(blocks[0], "test"))
    assert list(found.seconds) == ["roi", "organs", "restore", "check"]
    assert all(0 < seconds < 60 for seconds in found.seconds.values())


def test_small_pieces_are_measured_in_mm(make_cascade: CascadeMaker) -> None:
    # A liver of 27 ml stays, one of 3.4 ml goes; both have the same voxels.
    for spacing, kept in ((5.0, True), (2.5, False)):
        hu = np.full((40, 40, 40), -150, np.int16)
        hu[14:20, 14:20, 14:20] = 250
        image = nib.Nifti1Image(hu, np.diag([spacing, spacing, spacing, 1.0]))
        assert codes_of(make_cascade(nothing, threshold).segment(image)).any() == kept


# Files


def test_a_files_labels_keep_its_geometry(by_hu: Cascade, blocks: Blocks, tmp_path: Path) -> None:
    image, _ = blocks
    nib.save(image, tmp_path / "ct.nii.gz")
    read = load_image(tmp_path / "ct.nii.gz")
    labels = by_hu.segment(read)
    assert labels.get_data_dtype() == np.uint8
    for key in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "dim"):
        assert np.array_equal(labels.header[key], read.header[key])


def test_errors_name_the_file(by_hu: Cascade, tmp_path: Path) -> None:
    path = tmp_path / "ct.nii"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 7), np.int16), np.eye(4)), path)
    image: Any = nib.load(path)
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: holds 7 volumes"):
        by_hu.segment(image)
    with pytest.raises(VolumeError, match=r"^the image: has 2 axes"):
        by_hu.segment(nib.Nifti1Image(np.zeros((4, 5), np.int16), np.eye(4)))


# Loading


def test_load_passes_on_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []

    class Runtime:
        engine = "an engine"

        def load(self, weights: object, network: str) -> Network:
            asked.append((weights, network))
            return nothing

    def choose(*arguments: object) -> Runtime:
        asked.append(arguments)
        return Runtime()

    monkeypatch.setattr(module, "choose_runtime", choose)
    monkeypatch.setattr(Weights, "find", lambda folder: ("weights", folder))
    loaded: Any = Cascade.load("cuda:1", engine="torch", threads=3, weights=tmp_path)
    weights = ("weights", tmp_path)
    assert asked == [("cuda:1", "torch", 3), (weights, "roi"), (weights, "organs")]
    assert loaded.engine == "an engine"
    assert loaded.weights == weights
    asked.clear()
    Cascade.load()
    assert asked == [("auto", "auto", None), (("weights", None), "roi"), (("weights", None), "organs")]


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "choose_runtime", lambda *_: None)
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path))):
        Cascade.load(weights=tmp_path)
