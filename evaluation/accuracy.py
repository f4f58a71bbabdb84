"""Accuracy of predicted labels: DSC and NSD by case and organ, as the FLARE challenges compute them.

Arrays stay in their files' axis order: neither figure depends on it, and the challenges compare voxel by voxel too.
"""

import csv
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastorgan.errors import FastorganError
from fastorgan.labels import IGNORE, ORGANS, Organ
from fastorgan.nifti import SUFFIXES
from fastorgan.volume import load_image

from .surface import Spacing, surface_dice

GRID_TOLERANCE_MM = 0.1
"""How far corner voxels of a prediction and its ground truth may lie apart; rounding stays below, a shift does not."""

Metric = Literal["dsc", "nsd"]

METRICS: tuple[Metric, ...] = ("dsc", "nsd")


class PairError(FastorganError):
    """A prediction and its ground truth cannot be compared."""


class Column(NamedTuple):
    """A column of a protocol's CSV file."""

    title: str
    organ: str
    metric: Metric


@dataclass(frozen=True)
class Protocol:
    """A challenge's rules for scoring the four organs.

    Attributes:
        name: as on the command line.
        tolerances: of the NSD, in mm, by organ name.
        least_dsc: below this DSC the NSD is 0 and not computed.
        columns: of the CSV file, after `Name`.
        decimals: of the CSV file; None for unrounded.
    """

    name: str
    tolerances: Mapping[str, float]
    least_dsc: float
    columns: tuple[Column, ...]
    decimals: int | None


FLARE21 = Protocol(
    name="flare21",
    tolerances={organ.name: 1.0 for organ in ORGANS},
    least_dsc=0.0,
    columns=tuple(
        Column(f"{'DSC' if metric == 'dsc' else 'NSD-1mm'}_{organ.code}", organ.name, metric)
        for organ in ORGANS
        for metric in METRICS
    ),
    decimals=None,
)
"""Of JunMa11/FLARE, FLARE21/Evaluation: both kidneys are one organ and the tolerance is 1 mm for all."""

FLARE22 = Protocol(
    name="flare22",
    tolerances={"liver": 5.0, "kidney": 3.0, "spleen": 3.0, "pancreas": 5.0},
    least_dsc=0.2,
    columns=tuple(
        Column(f"{organ.name.capitalize()}_{metric.upper()}", organ.name, metric)
        for metric in METRICS
        for organ in ORGANS
    ),
    decimals=4,
)
"""Tolerances and file layout of FLARE22 to FLARE24, for the four organs, and FLARE24's bound on the DSC.

FLARE23 has the bound at 0.1 and FLARE22 has none. The challenges score each kidney by itself; here both are one organ.
"""

PROTOCOLS = {protocol.name: protocol for protocol in (FLARE21, FLARE22)}


@dataclass(frozen=True)
class Score:
    """DSC and NSD of one organ in one case, 0 to 1; an NSD that was not computed, or has no surface, is NaN."""

    dsc: float
    nsd: float


@dataclass(frozen=True)
class CaseScores:
    """One case's scores.

    Attributes:
        name: the file name with its suffix.
        scores: by organ name; organs that were left out are missing.
    """

    name: str
    scores: Mapping[str, Score]

    def value(self, organ: str, metric: Metric) -> float:
        """One figure; NaN if it was left out."""
        score = self.scores.get(organ)
        return math.nan if score is None else score.dsc if metric == "dsc" else score.nsd


@dataclass(frozen=True)
class Pair:
    """The two files of one case; either may be missing until they are read."""

    name: str
    prediction: Path
    truth: Path


@dataclass(frozen=True)
class Labels:
    """A label file's content.

    Attributes:
        array: codes, in the file's axis order.
        spacing: voxel size in mm, in the same order.
        affine: (4, 4), from voxel indices to mm.
    """

    array: NDArray[np.uint8]
    spacing: Spacing
    affine: NDArray[np.float64]


