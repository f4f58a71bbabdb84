"""Borders of labels, moved to the edges that the image has beside fat.

Machine-made labels have habits. In the training set, where fat lies beyond a liver, the image's edge (the middle
between both HU) is .95 mm outside the label, beside spleens .26 mm, and beside kidneys and pancreas on the label's
border. A network that learns from such labels ends short of these organs as well.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastorgan.box import extent
from fastorgan.intensity import LEVELS, to_unit
from fastorgan.labels import ORGANS

from .cache import CachedVolume, load_cache

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


def refine(folder: Path, out: Path) -> Iterator[tuple[str, float]]:
    """Write the organ net's volumes of a cache again, `refined`.

    Args:
        folder: a cache of `prepare` or `warp`.
        out: where NAME.organs.npz go.

    Yields:
        The name of each volume when it is written, and how many ml its organs gained.

    Raises:
        DataError: if there are no volumes or one is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    for volume in load_cache(folder, "organs"):
        better = refined(volume)
        better.save(out / f"{volume.name}.organs.npz")
        voxels = np.isin(better.labels, MOVED).sum(dtype=int) - np.isin(volume.labels, MOVED).sum(dtype=int)
        yield volume.name, float(voxels * np.prod(volume.spacing) / 1000.0)


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
    labels = volume.labels.copy()
    room = np.ceil((REACH_MM + max(OUTSIDE_MM)) / volume.spacing).astype(int)
    for code in MOVED:
        mask = volume.labels == code
        if not mask.any():
            continue
        spans = zip(extent(mask), room.tolist(), strict=True)
        near = tuple(slice(max(0, span.start - pad), span.stop + pad) for span, pad in spans)
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
    distance = ndimage.distance_transform_edt(~mask, sampling=spacing)
    distance -= ndimage.distance_transform_edt(mask, sampling=spacing)
    # Distances are between centres; the border is half a voxel away from the first on either side.
    height = distance - np.copysign(spacing.min() / 2, distance)
    band = np.nonzero((np.abs(height) <= REACH_MM) & (mask | free))
    smooth = ndimage.gaussian_filter(distance, SMOOTH_MM / spacing)
    normal = np.stack([slope[band] for slope in np.gradient(smooth, *spacing.tolist())])
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-6)

    def along(mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where one comes to from each voxel of the band, mm along its normal: fractional indices."""
        return np.asarray(band) + normal * mm / spacing[:, None]

    def levels(mm: NDArray[np.float64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = ndimage.map_coordinates(image, along(mm), np.float32, order=1, mode="nearest")
        return found

    beside = np.ones(len(normal[0]), bool)
    low, high = to_unit(np.array(FAT_HU)) * LEVELS
    outside = [levels(mm - height[band]) for mm in OUTSIDE_MM]
    for mm, found in zip(OUTSIDE_MM, outside, strict=True):
        beside &= (found >= low) & (found <= high)
        # Beyond the volume's faces nothing is free.
        beside &= ndimage.map_coordinates(free, along(mm - height[band]), np.uint8, order=0, mode="constant") > 0
    fat = np.mean(outside, axis=0)
    organ = np.mean([levels(mm - height[band]) for mm in INSIDE_MM], axis=0)
    least, none = to_unit(np.array([LEAST_CONTRAST_HU, 0.0])) * LEVELS
    beside &= organ - fat >= least - none
    middle = (organ + fat) / 2
    dense = image[band] > middle
    # What is dense further out, beyond a gap, is something else.
    dense &= mask[band] | (levels(-height[band] / 2) > middle)
    return tuple(axis[beside] for axis in band), dense[beside]
