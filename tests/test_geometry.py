"""Any grid that a scanner or a converter makes, from file to file: labels lie where the scan does."""

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fastorgan.cascade import Cascade
from fastorgan.phantom import make_phantom
from fastorgan.predict import Job, Settings, run_batch
from fastorgan.report import CaseRecord, Status
from fastorgan.volume import load_image, read_volume, save_image

Blocks = tuple[nib.Nifti1Image, NDArray[np.uint8]]

ORDERS = [
    (order, directions)
    for order in itertools.permutations((0, 1, 2))
    for directions in itertools.product((1, -1), repeat=3)
]
"""All 48: the axis of the image that each file axis is, and whether it runs along or against it."""


def in_order(image: nib.Nifti1Image, order: tuple[int, ...], directions: tuple[int, ...]) -> nib.Nifti1Image:
    """The same image with its axes stored in another order."""
    turned: nib.Nifti1Image = image.as_reoriented(np.array([[order.index(n), directions[n]] for n in range(3)]))
    return turned


def canonical(image: Any) -> NDArray[np.uint8]:
    return np.asarray(nib.as_closest_canonical(image).dataobj)


@pytest.mark.parametrize(("order", "directions"), ORDERS)
def test_turning_the_axes_and_segmenting_commute(
    by_hu: Cascade, blocks: Blocks, order: tuple[int, ...], directions: tuple[int, ...]
) -> None:
    image, codes = blocks
    turned = in_order(image, order, directions)
    labels = by_hu.segment(turned)
    assert labels.shape == turned.shape
    assert np.array_equal(labels.affine, turned.affine)
    assert np.array_equal(canonical(labels), canonical(by_hu.segment(image)))
    assert np.mean(canonical(labels) == codes) > 0.97


@pytest.mark.slow
def test_turning_the_axes_and_segmenting_commute_with_the_real_networks() -> None:
    pytest.importorskip("openvino")
    image, _ = make_phantom()
    known = Cascade.load("cpu")
    expected = canonical(known.segment(image))
    assert set(np.unique(expected)) == {0, 1, 2, 3, 4}
    for order, directions in ORDERS:
        found = canonical(known.segment(in_order(image, order, directions)))
        assert np.mean(found == expected) > 0.99999, (order, directions)


def run_file(source: Path, target: Path, known: Cascade, patch: pytest.MonkeyPatch) -> CaseRecord:
    with patch.context() as now:
        now.setattr(Cascade, "load", lambda *_, **__: known)
        return run_batch([Job(source, target)], Settings(device="cpu")).cases[0]


FORMS = [(0, 0), (1, 0), (0, 1), (2, 1), (4, 4), (3, 2), (1, 5)]