def find_pairs(predictions: Path, truths: Path) -> list[Pair]:
    """Pair two files, or the *.nii.gz files of two folders by their names.

    A name that only one folder has makes a pair all the same, so that no case drops out silently; reading it fails.

    Args:
        predictions, truths: two folders or two files. A case of two files has the name of its ground truth.

    Returns:
        At least one pair, in the order of the names.

    Raises:
        PairError: if a path does not exist, one is a folder and the other is not, or both folders are empty.
    """
    for path in (predictions, truths):
        if not path.exists():
            raise PairError(f"{path}: no such file or folder")
    if predictions.is_dir() != truths.is_dir():
        raise PairError(f"{predictions} and {truths}: give two folders or two files")
    if not predictions.is_dir():
        return [Pair(truths.name, predictions, truths)]
    names = sorted({path.name for folder in (predictions, truths) for path in folder.glob("*.nii.gz")})
    if not names:
        raise PairError(f"{predictions} and {truths}: no *.nii.gz files")
    return [Pair(name, predictions / name, truths / name) for name in names]


def case_of(name: str) -> str:
    """Cut the suffix off a NIfTI file name."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def image_of(images: Path, case: str) -> Path:
    """Find a case's CT in a folder: CASE_0000.nii.gz, as the challenge names it, or CASE.nii.gz.

    Raises:
        PairError: if there is none.
    """
    for name in (f"{case}_0000.nii.gz", f"{case}.nii.gz"):
        if (images / name).exists():
            return images / name
    raise PairError(f"{images}: no CT of the case {case}")


def read_labels(path: Path) -> Labels:
    """Read a label file.

    Raises:
        VolumeError: if the file is missing or is not NIfTI.
        PairError: if it is cut short, not three-dimensional, or holds values that are no label codes.
    """
    image = load_image(path)
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise PairError(f"{path}: damaged, its voxels cannot be read") from error
    if values.ndim < 3 or values.size == 0 or any(length != 1 for length in values.shape[3:]):
        raise PairError(f"{path}: not one three-dimensional volume (shape {' x '.join(map(str, values.shape))})")
    values = values.reshape(values.shape[:3], order="A")
    with np.errstate(invalid="ignore"):
        array = values.astype(np.uint8, copy=False) if values.dtype.kind in "biuf" else np.zeros(0, np.uint8)
    if not np.array_equal(array, values):
        raise PairError(f"{path}: holds values that are not whole numbers from 0 to 255, so no labels")
    header: Any = image.header
    first, second, third = (float(size) for size in header.get_zooms()[:3])
    return Labels(array, (first, second, third), np.asarray(image.affine, float))


def score_pair(pair: Pair, protocol: Protocol, organs: Iterable[Organ] = ORGANS, with_nsd: bool = True) -> CaseScores:
    """Read one case's files and score it.

    Raises:
        PairError: naming both files, if one cannot be read or their grids differ.
    """
    try:
        prediction, truth = read_labels(pair.prediction), read_labels(pair.truth)
        _check_grids(prediction, truth)
    except FastorganError as error:
        raise PairError(f"{pair.prediction} against {pair.truth}: {error}") from error
    return CaseScores(pair.name, score_labels(prediction.array, truth, protocol, organs, with_nsd))


def score_labels(
    prediction: NDArray[np.uint8],
    truth: Labels,
    protocol: Protocol,
    organs: Iterable[Organ] = ORGANS,
    with_nsd: bool = True,
) -> dict[str, Score]:
    """Score one case's labels.

    Voxels that the ground truth labels `IGNORE` count for nothing. An organ that neither side has scores 1 and 1, one
    that only one side has 0 and 0.

    Args:
        prediction: codes on the ground truth's grid.
        truth: the ground truth.
        protocol: the rules.
        organs: what to score.
        with_nsd: False saves the surfaces' time; every NSD is NaN then.

    Returns:
        Scores by organ name.
    """
    unknown = truth.array == IGNORE
    ignore = unknown if unknown.any() else None
    scores = {}
    for organ in organs:
        expected, found = truth.array == organ.code, prediction == organ.code
        if ignore is not None:
            found &= ~ignore
        overlap = dsc(expected, found)
        if not with_nsd:
            nsd = math.nan
        elif not expected.any() or not found.any() or overlap < protocol.least_dsc:
            nsd = float(not (expected.any() or found.any()))
        else:
            nsd = surface_dice(expected, found, truth.spacing, protocol.tolerances[organ.name], ignore)
        scores[organ.name] = Score(overlap, nsd)
    return scores


def dsc(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> float:
    """Compute the Dice similarity coefficient of two masks of one shape, 0 to 1; 1 if both are empty."""
    voxels = int(truth.sum()) + int(prediction.sum())
    return 2 * int((truth & prediction).sum()) / voxels if voxels else 1.0


def write_csv(cases: Iterable[CaseScores], protocol: Protocol, path: Path) -> None:
    """Write scores as the protocol's CSV file; what was left out is an empty cell.

    Raises:
        PairError: if the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["Name", *(column.title for column in protocol.columns)])
            for case in cases:
                values = (case.value(column.organ, column.metric) for column in protocol.columns)
                writer.writerow([case.name, *(_csv_cell(value, protocol.decimals) for value in values)])
    except OSError as error:
        raise PairError(f"{path}: cannot be written ({error.strerror})") from error


