import gzip
import itertools
import logging
import os
import re
import resource
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fastorgan.box import Box
from fastorgan.errors import VolumeError
from fastorgan.label_tables import names_extension
from fastorgan.restore import restore_labels
from fastorgan.upright import DEEP, OBLIQUE_DEGREES
from fastorgan.volume import FileGrid, Volume, label_image, load_image, read_volume, save_image

AFFINE = np.diag([0.75, 1.5, 5.0, 1.0])
AFFINE[:3, 3] = (-20, 30, -40)
"""Upright, 0.75 x 1.5 x 5 mm; all numbers have an exact binary form."""

# Where the NIfTI-1 header holds what; (offset, format).
DIM, DATATYPE, BITPIX, PIXDIM = (40, "8h"), (70, "h"), (72, "h"), (76, "8f")
VOX_OFFSET, SLOPE, INTER, CODES = (108, "f"), (112, "f"), (116, "f"), (252, "2h")
GEOMETRY = slice(252, 328)
"""Both codes, the quaternion, its offsets and the sform's rows."""

EXTENSION_SIZE = 8 + len(names_extension().get_content())
"""Bytes of the extension that names the labels, before the voxels."""

Write = Callable[[Path], None]


def numbers(shape: tuple[int, ...], dtype: str = "i2") -> NDArray[Any]:
    """0, 1, 2 and so on; no two voxels alike."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def open_volume(path: Path) -> Volume:
    return read_volume(load_image(path), str(path))


def loaded(path: Path) -> Any:
    """The file as nibabel alone reads it."""
    return nib.load(path)


def header_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content)[:352]


def field(path: Path, where: tuple[int, str], order: str = "<") -> tuple[float, ...]:
    return struct.unpack_from(order + where[1], header_bytes(path), where[0])


def patch(path: Path, *changes: tuple[tuple[int, str], tuple[float, ...]]) -> None:
    """Overwrite fields of a file's header."""
    raw = path.read_bytes()
    content = bytearray(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    for (offset, form), values in changes:
        struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def image_of(array: NDArray[Any], affine: NDArray[np.float64] = AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(array, affine)


def image_with_forms(
    array: NDArray[Any], qform: NDArray[np.float64], qcode: int, sform: NDArray[np.float64], scode: int
) -> nib.Nifti1Image:
    """An image whose header holds two matrices; from an affine nibabel would make both codes and matrices itself."""
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_qform(qform, qcode)
    header.set_sform(sform, scode)
    return nib.Nifti1Image(array, None, header)


# Reading


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_type_is_read_as_it_is_stored(
    tmp_path: Path, suffix: str, dtype: str, order: str, kind: type[nib.Nifti1Image]
) -> None:
    array = numbers((3, 4, 5), dtype)
    path = tmp_path / f"ct{suffix}"
    header = kind.header_class(endianness=order)
    header.set_data_dtype(array.dtype)
    nib.save(kind(array, AFFINE, header), path)
    volume = open_volume(path)
    assert volume.array.dtype.str[1:] == dtype
    assert np.array_equal(volume.array, array.transpose(2, 1, 0))
    assert volume.shape == (5, 4, 3)
    assert volume.spacing == (5.0, 1.5, 0.75)
    assert (volume.slope, volume.intercept) == (1.0, 0.0)
    assert volume.grid.shape == (3, 4, 5)
    assert volume.grid.upright is None


def test_slope_and_intercept_stay_apart_from_integers(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii"
    nib.save(image_of(numbers((3, 4, 5))), path)
    patch(path, (SLOPE, (2.0,)), (INTER, (-50.0,)))
    volume = open_volume(path)
    assert volume.array.dtype == np.int16
    assert (volume.slope, volume.intercept) == (2.0, -50.0)
    # In memory, not mapped: a file that is cut short while it is worked on would end the process (SIGBUS).
    memory: Any = volume.array
    while isinstance(memory, np.ndarray):
        assert not isinstance(memory, np.memmap)
        memory = memory.base
    # 25 is stored for 0 HU, 50 for 50 HU.
    assert volume.unit(np.array([25, 50], np.int16)) == pytest.approx([0.4, 0.5])


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", "i4", "u4", "i8", "f4", ">f4", "f8"])
@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(1.0, 0.0), (1.0, -1024.0), (2.0, -50.0), (0.1, 3.0), (-1.0, 0.0), (1.0, 1e5), (1.0, -1e5), (1e-3, 0.0)],
)
def test_clipping_before_averaging_is_the_window(dtype: str, slope: float, intercept: float) -> None:
    values = np.linspace(-3000, 3000, 601).clip(*limits_of(dtype)).astype(dtype)
    grid = FileGrid((1, 1, 1), nib.orientations.io_orientation(np.eye(4)))
    volume = Volume(values.reshape(1, 1, -1), (1.0, 1.0, 1.0), slope, intercept, grid)
    clipped = volume.windowed(values)
    assert clipped.dtype == np.float32
    assert volume.unit(clipped) == pytest.approx(volume.unit(values), abs=1e-4)
    # The average may be taken before or after.
    assert volume.unit(clipped[:600].reshape(-1, 2).mean(axis=1)) == pytest.approx(
        volume.unit(values[:600]).reshape(-1, 2).mean(axis=1), abs=1e-4
    )


def limits_of(dtype: str) -> tuple[float, float]:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return -np.inf, np.inf
    limits = np.iinfo(str(kind))
    return limits.min, limits.max


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_a_slope_that_means_none_is_one(tmp_path: Path, slope: float) -> None:
    path = tmp_path / "ct.nii"
    nib.save(image_of(numbers((3, 4, 5))), path)
    patch(path, (SLOPE, (slope,)), (INTER, (7.0,)))
    volume = open_volume(path)
    assert (volume.slope, volume.intercept) == (1.0, 0.0)


def test_no_voxel_is_copied_in_memory() -> None:
    array = np.asfortranarray(numbers((3, 4, 5)))
    volume = read_volume(image_of(array, np.diag([-1.0, 1.0, -2.0, 1.0])), "test")
    assert np.shares_memory(volume.array, array)
    assert volume.array.dtype == np.int16


def test_a_fourth_axis_of_one_volume_is_dropped(tmp_path: Path) -> None:
    array = numbers((3, 4, 5))
    for axes, path in ((1, tmp_path / "a.nii"), (2, tmp_path / "b.nii.gz")):
        nib.save(image_of(array.reshape(3, 4, 5, *[1] * axes)), path)
        volume = open_volume(path)
        assert np.array_equal(volume.array, array.transpose(2, 1, 0))
        assert volume.grid.shape == (3, 4, 5)


def test_a_single_slice_is_a_volume(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii"
    nib.save(image_of(numbers((3, 4, 1))), path)
    assert open_volume(path).shape == (1, 4, 3)


TURNED = np.array([[0, -0.75, 0, 5.0], [1.5, 0, 0, 7.0], [0, 0, -5.0, 9.0], [0, 0, 0, 1.0]])
"""First axis to the front at 1.5 mm, second to the left at 0.75 mm, third to the feet at 5 mm."""


def turned_upright(array: NDArray[Any]) -> NDArray[Any]:
    """What TURNED means for an array in the file's axes: (z, y, x) are the third from its end, first, second back."""
    return array.transpose(2, 0, 1)[::-1, :, ::-1]


@pytest.mark.parametrize(
    ("qcode", "scode", "qform", "sform"),
    [
        (1, 0, TURNED, AFFINE),
        (3, 0, TURNED, AFFINE),
        (0, 1, AFFINE, TURNED),
        (0, 4, AFFINE, TURNED),
        (1, 2, TURNED, TURNED),
        # The sform goes before the qform.
        (4, 1, AFFINE, TURNED),
        (1, 1, AFFINE, TURNED),
    ],
)
def test_geometry_comes_from_sform_or_qform(
    tmp_path: Path, qcode: int, scode: int, qform: NDArray[np.float64], sform: NDArray[np.float64]
) -> None:
    array = numbers((4, 3, 5))
    nib.save(image_with_forms(array, qform, qcode, sform, scode), tmp_path / "ct.nii")
    assert field(tmp_path / "ct.nii", CODES) == (qcode, scode)
    volume = open_volume(tmp_path / "ct.nii")
    assert np.array_equal(volume.array, turned_upright(array))
    assert volume.spacing == pytest.approx((5.0, 1.5, 0.75))


def test_without_either_form_the_first_axis_runs_to_the_left(tmp_path: Path) -> None:
    array = numbers((3, 4, 5))
    nib.save(image_with_forms(array, AFFINE, 0, TURNED, 0), tmp_path / "ct.nii")
    assert field(tmp_path / "ct.nii", CODES) == (0, 0)
    volume = open_volume(tmp_path / "ct.nii")
    assert np.array_equal(volume.array, array.transpose(2, 1, 0)[:, :, ::-1])
    assert volume.spacing == (5.0, 1.5, 0.75)


# Axes

ORIENTATIONS = [
    (order, directions)
    for order in itertools.permutations((0, 1, 2))
    for directions in itertools.product((1, -1), repeat=3)
]
"""The patient axis (x, y, z) of each file axis, and whether the file axis runs along it."""

Orientation = tuple[tuple[int, ...], tuple[int, ...]]


def to_file_axes(upright: NDArray[Any], orientation: Orientation) -> NDArray[Any]:
    """An array over (x, y, z), towards right, front and head, as the file's axes have it."""
    order, directions = orientation
    return upright.transpose(order)[tuple(slice(None, None, d) for d in directions)]


def file_affine(shape: tuple[int, ...], spacing: tuple[float, ...], orientation: Orientation) -> NDArray[np.float64]:
    """The affine for `to_file_axes` of an array over (x, y, z) of `shape` whose voxel (0, 0, 0) is at (-3, 8, 20)."""
    affine = np.eye(4)
    affine[:3, 3] = (-3, 8, 20)
    for axis, (patient, direction) in enumerate(zip(*orientation, strict=True)):
        affine[:3, axis] = 0
        affine[patient, axis] = direction * spacing[patient]
        if direction < 0:
            affine[patient, 3] += (shape[patient] - 1) * spacing[patient]
    return affine


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_files_of_any_orientation_are_read_upright(tmp_path: Path, orientation: Orientation) -> None:
    upright = numbers((3, 4, 5))
    affine = file_affine(upright.shape, (0.75, 1.5, 5.0), orientation)
    nib.save(image_of(to_file_axes(upright, orientation), affine), tmp_path / "ct.nii")
    volume = open_volume(tmp_path / "ct.nii")
    assert np.array_equal(volume.array, upright.transpose(2, 1, 0))
    assert volume.spacing == (5.0, 1.5, 0.75)
    labels = volume.grid.empty_labels()
    volume.grid.reorient(labels)[...] = upright.transpose(2, 1, 0)
    assert labels.flags.f_contiguous
    assert np.array_equal(labels, to_file_axes(upright, orientation))


@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.tuples(*[st.integers(1, 40).map(lambda n: n / 8)] * 3),
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.floats(-np.radians(1.5), np.radians(1.5))] * 3),
    st.integers(0, 2**32 - 1),
)
def test_labels_come_back_in_the_files_axes(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    orientation: Orientation,
    tilt: tuple[float, float, float],
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    upright = random.integers(-1024, 3072, shape).astype(np.int16)
    affine = file_affine(shape, spacing, orientation)
    # A little off the patient's axes, as a patient lies on the table.
    affine[:3, :3] = Rotation.from_rotvec(np.array(tilt) / 3**0.5).as_matrix() @ affine[:3, :3]
    volume = read_volume(image_of(to_file_axes(upright, orientation), affine), "test")
    assert volume.grid.upright is None
    assert np.array_equal(volume.array, upright.transpose(2, 1, 0))
    assert volume.spacing == pytest.approx(spacing[::-1])
    codes = random.integers(0, 5, shape).astype(np.uint8)
    margins = {
        code: np.where(codes == code, np.float32(1), np.float32(-1)).transpose(2, 1, 0)
        for code in range(1, 5)
        if (codes == code).any()
    }
    labels = restore_labels(margins, Box.whole(volume.shape), volume)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, to_file_axes(codes, orientation))


