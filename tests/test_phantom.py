"""The phantom is judged by what anatomy allows, and by its independence of the grid."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan import phantom
from fastorgan.errors import VolumeError
from fastorgan.labels import ORGANS
from fastorgan.phantom import HU, SHAPE, SPACING, make_phantom
from fastorgan.volume import load_image, read_volume, save_image

LIVER, KIDNEY, SPLEEN, PANCREAS = (organ.code for organ in ORGANS)
# The default field of view at half the resolution in plane.
COARSE: dict[str, Any] = {"shape": (128, 128, 120), "spacing": (3.0, 3.0, 2.5)}


def voxels(image: nib.Nifti1Image) -> NDArray[np.int64]:
    """HU or codes, exactly as stored; any integer type."""
    return np.asanyarray(image.dataobj)


def ras_mm(image: nib.Nifti1Image, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """RAS coordinates (n, 3) of a mask's voxels."""
    return np.asarray(nib.affines.apply_affine(image.affine, np.argwhere(mask)))


@pytest.fixture(scope="module")
def case() -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    return make_phantom()


def test_the_files_are_what_a_scanner_would_give(case: tuple[nib.Nifti1Image, nib.Nifti1Image]) -> None:
    image, labels = case
    assert image.shape == labels.shape == SHAPE
    assert [voxels(file).dtype.name for file in case] == ["int16", "uint8"]
    assert set(np.unique(voxels(labels))) == {0, LIVER, KIDNEY, SPLEEN, PANCREAS}
    # 256 voxels of 1.5 mm about the midline: the first centre is 127.5 voxels, 191.25 mm, to the patient's right.
    expected = [[-1.5, 0, 0, 191.25], [0, -1.5, 0, 191.25], [0, 0, 2.5, -148.75], [0, 0, 0, 1]]
    for file in case:
        assert file.affine.tolist() == expected
        assert nib.aff2axcodes(file.affine) == ("L", "P", "S")
        assert (int(file.header["qform_code"]), int(file.header["sform_code"])) == (1, 1)
        assert file.get_qform() == pytest.approx(file.affine)
        assert file.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize(
    ("code", "low", "high", "pieces"),
    [(LIVER, 1200, 2000, 1), (KIDNEY, 250, 450, 2), (SPLEEN, 120, 350, 1), (PANCREAS, 50, 130, 1)],
)
def test_organs_have_plausible_volumes_in_one_piece(
    case: tuple[nib.Nifti1Image, nib.Nifti1Image], code: int, low: float, high: float, pieces: int
) -> None:
    mask = voxels(case[1]) == code
    assert low <= mask.sum() * np.prod(SPACING) / 1000 <= high
    _, count = ndimage.label(mask)
    assert count == pieces
    # Wholly in view.
    assert not any(mask.take([0, -1], axis=axis).any() for axis in range(3))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_volumes_are_plausible_for_other_patients(seed: int) -> None:
    _, labels = make_phantom(**COARSE, seed=seed, noise=0)
    codes = voxels(labels)
    ml = np.bincount(codes.ravel(), minlength=5) * 3 * 3 * 2.5 / 1000
    for code, low, high in ((LIVER, 1200, 2000), (KIDNEY, 250, 450), (SPLEEN, 120, 350), (PANCREAS, 50, 130)):
        assert low <= ml[code] <= high
    for organ in ORGANS:
        pieces, _ = ndimage.label(codes == organ.code)
        sizes = np.sort(np.bincount(pieces.ravel())[1:])[::-1]
        assert sizes[: organ.components].sum() >= 0.999 * sizes.sum()