@dataclass(frozen=True)
class Table:
    """Scores as text in percent, a line a case, with mean and standard deviation as the FLARE papers state them.

    Attributes:
        cases: their names, for the first column's width.
        organs: in the order of the columns.
        metrics: DSC, NSD or both, of each organ.
    """

    cases: Collection[str]
    organs: Sequence[Organ]
    metrics: Sequence[Metric] = METRICS

    def header(self) -> str:
        """The line that names the columns."""
        titles = (f"{organ.name} {metric.upper()}" for organ in self.organs for metric in self.metrics)
        return self._line("case", (title.rjust(_CELL) for title in titles))

    def row(self, case: CaseScores) -> str:
        """One case's line."""
        values = (case.value(organ.name, metric) for organ in self.organs for metric in self.metrics)
        return self._line(case_of(case.name), (_percent(value).rjust(_CELL) for value in values))

    def summary(self, cases: Sequence[CaseScores]) -> str:
        """Mean ± sample standard deviation of every column over the cases, and the mean of the organs' means."""
        means: dict[Metric, list[float]] = {metric: [] for metric in self.metrics}
        cells = []
        for organ in self.organs:
            for metric in self.metrics:
                values = [v for case in cases if not math.isnan(v := case.value(organ.name, metric))]
                mean = float(np.mean(values)) if values else math.nan
                means[metric].append(mean)
                spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                cells.append((_percent(mean) + spread).rjust(_CELL))
        overall = []
        for metric, organ_means in means.items():
            scored = [mean for mean in organ_means if not math.isnan(mean)]
            overall.append(f"{metric.upper()} {_percent(float(np.mean(scored)) if scored else math.nan)}")
        count = f"{len(cases)} case{'' if len(cases) == 1 else 's'}"
        return self._line("mean ± SD", cells) + f"\nmean of the organs, {count}: {', '.join(overall)}"

    def _line(self, name: str, cells: Iterable[str]) -> str:
        width = max(len("mean ± SD"), *(len(case_of(case)) for case in self.cases))
        return "  ".join((name.ljust(width), *cells)).rstrip()


_CELL = len("pancreas DSC")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _csv_cell(value: float, decimals: int | None) -> str:
    if math.isnan(value):
        return ""
    return repr(value) if decimals is None else f"{value:.{decimals}f}"


def _check_grids(prediction: Labels, truth: Labels) -> None:
    if prediction.array.shape != truth.array.shape:
        shapes = [" x ".join(map(str, labels.array.shape)) for labels in (prediction, truth)]
        raise PairError(f"shapes differ, {shapes[0]} and {shapes[1]} voxels")
    corners = np.array([[*corner, 1] for corner in product(*((0, length - 1) for length in truth.array.shape))])
    apart = np.linalg.norm((corners @ (prediction.affine - truth.affine).T)[:, :3], axis=1).max()
    if not apart <= GRID_TOLERANCE_MM:
        raise PairError(f"affines differ, a corner voxel lies {apart:.1f} mm from the other's")
