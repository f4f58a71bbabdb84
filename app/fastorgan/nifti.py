"""NIfTI files opened without trusting them: what a header claims is checked before anything is read or allocated by it.

nibabel's own `load` reads extensions of any size and hands some to other parsers, maps voxels so that a file which
shrinks kills the process, and allocates whatever the header asks for.
"""

import logging
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .errors import VolumeError
from .gzipped import open_packed
from .memory import check_memory

SUFFIXES = (".nii.gz", ".nii")
"""Of single files, read and written."""

PAIR_SUFFIXES = (".hdr", ".img")
"""Of a header and its voxels in two files of one name; read only."""

MAX_VOXELS = 2**31
"""More voxels than this are refused: 1024 x 1024 x 2048."""

MAX_HEADER_BYTES = 64 << 20
"""Voxels that begin later than this behind the header's extensions are no honest file's."""

VOXEL_MM = (0.01, 100.0)
"""Voxel sizes outside are a header in other units, or a damaged one."""

_MOST_INFLATED = 1032  # bytes that deflate can make of one, by its format

# nibabel writes what it finds in a header to a logger, without the file's name.
_SILENT = logging.getLogger("fastorgan.silent")
_SILENT.disabled = True


def open_nifti(path: Path, max_voxels: int = MAX_VOXELS) -> nib.Nifti1Image:
    """Open a NIfTI-1 or -2 file and check its header; voxels stay on disk, extensions are not read.

    Args:
        path: .nii, .nii.gz, .hdr or .img.
        max_voxels: more are refused.

    Returns:
        The image; of a pair too, a `Nifti1Image` or `Nifti2Image`.

    Raises:
        VolumeError: if the file is not NIfTI, or what its header claims cannot be true or does not fit into memory.
        One of `gzipped.DAMAGE`: if it cannot be read.
    """
    pair = path.suffix in PAIR_SUFFIXES
    head, data = (path.with_suffix(".hdr"), path.with_suffix(".img")) if pair else (path, path)
    if pair and not (head.is_file() and data.is_file()):
        raise VolumeError(f"{path}: {head.name} and {data.name} belong together; one of them is missing")
    try:
        # What overflows or is NaN is refused by its value; NumPy's warnings would come on top, without the file's name.
        with np.errstate(all="ignore"):
            return _checked(path, _first_bytes(head), data, pair, max_voxels)
    except (nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError, np.linalg.LinAlgError) as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({' '.join(str(error).split())})") from error


def _checked(path: Path, block: bytes, data: Path, pair: bool, max_voxels: int) -> nib.Nifti1Image:
    kind = _kind(path, block, pair)
    block = block[: kind.header_class.template_dtype.itemsize]
    header = kind.header_class(block, check=False)
    _check_spacing(path, header)
    begin = float(header["vox_offset"])
    if not 0 <= begin <= MAX_HEADER_BYTES:
        raise VolumeError(f"{path}: its voxels are said to begin {begin:.0f} bytes into it; the header is damaged")
    header.check_fix(_SILENT)
    proxy_header = header.copy()
    if pair:
        # The image's own header is a single file's, as the labels will have.
        proxy_header = (nib.nifti1.Nifti1PairHeader if kind is nib.Nifti1Image else nib.nifti2.Nifti2PairHeader)(
            header.binaryblock, header.endianness, check=False
        )
    _check_size(path, proxy_header, data, max_voxels)
    affine = np.asarray(header.get_best_affine(), float)
    check_affine(affine, path)
    # As nibabel leaves it: of the file, not of the image. The image's constructor would find fault with it anew.
    header.set_data_offset(0)
    proxy = kind.ImageArrayProxy(str(data), proxy_header, mmap=False)
    image: nib.Nifti1Image = kind(proxy, affine, header, file_map={"image": nib.FileHolder(str(path))})
    return image


def _first_bytes(path: Path) -> bytes:
    size = nib.Nifti2Header.template_dtype.itemsize
    with open_packed(path) if path.suffix == ".gz" else path.open("rb") as stream:
        return stream.read(size)


