"""Distances from the borders of masks, with numpy alone, as training has it on machines that have little more."""

import numpy as np
from numpy.typing import NDArray

from fastorgan.box import extent


def signed_distance(mask: NDArray[np.bool_], spacing: NDArray[np.float64], reach: float) -> NDArray[np.float64]:
    """Distance in mm of each voxel's centre from the nearest on the other side of a mask's border, negative inside.

    Args:
        mask: (z, y, x).
        spacing: mm of a voxel (z, y, x).
        reach: mm; what is farther, or has no other side, counts as this far.
    """
    outside, inside = np.sqrt(_squares(mask, spacing, reach)), np.sqrt(_squares(~mask, spacing, reach))
    return (outside - inside).astype(np.float64)


def _squares(mask: NDArray[np.bool_], spacing: NDArray[np.float64], reach: float) -> NDArray[np.float32]:
    """Squared distance of each voxel from the mask's nearest: axis by axis, as squares add up."""
    result = np.where(mask, np.float32(0), np.float32(reach**2))
    for axis, mm in enumerate(spacing.tolist()):
        line = np.moveaxis(result, axis, 0)
        best = line.copy()
        for step in range(1, min(len(line) - 1, int(reach / mm)) + 1):
            beside = line + np.float32((step * mm) ** 2)
            np.minimum(best[step:], beside[:-step], out=best[step:])
            np.minimum(best[:-step], beside[step:], out=best[:-step])
        result = np.moveaxis(best, 0, axis)
    return result


def beyond_border(distance: NDArray[np.float64], spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far from the border itself voxels lie, by their `signed_distance`: it is half a voxel nearer."""
    result: NDArray[np.float64] = distance - np.copysign(spacing.min() / 2, distance)
    return result


def around(mask: NDArray[np.bool_], mm: float, spacing: NDArray[np.float64]) -> tuple[slice, ...]:
    """The box of a mask's foreground with at least `mm` on either side, where there is as much.

    Raises:
        ValueError: if the mask is empty.
    """
    room = np.ceil(mm / spacing).astype(int).tolist()
    spans = zip(extent(mask), room, strict=True)
    return tuple(slice(max(0, span.start - pad), span.stop + pad) for span, pad in spans)
