"""Connected components: which pieces of a mask anatomy allows.

They are found from runs of voxels, with NumPy alone: to import SciPy's image filters takes longer than to clean all
organs of a case.
"""

import numpy as np
from numpy.typing import NDArray

from .box import extent


def label(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the face-connected pieces of a mask with three axes.

    Returns:
        By voxel its piece, from 1 on in the order of the pieces' first voxels, and 0 for the background; and by piece
        its voxels, where the background counts none.
    """
    slices, rows, columns = mask.shape
    # Background at both ends of each line, so that no run of foreground goes on in the next one.
    width = columns + 2
    lines = np.zeros((slices, rows, width), bool)
    lines[:, :, 1:-1] = mask
    flat = lines.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start, stop = ends[::2], ends[1::2]
    line = start // width
    below = _touching(start, stop, width, line % rows > 0)
    before = _touching(start, stop, width * rows, line >= rows)
    roots = _joined(len(start), np.concatenate((below, before), axis=1))
    piece = np.cumsum(roots == np.arange(len(roots)))[roots]
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(piece, stop - start)
    sizes = np.zeros(int(piece.max(initial=0)) + 1, np.int64)
    np.add.at(sizes, piece, stop - start)
    return labels, sizes


def _touching(
    start: NDArray[np.int64], stop: NDArray[np.int64], back: int, where: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Pairs (2, n) of runs that share a column, the second of them `back` positions before the first's line."""
    runs = np.flatnonzero(where)
    first = np.searchsorted(stop, start[runs] - back, side="right")
    counts = np.searchsorted(start, stop[runs] - back, side="left") - first
    skipped = np.repeat(np.cumsum(counts) - counts, counts)
    others = np.repeat(first, counts) + np.arange(len(skipped)) - skipped
    return np.stack((np.repeat(runs, counts), others))


def _joined(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first of all runs that each of `count` runs hangs together with by way of `pairs`."""
    root = np.arange(count)
    while True:
        a, b = root[pairs]
        apart = a != b
        if not apart.any():
            return root
        low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
        np.minimum.at(root, high, low)
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter


def largest_group(
    mask: NDArray[np.bool_], voxel: tuple[float, ...], bridge: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """Keep the largest group of pieces of which each lies within `bridge` of another; empty stays empty.

    Distance is measured along each axis (a box, not a ball), which is quick to do axis by axis.

    Args:
        mask: three axes.
        voxel: voxel size in mm, in the mask's axis order.
        bridge: the widest gap within a group in mm, per axis.
    """
    near = mask
    for axis, (gap, size) in enumerate(zip(bridge, voxel, strict=True)):
        near = _widened(near, round(gap / 2 / size), axis)
    groups, sizes = label(near)
    if len(sizes) <= 2:
        return mask
    sizes = np.bincount(groups[mask], minlength=len(sizes))
    largest: NDArray[np.bool_] = mask & (groups == int(sizes.argmax()))
    return largest


def _widened(mask: NDArray[np.bool_], reach: int, axis: int) -> NDArray[np.bool_]:
    """Each voxel that has foreground within `reach` voxels along an axis."""
    length = mask.shape[axis]
    sums = np.zeros((length + 1, *np.delete(mask.shape, axis)), np.int32)
    np.cumsum(np.moveaxis(mask, axis, 0), axis=0, out=sums[1:])
    at = np.arange(length)
    upper, lower = sums[np.minimum(at + reach + 1, length)], sums[np.maximum(at - reach, 0)]
    return np.moveaxis(upper > lower, 0, axis)


def largest_components(
    mask: NDArray[np.bool_], keep: int, least_voxels: float, within: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Keep the `keep` largest face-connected pieces of at least `least_voxels` voxels; empty stays empty.

    Args:
        mask: three axes.
        keep: pieces.
        least_voxels: may be a fraction.
        within: holds the mask; parts of it that hang together in `within`, inside the mask's extent, are one piece, of
            which the mask's voxels alone are counted and kept.
    """
    if not mask.any():
        return mask
    # An organ fills a small part of the array: the rest need not be gone through once more.
    box = extent(mask)
    there = mask[box]
    pieces, sizes = label(there if within is None else within[box])
    if within is not None:
        sizes = np.bincount(pieces[there], minlength=len(sizes))
    kept = np.zeros(len(sizes), bool)
    kept[np.argsort(sizes)[::-1][:keep]] = True
    kept &= sizes >= max(1.0, least_voxels)
    result = np.zeros(mask.shape, bool)
    result[box] = there & kept[pieces]
    return result
