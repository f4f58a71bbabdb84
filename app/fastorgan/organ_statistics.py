"""What is measured of each organ besides its volume: HU, the box around it, and where it leaves the scan."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .errors import FastorganError
from .files import whole_file
from .labels import ORGANS
from .upright import Affine
from .volume import Volume, read_values

SUFFIXES = (".csv", ".json")

Point = tuple[float, float, float]

_FACES = (("inferior", "superior"), ("posterior", "anterior"), ("left", "right"))
"""What lies at the low and the high end of the axes z, y and x."""

SIDES = tuple(side for pair in _FACES for side in pair)

CSV_COLUMNS = (
    *("case", "organ", "voxels", "volume_ml", "mean_hu", "sd_hu"),
    *(f"{axis}_{end}_mm" for axis in "xyz" for end in ("min", "max")),
    *(f"touches_{side}" for side in SIDES),
)


@dataclass(frozen=True)
class OrganStatistics:
    """One organ in one case.

    Attributes:
        voxels: how many bear its code.
        volume_ml: voxels times a voxel's volume, in ml.
        mean_hu: of its voxels' HU; None for an organ that was not found.
        sd_hu: their standard deviation (of the voxels themselves, so divided by their number); None like the mean.
        box_mm: lowest and highest x, y and z of its voxels' edges in the scanner's space, in mm: x to the patient's
            right, y to the front, z to the head (RAS+, as NIfTI has it). None like the mean.
        touches: the faces of the scan that it reaches, such as "inferior". The scan may have cut it off there.
    """

    voxels: int
    volume_ml: float
    mean_hu: float | None
    sd_hu: float | None
    box_mm: tuple[Point, Point] | None
    touches: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as JSON has them, rounded to what they are worth."""
        box = self.box_mm
        return asdict(self) | {
            "volume_ml": round(self.volume_ml, 2),
            "mean_hu": None if self.mean_hu is None else round(self.mean_hu, 2),
            "sd_hu": None if self.sd_hu is None else round(self.sd_hu, 2),
            "box_mm": None if box is None else [[round(mm, 2) for mm in corner] for corner in box],
            "touches": list(self.touches),
        }


def organ_statistics(volume: Volume, labels: NDArray[np.uint8], image: nib.Nifti1Image) -> dict[str, OrganStatistics]:
    """Measure every organ of `ORGANS`, in the order of their codes.

    Args:
        volume: the CT.
        labels: codes in the axes of the CT's file; other values are passed over.
        image: the CT's file, for its affine; its voxels are read anew only where the scan is oblique, so that HU are
            those of the file and not resampled ones.

    Returns:
        The statistics by organ name; an organ without a voxel has 0 voxels and no HU.
    """
    from scipy import ndimage

    affine = np.asarray(image.affine, float)
    codes = volume.grid.reorient(labels)
    stored, slope, intercept = volume.array, volume.slope, volume.intercept
    if volume.grid.upright is not None:
        values, slope, intercept, _ = read_values(image, str(image.get_filename() or "the scan"))
        stored = volume.grid.reorient(values)
    # From indices (z, y, x) of the reoriented grid to RAS mm.
    to_mm = (affine @ nib.orientations.inv_ornt_aff(volume.grid.orientation, volume.grid.shape))[:, [2, 1, 0, 3]]
    voxel_ml = float(np.prod(nib.affines.voxel_sizes(affine))) / 1000.0
    places = ndimage.find_objects(codes, max_label=max(organ.code for organ in ORGANS))
    found = {}
    for organ in ORGANS:
        place = places[organ.code - 1]
        if place is None:
            found[organ.name] = OrganStatistics(0, 0.0, None, None, None, ())
            continue
        mask = codes[place] == organ.code
        hu = stored[place][mask].astype(np.float64) * slope + intercept
        found[organ.name] = OrganStatistics(
            voxels=len(hu),
            volume_ml=len(hu) * voxel_ml,
            mean_hu=float(hu.mean()),
            sd_hu=float(hu.std()),
            box_mm=_box(mask, [part.start for part in place], to_mm),
            touches=_touched(place, codes.shape),
        )
    return found


def write_statistics(
    cases: Iterable[tuple[str, Mapping[str, OrganStatistics]]], path: Path, *, keep: bool = False
) -> None:
    """Write a table with one row per case and organ, as CSV or JSON after the name's suffix, whole or not at all.

    Args:
        cases: names and statistics by organ name.
        path: the file; one that is there is replaced.
        keep: leave the rows of other cases that an earlier run wrote to `path`.

    Raises:
        FastorganError: the name ends in neither .csv nor .json, the file cannot be written, or is no such table.
    """
    check_name(path)
    rows = [{"case": case, "organ": name} | organ.to_dict() for case, organs in cases for name, organ in organs.items()]
    table = rows if path.suffix == ".json" else [_flat(row) for row in rows]
    if keep and path.exists():
        new = {row["case"] for row in rows}
        table = [*(row for row in _read_table(path) if row["case"] not in new), *table]
    text = json.dumps(table, indent=1) + "\n" if path.suffix == ".json" else _csv(table)
    try:
        with whole_file(path, path.suffix) as partial:
            # Bytes in a file's name that are no text must not stop the table.
            partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as error:
        raise FastorganError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_name(path: Path) -> None:
    """Say whether a statistics file can have this name.

    Raises:
        FastorganError: it ends in neither .csv nor .json.
    """
    if path.suffix not in SUFFIXES:
        raise FastorganError(f"{path}: the name of a statistics file must end in {' or '.join(SUFFIXES)}")


def _read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that `write_statistics` wrote."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
        if all(set(row) >= {"case", "organ"} for row in rows):
            return list(rows)
    except (OSError, ValueError, TypeError) as error:
        raise FastorganError(f"{path}: cannot be continued ({' '.join(str(error).split())})") from error
    raise FastorganError(f"{path}: no table of fastorgan's, so it cannot be continued; name another file")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One number a column, so that spreadsheets can work with it; what is unknown is empty."""
    box = row["box_mm"] or [[None] * 3] * 2
    flat = {key: row[key] for key in CSV_COLUMNS if key in row}
    flat |= {f"{axis}_{end}_mm": box[i][j] for i, end in enumerate(("min", "max")) for j, axis in enumerate("xyz")}
    return flat | {f"touches_{side}": int(side in row["touches"]) for side in SIDES}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _box(mask: NDArray[np.bool_], start: list[int], to_mm: Affine) -> tuple[Point, Point]:
    """The box along the scanner's axes around the voxels of a mask, their corners included."""
    # Along a line of voxels the extremes of a linear function lie at the line's ends, so all others can be left out.
    y, x = np.nonzero(mask.any(axis=0))
    lines = mask[:, y, x]
    first, last = lines.argmax(axis=0), len(mask) - 1 - lines[::-1].argmax(axis=0)
    ends = np.concatenate([np.stack([first, y, x], axis=1), np.stack([last, y, x], axis=1)]) + start
    centres = ends @ to_mm[:3, :3].T + to_mm[:3, 3]
    half = np.abs(to_mm[:3, :3]).sum(axis=1) / 2
    (x0, y0, z0), (x1, y1, z1) = (centres.min(axis=0) - half).tolist(), (centres.max(axis=0) + half).tolist()
    return (x0, y0, z0), (x1, y1, z1)


def _touched(place: tuple[slice, slice, slice], shape: tuple[int, ...]) -> tuple[str, ...]:
    touched = []
    for part, size, (low, high) in zip(place, shape, _FACES, strict=True):
        touched += [low] * (part.start == 0) + [high] * (part.stop == size)
    return tuple(touched)
