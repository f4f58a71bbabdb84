"""Whether doubts come where labels are poor, and stay away where they are good.

Every CT of a folder is segmented as it is and in spoilt copies: turned, mirrored, cut, noisy, inverted, shifted in HU,
and in parts that hold none of the organs. The true labels are turned and cut along with it, so that each organ of each
copy has its DSC to hold the doubts against.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan.cascade import Cascade
from fastorgan.labels import IGNORE, ORGANS
from fastorgan.plausibility import Evidence, doubts
from fastorgan.volume import load_image, read_volume

from .accuracy import case_of, dsc, image_of

Hu = NDArray[np.int16]
Codes = NDArray[np.uint8]
Spoil = Callable[[Hu, Codes, NDArray[np.float64]], tuple[Hu, Codes] | None]
"""Spoils HU and labels (x, y, z; right, front, head) of a voxel size in mm; None where the CT does not allow it."""

LEAST_PART_MM = 80.0
"""Thinner parts of a scan are no test."""

BANDS = ((0.9, 1.0), (0.8, 0.9), (0.7, 0.8), (0.5, 0.7), (0.0, 0.5))
"""Of the DSC, in the summary's order; each without its upper end but the first."""


@dataclass(frozen=True)
class Verdict:
    """One organ of one copy.

    Attributes:
        case, copy, organ: which.
        dsc: 0 to 1; NaN where the true labels lack the organ and none was found.
        present: whether the true labels have it.
        evidence: None where it was not found.
        doubts: what was said of it.
    """

    case: str
    copy: str
    organ: str
    dsc: float
    present: bool
    evidence: Evidence | None
    doubts: tuple[str, ...]

    @property
    def warned(self) -> bool:
        """Whether a user is told, be it that the organ was not found."""
        return self.evidence is None or bool(self.doubts)