@given(st.sampled_from(ORIENTATIONS), st.data())
def test_a_box_is_told_on_the_files_axes(orientation: Orientation, data: st.DataObject) -> None:
    shape = (7, 8, 9)
    volume = read_volume(
        image_of(
            np.zeros(to_file_axes(np.zeros(shape), orientation).shape, np.int16),
            file_affine(shape, (1, 2, 3), orientation),
        ),
        "test",
    )
    spans = [
        sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)).filter(lambda s: s[0] != s[1]))) for n in shape
    ]
    inside = np.zeros(shape, bool)
    inside[tuple(slice(a, b) for a, b in spans)] = True
    (x0, x1), (y0, y1), (z0, z1) = spans
    # Faces within a voxel belong to that voxel.
    box = Box((z0 + 0.25, y0 + 0.5, x0 + 0.75), (z1 - 0.5, y1 - 0.25, x1 - 0.125))
    start, stop = volume.grid.box_in_file(box)
    found = np.zeros(volume.grid.shape, bool)
    found[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    assert np.array_equal(found, to_file_axes(inside, orientation))


# Oblique grids


def oblique(degrees: float, axis: int = 0) -> NDArray[np.float64]:
    affine = AFFINE.copy()
    affine[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * np.eye(3)[axis]).as_matrix() @ AFFINE[:3, :3]
    return affine


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grids_turned_beyond_the_limit_are_set_upright(axis: int) -> None:
    array = numbers((6, 7, 8))
    assert read_volume(image_of(array, oblique(OBLIQUE_DEGREES - 0.1, axis)), "test").grid.upright is None
    assert read_volume(image_of(array, oblique(OBLIQUE_DEGREES + 0.1, axis)), "test").grid.upright is not None


@given(
    st.sampled_from(["i2", "u2", ">i2", "f4", "f8"]),
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1),
    st.floats(8, 30),
)
def test_an_upright_grid_shows_the_patient_at_the_same_place(
    dtype: str, orientation: Orientation, direction: tuple[float, float, float], degrees: float
) -> None:
    shape, spacing = (9, 10, 11), (2.0, 1.5, 3.0)
    affine = file_affine(shape, spacing, orientation)
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array(direction) / np.linalg.norm(direction))
    affine[:3, :3] = turn.as_matrix() @ affine[:3, :3]
    file_shape = to_file_axes(np.zeros(shape), orientation).shape
    # Where each voxel lies in mm, and stored values that are linear in it, so that resampling is exact but for
    # rounding.
    places = np.moveaxis(np.indices(file_shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    values = np.rint(places @ (12, 8, 4) + 1000).astype(dtype)
    volume = read_volume(image_of(values, affine), "test")
    upright = volume.grid.upright
    assert upright is not None
    assert volume.array.dtype.kind == np.dtype(dtype).kind
    assert volume.spacing == pytest.approx(spacing[::-1])
    # Indices in the upright array of the file's voxels, reoriented to (z, y, x): every one lies inside.
    at = np.moveaxis(np.indices(volume.grid.reorient(values).shape), 0, -1) @ upright[:3, :3].T
    at += upright[:3, 3]
    assert at.min() > -1e-6
    assert (at.reshape(-1, 3).max(axis=0) < np.array(volume.shape) - 1 + 1e-6).all()
    # One mm place of index (0, 0, 0) fits all voxels.
    mm = np.stack([volume.grid.reorient(places[..., axis]) for axis in (2, 1, 0)], axis=-1)
    corners = (mm - at * volume.spacing).reshape(-1, 3)
    assert np.ptp(corners, axis=0) == pytest.approx([0, 0, 0], abs=1e-6)
    z, y, x = np.indices(volume.shape) * np.reshape(volume.spacing, (3, 1, 1, 1)) + corners[0].reshape(3, 1, 1, 1)
    # Where the upright array's voxels lie in the scan: between its centres, within a voxel of them, or outside.
    back = np.linalg.inv(upright)
    there = np.moveaxis(np.indices(volume.shape), 0, -1) @ back[:3, :3].T + back[:3, 3]
    last = np.array(mm.shape[:3]) - 1
    beyond = np.maximum(-there, there - last).max(axis=-1)
    inside = beyond <= 0
    assert inside.sum() > 0.4 * values.size
    # Stored values are rounded by half a unit, and the result again. Deep inside cubic splines make up to 1.549 times
    # as much of the first along each axis, the norm of interpolation by them.
    off = np.abs(volume.array - (12 * x + 8 * y + 4 * z + 1000))
    deep = ((there > DEEP - 0.01) & (there < last - DEEP + 0.01)).all(axis=-1)
    assert off[inside & ~deep].max() <= 1.01
    assert off[inside].max() <= 0.5 * 1.549**3 + 0.51
    assert volume.array[beyond < 0.999].min() >= values.min()
    assert set(np.unique(volume.array[beyond > 1.001])) <= {0 if np.dtype(dtype).kind == "u" else -1024}


def test_what_an_oblique_scan_does_not_show_is_air(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii"
    nib.save(
        image_of(np.full((12, 12, 12), 1000, np.int16), np.diag([2.0, 2, 2, 1]) @ oblique(20) @ np.linalg.inv(AFFINE)),
        path,
    )
    volume = open_volume(path)
    assert set(np.unique(volume.array)) == {-1024, 1000}
    # Stored with another slope and intercept air is another number.
    patch(path, (SLOPE, (2.0,)), (INTER, (-1124.0,)))
    assert set(np.unique(open_volume(path).array)) == {50, 1000}


def test_air_that_the_type_cannot_hold_is_its_end() -> None:
    array = np.full((12, 12, 12), 1000, np.uint16)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", 20, degrees=True).as_matrix()
    assert set(np.unique(read_volume(image_of(array, affine), "test").array)) == {0, 1000}


def test_a_sheared_grid_is_set_upright() -> None:
    # A gantry tilt: slices move to the front as they go up, and stay parallel.
    affine = np.eye(4)
    affine[1, 2] = np.tan(np.radians(15))
    assert read_volume(image_of(numbers((6, 7, 8)), affine), "test").grid.upright is not None


# Files that are refused


def good(path: Path, array: NDArray[Any] | None = None) -> None:
    nib.save(image_of(numbers((3, 4, 5)) if array is None else array), path)


def patched(*changes: tuple[tuple[int, str], tuple[float, ...]]) -> Write:
    def write(path: Path) -> None:
        good(path)
        patch(path, *changes)

    return write


def holding(content: bytes) -> Write:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def renamed(name: str) -> Write:
    """A good file under another kind's name."""

    def write(path: Path) -> None:
        good(path.parent / name)
        (path.parent / name).rename(path)

    return write


def cut_to(size: int) -> Write:
    def write(path: Path) -> None:
        good(path)
        os.truncate(path, size)

    return write


def of(array: NDArray[Any], affine: NDArray[np.float64] = AFFINE) -> Write:
    return lambda path: nib.save(image_of(array, affine), path)


def with_affine(*rows: list[float]) -> Write:
    """A file whose sform is written as it is; nibabel would refuse some."""
    return patched((CODES, (0, 1)), ((280, "12f"), tuple(itertools.chain(*rows))))


def with_spacing(*spacing: float, sform: bool) -> Write:
    return patched(((80, "3f"), spacing), (CODES, (0, 1) if sform else (1, 0)))


RGB = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])

REFUSED: dict[str, tuple[str, Write, str]] = {
    "missing": ("ct.nii.gz", lambda path: None, "no such file"),
    "folder": ("ct.nii.gz", lambda path: path.mkdir(), "not a file"),
    "other suffix": ("ct.txt", holding(b"ObjectType = Image\n"), "not a name of a CT volume"),
    "upper case": ("ct.NII.GZ", holding(b""), "not a name of a CT volume"),
    "name too long": ("x" * 300 + ".nii.gz", lambda path: None, "name too long"),
    "empty": ("ct.nii", holding(b""), "is empty"),
    "empty gz": ("ct.nii.gz", holding(b""), "is empty"),
    "gz of nothing": ("ct.nii.gz", holding(gzip.compress(b"")), "is empty"),
    "text": ("ct.nii", holding(b"<html><body>404 Not Found</body></html>\n" * 20), "not a NIfTI file"),
    "text called gz": ("ct.nii.gz", holding(b"patient,age\n1,60\n" * 50), "Not a gzipped file"),
    "text within gz": ("ct.nii.gz", holding(gzip.compress(b"patient,age\n" * 50)), "not a NIfTI file"),
    "nii called gz": ("ct.nii.gz", renamed("a.nii"), "Not a gzipped file"),
    "gz called nii": ("ct.nii", renamed("a.nii.gz"), r"packed with gzip; call it ct\.nii\.gz"),
    "half a header": ("ct.nii", holding(b"\x5c\x01\0\0" + bytes(100)), "ends within its header"),
    "no voxels in nii": ("ct.nii", cut_to(352), "claims 472 bytes, it can hold 352"),
    "cut nii": ("ct.nii", cut_to(352 + 100), "claims 472 bytes, it can hold 452"),
    "two axes": ("ct.nii", of(numbers((3, 4))), "has 2 axes"),
    "four volumes": ("ct.nii.gz", of(numbers((3, 4, 5, 4))), "holds 4 volumes"),
    "six volumes in five axes": ("ct.nii.gz", of(numbers((3, 4, 5, 2, 3))), "holds 6 volumes"),
    "no voxel": ("ct.nii", patched((DIM, (3, 3, 0, 5, 1, 1, 1, 1))), "no voxels"),
    "negative axis": ("ct.nii", patched((DIM, (3, 3, -4, 5, 1, 1, 1, 1))), "axis of -4 voxels"),
    "too many voxels": ("ct.nii", patched((DIM, (3, 30000, 30000, 30000, 1, 1, 1, 1))), "more than 2147483648"),
    "too many voxels in gz": (
        "ct.nii.gz",
        patched((DIM, (3, 30000, 30000, 30000, 1, 1, 1, 1))),
        "more than 2147483648",
    ),
    "a hundred more voxels in gz": ("ct.nii.gz", patched((DIM, (3, 3, 4, 105, 1, 1, 1, 1))), "cannot be read"),
    "unknown type": ("ct.nii", patched((DATATYPE, (77,))), "data code 77"),
    "colours": ("ct.nii", of(RGB), "colours or complex numbers"),
    "complex": ("ct.nii", of(numbers((3, 4, 5), "c8")), "colours or complex numbers"),
    "voxels before the end of the header": ("ct.nii", patched((VOX_OFFSET, (12.0,))), "vox offset 12"),
    "voxels past the end": ("ct.nii", patched((VOX_OFFSET, (1e9,))), "begin 1000000000 bytes into it"),
    "voxels past the end, though not far": ("ct.nii", patched((VOX_OFFSET, (1e6,))), "cut short"),
    "voxels nowhere": ("ct.nii", patched((VOX_OFFSET, (np.nan,))), "begin nan bytes into it"),
    "voxels behind all": ("ct.nii", patched((VOX_OFFSET, (np.inf,))), "begin inf bytes into it"),
    "voxels before all": ("ct.nii.gz", patched((VOX_OFFSET, (-np.inf,))), "begin -inf bytes into it"),
    "slope of 1e30": (
        "ct.nii",
        patched((SLOPE, (1e30,)), (INTER, (0.0,))),
        "slope of 1e.30 and an intercept of 0 are no",
    ),
    "slope of 1e-30": ("ct.nii", patched((SLOPE, (1e-30,)), (INTER, (0.0,))), "slope of 1e-30 and"),
    "intercept of -1e30": ("ct.nii", patched((SLOPE, (1.0,)), (INTER, (-1e30,))), "intercept of -1e.30 are no CT's"),
    "affine of 1e300": ("ct.nii", with_affine([1e38, 0, 0, 0], [0, 1e38, 0, 0], [0, 0, 1e38, 0]), "are no CT's"),
    "intercept NaN": ("ct.nii", patched((SLOPE, (2.0,)), (INTER, (np.nan,))), "invalid intercept"),
    "nothing but NaN": ("ct.nii", of(np.full((3, 4, 5), np.nan, "f4")), "no finite number"),
    "nothing but infinity": ("ct.nii.gz", of(np.full((3, 4, 5), -np.inf, "f8")), "no finite number"),
    "zero spacing": ("ct.nii", with_spacing(0.75, 1.5, 0.0, sform=False), r"0\.75 x 1\.5 x 0 mm"),
    "zero spacing beside a sform": ("ct.nii.gz", with_spacing(0.75, 0.0, 5.0, sform=True), r"0\.75 x 0 x 5 mm"),
    "negative spacing": ("ct.nii", with_spacing(0.75, -1.5, 5.0, sform=True), r"0\.75 x -1\.5 x 5 mm"),
    "spacing NaN": ("ct.nii", with_spacing(0.75, 1.5, np.nan, sform=True), r"0\.75 x 1\.5 x nan mm"),
    "singular affine": ("ct.nii", with_affine([1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]), "singular"),
    "zero affine": ("ct.nii", with_affine([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]), "singular"),
    "affine NaN": ("ct.nii", with_affine([np.nan, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]), "singular or not finite"),
    "affine infinite": ("ct.nii", with_affine([np.inf, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]), "singular or not finite"),
    "impossible quaternion": ("ct.nii", patched((CODES, (1, 0)), ((256, "3f"), (1.0, 1.0, 1.0))), "not readable"),
}


@pytest.mark.parametrize(("name", "write", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, write: Write, reason: str
) -> None:
    path = tmp_path / name
    write(path)
    caplog.clear()
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: .*{reason}.*\Z"):
        open_volume(path)
    # nibabel's own words would come on top, without the file's name.
    assert [record.message for record in caplog.records] == []


def test_what_nibabel_mends_is_mended_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ct.nii"
    good(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 108, 353.0)
    path.write_bytes(content[:352] + b"\0" + content[352:])
    level = logging.getLogger("nibabel.global").level
    assert np.array_equal(open_volume(path).array, numbers((3, 4, 5)).transpose(2, 1, 0))
    assert caplog.records == []
    assert logging.getLogger("nibabel.global").level == level


def noise(path: Path) -> None:
    """A file that gzip can hardly press, so that cuts and flips hit its voxels."""
    good(path, np.random.default_rng(0).integers(-1024, 3072, (30, 30, 30)).astype(np.int16))


@pytest.mark.parametrize("left", [1, 9, 11, 100, 352, 2000, 0.5, -20000, -100, -9, -8, -4, -1])
def test_a_gz_file_that_is_cut_short_is_refused(tmp_path: Path, left: float) -> None:
    path = tmp_path / "ct.nii.gz"
    noise(path)
    size = path.stat().st_size
    os.truncate(path, int(left * size) if isinstance(left, float) else left % size)
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: .*\Z"):
        open_volume(path)


@pytest.mark.parametrize("place", [0, 1, 2, 12, 200, 5000, 20000, 30000, -3000, -300, -8, -6, -5, -3, -1])
@pytest.mark.parametrize("bit", [1, 128])
def test_a_gz_file_with_a_flipped_bit_is_refused(tmp_path: Path, place: int, bit: int) -> None:
    path = tmp_path / "ct.nii.gz"
    noise(path)
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: .*\Z"):
        open_volume(path)


def test_a_gz_file_of_several_members_is_read(tmp_path: Path) -> None:
    # As parallel packers and concatenation make them.
    noise(tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[:9000]) + gzip.compress(content[9000:]) + bytes(512))
    assert np.array_equal(open_volume(tmp_path / "b.nii.gz").array, open_volume(tmp_path / "a.nii").array)


def test_bytes_behind_the_voxels_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    good(path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(3_000_000)))
    assert np.array_equal(open_volume(path).array, numbers((3, 4, 5)).transpose(2, 1, 0))


