"""One picture of a run's range: its best, its middle and its worst case, found and true contours on the CT."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastorgan.labels import IGNORE, ORGANS, Organ
from fastorgan.preview import upright_labels
from fastorgan.volume import Volume, load_image, read_volume

from .accuracy import FLARE21, CaseScores, Pair, PairError, case_of, image_of, read_labels, score_pair
from .efficiency import load_plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOM_MM = 30.0
"""Around the organ, in plane."""

TRUE_COLOUR = "white"


@dataclass(frozen=True)
class Shown:
    """A case to draw.

    Attributes:
        title: its name and what it stands for.
        scores: DSC by organ.
        volume: the CT, upright.
        found, true: codes (z, y, x) on its grid.
    """

    title: str
    scores: CaseScores
    volume: Volume
    found: NDArray[np.uint8]
    true: NDArray[np.uint8]

    @classmethod
    def read(cls, title: str, scores: CaseScores, pair: Pair, images: Path) -> "Shown":
        """Read a case's CT and labels.

        Raises:
            VolumeError, PairError: if a file is missing or cannot be read, or the CT has another shape.
        """
        case = case_of(pair.name)
        path = image_of(images, case)
        volume = read_volume(load_image(path), str(path))
        upright = []
        for labels in (pair.prediction, pair.truth):
            array = read_labels(labels).array
            if array.shape != volume.grid.shape:
                raise PairError(f"{labels}: the shape is not that of {path}")
            upright.append(upright_labels(volume, array))
        return cls(title, scores, volume, *upright)


def draw_overlays(pairs: Sequence[Pair], images: Path, out: Path, organs: Sequence[Organ] = ORGANS) -> list[CaseScores]:
    """Score all cases and draw the best, the middle and the worst of them by the mean DSC of their organs.

    A row is a case, a column an organ: the axial slice that holds most of it, in radiological convention. Fewer than
    three cases are drawn all.

    Args:
        pairs: of predictions and ground truths, one at least.
        images: the folder of the CTs, NAME_0000.nii.gz or NAME.nii.gz.
        out: the PNG.
        organs: what to score and to draw.

    Returns:
        Scores of the cases drawn, best first.

    Raises:
        PairError: if a case cannot be scored, its CT is missing or has another shape, or the picture cannot be written.
        VolumeError: if a CT cannot be read.
        EfficiencyError: if matplotlib is not installed.
    """
    load_plotting()
    scored = [(score_pair(pair, FLARE21, organs, with_nsd=False), pair) for pair in pairs]
    scored.sort(key=lambda item: (-mean_dsc(item[0]), item[0].name))
    cases = []
    for name, place in spread(len(scored)).items():
        scores, pair = scored[place]
        cases.append(Shown.read(f"{name}: {case_of(pair.name)}", scores, pair, images))
    _draw(cases, organs, out)
    return [case.scores for case in cases]


def mean_dsc(scores: CaseScores) -> float:
    """Mean DSC of the organs that were scored."""
    return float(np.mean([score.dsc for score in scores.scores.values()]))


def spread(count: int) -> dict[str, int]:
    """Places of the best, the middle and the worst of `count` cases in their order; fewer where there are fewer."""
    first: dict[int, str] = {}
    for name, place in (("best", 0), ("worst", count - 1), ("median", (count - 1) // 2)):
        first.setdefault(place, name)
    return {first[place]: place for place in sorted(first)}


def slice_of(true: NDArray[np.bool_], found: NDArray[np.bool_]) -> int | None:
    """The slice along z that holds most of what is true, or of what was found where nothing is true; None without."""
    for mask in (true, found):
        areas = mask.sum(axis=(1, 2))
        if areas.any():
            return int(areas.argmax())
    return None


def _draw(cases: Sequence[Shown], organs: Sequence[Organ], out: Path) -> None:
    figure_of, canvas_of = load_plotting()
    figure = figure_of(figsize=(3.0 * len(organs), 2.9 * len(cases)), layout="constrained", facecolor="black")
    canvas_of(figure)
    grid = figure.subplots(len(cases), len(organs), squeeze=False)
    for axes, case in zip(grid, cases, strict=True):
        for axis, organ in zip(axes, organs, strict=True):
            _draw_organ(axis, case, organ)
        mean = 100 * mean_dsc(case.scores)
        axes[0].set_ylabel(f"{case.title}\nmean {mean:.1f}", color="white", fontsize=9, parse_math=False)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise PairError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _draw_organ(axis: "Axes", case: Shown, organ: Organ) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor("black")
    true = case.true == organ.code
    found = (case.found == organ.code) & (case.true != IGNORE)
    place = slice_of(true, found)
    dsc = 100 * case.scores.scores[organ.name].dsc
    if place is None:
        axis.set_title(f"{organ.name}: none", color="white", fontsize=9)
        return
    axis.set_title(f"{organ.name} {dsc:.1f}", color="white", fontsize=9)
    _, dy, dx = case.volume.spacing
    near = _around(true[place] | found[place], (ROOM_MM / dy, ROOM_MM / dx))
    # The patient's right is on the picture's left, the front above.
    pixels = case.volume.unit(case.volume.array[place][near])[:, ::-1]
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, origin="lower", aspect=dy / dx)
    colour = tuple(part / 255 for part in organ.colour)
    for mask, line, width in ((true, TRUE_COLOUR, 1.6), (found, colour, 1.2)):
        plane = mask[place][near][:, ::-1]
        if plane.any():
            axis.contour(plane.astype(float), [0.5], colors=[line], linewidths=width)


def _around(mask: NDArray[np.bool_], room: tuple[float, float]) -> tuple[slice, slice]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    first = [max(0, int(edges[0] - pad)) for edges, pad in zip((rows, columns), room, strict=True)]
    last = [int(edges[-1] + pad) + 1 for edges, pad in zip((rows, columns), room, strict=True)]
    return slice(first[0], last[0]), slice(first[1], last[1])
