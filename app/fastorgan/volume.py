"""CT volumes in and label volumes out: NIfTI files, orientation, spacing.

Inside fastorgan arrays are (z, y, x) with z to the head, y to the front and x to the patient's right: RAS+ in
reverse order. For a NIfTI file in memory this is a view: no voxel is moved.
"""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .box import Box
from .errors import VolumeError
from .files import whole_file
from .gzipped import DAMAGE, open_packed, pack_to
from .hounsfield import find_rescale
from .intensity import WINDOW_HU, to_unit
from .label_tables import names_extension
from .mha_nrrd import TEXT_HEADER_SUFFIXES, open_text_header, write_text_header
from .nifti import (
    MAX_HEADER_BYTES,
    MAX_VOXELS,
    PAIR_SUFFIXES,
    SUFFIXES,
    check_affine,
    form_warnings,
    open_nifti,
)
from .upright import AIR_HU, Affine, is_oblique, set_upright

INPUT_SUFFIXES = (*SUFFIXES, *PAIR_SUFFIXES, *TEXT_HEADER_SUFFIXES)
"""Endings of the names of files that hold a CT."""

OUTPUT_SUFFIXES = (*SUFFIXES, *TEXT_HEADER_SUFFIXES)
"""Endings of the names of files that labels can be written to."""

MOST_SCALED = 1e9
"""A slope or intercept beyond, or a slope below its reciprocal, is a damaged header: HU are a few thousand."""

_CHUNK = 1 << 20  # bytes unpacked at a time: unpacked in one go, the voxels would be in memory twice


