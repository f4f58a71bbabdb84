"""CT volumes in and label volumes out: NIfTI files, orientation, spacing.

Inside fastorgan arrays are (z, y, x) with z to the head, y to the front and x to the patient's right: RAS+ in
reverse order. For a NIfTI file in memory this is a view: no voxel is moved.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .box import Box
from .errors import VolumeError
from .files import whole_file
from .gzipped import DAMAGE, open_packed, pack_to
from .intensity import to_unit

SUFFIXES = (".nii.gz", ".nii")

OBLIQUE_DEGREES = 3.0
"""A grid turned further than this from the patient's axes is resampled upright before the networks see it."""

AIR_HU = -1024.0
"""What lies outside the scan when an oblique grid is resampled upright."""

_CHUNK = 1 << 20  # bytes unpacked at a time: unpacked in one go, the voxels would be in memory twice

Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """A CT ready for the cascade.

    Attributes:
        array: stored values (z, y, x), upright; HU = array * slope + intercept.
        spacing: voxel size in mm (z, y, x).
        slope, intercept: of the stored values.
        grid: how the file's own grid lies in `array`.
    """

    array: NDArray[np.generic]
    spacing: tuple[float, float, float]
    slope: float
    intercept: float
    grid: "FileGrid"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (z, y, x) of `array`."""
        z, y, x = self.array.shape
        return z, y, x

    def unit(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """Stored values to [0, 1] over the HU window."""
        if self.slope == 1.0 and self.intercept == 0.0:
            return to_unit(values)
        return to_unit(values.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept))


@dataclass(frozen=True)
class FileGrid:
    """The grid of a file against the upright (z, y, x) array that the cascade works on.

    Attributes:
        shape: the file's (i, j, k).
        orientation: (3, 2) as nibabel's `io_orientation`: the RAS axis and direction of each file axis.
        upright: maps indices of the reoriented file grid (z, y, x, 1) to indices of the upright array; None where
            both are the same grid, as they are unless the scan is oblique.
    """

    shape: tuple[int, int, int]
    orientation: NDArray[np.float64]
    upright: Affine | None = None

    def empty_labels(self) -> NDArray[np.uint8]:
        """Zeros of the file's shape, laid out as NIfTI stores them (first axis fastest)."""
        return np.zeros(self.shape, np.uint8, order="F")

    def box_in_file(self, box: Box) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """First and one past the last voxel, on the file's own axes, of the smallest box that holds `box`."""
        corners = np.array([[z, y, x, 1.0] for z, y, x in product(*zip(box.start, box.stop, strict=True))])
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


def load_image(path: Path) -> nib.Nifti1Image:
    """Open a NIfTI file and check its header; voxels stay on disk.

    Raises:
        VolumeError: if the file is missing, not NIfTI, or its voxel sizes are not positive numbers.
    """
    try:
        if not path.exists():
            raise VolumeError(f"{path}: no such file")
        if not path.is_file():
            raise VolumeError(f"{path}: not a file")
        if not path.name.endswith(SUFFIXES):
            raise VolumeError(f"{path}: not a NIfTI file name (expected {' or '.join(SUFFIXES)})")
        with _quiet_nibabel():
            image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise VolumeError(f"{path}: not a NIfTI file")
        _check_stored_spacing(path, image)
    except VolumeError:
        raise
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({_one_line(error)})") from error
    except DAMAGE as error:
        raise VolumeError(f"{path}: damaged or not readable ({_one_line(error)})") from error
    return image