def test_an_image_without_affine_is_refused() -> None:
    with pytest.raises(VolumeError, match=r"^test: the affine is singular or not finite"):
        read_volume(nib.Nifti1Image(numbers((3, 4, 5)), None), "test")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_air(order: Any, bad: float) -> None:
    for place in ((0, 0, 0), (2, 3, 4), (1, 0, 4)):
        array = np.asarray(numbers((3, 4, 5), "f4"), order=order)
        array[place] = bad
        volume = read_volume(image_of(array), "test")
        expected = numbers((3, 4, 5), "f4")
        expected[place] = -1024
        assert np.array_equal(volume.array, expected.transpose(2, 1, 0))
        assert volume.warnings[0] == "1 voxels (1.7%) are NaN or infinite and were taken for air"
        assert not np.isfinite(array[place]), "the image given is changed"


# Writing


def labels_for(image: nib.Nifti1Image) -> NDArray[np.uint8]:
    labels = np.zeros(image.shape[:3], np.uint8, order="F")
    labels[0, 1, 2] = 4
    labels[-1, -1, -1] = 255
    return labels


def write_labels(source: Path, target: Path) -> None:
    image = load_image(source)
    save_image(label_image(labels_for(image), image), target)


@pytest.mark.parametrize(("qcode", "scode"), [(1, 0), (0, 1), (3, 4), (0, 0), (2, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("qfac", [1, -1])
def test_labels_have_the_scans_geometry_to_the_bit(
    tmp_path: Path, qcode: int, scode: int, suffix: str, qfac: int
) -> None:
    source, target = tmp_path / f"ct{suffix}", tmp_path / f"labels{suffix}"
    turn = oblique(17, 2) @ np.diag([qfac, 1, 1, 1])
    # Two matrices that differ.
    image = image_with_forms(numbers((3, 4, 5)), turn, qcode, turn @ np.diag([1, 1, 1.125, 1]), scode)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, source)
    patch(source, (SLOPE, (2.0,)), (INTER, (-1024.0,)), ((92, "4f"), (2.5, 0.0, 0.0, 0.0)))
    before = header_bytes(source)
    assert field(source, CODES) == (qcode, scode)
    assert field(source, PIXDIM)[:1] == (qfac,)
    write_labels(source, target)
    after = header_bytes(target)
    assert after[GEOMETRY] == before[GEOMETRY]
    assert after[76:108] == before[76:108], "pixdim"
    assert after[40:56] == before[40:56], "dim"
    assert after[123] == before[123], "units"
    assert field(target, DATATYPE) == (2,)
    assert field(target, BITPIX) == (8,)
    assert after[112:120] == struct.pack("<2f", 1.0, 0.0), "slope and intercept"
    assert field(target, VOX_OFFSET) == (352.0 + EXTENSION_SIZE,)
    written = loaded(target)
    assert np.array_equal(written.affine, load_image(source).affine)
    assert np.array_equal(np.asarray(written.dataobj), labels_for(image))
    # Raw bytes too: first axis fastest, nothing scaled.
    content = target.read_bytes()
    content = gzip.decompress(content) if suffix == ".nii.gz" else content
    assert content[352 + EXTENSION_SIZE :] == labels_for(image).tobytes(order="F")
    assert header_bytes(source) == before


def test_nifti_2_labels_are_nifti_2(tmp_path: Path) -> None:
    source, target = tmp_path / "ct.nii", tmp_path / "labels.nii"
    nib.save(nib.Nifti2Image(numbers((3, 4, 5), "f4"), oblique(17)), source)
    write_labels(source, target)
    before, after = source.read_bytes(), target.read_bytes()
    assert after[:12] == before[:12]
    assert struct.unpack_from("<2h", after, 12) == (2, 8)
    assert after[16:80] == before[16:80], "dim"
    assert after[104:168] == before[104:168], "pixdim"
    assert after[176:192] == struct.pack("<2d", 1.0, 0.0), "slope and intercept"
    assert after[344:500] == before[344:500], "codes, quaternion, sform, slices' codes and units"
    assert after[544 + EXTENSION_SIZE :] == labels_for(load_image(source)).tobytes(order="F")


def test_big_endian_scans_get_the_same_geometry(tmp_path: Path) -> None:
    source, target = tmp_path / "ct.nii", tmp_path / "labels.nii.gz"
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(numbers((3, 4, 5)), oblique(17), header), source)
    write_labels(source, target)
    assert header_bytes(target)[GEOMETRY] == header_bytes(source)[GEOMETRY]
    assert field(target, SLOPE, ">") == (1.0,)
    assert field(target, INTER, ">") == (0.0,)
    assert np.array_equal(np.asarray(loaded(target).dataobj), labels_for(load_image(source)))


def test_a_fourth_axis_is_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "ct.nii", tmp_path / "labels.nii"
    nib.save(image_of(numbers((3, 4, 5, 1))), source)
    write_labels(source, target)
    assert field(target, DIM) == field(source, DIM) == (4, 3, 4, 5, 1, 1, 1, 1)


def test_texts_and_extensions_stay_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "ct.nii", tmp_path / "labels.nii"
    image = image_of(numbers((3, 4, 5)))
    secret = b"Jane Doe, 1970-01-01"
    for key, size in (("descrip", 80), ("aux_file", 24), ("intent_name", 16), ("db_name", 18)):
        image.header[key] = secret[: size - 1]
    image.header["cal_max"], image.header["cal_min"] = 240, -160
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secret * 9))
    nib.save(image, source)
    assert secret in source.read_bytes()
    scan = loaded(source)
    label_image(labels_for(scan), scan)
    assert len(scan.header.extensions) == 1
    write_labels(source, target)
    content = target.read_bytes()
    assert b"Jane" not in content
    assert content[348:352] == bytes([1, 0, 0, 0])
    assert len(content) == 352 + EXTENSION_SIZE + 60
    assert struct.unpack_from("<2f", content, 124) == (0.0, 0.0)


