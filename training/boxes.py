"""How well the box that the ROI net's finding is framed to holds the organs, in scans as they are and in harder views.

Views are made of the cache's whole scans: parts of them, turned and slanted grids, and changed grey values.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan.box import MARGIN_MM, Box, extent_mm, frame
from fastorgan.intensity import LEVELS, WINDOW_HU
from fastorgan.roi import locate, overview
from fastorgan.runtime import Network
from fastorgan.volume import read_volume

from .cache import CachedVolume
from .sampling import rotation

AIR_HU = -1000.0


@dataclass(frozen=True)
class Field:
    """A field of view: float HU and organs' mask, (z, y, x), with the voxel size in mm."""

    hu: NDArray[np.float32]
    organs: NDArray[np.bool_]
    spacing: tuple[float, float, float]

    @classmethod
    def of(cls, source: CachedVolume) -> "Field":
        """The whole of a cached scan; what lies below the HU window becomes air."""
        low, high = WINDOW_HU
        hu = np.where(source.image == 0, AIR_HU, low + source.image * ((high - low) / LEVELS)).astype(np.float32)
        z, y, x = source.spacing.tolist()
        return cls(hu, source.labels > 127, (z, y, x))

    def part(self, axis: int, first_mm: float, last_mm: float) -> "Field":
        """What lies between two places on an axis, in mm from the array's corner; never nothing."""
        size, step = self.hu.shape[axis], self.spacing[axis]
        first = round(min(max(0.0, first_mm / step), size - 1))
        last = max(round(min(max(0.0, last_mm / step), size)), first + 1)
        cut = tuple(slice(first, last) if a == axis else slice(None) for a in range(3))
        return replace(self, hu=self.hu[cut], organs=self.organs[cut])

    def span(self, axis: int) -> tuple[float, float]:
        """First and last edge of the organs on an axis, in mm from the array's corner."""
        start, stop = extent_mm(self.organs, self.spacing)
        return float(start[axis]), float(stop[axis])

    def turned(self, about_z: float = 0.0, about_y: float = 0.0, about_x: float = 0.0) -> "Field":
        """The same on a grid that is turned by degrees and holds all of it, with air beyond the scan."""
        steps = np.asarray(self.spacing)
        turn = rotation(np.radians([about_z, about_y, about_x]))
        half = np.multiply(self.hu.shape, steps) / 2
        size = np.ceil(2 * np.abs(turn) @ half / steps).astype(int)
        # From voxels of the turned grid to the scan's, about the middle of both.
        matrix = turn.T * steps[None] / steps[:, None]
        offset = (np.asarray(self.hu.shape) - 1) / 2 - matrix @ ((size - 1) / 2)
        shape = tuple(size.tolist())
        hu = ndimage.affine_transform(self.hu, matrix, offset, shape, order=1, cval=AIR_HU)
        share = ndimage.affine_transform(self.organs.astype(np.float32), matrix, offset, shape, order=1)
        return replace(self, hu=hu, organs=share > 0.5)


def _recoloured(factor: float, add: float) -> Callable[[Field], Field]:
    """Other HU, where it is not air."""
    return lambda field: replace(field, hu=np.where(field.hu > AIR_HU, field.hu * factor + add, field.hu))


def _abdomen(field: Field) -> Field:
    first, last = field.span(0)
    return field.part(0, first - 30, last + 30)


def _along(low: float, high: float) -> Callable[[Field], Field]:
    """The scan between two shares of the organs' height, from below; infinities take its ends."""

    def view(field: Field) -> Field:
        first, last = field.span(0)
        return field.part(0, first + low * (last - first), first + high * (last - first))

    return view


def _slab(height_mm: float) -> Callable[[Field], Field]:
    def view(field: Field) -> Field:
        middle = sum(field.span(0)) / 2
        return field.part(0, middle - height_mm / 2, middle + height_mm / 2)

    return view


def _side(first_mm: float, last_mm: float) -> Callable[[Field], Field]:
    """A narrow field of view, by mm from the organs' middle along x."""

    def view(field: Field) -> Field:
        middle = sum(field.span(2)) / 2
        return field.part(2, middle + first_mm, middle + last_mm)

    return view


def _noisy(field: Field) -> Field:
    noise = np.random.default_rng(0).standard_normal(field.hu.shape, np.float32)
    return replace(field, hu=field.hu + np.float32(80) * noise)


def _thick(field: Field) -> Field:
    return replace(field, hu=ndimage.uniform_filter1d(field.hu, max(1, round(10 / field.spacing[0])), axis=0))


