"""CT series of DICOM slices: found in a folder, checked, sorted and read into one volume.

The volume's grid is the slices' own: i along a row, j down a column, k along the series, as ITK reads it. Everything
here needs pydicom, which the extra `dicom` brings.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .errors import FastorganError, VolumeError
from .nifti import MAX_VOXELS, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

TILT_DEGREES = 0.5
"""Slices shifted against each other by more than this are a tilted gantry's; less is rounding."""

IRREGULAR = 0.1
"""How far a slice may lie from its place in a regular series, as a share of the distance between slices."""

MOST_MISSING = 0.1
"""Share of the slices that may be missing and are filled in; with more the series is refused."""

WIDEST_GAP_MM = 15.0
"""Distance between two neighbours over which missing slices are filled in."""

AIR_HU = -1024
"""What padding around the field of view is taken for."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_HEADER = (
    "SOPClassUID",
    "Modality",
    "ImageType",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
)

_ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"


class DicomError(FastorganError):
    """DICOM cannot be read or written here: a package is missing."""


@dataclass(frozen=True)
class Slice:
    """What one file says of its slice; lengths in mm, directions in the patient's LPS axes.

    Attributes:
        path: its file.
        series, number, description: of the series; the number is None where none is given.
        position: of the first voxel's centre.
        directions: unit vectors (2, 3), along a row and down a column.
        pixel_mm: between voxels along a row and down a column.
        size: voxels along a row and down a column.
        acquisition, moment: numbers that tell several scans within one series apart, where they are given.
        scale: slope and intercept from stored values to HU; None where the file has none.
    """

    path: Path
    series: str
    number: int | None
    description: str
    position: tuple[float, float, float]
    directions: tuple[tuple[float, ...], tuple[float, ...]]
    pixel_mm: tuple[float, float]
    size: tuple[int, int]
    acquisition: int | None
    moment: int | None
    scale: tuple[float, float] | None

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across the slice."""
        return np.cross(*self.directions)