def test_labels_in_memory_have_an_affine() -> None:
    image = image_of(numbers((3, 4, 5)), oblique(17))
    labels = label_image(labels_for(image), image)
    assert labels.get_data_dtype() == np.uint8
    assert np.array_equal(labels.affine, image.affine)
    assert np.array_equal(np.asarray(labels.dataobj), labels_for(image))


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.AnalyzeImage, nib.MGHImage])
def test_other_formats_in_memory_get_nifti_labels(kind: Any, tmp_path: Path) -> None:
    image = kind(numbers((3, 4, 5)), AFFINE)
    save_image(label_image(labels_for(image), image), tmp_path / "labels.nii")
    written = loaded(tmp_path / "labels.nii")
    assert isinstance(written, nib.Nifti1Image)
    assert np.array_equal(written.affine, image.affine)
    assert np.array_equal(np.asarray(written.dataobj), labels_for(image))


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_image(image_of(numbers((3, 4, 5))), tmp_path / "a.nii.gz")
    assert stat.S_IMODE((tmp_path / "a.nii.gz").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "other"]


def test_the_same_labels_are_the_same_bytes(tmp_path: Path) -> None:
    image = image_of(numbers((3, 4, 5)))
    save_image(image, tmp_path / "a.nii.gz")
    save_image(image, tmp_path / "b.nii.gz")
    first, second = (gzip.decompress((tmp_path / name).read_bytes()) for name in ("a.nii.gz", "b.nii.gz"))
    assert first == second


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(b"old")
    save_image(image_of(numbers((3, 4, 5))), path)
    assert np.array_equal(np.asarray(loaded(path).dataobj), numbers((3, 4, 5)))


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_things_as_they_were(tmp_path: Path, suffix: str, old: bytes | None) -> None:
    path = tmp_path / f"a{suffix}"
    if old is not None:
        path.write_bytes(old)
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 100)).astype(np.uint8)
    with disk_of(300_000), pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: cannot be written \(.*\)\Z"):
        save_image(image_of(noise), path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else [path.name])
    assert old is None or path.read_bytes() == old


def test_an_interrupted_write_leaves_things_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(image: object, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", save)
    with pytest.raises(KeyboardInterrupt):
        save_image(image_of(numbers((3, 4, 5))), tmp_path / "a.nii")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "a.nii.gz", tmp_path / "file" / "a.nii.gz"):
        with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: cannot be written \(.*\)\Z"):
            save_image(image_of(numbers((3, 4, 5))), path)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.mkdir()
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: cannot be written \(.*\)\Z"):
        save_image(image_of(numbers((3, 4, 5))), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(VolumeError, match="cannot be written"):
            save_image(image_of(numbers((3, 4, 5))), tmp_path / "a.nii.gz")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["labels", "labels.nii.bz2", "labels.img", "labels.gz", "labels.NII"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(VolumeError, match=r"must end in \.nii\.gz, \.nii, \.mha, \.nrrd\Z"):
        save_image(image_of(numbers((3, 4, 5))), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