VIEWS: Mapping[str, Callable[[Field], Field]] = {
    "whole": lambda field: field,
    "abdomen, 30 mm more above and below": _abdomen,
    "upper half": _along(0.5, math.inf),
    "lower half": _along(-math.inf, 0.5),
    "uppermost quarter": _along(0.75, math.inf),
    "100 mm along z": _slab(100),
    "60 mm along z": _slab(60),
    "200 mm on the left": _side(0, 200),
    "200 mm on the right": _side(-200, 0),
    "180 mm about the spine": _side(-90, 90),
    "turned by 15 degrees": lambda field: field.turned(about_z=15),
    "turned by -15 degrees": lambda field: field.turned(about_z=-15),
    "tilted by 12 degrees": lambda field: field.turned(about_x=12),
    "leaning by 12 degrees": lambda field: field.turned(about_y=12),
    "abdomen, tilted by 15 degrees": lambda field: _abdomen(field).turned(about_x=15),
    "noise of 80 HU": _noisy,
    "60 HU more": _recoloured(1.0, 60.0),
    "60 HU less": _recoloured(1.0, -60.0),
    "half the contrast": _recoloured(0.5, 0.0),
    "slices of 10 mm": _thick,
}
"""By name."""

WITHOUT_ORGANS: Mapping[str, Callable[[Field], Field]] = {
    "above the organs": lambda field: field.part(0, field.span(0)[1] + 3, math.inf),
    "below the organs": lambda field: field.part(0, -math.inf, field.span(0)[0] - 3),
}
"""By name; they count where they are `LEAST_EMPTY_MM` high."""

LEAST_EMPTY_MM = 110.0


@dataclass(frozen=True)
class Finding:
    """What became of one view of a scan.

    Attributes:
        view, name: which.
        found: whether the ROI net found organs that could be framed; else the whole view is searched.
        shows: whether there are organs to be seen.
        beyond_mm: how far what was found reaches beyond the organs on their six sides; negative where it falls short.
            None without organs or finding.
        lost: share of the organs' voxels outside the box.
        ratio: the box's volume over that of the box that the labels are framed to.
    """

    view: str
    name: str
    found: bool
    shows: bool
    beyond_mm: NDArray[np.float64] | None = None
    lost: float = 0.0
    ratio: float = math.nan


def judge(network: Network, view: str, name: str, field: Field) -> Finding:
    """Frame a view by a ROI net's finding, as the cascade does, and compare the box with the labels'."""
    grid = np.diag([*field.spacing[::-1], 1.0])
    hu = np.clip(np.rint(field.hu), -2048, 4000).astype(np.int16)
    volume = read_volume(nib.Nifti1Image(hu.transpose(2, 1, 0), grid), name)
    body, whole = overview(volume)
    roi = locate(network(whole)[0] > 0, body, volume.shape, volume.spacing)
    shows = bool(field.organs.any())
    if roi.found is None or not shows:
        return Finding(view, name, roi.found is not None, shows)
    start, stop = extent_mm(field.organs, volume.spacing)
    found = np.multiply((roi.found.start, roi.found.stop), volume.spacing)
    beyond = np.concatenate((start - found[0], found[1] - stop))
    box = tuple(slice(round(a), round(b)) for a, b in zip(roi.box.start, roi.box.stop, strict=True))
    lost = 1.0 - np.count_nonzero(field.organs[box]) / np.count_nonzero(field.organs)
    ideal = frame(start, stop, Box.whole(volume.shape), volume.spacing)
    return Finding(view, name, True, True, beyond, lost, float(np.prod(roi.box.size) / np.prod(ideal.size)))


def judge_all(network: Network, sources: Iterable[CachedVolume]) -> Iterator[Finding]:
    """Judge every view of every scan of the ROI net's cache."""
    for source in sources:
        whole = Field.of(source)
        for view, of in VIEWS.items():
            yield judge(network, view, source.name, of(whole))
        for view, of in WITHOUT_ORGANS.items():
            field = of(whole)
            if field.hu.shape[0] * field.spacing[0] >= LEAST_EMPTY_MM:
                yield judge(network, view, source.name, field)


def table(findings: Iterable[Finding]) -> str:
    """Findings by view as a table in Markdown, with a last line for all views but the whole scans."""
    lines = [
        "| view | scans | found | short by more than the margin | farthest short, mm | mean distance, mm | "
        "organs lost, % | volume of the box |",
        "|---|---|---|---|---|---|---|---|",
    ]
    views: dict[str, list[Finding]] = {}
    for finding in findings:
        views.setdefault(finding.view, []).append(finding)
    changed = [finding for view, some in views.items() for finding in some if view != "whole" and finding.shows]
    for title, some in (*views.items(), ("all but whole", changed)):
        found = sum(finding.found for finding in some)
        framed = [finding for finding in some if finding.beyond_mm is not None]
        cells = [title, len(some), found, *_figures(framed)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _figures(framed: list[Finding]) -> list[str]:
    if not framed:
        return [""] * 5
    beyond = np.stack([finding.beyond_mm for finding in framed if finding.beyond_mm is not None])
    ratios = [finding.ratio for finding in framed]
    return [
        f"{np.count_nonzero(beyond < -np.tile(MARGIN_MM, 2))} of {beyond.size} sides",
        f"{max(0.0, -float(beyond.min())):.0f}",
        f"{np.abs(beyond).mean():.1f}",
        f"{100 * max(finding.lost for finding in framed):.2f}",
        f"{np.mean(ratios):.3f}, at most {max(ratios):.2f}",
    ]