@dataclass(frozen=True)
class Series:
    """One scan: slices of one size and direction in the order of their positions along the normal.

    Attributes:
        slices: at least one.
        name: of the case.
    """

    slices: tuple[Slice, ...]
    name: str

    @property
    def uid(self) -> str:
        """The series' DICOM UID."""
        return self.slices[0].series

    @property
    def folder(self) -> Path:
        """Where its first file lies."""
        return self.slices[0].path.parent

    def absolute(self) -> "Series":
        """The series with files that do not depend on the working folder."""
        return replace(self, slices=tuple(replace(part, path=part.path.absolute()) for part in self.slices))

    def describe(self) -> str:
        """Number, description, count and voxel size, in a few words."""
        first = self.slices[0]
        number = "without number" if first.number is None else str(first.number)
        what = f" {first.description}" if first.description else ""
        step = f"{self.step_mm:g}" if len(self.slices) > 1 else "?"
        return (
            f"{number}{what} ({len(self.slices)} slices, {first.pixel_mm[0]:.3g} x {first.pixel_mm[1]:.3g} x {step} mm)"
        )

    @property
    def step_mm(self) -> float:
        """The usual distance of a slice from the next, in mm, along the normal."""
        return round(float(np.median(np.diff(self._heights()))), 4) if len(self.slices) > 1 else math.nan

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (i, j, k) of the volume; raises as `places`."""
        return *self.slices[0].size, int(self.places()[-1]) + 1

    def places(self) -> NDArray[np.intp]:
        """Index along k of each slice; a number left out is a missing slice.

        Raises:
            VolumeError: if there is one slice alone, slices share a place or lie irregularly, or too many are missing.
        """
        if len(self.slices) < 2:
            raise VolumeError(f"{self.folder}: series {self.describe()} is a single slice and no volume")
        steps = np.diff(self._heights())
        step = float(np.median(steps))
        counts = np.rint(steps / step) if step > 0 else np.zeros(len(steps))
        if (counts < 1).any():
            at = self.slices[int(np.argmin(counts)) + 1].path
            raise VolumeError(f"{at}: lies where another slice of its series does; take one scan out of the folder")
        if (np.abs(steps - counts * step) > IRREGULAR * step).any():
            raise VolumeError(
                f"{self.folder}: slices of series {self.describe()} are {steps.min():.4g} to {steps.max():.4g} mm "
                "apart; resample it to regular slices first"
            )
        places = np.concatenate([[0], np.cumsum(counts)]).astype(np.intp)
        missing = int(places[-1]) + 1 - len(places)
        if missing > MOST_MISSING * (places[-1] + 1) or (missing and float(steps.max()) > WIDEST_GAP_MM):
            raise VolumeError(
                f"{self.folder}: {missing} of {places[-1] + 1} slices of series {self.describe()} are missing; "
                "fetch it again"
            )
        return places

    def affine(self) -> NDArray[np.float64]:
        """From voxel indices (i, j, k) to mm in RAS; sheared where the gantry was tilted.

        Raises:
            VolumeError: as `places`, or if the slices do not lie along a straight line.
        """
        places = self.places()
        positions = np.array([s.position for s in self.slices])
        first = self.slices[0]
        step = (positions[-1] - positions[0]) / places[-1]
        strays = np.abs(positions - positions[0] - places[:, None] * step).max()
        if strays > IRREGULAR * np.linalg.norm(step):
            raise VolumeError(f"{self.folder}: slices of series {self.describe()} do not lie along a straight line")
        if self.tilt_degrees() <= TILT_DEGREES:
            step = first.normal * float(step @ first.normal)
        lps = np.eye(4)
        lps[:3, 0] = np.multiply(first.directions[0], first.pixel_mm[0])
        lps[:3, 1] = np.multiply(first.directions[1], first.pixel_mm[1])
        lps[:3, 2], lps[:3, 3] = step, positions[0]
        return _LPS_TO_RAS @ lps

    def tilt_degrees(self) -> float:
        """Angle in degrees between the line along which the slices lie and their normal."""
        way = np.subtract(self.slices[-1].position, self.slices[0].position)
        length = float(np.linalg.norm(way))
        return math.degrees(math.acos(min(1.0, float(way @ self.slices[0].normal) / length))) if length else 0.0

    def warnings(self) -> list[str]:
        """What is unusual about the series and was dealt with, one line each; raises as `places`."""
        places = self.places()
        lines = []
        if (tilt := self.tilt_degrees()) > TILT_DEGREES:
            lines.append(
                f"the gantry was tilted by {tilt:.1f} degrees; the label file's grid is sheared as the slices are"
            )
        if gone := sorted(set(range(int(places[-1]) + 1)) - set(places.tolist())):
            shown = ", ".join(str(k + 1) for k in gone[:5]) + (", …" if len(gone) > 5 else "")
            lines.append(
                f"{len(gone)} of {places[-1] + 1} slices are missing (number {shown}); filled in from their neighbours"
            )
        if any(s.scale is None for s in self.slices):
            lines.append("slices have no rescale slope; their values were taken for HU")
        return lines

    def load(self, max_voxels: int = MAX_VOXELS) -> nib.Nifti1Image:
        """Read all slices into one image in HU, int16 where that holds them, else float32.

        Missing slices are interpolated linearly between their neighbours; padding becomes air.

        Args:
            max_voxels: more are refused.

        Raises:
            VolumeError: as `affine`, if a slice's voxels cannot be read, or they are too many.
        """
        affine, places = self.affine(), self.places()
        whole = all(float(number).is_integer() for s in self.slices for number in s.scale or ())
        dtype = np.dtype(np.int16 if whole else np.float32)
        check_size(self.shape, dtype, self.folder, max_voxels)
        stack = np.empty(self.shape[::-1], dtype)
        for k, part in zip(places, self.slices, strict=True):
            _read_slice(part, stack[k])
        for k, after in pairwise(places):
            for between in range(int(k) + 1, int(after)):
                share = (between - k) / (after - k)
                filled = stack[k] * np.float32(1 - share) + stack[after] * np.float32(share)
                stack[between] = np.rint(filled) if whole else filled
        image = nib.Nifti1Image(stack.transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, 1)
        # A quaternion cannot hold a sheared grid.
        image.set_qform(affine, 0 if self.tilt_degrees() > TILT_DEGREES else 1)
        return image

    def _heights(self) -> NDArray[np.float64]:
        return np.array([s.position for s in self.slices]) @ self.slices[0].normal


def find_series(folder: Path) -> list[Series]:
    """All CT series in a folder and below it, by series number; what is no CT slice is passed over.

    Scout views (localizers) and pictures without a place in the patient are passed over too. Several scans within one
    series, such as phases, are told apart by acquisition number or temporal position, and are a series each.

    Returns:
        The series; none if the folder holds no DICOM CT.

    Raises:
        DicomError: if there is DICOM but pydicom is not installed.
        VolumeError: if the folder or a DICOM file in it cannot be read, or it has multi-frame CT alone.
    """
    groups: dict[tuple[object, ...], list[Slice]] = {}
    enhanced: Path | None = None
    for path in _dicom_files(folder):
        header = _read(path, headers_only=True)
        if header.get("SOPClassUID") == _ENHANCED_CT:
            enhanced = path
        elif (found := _slice(path, header)) is not None:
            directions = tuple(round(x, 3) for direction in found.directions for x in direction)
            groups.setdefault((found.series, directions, found.size, found.pixel_mm), []).append(found)
    if enhanced is not None and not groups:
        raise VolumeError(f"{enhanced}: multi-frame (enhanced) CT is not read; convert it to NIfTI first")
    scans = [scan for slices in groups.values() for scan in _scans(slices)]
    scans.sort(key=lambda scan: (scan[0].number is None, scan[0].number or 0, str(scan[0].path)))
    return [Series(tuple(scan), name) for scan, name in zip(scans, _names(folder, scans), strict=True)]


def choose(found: Sequence[Series], choice: str | None, folder: Path) -> list[Series]:
    """The series that are meant.

    Args:
        found: the folder's series, at least one.
        choice: a series number, a series UID or its ending, or "all", which leaves out single slices; None is fine
            where there is one series only.
        folder: stands in error messages.

    Raises:
        VolumeError: if no series is meant, or several are by anything else than "all".
    """
    if choice == "all":
        return [s for s in found if len(s.slices) > 1] or list(found)
    meant = found
    if choice is not None:
        meant = [s for s in found if str(s.slices[0].number) == choice]
        meant = meant or [s for s in found if len(choice) > 3 and s.uid.endswith(choice)]
    # A scout or a reconstruction of one slice is no volume, and nobody's choice.
    meant = [s for s in meant if len(s.slices) > 1] or list(meant)
    if len(meant) == 1:
        return list(meant)
    listed = "; ".join(s.describe() for s in found)
    if not meant:
        raise VolumeError(f"{folder}: no series {choice} here, but: {listed}")
    raise VolumeError(f"{folder}: holds {len(found)} series; choose by --series NUMBER, UID or all: {listed}")


def read_datasets(series: Series) -> list["Dataset"]:
    """The headers of all slices, whole but for the voxels, in the order of the slices.

    Raises:
        VolumeError: if a file cannot be read.
    """
    return [_read(part.path, headers_only=False, voxels=False) for part in series.slices]


def _dicom_files(folder: Path) -> Iterator[Path]:
    """Files that say DICM after their preamble, or have none and a usual ending, in the order of their names."""
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be read ({error.strerror or error})") from error
    for path in paths:
        if path.name.upper() == "DICOMDIR" or path.name.startswith("."):
            continue
        try:
            with path.open("rb") as stream:
                marked = stream.read(132)[128:] == b"DICM"
        except OSError as error:
            raise VolumeError(f"{path}: cannot be read ({error.strerror or error})") from error
        if marked or path.suffix.lower() in (".dcm", ".ima"):
            yield path


def _read(path: Path, *, headers_only: bool, voxels: bool = True) -> "Dataset":
    pydicom = _pydicom()
    try:
        if headers_only:
            found = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(_HEADER))
        else:
            found = pydicom.dcmread(path, force=True, stop_before_pixels=not voxels)
    except Exception as error:
        # On bytes that are no DICOM the reader fails in whatever way it comes to.
        raise VolumeError(f"{path}: damaged, or not DICOM ({_one_line(error)})") from error
    dataset: Dataset = found
    return dataset


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise DicomError("DICOM needs pydicom: pip install 'fastorgan[dicom]'") from error
    # What breaks the standard's rules of form is no reason to refuse a scan, nor to write a page that names no file.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


def _slice(path: Path, header: "Dataset") -> Slice | None:
    """What a file's header says; None for what is no CT slice.

    Raises:
        VolumeError: if the header contradicts itself.
    """
    try:
        if header.get("Modality") != "CT" or "LOCALIZER" in (header.get("ImageType") or ()):
            return None
        if header.get("ImagePositionPatient") is None or header.get("ImageOrientationPatient") is None:
            return None
        position = tuple(float(x) for x in header.ImagePositionPatient)
        directions = np.array([float(x) for x in header.ImageOrientationPatient]).reshape(2, 3)
        between_rows, between_columns = (float(x) for x in header.PixelSpacing)
        columns, rows = int(header.Columns), int(header.Rows)
        scale = None
        if header.get("RescaleSlope") is not None:
            scale = (float(header.RescaleSlope), float(header.get("RescaleIntercept") or 0))
        numbers = [*position, *directions.flat, between_rows, between_columns, *(scale or ())]
        lengths = np.linalg.norm(directions, axis=1)
        if not np.isfinite(numbers).all() or len(position) != 3:
            raise ValueError("position, orientation or spacing are no numbers")
        if min(columns, rows) < 1 or min(between_rows, between_columns) <= 0 or (scale and scale[0] == 0):
            raise ValueError("size, pixel spacing or rescale slope are not positive")
        if (np.abs(lengths - 1) > 0.01).any() or abs(directions[0] @ directions[1]) > 0.01:
            raise ValueError("rows and columns are not at right angles")
        if int(header.get("SamplesPerPixel") or 1) != 1:
            raise ValueError("holds colours")
        directions /= lengths[:, None]
        return Slice(
            path,
            str(header.get("SeriesInstanceUID") or ""),
            _number(header.get("SeriesNumber")),
            " ".join(str(header.get("SeriesDescription") or "").split()),
            (position[0], position[1], position[2]),
            (tuple(directions[0].tolist()), tuple(directions[1].tolist())),
            (between_columns, between_rows),
            (columns, rows),
            _number(header.get("AcquisitionNumber")),
            _number(header.get("TemporalPositionIdentifier")),
            scale,
        )
    except Exception as error:
        # pydicom reads values when they are asked for, and damaged ones fail in whatever way they come to.
        raise VolumeError(f"{path}: its header cannot be used ({_one_line(error)})") from error


def _number(value: object) -> int | None:
    return None if value is None or value == "" else int(str(value))


def _scans(slices: list[Slice]) -> list[list[Slice]]:
    """Tell the scans within a series apart, where slices would share a place; each in order along the normal."""

    def height(part: Slice) -> float:
        return float(np.dot(part.position, slices[0].normal))

    def tell(part: Slice, key: str) -> int:
        value: int | None = getattr(part, key)
        return -1 if value is None else value

    for key in (None, "acquisition", "moment"):
        parts: dict[int, list[Slice]] = {}
        for part in sorted(slices, key=height):
            parts.setdefault(0 if key is None else tell(part, key), []).append(part)
        if all(height(b) - height(a) > 1e-3 for scan in parts.values() for a, b in pairwise(scan)):
            return list(parts.values())
    # `places` says of which file it cannot be told.
    return [sorted(slices, key=height)]


def _names(folder: Path, scans: Sequence[Sequence[Slice]]) -> list[str]:
    """A name for each scan: the folders on the way to it, and its number where a folder has several."""
    homes = [scan[0].path.parent for scan in scans]
    names: list[str] = []
    for scan, home in zip(scans, homes, strict=True):
        parts = home.relative_to(folder).parts or (folder.resolve().name or "series",)
        if homes.count(home) > 1:
            parts = (*parts, str(scan[0].number if scan[0].number is not None else scan[0].series.rpartition(".")[2]))
        name = re.sub(r"[^\w.-]+", "_", "_".join(parts))
        # Phases of one series share a number.
        names.append(name if name not in names else f"{name}_{sum(n.startswith(name) for n in names) + 1}")
    return names


def _read_slice(part: Slice, into: NDArray[Any]) -> None:
    """Decode one slice's voxels and write them in HU."""
    dataset = _read(part.path, headers_only=False)
    try:
        stored = dataset.pixel_array
        slope, intercept = part.scale or (1.0, 0.0)
        hu = stored * np.float64(slope) + intercept
        padding = dataset.get("PixelPaddingValue")
        if padding is not None:
            low, high = sorted((int(padding), int(dataset.get("PixelPaddingRangeLimit", padding))))
            hu[(stored >= low) & (stored <= high)] = AIR_HU
    except Exception as error:
        # Each plugin of pydicom fails in its own way.
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        packed = "" if syntax is None else f"; stored as {syntax.name}"
        raise VolumeError(f"{part.path}: its voxels cannot be read ({_one_line(error)}{packed})") from error
    if hu.shape != into.shape:
        raise VolumeError(f"{part.path}: holds {' x '.join(map(str, hu.shape))} voxels, and not what its header says")
    into[:] = np.clip(hu, -32768, 32767) if into.dtype == np.int16 else hu


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
