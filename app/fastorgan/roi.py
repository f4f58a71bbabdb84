"""From the ROI net's foreground to the box that the organ net sees.

The paper takes the union of the organs as foreground, maps it back to the full size and "expands some pixels"; which
component, and what happens when nothing is found, it does not say.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .box import Box, extent_mm, frame
from .components import largest_group

BRIDGE_MM = (40.0, 60.0, 140.0)
"""Pieces of foreground nearer than this (z, y, x) belong together: in a chest scan's last slices the tips of liver and
spleen lie as far apart, while what is mistaken for an organ lies above or below: heart, bladder, head."""

LEAST_FOREGROUND_ML = 20.0
"""Less foreground than this is taken for nothing found."""

LEAST_EXTENT_MM = 15.0
"""Foreground thinner than this along any axis is no organ."""


@dataclass(frozen=True)
class Roi:
    """The box for the organ net.

    Attributes:
        box: in voxels of the volume, (z, y, x).
        fallback: why the whole volume is taken; None where the box comes from the ROI net.
    """

    box: Box
    fallback: str | None = None


def locate(foreground: NDArray[np.bool_], shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Roi:
    """Find the organs' box from the ROI net's foreground.

    Takes the largest group of foreground pieces (`BRIDGE_MM`) and frames it (`box.frame`). Where that group is
    implausibly small (`LEAST_FOREGROUND_ML`, `LEAST_EXTENT_MM`), the whole volume is the box and `fallback` says why.

    Args:
        foreground: (z, y, x) mask over the whole volume at any resolution, `ROI_SIZE` in the cascade.
        shape: the volume's voxels (z, y, x).
        spacing: the volume's voxel size in mm (z, y, x).
    """
    voxel = tuple(n * s / m for n, s, m in zip(shape, spacing, foreground.shape, strict=True))
    group = largest_group(foreground, voxel, BRIDGE_MM)
    volume_ml = float(np.count_nonzero(group)) * float(np.prod(voxel)) / 1000.0
    if volume_ml < LEAST_FOREGROUND_ML:
        return Roi(Box.whole(shape), f"only {volume_ml:.0f} ml of organs found at low resolution")
    start, stop = extent_mm(group, voxel)
    if (stop - start).min() < LEAST_EXTENT_MM:
        return Roi(Box.whole(shape), f"organs found at low resolution are only {(stop - start).min():.0f} mm thick")
    return Roi(frame(start, stop, shape, spacing))
