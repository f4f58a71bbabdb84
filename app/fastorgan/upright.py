"""Oblique grids: resampled along the patient's axes before the networks see them.

Many such grids were made by turning a scan, and padded with air where the scan ends. Air that mixes with the patient
there would make the scan fade out over a slice or two, in which organs are not recognised. So it does not: a sample is
the mean of the denser voxels around it alone, up to most of a voxel beyond the last of them, and labels go only to
voxels that are denser than air. Deeper in the patient, and away from metal, cubic splines are taken, which blur less.
"""

import math
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .box import Box
from .errors import VolumeError
from .memory import check_memory

AIR_HU = -1024.0
"""What lies outside the scan when an oblique grid is resampled upright."""

DENSE_HU = -1000.0
"""What is denser belongs to the patient, or to the couch, or is noise in the air; padding is not."""

WATER_HU, METAL_HU = 0.0, 2000.0
"""What cubic splines take air for, from whose step they would ring, and the most that they take metal for."""

DEEP = 3
"""Voxels from air and metal where a patient's depth begins, in which splines are taken."""

LEAST_DENSE = 0.25
"""Weight of dense voxels from which a sample is dense: it ends three quarters of a voxel beyond the last of them."""

OBLIQUE_DEGREES = 3.0
"""A grid turned further than this from the patient's axes is resampled upright before the networks see it."""

GROWTH, MORE_VOXELS = 16, 1 << 24
"""An upright grid may have so many times the voxels of the oblique one, and so many more: a single slice needs them."""

STEP_MM = 5.0
"""Distance of the voxels that are looked at to find how far the patient reaches."""

ROOM_MM = 50.0
"""Air that is kept around the patient: the organs' box may reach into it."""

Affine = NDArray[np.float64]


def is_oblique(turned: Affine) -> bool:
    """Whether a grid axis leans by more than `OBLIQUE_DEGREES` from the patient axis that it is nearest to.

    Args:
        turned: affine of a grid (z, y, x) to RAS mm (z, y, x).
    """
    directions = turned[:3, :3] / nib.affines.voxel_sizes(turned)
    return bool(np.degrees(np.arccos(np.clip(np.diag(directions), -1.0, 1.0))).max() > OBLIQUE_DEGREES)


def set_upright(
    array: NDArray[np.generic], turned: Affine, rescale: tuple[float, float], name: str
) -> tuple[NDArray[np.generic], Affine, NDArray[np.bool_]]:
    """Resample an oblique grid onto one along the patient's axes, at the same spacing.

    By cubic splines, but linearly where air or metal is near.

    Args:
        array: stored values (z, y, x).
        turned: affine of its indices to RAS mm (z, y, x).
        rescale: slope and intercept that make HU of stored values.
        name: begins error messages.

    Returns:
        The upright array, in the stored type, large enough for all that is dense; the affine from oblique to upright
        indices; and which voxels of the oblique grid are dense.

    Raises:
        VolumeError: if the upright grid does not fit into memory.
    """
    from scipy import ndimage

    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    slope, intercept = rescale
    air, least, water, metal = ((hu - intercept) / slope for hu in (AIR_HU, DENSE_HU, WATER_HU, METAL_HU))
    kind: np.dtype[Any] = array.dtype
    if kind.kind in "iu":
        limits = np.iinfo(str(kind))
        air, metal = (round(min(max(value, limits.min), limits.max)) for value in (air, metal))
    else:
        kind = np.dtype(np.float32)
    # The array without padding, the same within bounds and its splines, what is dense and what is deep.
    check_memory(array.size * (array.itemsize + 10), f"{name}: {array.size} voxels set upright")
    numbers: NDArray[Any] = array
    dense: NDArray[np.bool_] = numbers > max(air, least) if slope > 0 else numbers < min(air, least)
    spacing = nib.affines.voxel_sizes(turned)
    low, high = _reach(dense, turned, spacing)
    size = tuple(int(n) for n in np.ceil((high - low) / spacing - 1e-6).astype(int) + 1)
    shown_size = " x ".join(map(str, size))
    if math.prod(size) > GROWTH * array.size + MORE_VOXELS:
        raise VolumeError(f"{name}: its axes are so skewed that upright it would have {shown_size} voxels; resample it")
    check_memory(math.prod(size) * array.itemsize, f"{name}: {shown_size} voxels set upright")
    place = np.eye(4)
    place[:3, :3] = np.diag(spacing)
    place[:3, 3] = low
    upright = np.linalg.inv(place) @ turned
    back = np.linalg.inv(upright)
    array = np.where(dense, array, np.asarray(air, array.dtype))
    deep = ndimage.binary_erosion(dense & (numbers < metal if slope > 0 else numbers > metal), iterations=DEEP)
    bounds = min(air, metal), max(air, metal)
    calm = np.full(array.shape, water, np.float32)
    # Numbers that float32 cannot hold become infinite; here they are clipped at once, in the result later.
    with np.errstate(over="ignore"):
        np.copyto(calm, array, where=dense, casting="unsafe")
    splines = ndimage.spline_filter(np.clip(calm, *bounds, out=calm), output=np.float32)
    del calm
    last = np.asarray(array.shape, float) - 1.0
    result = np.full(size, air, kind)
    y, x = np.ogrid[: size[1], : size[2]]
    for z in range(size[0]):
        offset = back[:3, :3] @ (z, 0, 0) + back[:3, 3]
        # The outermost voxels reach one voxel further out: were there air, it would mix into them on the way back.
        mean, weight, depth = (
            ndimage.affine_transform(
                part, back[:3, :3], offset, (1, *size[1:]), output=np.float32, order=1, mode="nearest"
            )[0]
            for part in (array, dense, deep)
        )
        shown = weight >= LEAST_DENSE
        places = [offset[axis] + back[axis, 1] * y + back[axis, 2] * x for axis in range(3)]
        for axis, at in enumerate(places):
            shown &= (at >= -1.0) & (at <= last[axis] + 1.0)
        with np.errstate(over="ignore"):
            values = air + (mean[shown] - air) / weight[shown]
        inner = shown & (depth > 0.999)
        cubic = ndimage.map_coordinates(splines, [at[inner] for at in places], np.float32, prefilter=False)
        values[inner[shown]] = np.clip(cubic, *bounds)
        result[z][shown] = np.rint(values) if kind.kind in "iu" else values
    return result, upright, dense


def _reach(
    dense: NDArray[np.bool_], turned: Affine, spacing: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First and last voxel centre in RAS mm (z, y, x) of an upright grid: around all that is dense, or around all."""
    z, y, x = dense.shape
    centres = Box((0.0, 0.0, 0.0), (z - 1.0, y - 1.0, x - 1.0))
    whole = (centres.corners() @ turned.T)[:, :3]
    low, high = whole.min(axis=0), whole.max(axis=0)
    steps = np.maximum(1, STEP_MM / spacing).astype(int)
    seen = np.argwhere(dense[tuple(slice(None, None, int(step)) for step in steps)]) * steps
    if len(seen) == 0:
        return low, high
    there = seen @ turned[:3, :3].T + turned[:3, 3]
    # Along z a slice of air is room enough, and what was passed over between the voxels that were looked at.
    room = np.array([steps @ spacing, ROOM_MM, ROOM_MM])
    return np.maximum(low, there.min(axis=0) - room), np.minimum(high, there.max(axis=0) + room)
