"""Connected components: which pieces of a mask anatomy allows."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_group(
    mask: NDArray[np.bool_], voxel: tuple[float, ...], bridge: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """Keep the largest group of pieces of which each lies within `bridge` of another; empty stays empty.

    Distance is measured along each axis (a box, not a ball), which a separable filter finds quickly.

    Args:
        mask: three axes.
        voxel: voxel size in mm, in the mask's axis order.
        bridge: the widest gap within a group in mm, per axis.
    """
    reach = [2 * round(gap / 2 / size) + 1 for gap, size in zip(bridge, voxel, strict=True)]
    near = ndimage.maximum_filter(mask.view(np.uint8), size=reach, mode="constant")
    groups, count = ndimage.label(near)
    if count <= 1:
        return mask
    sizes = np.bincount(groups[mask], minlength=count + 1)
    largest: NDArray[np.bool_] = mask & (groups == int(sizes.argmax()))
    return largest


def largest_components(mask: NDArray[np.bool_], keep: int, least_voxels: float) -> NDArray[np.bool_]:
    """Keep the `keep` largest face-connected pieces of at least `least_voxels` voxels; empty stays empty."""
    if not mask.any():
        return mask
    box = tuple(
        slice(int(used[0]), int(used[-1]) + 1)
        for used in (np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3))
    )
    # An organ fills a small part of the array: the rest need not be gone through once more.
    pieces, count = ndimage.label(mask[box])
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept = np.zeros(count + 1, bool)
    kept[np.argsort(sizes)[::-1][:keep]] = True
    kept &= sizes >= max(1.0, least_voxels)
    result = np.zeros(mask.shape, bool)
    result[box] = kept[pieces]
    return result