def test_organs_lie_where_anatomy_has_them(case: tuple[nib.Nifti1Image, nib.Nifti1Image]) -> None:
    image, labels = case
    codes, hu = voxels(labels), voxels(image)
    liver, spleen, pancreas = (ras_mm(labels, codes == code).mean(axis=0) for code in (LIVER, SPLEEN, PANCREAS))
    kidneys = ras_mm(labels, codes == KIDNEY)
    right, left = kidneys[kidneys[:, 0] > 0].mean(axis=0), kidneys[kidneys[:, 0] < 0].mean(axis=0)
    assert liver[0] > 40  # +x is the patient's right
    assert spleen[0] < -60
    assert spleen[1] < -20  # behind
    assert right[0] > 50
    assert left[0] < -50
    assert left[2] > right[2]  # the liver pushes the right kidney down
    assert right[2] < liver[2]
    assert pancreas[1] > max(right[1], left[1]) + 30
    assert spleen[2] > left[2]
    # The spine is bone in the midline at the back; air above the diaphragm is inside the chest, on both sides.
    bone = ras_mm(image, hu > 300)
    spine = bone[(np.abs(bone[:, 0]) < 25) & (np.abs(bone[:, 2]) < 100)]
    assert -90 < np.median(spine[:, 1]) < -40
    lung = ras_mm(image, (hu > -950) & (hu < -700))
    lung = lung[(np.abs(lung[:, 1]) < 60) & (lung[:, 2] > 0)]
    assert min((lung[:, 0] > 60).sum(), (lung[:, 0] < -60).sum()) > 10_000
    assert lung[:, 2].mean() > liver[2] + 40


def test_organs_have_their_attenuation(case: tuple[nib.Nifti1Image, nib.Nifti1Image]) -> None:
    hu, codes = voxels(case[0]), voxels(case[1])
    for organ in ORGANS:
        inside = ndimage.binary_erosion(codes == organ.code, iterations=2)
        # A tissue's HU differs by at most 2 x 4 % between patients; fat and vessels add a little.
        assert np.median(hu[inside]) == pytest.approx(HU[organ.name], rel=0.12)
    assert np.median(hu[:5, :5]) == HU["air"]
    assert hu.min() >= -1024


def test_noise_has_its_standard_deviation_and_is_correlated_in_plane_only() -> None:
    options: dict[str, Any] = {"shape": (64, 64, 16), "spacing": (0.8, 0.8, 2.5), "centre": (70.0, 10.0, 40.0)}
    smooth, rough = (voxels(make_phantom(**options, noise=sd)[0]).astype(float) for sd in (0.0, 20.0))
    noise = rough - smooth
    assert noise.std() == pytest.approx(20, rel=0.05)
    assert abs(noise.mean()) < 1
    assert np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1] > 0.3
    assert abs(np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]) < 0.05


def test_a_seed_is_a_patient() -> None:
    small: dict[str, Any] = {"shape": (48, 48, 30), "spacing": (8.0, 8.0, 10.0)}
    first, again, other = (make_phantom(**small, seed=seed) for seed in (4, 4, 5))
    for one, two, three in zip(first, again, other, strict=True):
        assert np.array_equal(voxels(one), voxels(two))
        assert not np.array_equal(voxels(one), voxels(three))