@st.composite
def affines(draw: st.DrawFn) -> NDArray[np.float64]:
    """Any turn, upright to steep, any order of axes, voxels of 0.3 to 10 mm, right- and left-handed, some sheared."""
    spacing = [draw(st.floats(0.3, 10)) for _ in range(3)]
    order, directions = draw(st.sampled_from(ORDERS))
    angles = draw(st.sampled_from([0.0, 0.0, 2.0, 4.0, 17.0, 45.0])) * np.array([draw(st.floats(-1, 1)) for _ in "xyz"])
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (turn @ np.eye(3)[list(order)].T) * directions * spacing
    if draw(st.booleans()):
        # A gantry tilt.
        affine[:3, 2] += affine[:3, 1] * draw(st.floats(-0.5, 0.5)) * spacing[2] / spacing[1]
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    return affine


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 30)] * 3),
    affine=affines(),
    dtype=st.sampled_from(["u1", "i1", "i2", ">i2", "u2", ">u2", "i4", "u4", "i8", "f4", ">f4", "f8"]),
    forms=st.sampled_from(FORMS),
    suffix=st.sampled_from([".nii", ".nii.gz", ".mha", ".nrrd"]),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_any_grid_and_type_gets_labels_of_its_own_geometry(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    by_hu: Cascade,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    dtype: str,
    forms: tuple[int, int],
    suffix: str,
    version: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    low, high = (0, 100) if dtype in ("u1", "i1") else (0, 2000)
    values = np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
    if suffix in (".mha", ".nrrd"):
        dtype = dtype.replace("i8", "i4")
        save_image(nib.Nifti1Image(values.astype(dtype), affine), folder / f"ct{suffix}")
    else:
        kind: Any = nib.Nifti1Image if version == 1 else nib.Nifti2Image
        header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
        header.set_data_dtype(values.dtype)
        header.set_data_shape(shape)
        header.set_qform(affine, forms[0], strip_shears=True)
        header.set_sform(affine, forms[1])
        header.set_xyzt_units("mm", "sec")
        nib.save(kind(values, None, header), folder / f"ct{suffix}")
    record = run_file(folder / f"ct{suffix}", folder / "out.nii.gz", by_hu, monkeypatch)
    assert record.status is Status.DONE, record.error
    scan, labels = load_image(folder / f"ct{suffix}"), load_image(folder / "out.nii.gz")
    assert labels.shape == scan.shape == shape
    if suffix in (".nii", ".nii.gz"):
        assert np.array_equal(labels.affine, scan.affine)
    else:
        # Their numbers are doubles, or decimal; NIfTI's are floats.
        assert np.allclose(labels.affine, scan.affine, rtol=1e-6, atol=1e-4)
    for key in ("qform_code", "sform_code"):
        assert int(labels.header[key]) == int(scan.header[key])
    assert np.array_equal(labels.header.get_sform(), scan.header.get_sform())
    assert np.allclose(labels.header.get_qform(), scan.header.get_qform(), rtol=1e-6, atol=1e-4)
    assert int(np.asarray(labels.dataobj).max()) <= 4


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), "i2"),
        ((512, 512, 1), "i2"),
        ((1, 300, 300), "i2"),
        ((64, 64, 2000), "i1"),
        ((1024, 1024, 3), "u2"),
        ((2000, 3, 64), "f4"),
    ],
)
def test_thin_long_and_wide_volumes(
    tmp_path: Path, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: str
) -> None:
    values = np.zeros(shape, dtype)
    values[tuple(slice(n // 4, n - n // 4) for n in shape)] = 50
    nib.save(nib.Nifti1Image(values, np.diag([0.7, 0.7, 1.0, 1.0])), tmp_path / "ct.nii.gz")
    record = run_file(tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", by_hu, monkeypatch)
    assert record.status is Status.DONE, record.error
    assert load_image(tmp_path / "out.nii.gz").shape == shape


@pytest.fixture(scope="module")
def real() -> Cascade:
    pytest.importorskip("openvino")
    return Cascade.load("cpu")


def head() -> nib.Nifti1Image:
    """A skull with a brain in it, and nothing else of the body."""
    z, y, x = np.mgrid[-1:1:60j, -1:1:110j, -1:1:90j]
    radius = np.sqrt(x**2 + y**2 + z**2)
    hu = np.select([radius < 0.7, radius < 0.8, radius < 0.88], [35, 1000, 20], -1000).astype(np.int16)
    return nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([2.0, 2.0, 3.0, 1.0]))


def legs() -> nib.Nifti1Image:
    """Two thighs with a bone in each."""
    y, x = np.mgrid[:128, :128]
    hu = np.full((128, 128), -1000)
    for middle in (38, 90):
        radius = np.hypot(x - middle, y - 64)
        hu = np.select([radius < 4, radius < 7, radius < 18, radius < 24], [0, 1200, 55, -100], hu)
    volume = np.repeat(hu.T[:, :, None], 100, axis=2).astype(np.int16)
    return nib.Nifti1Image(volume, np.diag([3.0, 3.0, 5.0, 1.0]))


def slab(first: float, last: float) -> nib.Nifti1Image:
    """A part of the phantom's slices, from the feet to the head."""
    image, _ = make_phantom()
    upright: Any = nib.as_closest_canonical(image)
    start, stop = (int(part * upright.shape[2]) for part in (first, last))
    part: nib.Nifti1Image = upright.slicer[:, :, start : max(stop, start + 1)]
    return part


@pytest.mark.slow
@pytest.mark.parametrize(
    "image",
    [
        pytest.param(head, id="head"),
        pytest.param(legs, id="legs"),
        pytest.param(lambda: slab(0.92, 1.0), id="top of the scan"),
        pytest.param(lambda: slab(0.0, 0.06), id="foot of the scan"),
        pytest.param(lambda: slab(0.5, 0.5), id="one slice"),
    ],
)
def test_a_scan_of_another_part_is_labelled_with_a_warning(
    tmp_path: Path, real: Cascade, monkeypatch: pytest.MonkeyPatch, image: Any
) -> None:
    nib.save(image(), tmp_path / "ct.nii.gz")
    record = run_file(tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", real, monkeypatch)
    assert record.status is Status.DONE, record.error
    assert record.warnings
    assert load_image(tmp_path / "out.nii.gz").shape == image().shape


def test_a_constant_volume_is_empty_with_a_warning(
    tmp_path: Path, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (-1000, 0, 3071):
        nib.save(nib.Nifti1Image(np.full((20, 20, 20), value, np.int16), np.diag([5.0, 5, 5, 1])), tmp_path / "ct.nii")
        record = run_file(tmp_path / "ct.nii", tmp_path / "out.nii.gz", by_hu, monkeypatch)
        assert record.status is Status.DONE, record.error
        assert record.warnings[0] == f"every voxel has the value {value}"


def test_reading_alone_keeps_every_voxel(tmp_path: Path) -> None:
    values = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
    for order, directions in ORDERS:
        nib.save(
            in_order(nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0])), order, directions), tmp_path / "a.nii"
        )
        assert np.array_equal(read_volume(load_image(tmp_path / "a.nii"), "a").array, values.transpose(2, 1, 0))
