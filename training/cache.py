"""The training cache: each volume upright, windowed to eight bits, near the networks' resolution.

Two files a case: NAME.organs.npz, the surroundings of the organs at 1.5 mm and finer slices untouched; and
NAME.roi.npz, the whole volume at 3 mm. `fit` reads nothing else and needs only numpy and torch.
"""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastorgan.box import Box, extent_mm, frame
from fastorgan.files import whole_file
from fastorgan.intensity import to_levels
from fastorgan.labels import CLASSES, IGNORE
from fastorgan.resample import resize

from .cases import Case, DataError

if TYPE_CHECKING:
    import nibabel as nib

FINEST_MM = (2.5, 1.5, 1.5)
"""Volumes finer than this (z, y, x) are averaged to it for the organ net."""

ROI_MM = (3.0, 3.0, 3.0)

STRUCTURES = (
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "oesophagus",
    "stomach",
    "duodenum",
)
"""Further organs that may be labelled, in the order of their codes, which follow the organs'. So FLARE22 has them,
whose codes 1 to 4 and 13 (left kidney) are the organs that fastorgan labels."""

MARKS = CLASSES + len(STRUCTURES)
"""Codes in the cache are below this, or `IGNORE`."""

SURROUND_MM = 60.0
"""Kept around the organs' box, for shifted, turned and grown boxes."""


@dataclass(frozen=True)
class CachedVolume:
    """One cached array pair and where it lies in its scan.

    Attributes:
        name, patient: of the case.
        image: uint8 levels of the HU window, (z, y, x).
        labels: uint8, the same shape: codes of organs, and of `STRUCTURES` where they are labelled, with `IGNORE`; for
            the ROI net the foreground's share, 0 to 255.
        spacing: mm (z, y, x).
        origin_mm: the array's first corner in mm from the scan's corner.
        scan_mm: the scan's extent in mm.
        organs_mm: (2, 3) first and last edge of the organs in mm from the scan's corner.
    """

    name: str
    patient: str
    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    spacing: NDArray[np.float64]
    origin_mm: NDArray[np.float64]
    scan_mm: NDArray[np.float64]
    organs_mm: NDArray[np.float64]

    @property
    def has_structures(self) -> bool:
        """Whether any of `STRUCTURES` is labelled."""
        return bool(_is_structure(self.labels).any())

    def save(self, path: Path) -> None:
        """Write one compressed npz file, whole or not at all."""
        with whole_file(path, ".npz") as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, **self.__dict__)

    @classmethod
    def load(cls, path: Path) -> "CachedVolume":
        """Read what `save` wrote.

        Raises:
            DataError: if the file is damaged or is something else.
        """
        try:
            with np.load(path) as stored:
                values = {key: stored[key] for key in stored.files}
            return cls(**{**values, "name": str(values["name"]), "patient": str(values["patient"])})
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged, or not a cache file; run `python -m training prepare` again") from error


def prepare(cases: list[Case], out: Path) -> Iterator[Case]:
    """Write the cache files of each case to `out`; yields a case when it is done."""
    out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        organs, roi = cache_case(case)
        organs.save(out / f"{case.name}.organs.npz")
        roi.save(out / f"{case.name}.roi.npz")
        yield case


def load_cache(folder: Path, kind: str) -> list[CachedVolume]:
    """Read all volumes of `kind` ("organs" or "roi") in the order of their names.

    Raises:
        DataError: if there are none.
    """
    volumes = [CachedVolume.load(path) for path in sorted(folder.glob(f"*.{kind}.npz"))]
    if not volumes:
        raise DataError(f"{folder}: no *.{kind}.npz files; they come from `python -m training prepare` (or `warp`)")
    return volumes