@pytest.fixture(scope="module")
def reference() -> NDArray[np.uint8]:
    """Labels of the default patient on a grid of 3 mm, RAS: voxel (i, j, k) lies at 3 * (i - 50, j - 40, k - 40) mm."""
    _, labels = make_phantom((101, 81, 81), (3.0, 3.0, 3.0), centre=(0.0, 0.0, 0.0), orientation="RAS", noise=0)
    return np.asarray(labels.dataobj)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_geometry_does_not_depend_on_the_grid(data: st.DataObject, reference: NDArray[np.uint8]) -> None:
    # Any field of view whose voxels are among the reference grid's: another start, size and a multiple of the spacing.
    start, step, size = [], [], []
    for length in reference.shape:
        stride = data.draw(st.integers(1, 4))
        first = data.draw(st.integers(0, length - 1))
        start.append(first)
        step.append(stride)
        size.append(data.draw(st.integers(1, min(40, 1 + (length - 1 - first) // stride))))
    spacing = 3.0 * np.array(step)
    origin = 3.0 * (np.array(start) - [50, 40, 40])
    centre = origin + spacing * (np.array(size) - 1) / 2
    grid: dict[str, Any] = {"shape": tuple(size), "spacing": tuple(spacing), "centre": tuple(centre)}
    _, labels = make_phantom(**grid, orientation="RAS", noise=0)
    assert labels.affine[:3, 3] == pytest.approx(origin)
    picked = tuple(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(start, step, size, strict=True))
    # float32 coordinates may round to the other side of a surface, once in a long while.
    assert np.count_nonzero(voxels(labels) != reference[picked]) <= max(1, 1e-4 * labels.get_fdata().size)


def test_volumes_agree_between_spacings(case: tuple[nib.Nifti1Image, nib.Nifti1Image]) -> None:
    fine = np.bincount(voxels(case[1]).ravel(), minlength=5)[1:] * np.prod(SPACING)
    _, labels = make_phantom((110, 100, 60), (3.5, 3.5, 5.0), noise=0)
    coarse = np.bincount(voxels(labels).ravel(), minlength=5)[1:] * 3.5 * 3.5 * 5
    assert coarse == pytest.approx(fine, rel=0.04)


@settings(max_examples=6, deadline=None)
@given(codes=st.permutations(["LR", "PA", "SI"]), picks=st.tuples(*[st.integers(0, 1)] * 3))
def test_any_orientation_shows_the_same_patient(codes: list[str], picks: tuple[int, int, int]) -> None:
    orientation = "".join(pair[pick] for pair, pick in zip(codes, picks, strict=True))
    options: dict[str, Any] = {"shape": (20, 14, 9), "spacing": (15.0, 16.0, 30.0), "centre": (10.0, -5.0, 0.0)}
    turned = make_phantom(**options, orientation=orientation)
    for image, ras in zip(turned, make_phantom(**options, orientation="RAS"), strict=True):
        assert nib.aff2axcodes(image.affine) == tuple(orientation)
        upright = nib.as_closest_canonical(image)
        assert upright.affine == pytest.approx(ras.affine)
        assert np.array_equal(voxels(upright), voxels(ras))


def test_a_partial_view_holds_only_what_is_in_it() -> None:
    # z from 160 to 220 mm: heart and lungs. z from -20 to 20 mm: the liver is cut at both ends.
    _, chest = make_phantom((96, 72, 12), (4.0, 4.0, 5.0), centre=(0.0, 0.0, 190.0))
    assert not voxels(chest).any()
    image, middle = make_phantom((96, 72, 8), (4.0, 4.0, 5.0), centre=(0.0, 0.0, 0.0))
    liver = voxels(middle) == LIVER
    assert liver[:, :, 0].any()
    assert liver[:, :, -1].any()
    assert image.affine[2, 3] == pytest.approx(-17.5)


def test_slabs_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"shape": (40, 40, 24), "spacing": (9.0, 9.0, 12.0), "seed": 7}
    whole = make_phantom(**options)
    monkeypatch.setattr(phantom, "_SLAB_VOXELS", 5 * 40 * 40)
    for one, other in zip(whole, make_phantom(**options), strict=True):
        assert np.array_equal(voxels(one), voxels(other))


def test_files_are_read_back_as_a_ct(tmp_path: Path) -> None:
    image, labels = make_phantom((40, 30, 20), (9.0, 9.0, 12.0))
    for file, name in ((image, "phantom_0000.nii.gz"), (labels, "phantom.nii.gz")):
        save_image(file, tmp_path / name)
        loaded = load_image(tmp_path / name)
        assert np.array_equal(voxels(loaded), voxels(file))
        assert loaded.affine == pytest.approx(file.affine)
    volume = read_volume(load_image(tmp_path / "phantom_0000.nii.gz"), "phantom")
    assert volume.shape == (20, 30, 40)
    assert volume.spacing == pytest.approx((12.0, 9.0, 9.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (10, 10)}, "shape"),
        ({"shape": (10, 0, 10)}, "shape"),
        ({"spacing": (1.0, -1.0, 1.0)}, "spacing"),
        ({"spacing": (1.0, 1.0, float("nan"))}, "spacing"),
        ({"centre": (0.0, float("inf"), 0.0)}, "centre"),
        ({"orientation": "LRS"}, "orientation"),
        ({"orientation": "XYZ"}, "orientation"),
        ({"orientation": "LP"}, "orientation"),
        ({"noise": -1.0}, "noise"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_volumes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        make_phantom(**{"shape": (4, 4, 4), **options})
