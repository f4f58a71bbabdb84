"""From organ margins in the box back to labels on the file's own grid.

Margins are interpolated linearly to every voxel before they are compared with 0, so borders are smooth where nearest
labels would leave steps (the paper blames those for its NSD). One organ at a time, one slice at a time, and only
where the organ is: no array of the scan's size is made but the labels themselves.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .box import Box
from .resample import Bands, axis_weights
from .volume import Volume


def restore_labels(margins: Mapping[int, NDArray[np.float32]], box: Box, volume: Volume) -> NDArray[np.uint8]:
    """Label every voxel of the file.

    Args:
        margins: by organ code (z, y, x) over `box`; see `postprocess.organ_margins`.
        box: where the margins lie in `volume`.
        volume: the scan.

    Returns:
        uint8 codes in the file's axes; 0 outside the box.
    """
    labels = volume.grid.empty_labels()
    view = volume.grid.reorient(labels)
    for code, margin in margins.items():
        if volume.grid.upright is None:
            _paint(view, code, margin, box)
        else:
            _paint_oblique(view, code, margin, box, volume.grid.upright)
    if volume.grid.dense is not None:
        view *= volume.grid.dense
    return labels


def _reach(margin: NDArray[np.float32], widths: tuple[float, ...]) -> list[tuple[int, int]]:
    """First and one past the last sample per axis that can make a voxel positive: the organ and a kernel's width."""
    won = margin > 0
    reach = []
    for axis, length in enumerate(margin.shape):
        used = np.flatnonzero(won.any(axis=tuple(a for a in range(3) if a != axis)))
        wide = math.ceil(widths[axis])
        reach.append((max(0, int(used[0]) - wide), min(length, int(used[-1]) + 1 + wide)))
    return reach


def _paint(view: NDArray[np.uint8], code: int, margin: NDArray[np.float32], box: Box) -> None:
    weights, targets, sources = [], [], []
    # In samples; more than 1 where voxels are larger than samples, as thick slices are.
    widths = tuple(max(1.0, n / size) for n, size in zip(margin.shape, box.size, strict=True))
    for axis, (first, last) in enumerate(_reach(margin, widths)):
        length, start, size = margin.shape[axis], box.start[axis], box.size[axis]
        # Voxels whose centres lie between the outermost samples used, clipped to the box.
        low = max(int(np.floor(start + first * size / length)), int(np.ceil(start - 0.5)))
        high = min(int(np.ceil(start + last * size / length)), int(np.ceil(start + size - 0.5)), view.shape[axis])
        if low >= high:
            return
        scale = length / size
        table = axis_weights(length, (low - start) * scale, (high - start) * scale, high - low)
        used = np.flatnonzero(table.any(axis=0))
        source = slice(int(used[0]), int(used[-1]) + 1)
        weights.append(np.ascontiguousarray(table[:, source]))
        targets.append(slice(low, high))
        sources.append(source)
    # Slices are painted as they lie in memory, whichever axis that is.
    order = sorted(range(3), key=lambda axis: -abs(view.strides[axis]))
    part = margin[tuple(sources)].transpose(order)
    painted = view[tuple(targets)].transpose(order)
    outer, *inner = (weights[axis] for axis in order)
    down, along = (Bands(table) for table in inner)
    for row, labels in zip(outer, painted, strict=True):
        used = np.flatnonzero(row)
        plane = row[used[0]] * part[used[0]]
        for k in used[1:]:
            plane += row[k] * part[k]
        labels[along.along(down.down(plane)) > 0] = code


def _paint_oblique(
    view: NDArray[np.uint8], code: int, margin: NDArray[np.float32], box: Box, upright: NDArray[np.float64]
) -> None:
    from scipy import ndimage

    # Indices of the upright array to sample indices of the box: centres lie at whole numbers in both.
    scale = np.asarray(margin.shape) / np.asarray(box.size)
    to_samples = np.eye(4)
    to_samples[:3, :3] = np.diag(scale)
    to_samples[:3, 3] = (0.5 - np.asarray(box.start)) * scale - 0.5
    matrix = to_samples @ upright
    (z0, z1), (y0, y1), (x0, x1) = ((first - 0.5, last - 0.5) for first, last in _reach(margin, (1.0, 1.0, 1.0)))
    corners = Box((z0, y0, x0), (z1, y1, x1)).corners()
    there = (corners @ np.linalg.inv(matrix).T)[:, :3]
    low = np.maximum(0, np.floor(there.min(axis=0)).astype(int) - 1)
    high = np.minimum(view.shape, np.ceil(there.max(axis=0)).astype(int) + 2)
    if (low >= high).any():
        return
    _, rows, columns = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    for z in range(int(low[0]), int(high[0])):
        offset = matrix[:3, :3] @ (z, low[1], low[2]) + matrix[:3, 3]
        size = (1, int(high[1] - low[1]), int(high[2] - low[2]))
        # The outermost samples hold up to the box's faces, half a sample further out.
        plane = ndimage.affine_transform(margin, matrix[:3, :3], offset, size, order=1, mode="nearest")
        won = np.argwhere(plane[0] > 0)
        at = won @ matrix[:3, 1:3].T + offset
        won = won[((at >= -0.5) & (at < np.subtract(margin.shape, 0.5))).all(axis=1)]
        view[z, rows, columns][won[:, 0], won[:, 1]] = code