def _plain(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return hu, codes


def _quarter_turn(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return np.rot90(hu, axes=(0, 1)), np.rot90(codes, axes=(0, 1))


def _half_turn(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return hu[::-1, ::-1], codes[::-1, ::-1]


def _tilted(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    # In plane the voxels are square.
    turned = ndimage.rotate(hu, 35, axes=(0, 1), reshape=False, order=1, cval=-1000)
    return turned, ndimage.rotate(codes, 35, axes=(0, 1), reshape=False, order=0)


def _mirrored(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return hu[::-1], codes[::-1]


def _head_down(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return hu[:, :, ::-1], codes[:, :, ::-1]


def _cut_across(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    low, high = _span(codes)
    part = slice(None, low + (high - low) // 2)
    return hu[:, :, part], codes[:, :, part]


def _cut_lengthwise(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    half = slice(hu.shape[0] // 2, None)
    return hu[half], codes[half]


def _noisy(deviation: float) -> Spoil:
    def add(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
        noise = np.random.default_rng(0).normal(0.0, deviation, hu.shape)
        return np.clip(hu + noise, -1024, 3000).astype(np.int16), codes

    return add


def _inverted(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return (-hu.astype(np.int32) - 24).clip(-1024, 1000).astype(np.int16), codes


def _shifted(by: int) -> Spoil:
    return lambda hu, codes, size: (hu + np.int16(by), codes)


def _squeezed(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    # As a picture of eight bits shows it.
    return ((hu.astype(np.float32) + 160).clip(0, 400) * (255 / 400)).astype(np.int16), codes


def _above(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    first = _span(codes)[1] + round(20 / size[2])
    return _part(hu, codes, first, min(hu.shape[2], first + round(250 / size[2])), size)


def _head(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    first = max(_span(codes)[1] + round(120 / size[2]), hu.shape[2] - round(200 / size[2]))
    return _part(hu, codes, first, hu.shape[2], size)


def _below(hu: Hu, codes: Codes, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    return _part(hu, codes, 0, _span(codes)[0] - round(20 / size[2]), size)


def _part(hu: Hu, codes: Codes, first: int, last: int, size: NDArray[np.float64]) -> tuple[Hu, Codes] | None:
    if (last - first) * size[2] < LEAST_PART_MM:
        return None
    return hu[:, :, first:last], codes[:, :, first:last]


def _span(codes: Codes) -> tuple[int, int]:
    """First and one past the last slice that holds an organ."""
    used = np.flatnonzero(((codes > 0) & (codes != IGNORE)).any(axis=(0, 1)))
    return int(used[0]), int(used[-1]) + 1


COPIES: dict[str, Spoil] = {
    "as it is": _plain,
    "quarter turn": _quarter_turn,
    "half turn": _half_turn,
    "turned 35°": _tilted,
    "mirrored": _mirrored,
    "head down": _head_down,
    "lower half": _cut_across,
    "right half": _cut_lengthwise,
    "noise 60 HU": _noisy(60),
    "noise 250 HU": _noisy(250),
    "inverted": _inverted,
    "HU + 1024": _shifted(1024),
    "HU - 150": _shifted(-150),
    "0 to 255": _squeezed,
    "chest": _above,
    "head": _head,
    "pelvis and legs": _below,
}
"""By name what is done to a CT; the header is never told."""


def judge(cascade: Cascade, images: Path, labels: Path, copies: Sequence[str]) -> Iterator[Verdict]:
    """Segment every CT in every copy and hold the doubts against the DSC.

    Args:
        cascade: the networks.
        images, labels: folders of FLARE's names.
        copies: names out of `COPIES`.
    """
    for path in sorted(labels.glob("*.nii.gz")):
        case = case_of(path.name)
        source: Any = nib.as_closest_canonical(load_image(image_of(images, case)))
        truth: Any = nib.as_closest_canonical(load_image(path))
        hu, codes = np.asarray(source.dataobj).astype(np.int16), np.asarray(truth.dataobj).astype(np.uint8)
        size = np.asarray(source.header.get_zooms()[:3], float)
        for copy in copies:
            spoilt = COPIES[copy](hu, codes, size)
            if spoilt is not None:
                yield from _judge_copy(cascade, case, copy, *spoilt, size)


def _judge_copy(
    cascade: Cascade, case: str, copy: str, hu: Hu, codes: Codes, size: NDArray[np.float64]
) -> Iterator[Verdict]:
    image = nib.Nifti1Image(np.ascontiguousarray(hu), np.diag([*size, 1.0]))
    found = cascade.find_organs(read_volume(image, f"{case}, {copy}"))
    said = doubts(found.evidence)
    known = codes != IGNORE
    for organ in ORGANS:
        truth, prediction = (codes == organ.code) & known, (found.labels == organ.code) & known
        present = bool(truth.any())
        score = dsc(truth, prediction) if present or prediction.any() else math.nan
        evidence = found.evidence.get(organ.name)
        yield Verdict(case, copy, organ.name, score, present, evidence, tuple(said.get(organ.name, ())))


def summary(verdicts: Iterable[Verdict]) -> str:
    """A table: by band of the DSC how many organs there are and of how many the user is warned.

    Left out is what is rightly absent.
    """
    rows = [verdict for verdict in verdicts if not math.isnan(verdict.dsc)]
    lines = ["| DSC | organs | warned | share |", "|---|---|---|---|"]
    for low, high in BANDS:
        band = [row for row in rows if low <= row.dsc and (row.dsc < high or high == 1.0)]
        warned = sum(row.warned for row in band)
        share = f"{warned / len(band):.0%}" if band else "–"
        lines.append(f"| {low:g} to {high:g} | {len(band)} | {warned} | {share} |")
    return "\n".join(lines)


def by_copy(verdicts: Iterable[Verdict]) -> str:
    """A table: by copy and organ the mean DSC, and of how many organs the user is warned out of how many."""
    rows = [verdict for verdict in verdicts if not math.isnan(verdict.dsc)]
    lines = [
        "| copy | " + " | ".join(f"{organ.name} DSC, warned" for organ in ORGANS) + " |",
        "|---|" + "---|" * len(ORGANS),
    ]
    for copy in dict.fromkeys(row.copy for row in rows):
        cells = []
        for organ in ORGANS:
            some = [row for row in rows if row.copy == copy and row.organ == organ.name]
            mean = f"{np.mean([row.dsc for row in some]) * 100:.0f}" if some else "–"
            cells.append(f"{mean}, {sum(row.warned for row in some)}/{len(some)}")
        lines.append(f"| {copy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_parts(verdicts: Iterable[Verdict]) -> str:
    """A table: of parts of scans that show none of the organs, in how many organs were found, and warned of."""
    lines = ["| part | scans | nothing found | organs found | of these warned |", "|---|---|---|---|---|"]
    scans: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        scans.setdefault((verdict.copy, verdict.case), []).append(verdict)
    without = {key: rows for key, rows in scans.items() if not any(row.present for row in rows)}
    for copy in dict.fromkeys(copy for copy, _ in without):
        parts = [rows for (name, _), rows in without.items() if name == copy]
        found = [row for rows in parts for row in rows if row.evidence is not None]
        empty = sum(all(row.evidence is None for row in rows) for rows in parts)
        lines.append(f"| {copy} | {len(parts)} | {empty} | {len(found)} | {sum(row.warned for row in found)} |")
    return "\n".join(lines)


def write_csv(verdicts: Iterable[Verdict], path: Path) -> None:
    """Write every organ of every copy with its evidence, from which limits can be set."""
    figures = ("volume_ml", "hu", "confidence", "stray", "cut", "boxed_cm2", "apart_mm")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["case", "copy", "organ", "dsc", "present", "found", *figures, "z", "y", "x", "doubts"])
        for row in verdicts:
            known = [""] * (len(figures) + 3)
            if row.evidence is not None:
                known = [_cell(getattr(row.evidence, figure)) for figure in figures]
                known += [f"{place:.1f}" for place in row.evidence.centre_mm]
            found = row.evidence is not None
            head = [row.case, row.copy, row.organ, f"{row.dsc:.4f}", int(row.present), int(found)]
            table.writerow([*head, *known, "; ".join(row.doubts)])


def _cell(figure: float | tuple[bool, ...] | None) -> str:
    if figure is None:
        return ""
    if isinstance(figure, tuple):
        return "".join(axis for axis, cut in zip("zyx", figure, strict=True) if cut)
    return f"{figure:.4g}"