def _kind(path: Path, block: bytes, pair: bool) -> Any:
    """The class that reads files of this header: NIfTI-1 or -2, in either byte order."""
    if not block:
        raise VolumeError(f"{path}: is empty")
    if block[:2] == b"\x1f\x8b":
        raise VolumeError(f"{path}: is packed with gzip; call it {path.name}.gz")
    for kind, size, place, magics in (
        (nib.Nifti1Image, 348, slice(344, 348), (b"n+1\0", b"ni1\0")),
        (nib.Nifti2Image, 540, slice(4, 8), (b"n+2\0", b"ni2\0")),
    ):
        if int.from_bytes(block[:4], "little") == size or int.from_bytes(block[:4], "big") == size:
            if len(block) < size:
                raise VolumeError(f"{path}: ends within its header")
            if block[place] in magics:
                return kind
            if pair:
                raise VolumeError(f"{path}: ANALYZE, which does not tell left from right; convert it to NIfTI")
    raise VolumeError(f"{path}: not a NIfTI file, whatever its name says")


def _check_spacing(path: Path, stored: Any) -> None:
    """Refuse voxel sizes of zero, which nibabel mends silently to 1 mm."""
    sizes = np.asarray(stored["pixdim"][1 : 1 + min(3, max(0, int(stored["dim"][0])))], float)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        shown = " x ".join(f"{s:g}" for s in sizes)
        raise VolumeError(f"{path}: voxel size {shown} mm in the header is not positive; mend the header")


def check_affine(affine: NDArray[np.float64], name: object) -> None:
    """Refuse an affine that gives no axes, or voxels that are no CT's.

    Raises:
        VolumeError: if it is singular, not finite, or a voxel size lies outside `VOXEL_MM`.
    """
    singular = f"{name}: the affine is singular or not finite, so voxel sizes are unknown; mend the header"
    if not np.isfinite(affine).all():
        raise VolumeError(singular)
    with np.errstate(all="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
    least, most = VOXEL_MM
    if (sizes == 0).any():
        raise VolumeError(singular)
    if sizes.min() < least or sizes.max() > most:
        shown = " x ".join(f"{s:g}" for s in sizes)
        raise VolumeError(f"{name}: voxels of {shown} mm are no CT's; if the header is in other units, mend it")
    # Of the directions alone, so that small voxels are no matter.
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise VolumeError(singular)


def form_warnings(header: Any) -> list[str]:
    """What is doubtful about the two matrices of a NIfTI header, qform and sform, one line each.

    Args:
        header: of any format; only NIfTI has two.
    """
    if not isinstance(header, nib.Nifti1Header):
        return []
    rows = header.get_sform(coded=True)[0]
    try:
        quaternion = header.get_qform(coded=True)[0]
    except ValueError:
        # Without a sform the affine could not have been had.
        return ["the qform is no rotation (its quaternion is too long); the sform was used"]
    if quaternion is None and rows is None:
        return ["the header says nothing of directions (qform and sform are 0): left and right may be exchanged"]
    if quaternion is None or rows is None or not (np.isfinite(quaternion).all() and np.isfinite(rows).all()):
        return []
    first, second = quaternion[:3, :3], rows[:3, :3]
    # In steps of one voxel: a hundredth of one is rounding, a twentieth is another grid.
    if np.linalg.norm(first - second, axis=0).max() > 0.05 * np.linalg.norm(second, axis=0).min():
        return ["qform and sform differ in directions or voxel sizes; the sform was used"]
    return []


def check_size(shape: tuple[int, ...], dtype: "np.dtype[Any]", name: object, max_voxels: int) -> None:
    """Refuse a volume that is too large, by what its header claims.

    Raises:
        VolumeError: if it has more than `max_voxels`, or it and its labels do not fit into memory.
    """
    voxels = math.prod(shape)
    shown = " x ".join(map(str, shape))
    if voxels > max_voxels:
        raise VolumeError(f"{name}: {shown} voxels are more than {max_voxels}; --max-voxels allows others")
    check_memory(voxels * (dtype.itemsize + 1), f"{name}: {shown} voxels")


def _check_size(path: Path, header: Any, data: Path, max_voxels: int) -> None:
    """Refuse sizes that are negative, that the file cannot hold, or that memory cannot."""
    shape = tuple(int(n) for n in header.get_data_shape())
    if any(n < 0 for n in shape):
        raise VolumeError(f"{path}: has an axis of {min(shape)} voxels; mend the header")
    dtype = np.dtype(header.get_data_dtype())
    # Memory first: what is cut short may also be too large, and of that the user should hear.
    check_size(shape, dtype, path, max_voxels)
    there = data.stat().st_size * (_MOST_INFLATED if data.suffix == ".gz" else 1)
    needed = int(header.get_data_offset()) + math.prod(shape) * dtype.itemsize
    if there < needed:
        raise VolumeError(f"{path}: cut short: its header claims {needed} bytes, it can hold {there} at most")