def read_volume(image: nib.Nifti1Image, name: str) -> Volume:
    """Read a CT image's voxels and set them upright.

    Args:
        image: one three-dimensional volume, in memory or on disk; a fourth axis of length 1 is dropped.
        name: stands in error messages for the image, usually its file name.

    Raises:
        VolumeError: if the image is not three-dimensional, is cut short or damaged, holds NaN, infinity, colours or
            complex numbers, or its affine is singular.
    """
    shape = _three_axes(image.shape, name)
    affine = np.asarray(image.affine, float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(f"{name}: the affine is singular or not finite, so voxel sizes are unknown; mend the header")
    stored, slope, intercept = _stored_values(image, name)
    stored = stored.reshape(shape, order="A")
    if not (np.isfinite(slope) and np.isfinite(intercept)) or not _all_finite(stored):
        raise VolumeError(f"{name}: holds voxels that are not finite numbers (NaN or infinity); replace them first")
    orientation = nib.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise VolumeError(f"{name}: the affine does not tell the axes apart; mend the header")
    grid = FileGrid(shape, orientation)
    array = grid.reorient(stored)
    # Affine of the reoriented (z, y, x) grid to RAS mm in the order (z, y, x).
    turned = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    turned = turned[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
    z, y, x = np.linalg.norm(turned[:3, :3], axis=0)
    if _tilt_degrees(turned) <= OBLIQUE_DEGREES:
        return Volume(array, (float(z), float(y), float(x)), slope, intercept, grid)
    air = (AIR_HU - intercept) / slope
    array, upright = _set_upright(array, turned, np.array([z, y, x]), air)
    return Volume(array, (float(z), float(y), float(x)), slope, intercept, FileGrid(shape, orientation, upright))


def label_image(labels: NDArray[np.uint8], like: nib.Nifti1Image) -> nib.Nifti1Image:
    """Make a label image with the geometry of `like`: shape, affine, qform, sform and their codes.

    Args:
        labels: in `like`'s axes.
        like: the CT.

    Returns:
        A uint8 image of `like`'s NIfTI version with slope 1 and intercept 0, without `like`'s texts and extensions.
    """
    kind: Any = nib.Nifti2Image if isinstance(like, nib.Nifti2Image) else nib.Nifti1Image
    if isinstance(like.header, nib.Nifti1Header):
        image: nib.Nifti1Image = kind(labels.reshape(like.shape), like.affine, like.header)
    else:
        image = kind(labels.reshape(like.shape), like.affine)
    header: Any = image.header
    header.extensions.clear()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0
    for text in ("descrip", "aux_file", "intent_name", "db_name"):
        if text in header:
            header[text] = b""
    return image


def make_folder(folder: Path) -> None:
    """Make a folder for volumes, and those above it, where there is none.

    Raises:
        VolumeError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be made ({error.strerror or error})") from error


def save_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image so that `path` is either absent, as it was, or whole.

    Raises:
        VolumeError: if the name does not end in .nii.gz or .nii, the folder cannot be written to, or the disk is full.
    """
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise VolumeError(f"{path}: the name of a label file must end in {' or '.join(SUFFIXES)}")
    try:
        with whole_file(path, suffix) as partial:
            if suffix == ".nii":
                nib.save(image, partial)
            else:
                with pack_to(partial) as stream:
                    image.to_stream(stream)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written ({_one_line(error)})") from error


def _check_stored_spacing(path: Path, image: nib.Nifti1Image) -> None:
    """Refuse voxel sizes of zero, which nibabel mends silently to 1 mm."""
    with nib.openers.ImageOpener(str(path)) as stream:
        stored = type(image.header).from_fileobj(stream, check=False)
    sizes = np.asarray(stored["pixdim"][1 : 1 + min(3, int(stored["dim"][0]))], float)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        shown = " x ".join(f"{s:g}" for s in sizes)
        raise VolumeError(f"{path}: voxel size {shown} mm in the header is not positive; mend the header")


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
        while stream.read(_CHUNK):
            pass
    return stored


def _all_finite(array: NDArray[np.generic]) -> bool:
    if not np.issubdtype(array.dtype, np.inexact):
        return True
    # Slice by slice along the slowest axis: a mask of the whole volume would be as large as the volume.
    slow = array.transpose() if array.flags.f_contiguous else array
    return all(bool(np.isfinite(part).all()) for part in slow)


def _tilt_degrees(turned: Affine) -> float:
    """Largest angle in degrees between a grid axis and the patient axis that it is nearest to."""
    directions = turned[:3, :3] / np.linalg.norm(turned[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(np.diag(directions), -1.0, 1.0))).max())


def _set_upright(
    array: NDArray[np.generic], turned: Affine, spacing: NDArray[np.float64], air: float
) -> tuple[NDArray[np.generic], Affine]:
    """Resample an oblique grid linearly onto one along the patient's axes that holds all of it, at the same spacing.

    What lies more than a voxel outside the oblique grid is `air`, in stored values.

    Returns the upright array, in the stored type, and the affine from oblique to upright indices (z, y, x).
    """
    from scipy import ndimage

    last = np.asarray(array.shape, float) - 1.0
    corners = np.array([[z, y, x, 1.0] for z, y, x in product(*((0.0, end) for end in last))])
    reach = (corners @ turned.T)[:, :3]
    low, high = reach.min(axis=0), reach.max(axis=0)
    size = tuple(int(n) for n in np.ceil((high - low) / spacing - 1e-6).astype(int) + 1)
    place = np.eye(4)
    place[:3, :3] = np.diag(spacing)
    place[:3, 3] = low
    upright = np.linalg.inv(place) @ turned
    back = np.linalg.inv(upright)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    kind: np.dtype[Any] = array.dtype
    if kind.kind in "iu":
        limits = np.iinfo(str(kind))
        air = round(min(max(air, limits.min), limits.max))
    else:
        kind = np.dtype(np.float32)
    result = np.full(size, air, kind)
    y, x = np.ogrid[: size[1], : size[2]]
    for z in range(size[0]):
        offset = back[:3, :3] @ (z, 0, 0) + back[:3, 3]
        plane = ndimage.affine_transform(
            array, back[:3, :3], offset, (1, *size[1:]), output=kind, order=1, mode="nearest"
        )[0]
        # The outermost voxels reach one voxel further out: were there air, it would mix into them on the way back.
        shown = np.ones(plane.shape, bool)
        for axis in range(3):
            at = offset[axis] + back[axis, 1] * y + back[axis, 2] * x
            shown &= (at >= -1.0) & (at <= last[axis] + 1.0)
        result[z][shown] = plane[shown]
    return result, upright


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Keep nibabel from writing what it finds in a header to standard error, without the file's name."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
