"""Separable linear resampling of a box in a volume, shared by training and inference.

Arrays are (z, y, x). Shrinking widens the linear kernel with the step, which averages instead of skipping voxels (no
aliasing); enlarging is plain linear interpolation between voxel centres. At the volume's ends the kernel is cut and
renormalised, so nothing is invented outside.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .box import Box


def axis_weights(length: int, start: float, stop: float, samples: int) -> NDArray[np.float32]:
    """Weights that turn `length` source values into `samples` values spread evenly over [start, stop).

    Sample k lies at the centre of the k-th of `samples` equal parts; a sample outside the source takes the value at
    the source's end.

    Returns:
        A (samples, length) matrix whose rows add up to 1.

    Raises:
        ValueError: if `length` or `samples` is not positive, or the span is empty.
    """
    if length < 1 or samples < 1 or not stop > start:
        raise ValueError(f"cannot resample {length} voxels over [{start}, {stop}) into {samples}")
    step = (stop - start) / samples
    width = max(step, 1.0)
    # Centre coordinates, where voxel i lies at i.
    at = np.clip(start + (np.arange(samples) + 0.5) * step - 0.5, 0.0, length - 1.0)
    weights = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(length)[None, :]) / width)
    weights /= weights.sum(axis=1, keepdims=True)
    result: NDArray[np.float32] = weights.astype(np.float32)
    return result


BLOCK = 8
"""Rows of a banded matrix that are multiplied together."""


class Bands:
    """A matrix of `axis_weights`, multiplied block by block of rows along its band.

    A dense product would spend nearly all its time on the zeros beside the band. It would also be large enough for
    BLAS to split over threads that wait for each other by spinning: on a machine with other work to do that costs many
    times what it gains.

    Args:
        weights: (samples, length).
    """

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self.samples, length = weights.shape
        self._blocks = []
        # Where many samples share a few values, as they do in enlarging, longer blocks are as narrow.
        step = BLOCK * math.ceil(self.samples / length)
        for first in range(0, self.samples, step):
            rows = weights[first : first + step]
            columns = _support(rows)
            self._blocks.append((slice(first, first + len(rows)), columns, np.ascontiguousarray(rows[:, columns])))

    def down(self, plane: NDArray[np.float32]) -> NDArray[np.float32]:
        """Resample the columns of a plane (length, any): the product weights @ plane."""
        out = np.empty((self.samples, plane.shape[1]), np.float32)
        for rows, columns, block in self._blocks:
            np.matmul(block, plane[columns], out=out[rows])
        return out

    def along(self, plane: NDArray[np.float32]) -> NDArray[np.float32]:
        """Resample the rows of a plane (any, length): the product plane @ weights.T."""
        out = np.empty((plane.shape[0], self.samples), np.float32)
        for rows, columns, block in self._blocks:
            np.matmul(plane[:, columns], block.T, out=out[:, rows])
        return out


def resize(
    volume: NDArray[np.generic],
    box: Box,
    size: tuple[int, int, int],
    convert: Callable[[NDArray[np.generic]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Resample `box` of `volume` to `size` without ever holding the volume as floats.

    Args:
        volume: (z, y, x), any type and strides.
        box: what to resample.
        size: samples per axis (z, y, x).
        convert: maps a slice's values to float32 before they are averaged, such as the HU window.

    Returns:
        A float32 array of `size`.
    """
    weights = [axis_weights(n, a, b, s) for n, a, b, s in zip(volume.shape, box.start, box.stop, size, strict=True)]
    # Voxels that lie backwards in memory, as x does in most files, are read several times as slowly.
    for axis in range(3):
        if volume.strides[axis] < 0:
            volume, weights[axis] = np.flip(volume, axis), weights[axis][:, ::-1]
    # Slices are taken as they lie in memory, whichever axis that is.
    order = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))
    outer, *inner = (weights[axis] for axis in order)
    slices, *plane_spans = (_support(weights[axis]) for axis in order)
    down, along = (Bands(table[:, span]) for table, span in zip(inner, plane_spans, strict=True))
    turned = volume.transpose(order)
    out = np.zeros([size[axis] for axis in order], np.float32)
    # Each source slice is read and shrunk in plane once, then spread over the samples that it touches.
    for index in range(slices.start, slices.stop):
        touched = np.flatnonzero(outer[:, index])
        if touched.size:
            plane = along.along(down.down(convert(turned[index, plane_spans[0], plane_spans[1]])))
            for k in touched:
                out[k] += outer[k, index] * plane
    return np.ascontiguousarray(out.transpose(np.argsort(order)))


def _support(weights: NDArray[np.float32]) -> slice:
    """Columns from the first to the last that any row uses."""
    used = np.flatnonzero(weights.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1)
