"""Separable linear resampling of a box in a volume, shared by training and inference.

Arrays are (z, y, x). Shrinking widens the linear kernel with the step, which averages instead of skipping voxels (no
aliasing); enlarging is plain linear interpolation between voxel centres. At the volume's ends the kernel is cut and
renormalised, so nothing is invented outside.
"""

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
    (z_span, y_span, x_span) = spans = [_support(w) for w in weights]
    wz, wy, wx = (np.ascontiguousarray(w[:, span]) for w, span in zip(weights, spans, strict=True))
    out = np.zeros(size, np.float32)
    # Each source slice is read and shrunk in plane once, then spread over the samples that it touches.
    for column, z in enumerate(range(z_span.start, z_span.stop)):
        touched = np.flatnonzero(wz[:, column])
        if touched.size:
            plane = (wy @ convert(volume[z, y_span, x_span])) @ wx.T
            for k in touched:
                out[k] += wz[k, column] * plane
    return out


def _support(weights: NDArray[np.float32]) -> slice:
    """Columns from the first to the last that any row uses."""
    used = np.flatnonzero(weights.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1)
