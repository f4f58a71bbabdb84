"""Borders of labels, moved to the edges that the image has beside fat.

Machine-made labels have habits. In the training set, where fat lies beyond a liver, the image's edge (the middle
between both HU) is a millimetre outside the label, beside spleens a quarter, and beside kidneys and pancreas on the
label's border. A network that learns from such labels ends short of these organs as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan.intensity import level_of
from fastorgan.labels import ORGANS

from .cache import CachedVolume, load_cache
from .distances import around, beyond_border, signed_distance

MOVED = tuple(organ.code for organ in ORGANS if organ.name in ("liver", "spleen"))
"""Codes of the organs whose borders move."""

REACH_MM = 2.5
"""How far from the border a voxel may change."""

INSIDE_MM, OUTSIDE_MM = (-5.0, -4.0), (3.5, 4.5)
"""From the border, along its normal: where organ and fat are looked at, beyond the blur of the edge."""

FAT_HU = (-150.0, -55.0)
"""What is there outside is fat."""

LEAST_CONTRAST_HU = 80.0
"""Between organ and fat; less is no edge."""

SMOOTH_MM = 1.5
"""Standard deviation that the border is smoothed by before its normal is taken."""

FARTHEST_MM = 15.0
"""Distance from a border beyond which smoothing brings nothing of it into normals."""

ROW = 4
"""Voxels on either side of a border whose distance from the edge is measured."""

LEAST_ROWS = 150
"""Fewer are no measurement."""


@dataclass(frozen=True)
class Refinement:
    """What became of one volume.

    Attributes:
        name: of the volume.
        gained_ml: by the organs of `MOVED` together.
        before, after: `edge_distance` by the names of all organs that have one.
    """

    name: str
    gained_ml: float
    before: dict[str, float]
    after: dict[str, float]

    def text(self) -> str:
        """One line: what was gained, and how far the edge is from the border of each organ."""
        edges = [f"{organ} {mm:+.2f} to {self.after.get(organ, np.nan):+.2f}" for organ, mm in self.before.items()]
        return f"{self.name}: {self.gained_ml:+.1f} ml; edges beside fat, mm outwards: {', '.join(edges) or 'none'}"


def refine(folder: Path, out: Path) -> Iterator[Refinement]:
    """Write the organ net's volumes of a cache again, `refined`; yields what became of each when it is written.

    Args:
        folder: a cache of `prepare` or `warp`.
        out: where NAME.organs.npz go.

    Raises:
        DataError: if there are no volumes or one is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    for volume in load_cache(folder, "organs"):
        better = refined(volume)
        better.save(out / f"{volume.name}.organs.npz")
        voxels = np.isin(better.labels, MOVED).sum(dtype=int) - np.isin(volume.labels, MOVED).sum(dtype=int)
        gained = float(voxels * np.prod(volume.spacing) / 1000.0)
        yield Refinement(volume.name, gained, _edge_distances(volume), _edge_distances(better))


def edge_distance(volume: CachedVolume, code: int) -> float | None:
    """Measure how far outside an organ's border the image has its edge beside fat: the mean in mm, in plane.

    Looks at rows of voxels along x and y: `ROW` of the organ, then as many of background of which the last two are fat.
    The edge is where the row first falls below the middle between its first two and its last two voxels.

    Returns:
        Negative where the edge is inside the organ; None where fewer than `LEAST_ROWS` rows show it.
    """
    mask = volume.labels == code
    if not mask.any():
        return None
    near = around(mask, ROW, np.ones(3))
    found = []
    for axis in (1, 2):
        for way in (1, -1):
            image, labels = (np.moveaxis(a[near], axis, -1)[..., ::way] for a in (volume.image, volume.labels))
            found.append(_edges_in_rows(image, labels, code) * volume.spacing[axis])
    distances = np.concatenate(found)
    return float(distances.mean()) if len(distances) >= LEAST_ROWS else None


