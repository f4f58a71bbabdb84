"""Boxes in a volume, and the one rule that frames the organs for the organ net."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

ROI_SIZE = (96, 96, 96)
"""Samples (z, y, x) of the whole CT that the ROI net sees."""

CROP_SIZE = (96, 128, 192)
"""Samples (z, y, x) of the box that the organ net sees."""

MARGIN_MM = (12.0, 12.0, 12.0)
"""Added on both sides of the organs (z, y, x); the paper's "expand some pixels".

The less, the finer the organ net's samples; the ROI net's foreground falls short of the organs by up to 9 mm.
"""

LEAST_MM = (150.0, 170.0, 250.0)
"""A box grows to this extent (z, y, x) where the volume allows, so that the organ net meets organs at a like scale."""


@dataclass(frozen=True)
class Box:
    """A box in a volume, in edge coordinates: voxel i spans [i, i + 1), a whole axis is [0, n).

    Attributes:
        start, stop: first and last edge per axis (z, y, x), in voxels, may be fractional.
    """

    start: tuple[float, float, float]
    stop: tuple[float, float, float]

    @property
    def size(self) -> tuple[float, float, float]:
        """Extent per axis (z, y, x) in voxels."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def corners(self) -> NDArray[np.float64]:
        """Its corners as homogeneous points (8, 4), for an affine of (z, y, x)."""
        return np.array([[*corner, 1.0] for corner in product(*zip(self.start, self.stop, strict=True))])

    @classmethod
    def from_mm(cls, start: NDArray[np.float64], stop: NDArray[np.float64], spacing: tuple[float, ...]) -> "Box":
        """The box between two corners (3,) in mm from the volume's own, by its voxel size in mm, all (z, y, x)."""
        (z0, y0, x0), (z1, y1, x1) = (start / np.asarray(spacing)).tolist(), (stop / np.asarray(spacing)).tolist()
        return cls((z0, y0, x0), (z1, y1, x1))

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """The box of a whole volume of `shape` (z, y, x)."""
        z, y, x = shape
        return cls((0.0, 0.0, 0.0), (float(z), float(y), float(x)))


def extent(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box of voxels that holds a mask's foreground, as slices.

    Raises:
        ValueError: if the mask is empty.
    """
    if not mask.any():
        raise ValueError("an empty mask has no extent")
    spans = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)


def extent_mm(mask: NDArray[np.bool_], voxel: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First and last edge of a mask's foreground in mm from the array's corner, per axis.

    Raises:
        ValueError: if the mask is empty.
    """
    box = extent(mask)
    start = np.array([span.start for span in box], float) * voxel
    stop = np.array([span.stop for span in box], float) * voxel
    return start, stop


def side_areas(margin: NDArray[np.float32], sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area in mm2 that is above 0 on each side of a box: (axis, first and last side).

    Args:
        margin: (z, y, x) over the box.
        sample: mm of a sample (z, y, x).
    """
    counts = [[np.count_nonzero(margin.take(side, axis) > 0) for side in (0, -1)] for axis in range(3)]
    areas: NDArray[np.float64] = np.array(counts) * (sample.prod() / sample)[:, None]
    return areas


def frame(start: NDArray[np.float64], stop: NDArray[np.float64], within: Box, spacing: tuple[float, ...]) -> Box:
    """Frame organs that span [start, stop): add `MARGIN_MM`, grow to `LEAST_MM`, clip to what may be looked at.

    Inference frames what the ROI net found; training frames labels, disturbed as the ROI net would.

    Args:
        start, stop: (3,) in mm from the volume's corner (z, y, x).
        within: in voxels, the part of the volume that may be looked at, such as `Box.whole`.
        spacing: the volume's voxel size in mm (z, y, x).

    Returns:
        The box in voxels, inside `within`.
    """
    sizes = np.asarray(spacing, float)
    floor, roof = np.asarray(within.start) * sizes, np.asarray(within.stop) * sizes
    low, high = np.maximum(floor, start - MARGIN_MM), np.minimum(roof, stop + MARGIN_MM)
    grow = np.maximum(0.0, np.asarray(LEAST_MM) - (high - low)) / 2
    low, high = low - grow, high + grow
    # Growth that an end cuts off goes to the other side instead.
    shift = np.maximum(0.0, floor - low) - np.maximum(0.0, high - roof)
    return Box.from_mm(np.maximum(floor, low + shift), np.minimum(roof, high + shift), spacing)