def cache_case(case: Case) -> tuple[CachedVolume, CachedVolume]:
    """Read a case and make its two cached volumes, for the organ net and for the ROI net.

    Raises:
        VolumeError: if a file cannot be read.
        DataError: if image and labels do not fit each other or hold no organ.
    """
    # Reading needs nibabel, which a bare training machine need not have.
    from fastorgan.volume import load_image, read_volume

    image = load_image(case.image)
    volume = read_volume(image, str(case.image))
    if volume.grid.upright is not None:
        raise DataError(f"{case.image}: oblique; resample it and its labels along the patient's axes first")
    labels = _read_codes(case.labels, case.image, image, CLASSES)
    foreground = (labels > 0) & (labels != IGNORE)
    if not foreground.any():
        raise DataError(f"{case.labels}: holds no organ")
    spacing = np.asarray(volume.spacing)
    scan_mm = np.asarray(volume.shape) * spacing
    organs_mm = np.stack(extent_mm(foreground, volume.spacing))

    whole = Box.whole(volume.shape)
    coarse = _sizes(scan_mm, np.maximum(spacing, ROI_MM))
    shares = np.where(labels == IGNORE, 0, foreground).astype(np.float32)
    roi = CachedVolume(
        case.name,
        case.patient,
        to_levels(resize(volume.array, whole, coarse, volume.unit)),
        np.rint(resize(shares, whole, coarse, np.asarray) * 255).astype(np.uint8),
        scan_mm / coarse,
        np.zeros(3),
        scan_mm,
        organs_mm,
    )

    box = frame(organs_mm[0], organs_mm[1], whole, volume.spacing)
    first = np.floor(np.maximum(0, box.start - SURROUND_MM / spacing)).astype(int)
    last = np.ceil(np.minimum(volume.shape, box.stop + SURROUND_MM / spacing)).astype(int)
    near = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    values, codes = volume.array[near], labels[near]
    near_mm = np.asarray(values.shape) * spacing
    fine = _sizes(near_mm, np.maximum(spacing, FINEST_MM))
    within = Box.whole(values.shape)
    marks = _resize_labels(codes, fine)
    if case.structures is not None:
        marks = _beside(marks, _read_codes(case.structures, case.image, image, MARKS + 1)[near], fine)
    organs = CachedVolume(
        case.name,
        case.patient,
        to_levels(resize(values, within, fine, volume.unit)),
        marks,
        near_mm / fine,
        first * spacing,
        scan_mm,
        organs_mm,
    )
    return organs, roi


def _read_codes(path: Path, scan: Path, image: "nib.Nifti1Image", end: int) -> NDArray[np.uint8]:
    """Upright codes of a label file that must fit `image`, which was read from `scan`: 0 to `end` - 1, or `IGNORE`."""
    from fastorgan.volume import load_image

    marked = load_image(path)
    if image.shape != marked.shape or not np.allclose(image.affine, marked.affine, atol=1e-2):
        raise DataError(f"{scan} and {path}: shape or affine differ")
    return upright_codes(marked, path, end)[0]


def upright_codes(image: "nib.Nifti1Image", path: Path, end: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Codes (z, y, x) and voxel size in mm of a label file, turned upright.

    Raises:
        DataError: if it holds other values than 0 to `end` - 1 and `IGNORE`.
    """
    from fastorgan.volume import read_volume

    mask = read_volume(image, str(path), hounsfield=False)
    # Checked before they are cast: 256 or -1 would wrap to a code that is allowed.
    marks = np.rint(mask.array.astype(np.float32) * np.float32(mask.slope) + np.float32(mask.intercept))
    if not np.isin(marks, (*range(end), IGNORE)).all():
        raise DataError(f"{path}: holds labels other than 0 to {end - 1} and {IGNORE}")
    codes: NDArray[np.uint8] = marks.astype(np.uint8)
    return codes, np.asarray(mask.spacing)


def _is_structure(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = (codes >= CLASSES) & (codes < MARKS)
    return result


def _beside(codes: NDArray[np.uint8], structures: NDArray[np.uint8], size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Put structures, by FLARE22's codes, where `codes` of `size` has background."""
    others = _resize_labels(np.where(_is_structure(structures), structures, np.uint8(0)), size)
    result: NDArray[np.uint8] = np.where(codes == 0, others, codes)
    return result


def _sizes(extent: NDArray[np.float64], spacing: NDArray[np.float64]) -> tuple[int, int, int]:
    z, y, x = (max(1, round(float(n))) for n in extent / spacing)
    return z, y, x


def _resize_labels(codes: NDArray[np.uint8], size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Resample codes by the largest share; voxels that are mostly unknown stay `IGNORE`."""
    if codes.shape == size:
        return np.ascontiguousarray(codes)
    best = np.zeros(size, np.float32)
    result = np.zeros(size, np.uint8)
    whole = Box.whole(codes.shape)
    for code in np.unique(codes):
        share = resize((codes == code).astype(np.float32), whole, size, np.asarray)
        better = share > best
        result[better] = code
        best[better] = share[better]
    return result