def _edges_in_rows(image: NDArray[np.uint8], labels: NDArray[np.uint8], code: int) -> NDArray[np.floating[Any]]:
    """Voxels from each border that is followed along the last axis to the edge, for the rows that show one."""
    if image.shape[-1] < 2 * ROW:
        return np.empty(0)
    levels, codes = (sliding_window_view(array, 2 * ROW, axis=-1) for array in (image, labels))
    rows = levels[(codes[..., :ROW] == code).all(-1) & (codes[..., ROW:] == 0).all(-1)].astype(np.float32)
    rows = rows[_is_edge(rows[:, :2].mean(1), [rows[:, -2], rows[:, -1]])]
    middle = (rows[:, :2].mean(1) + rows[:, -2:].mean(1)) / 2
    below = np.argmax(rows[:, 1:] < middle[:, None], axis=1) + 1
    last, first = (np.take_along_axis(rows, k[:, None], 1)[:, 0] for k in (below - 1, below))
    edge: NDArray[np.floating[Any]] = below - (middle - first) / np.maximum(last - first, 1.0) - (ROW - 0.5)
    return edge


def _edge_distances(volume: CachedVolume) -> dict[str, float]:
    found = {organ.name: edge_distance(volume, organ.code) for organ in ORGANS}
    return {name: mm for name, mm in found.items() if mm is not None}


def _is_edge(organ: NDArray[np.float32], outside: list[NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Whether all levels outside are fat, and those inside denser than their mean by `LEAST_CONTRAST_HU`."""
    low, high = (level_of(hu) for hu in FAT_HU)
    dense = organ - np.mean(outside, axis=0) >= level_of(LEAST_CONTRAST_HU) - level_of(0.0)
    result: NDArray[np.bool_] = np.logical_and.reduce([dense, *((low <= fat) & (fat <= high) for fat in outside)])
    return result


def refined(volume: CachedVolume) -> CachedVolume:
    """Move the borders of `MOVED` to the image's edge where fat lies beyond them.

    A voxel within `REACH_MM` of the border belongs to the organ if it is denser than the middle between what lies
    inside and what lies outside of it. Where that outside is no fat, but another organ, muscle or air, and beyond the
    volume's faces, the border stays. Organ and background alone change into each other.

    Args:
        volume: of the organ net's cache; it is left as it is.

    Returns:
        The same with other labels; equal ones where none of these organs is to be seen.
    """
    if min(volume.labels.shape) < 2:
        # A single slice has no normals.
        return volume
    labels = volume.labels.copy()
    for code in MOVED:
        mask = volume.labels == code
        if not mask.any():
            continue
        near = around(mask, REACH_MM + max(OUTSIDE_MM), volume.spacing)
        places, dense = _beside_fat(volume.image[near], volume.labels[near], code, volume.spacing)
        labels[near][places] = np.where(dense, code, 0)
    return replace(volume, labels=labels)


def _beside_fat(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], code: int, spacing: NDArray[np.float64]
) -> tuple[tuple[NDArray[np.intp], ...], NDArray[np.bool_]]:
    """Find where an organ has fat beside it.

    Returns:
        Indices (z, y, x) of its voxels and of background near such borders, and which of them are the organ by density.
    """
    mask, free = labels == code, labels == 0
    distance = signed_distance(mask, spacing, FARTHEST_MM)
    height = beyond_border(distance, spacing)
    band = np.nonzero((np.abs(height) <= REACH_MM) & (mask | free))
    smooth = ndimage.gaussian_filter(distance, SMOOTH_MM / spacing)
    normal = np.stack([slope[band] for slope in np.gradient(smooth, *spacing.tolist())])
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-6)

    def along(mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where one comes to from each voxel of the band, mm along its normal: fractional indices."""
        return np.asarray(band) + normal * mm / spacing[:, None]

    def levels(points: NDArray[np.float64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = ndimage.map_coordinates(image, points, np.float32, order=1, mode="nearest")
        return found

    beyond = [along(mm - height[band]) for mm in OUTSIDE_MM]
    outside = [levels(points) for points in beyond]
    organ = np.mean([levels(along(mm - height[band])) for mm in INSIDE_MM], axis=0)
    beside = _is_edge(organ, outside)
    for points in beyond:
        # Beyond the volume's faces nothing is free.
        beside &= ndimage.map_coordinates(free, points, np.uint8, order=0, mode="constant") > 0
    middle = (organ + np.mean(outside, axis=0)) / 2
    dense = image[band] > middle
    # What is dense further out, beyond a gap, is something else.
    dense &= mask[band] | (levels(along(-height[band] / 2)) > middle)
    return tuple(axis[beside] for axis in band), dense[beside]