@dataclass(frozen=True)
class Volume:
    """A CT ready for the cascade.

    Attributes:
        array: stored values (z, y, x), upright; HU = array * slope + intercept.
        spacing: voxel size in mm (z, y, x).
        slope, intercept: of the stored values.
        grid: how the file's own grid lies in `array`.
        warnings: what is doubtful or was mended, one line each.
    """

    array: NDArray[np.generic]
    spacing: tuple[float, float, float]
    slope: float
    intercept: float
    grid: "FileGrid"
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (z, y, x) of `array`."""
        z, y, x = self.array.shape
        return z, y, x

    def windowed(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """Clip stored values to the HU window; `unit` may then be taken of their averages instead of each of them."""
        ends = [(hu - self.intercept) / self.slope for hu in WINDOW_HU]
        low, high = min(ends), max(ends)
        if np.issubdtype(values.dtype, np.integer) and low.is_integer() and high.is_integer():
            # Much faster than on floats, which would be twice the bytes at least.
            limits = np.iinfo(str(values.dtype))
            if limits.min <= high and low <= limits.max:
                values = np.clip(values, max(int(low), limits.min), min(int(high), limits.max))
                return values.astype(np.float32)
        # Doubles that float32 cannot hold are infinite then, and clipped as well.
        with np.errstate(over="ignore"):
            return np.clip(values.astype(np.float32), np.float32(low), np.float32(high))

    def unit(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """Stored values to [0, 1] over the HU window."""
        if self.slope == 1.0 and self.intercept == 0.0:
            return to_unit(values)
        with np.errstate(over="ignore"):
            return to_unit(values.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept))


@dataclass(frozen=True)
class FileGrid:
    """The grid of a file against the upright (z, y, x) array that the cascade works on.

    Attributes:
        shape: the file's (i, j, k).
        orientation: (3, 2) as nibabel's `io_orientation`: the RAS axis and direction of each file axis.
        upright: maps indices of the reoriented file grid (z, y, x, 1) to indices of the upright array; None where
            both are the same grid, as they are unless the scan is oblique.
        dense: of an oblique scan, which voxels of the reoriented file grid may be labelled; see `upright`.
    """

    shape: tuple[int, int, int]
    orientation: NDArray[np.float64]
    upright: Affine | None = None
    dense: NDArray[np.bool_] | None = None

    def empty_labels(self) -> NDArray[np.uint8]:
        """Zeros of the file's shape, laid out as NIfTI stores them (first axis fastest)."""
        if not hasattr(mmap, "MAP_PRIVATE"):
            return np.zeros(self.shape, np.uint8, order="F")
        # NumPy asks for pages of 2 MiB: wherever there is an organ, whole slices would take memory.
        memory = mmap.mmap(-1, math.prod(self.shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(memory, np.uint8).reshape(self.shape, order="F")

    def box_in_file(self, box: Box) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """First and one past the last voxel, on the file's own axes, of the smallest box that holds `box`."""
        corners = box.corners()
        # Edge coordinates count from voxel edges, affines from centres.
        corners[:, :3] -= 0.5
        if self.upright is not None:
            corners = corners @ np.linalg.inv(self.upright).T
        corners = corners[:, [2, 1, 0, 3]] @ nib.orientations.inv_ornt_aff(self.orientation, self.shape).T
        edges = corners[:, :3] + 0.5
        low = np.clip(np.floor(edges.min(axis=0) + 1e-6), 0, self.shape).astype(int)
        high = np.clip(np.ceil(edges.max(axis=0) - 1e-6), 0, self.shape).astype(int)
        (i0, j0, k0), (i1, j1, k1) = low.tolist(), high.tolist()
        return (i0, j0, k0), (i1, j1, k1)

    def reorient(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array in the file's axes as (z, y, x); writing to the view writes to the array."""
        return np.asarray(nib.orientations.apply_orientation(array, self.orientation)).transpose(2, 1, 0)


def load_image(path: Path, max_voxels: int = MAX_VOXELS) -> nib.Nifti1Image:
    """Open a file and check its header; voxels stay on disk, but those of .mha and .nrrd are read.

    Args:
        path: NIfTI (.nii, .nii.gz, or .hdr beside .img), MetaImage (.mha) or NRRD (.nrrd).
        max_voxels: more are refused.

    Raises:
        VolumeError: if the file is missing, of another kind, or its header claims what cannot be true or does not fit
            into memory.
    """
    try:
        if not path.exists():
            raise VolumeError(f"{path}: no such file")
        if not path.is_file():
            raise VolumeError(f"{path}: not a file")
        if not path.name.endswith(INPUT_SUFFIXES):
            raise VolumeError(f"{path}: not a name of a CT volume (expected {', '.join(INPUT_SUFFIXES)})")
        return (open_text_header if path.suffix in TEXT_HEADER_SUFFIXES else open_nifti)(path, max_voxels)
    except DAMAGE as error:
        raise VolumeError(f"{path}: damaged or not readable ({_one_line(error)})") from error


def read_volume(image: nib.Nifti1Image, name: str, *, hounsfield: bool = True) -> Volume:
    """Read a CT image's voxels and set them upright.

    What is wrong without doubt is mended and said in `Volume.warnings`: NaN and infinity become air, values that are
    not HU by a usual error become HU (`hounsfield.find_rescale`).

    Args:
        image: one three-dimensional volume, in memory or on disk; a fourth axis of length 1 is dropped.
        name: stands in error messages for the image, usually its file name.
        hounsfield: whether the values should be HU; False for labels.

    Raises:
        VolumeError: if the image is not three-dimensional, is cut short or damaged, holds no finite number, colours or
            complex numbers, its affine is singular, or it does not fit into memory.
    """
    shape = _three_axes(image.shape, name)
    affine = np.asarray(image.affine, float)
    check_affine(affine, name)
    orientation = nib.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise VolumeError(f"{name}: the affine does not tell the axes apart; mend the header")
    stored, slope, intercept, warnings = read_values(image, name, hounsfield=hounsfield)
    grid = FileGrid(shape, orientation)
    array = grid.reorient(stored)
    # Affine of the reoriented (z, y, x) grid to RAS mm in the order (z, y, x).
    turned = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    turned = turned[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
    z, y, x = (float(n) for n in nib.affines.voxel_sizes(turned))
    if is_oblique(turned):
        array, upright, dense = set_upright(array, turned, (slope, intercept), name)
        grid = FileGrid(shape, orientation, upright, dense)
    return Volume(array, (z, y, x), slope, intercept, grid, tuple(warnings))


def read_values(
    image: nib.Nifti1Image, name: str, *, hounsfield: bool = True
) -> tuple[NDArray[np.generic], float, float, list[str]]:
    """Read a CT image's voxels on the file's own grid, mended as `read_volume` says.

    Args:
        image, name, hounsfield: as `read_volume` takes them.

    Returns:
        Stored values in the file's axes, the slope and the intercept that make HU of them, and what was mended.

    Raises:
        VolumeError: as `read_volume`.
    """
    shape = _three_axes(image.shape, name)
    stored, slope, intercept = _stored_values(image, name)
    if not (1 / MOST_SCALED < abs(slope) < MOST_SCALED and abs(intercept) < MOST_SCALED):
        raise VolumeError(
            f"{name}: a slope of {slope:g} and an intercept of {intercept:g} are no CT's; mend the header"
        )
    stored = stored.reshape(shape, order="A")
    warnings = form_warnings(image.header)
    stored, lost = _without_nan(stored, slope, intercept, name)
    warnings += lost
    if hounsfield:
        rescale = find_rescale(stored, slope, intercept)
        slope, intercept = rescale.slope, rescale.intercept
        if rescale.wrapped:
            stored = stored.view(stored.dtype.str.replace("u", "i"))
        if rescale.warning is not None:
            warnings.append(rescale.warning)
    return stored, slope, intercept, warnings


def label_image(labels: NDArray[np.uint8], like: nib.Nifti1Image) -> nib.Nifti1Image:
    """Make a label image with the geometry of `like`: shape, affine, qform, sform and their codes.

    Args:
        labels: in `like`'s axes.
        like: the CT.

    Returns:
        A uint8 image of `like`'s NIfTI version with slope 1 and intercept 0, without `like`'s texts and extensions; an
        extension of its own names the labels.
    """
    kind: Any = nib.Nifti2Image if isinstance(like, nib.Nifti2Image) else nib.Nifti1Image
    if isinstance(like.header, nib.Nifti1Header):
        image: nib.Nifti1Image = kind(labels.reshape(like.shape), like.affine, like.header)
    else:
        image = kind(labels.reshape(like.shape), like.affine)
    header: Any = image.header
    header.extensions.clear()
    header.extensions.append(names_extension())
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0
    for text in ("descrip", "aux_file", "intent_name", "db_name"):
        if text in header:
            header[text] = b""
    return image


def stem(path: Path) -> str:
    """A file's name without its suffix, such as .nii.gz; the whole name where nothing would be left."""
    for suffix in INPUT_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix) or path.name
    return path.name


def make_folder(folder: Path) -> None:
    """Make a folder for volumes, and those above it, where there is none.

    Raises:
        VolumeError: if it cannot be made, or not written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be made ({error.strerror or error})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeError(f"{folder}: cannot be written to; choose another folder, or mend its permissions")


def save_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image so that `path` is either absent, as it was, or whole.

    Raises:
        VolumeError: if the name ends in none of `OUTPUT_SUFFIXES`, the folder cannot be written to, or the disk is
            full.
    """
    suffix = next((s for s in OUTPUT_SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise VolumeError(f"{path}: the name of a label file must end in {', '.join(OUTPUT_SUFFIXES)}")
    try:
        with whole_file(path, suffix) as partial:
            if suffix in TEXT_HEADER_SUFFIXES:
                write_text_header(image, partial, suffix)
            elif suffix == ".nii":
                nib.save(image, partial)
            else:
                with pack_to(partial) as stream:
                    image.to_stream(stream)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written ({error.strerror or _one_line(error)})") from error


def _three_axes(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) < 3:
        raise VolumeError(f"{name}: has {len(shape)} axes; a CT volume has 3")
    if any(n != 1 for n in shape[3:]):
        volumes = int(np.prod(shape[3:]))
        raise VolumeError(f"{name}: holds {volumes} volumes; give one three-dimensional volume per file")
    if min(shape) < 1:
        raise VolumeError(f"{name}: has no voxels (shape {' x '.join(map(str, shape))})")
    i, j, k = (int(n) for n in shape[:3])
    return i, j, k


def _stored_values(image: nib.Nifti1Image, name: str) -> tuple[NDArray[np.generic], float, float]:
    """Voxels as stored, with slope and intercept apart, so that integers stay integers."""
    proxy: Any = image.dataobj
    if np.dtype(proxy.dtype).kind not in "biuf":
        raise VolumeError(f"{name}: holds colours or complex numbers; a CT volume has one real number per voxel")
    try:
        if not nib.is_proxy(proxy):
            return np.asanyarray(proxy), 1.0, 0.0
        packed = isinstance(proxy.file_like, str) and proxy.file_like.endswith(".gz")
        stored = _unpacked(proxy) if packed else np.asanyarray(proxy.get_unscaled())
        return stored, float(proxy.slope), float(proxy.inter)
    except DAMAGE as error:
        raise VolumeError(f"{name}: damaged, its voxels cannot be read ({_one_line(error)})") from error
    except MemoryError as error:
        size = " x ".join(map(str, image.shape))
        raise VolumeError(f"{name}: {size} voxels cannot be read into this machine's memory") from error


def _unpacked(proxy: Any) -> NDArray[np.generic]:
    """Read a .gz file to its very end, where its checksum lies: nibabel stops at the last voxel and never checks it."""
    stored: NDArray[np.generic] = np.empty(proxy.shape, proxy.dtype, order=proxy.order)
    room = stored.reshape(-1, order=proxy.order).view(np.uint8).data
    with open_packed(proxy.file_like) as stream:
        stream.seek(proxy.offset)
        filled = 0
        while filled < len(room):
            count = stream.readinto(room[filled : filled + _CHUNK])
            if not count:
                raise EOFError(f"expected {len(room)} bytes, got {filled}")
            filled += count
        behind = 0
        while count := len(stream.read(_CHUNK)):
            behind += count
            if behind > MAX_HEADER_BYTES:
                raise ValueError("it goes on long after its last voxel")
    return stored


def _without_nan(
    stored: NDArray[np.generic], slope: float, intercept: float, name: str
) -> tuple[NDArray[np.generic], list[str]]:
    """Put air in the place of NaN and infinity, which tools leave where there was no measurement, and say so."""
    if not np.issubdtype(stored.dtype, np.inexact):
        return stored, []
    # Slice by slice along the slowest axis: a mask of the whole volume would be as large as the volume.
    lost = sum(int(np.count_nonzero(~np.isfinite(part))) for part in _slices(stored))
    if lost == 0:
        return stored, []
    if lost == stored.size:
        raise VolumeError(f"{name}: holds no finite number, only NaN or infinity")
    # The caller's image stays as it is.
    mended = stored.copy(order="K")
    for part in _slices(mended):
        part[~np.isfinite(part)] = (AIR_HU - intercept) / slope
    return mended, [f"{lost} voxels ({lost / stored.size:.1%}) are NaN or infinite and were taken for air"]


def _slices(array: NDArray[np.generic]) -> NDArray[Any]:
    """The array with its slowest axis first."""
    return array.transpose() if array.flags.f_contiguous else array


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
