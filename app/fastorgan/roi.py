"""From the ROI net's foreground to the box that the organ net sees.

The paper takes the union of the organs as foreground, maps it back to the full size and "expands some pixels"; which
component, and what happens when nothing is found, it does not say.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .box import ROI_SIZE, Box, extent_mm, frame, side_areas
from .components import largest_group
from .intensity import to_network
from .resample import resize
from .volume import Volume

BRIDGE_MM = (40.0, 60.0, 140.0)
"""Pieces of foreground nearer than this (z, y, x) belong together: in a chest scan's last slices the tips of liver and
spleen lie as far apart, while what is mistaken for an organ lies above or below: heart, bladder, head."""

BODY_STEP_MM = 4.0
"""Distance of the voxels that are looked at to find the body."""

LEAST_FOREGROUND_ML = 20.0
"""Less foreground than this is taken for nothing found."""

LEAST_EXTENT_MM = 15.0
"""Foreground thinner than this along any axis is no organ."""

REACHED_CM2 = 1.0
"""An organ that touches a side of the box with more than this is taken to go on beyond it."""

WIDER_MM = 25.0
"""How far such a side moves out."""


@dataclass(frozen=True)
class Roi:
    """The box for the organ net.

    Attributes:
        box: in voxels of the volume, (z, y, x).
        fallback: why the whole volume is taken; None where the box comes from the ROI net.
        found: the organs that the box frames, as the ROI net found them; None where the whole volume is taken.
    """

    box: Box
    fallback: str | None = None
    found: Box | None = None


def overview(volume: Volume) -> tuple[Box, NDArray[np.float32]]:
    """What the ROI net sees: the body's box (`body_box`), and `ROI_SIZE` samples of it in the networks' range."""
    body = body_box(volume)
    return body, to_network(volume.unit(resize(volume.array, body, ROI_SIZE, volume.windowed)))


def body_box(volume: Volume) -> Box:
    """Find the smallest box of all that is denser than the HU window's lower end: the patient, and the couch.

    The ROI net looks at this box, so that a wide field of view or padding does not make the patient small in it.

    Returns:
        The box, exact along z and up to `BODY_STEP_MM` wider than the body in plane; the whole volume where nothing is
        dense.
    """
    steps = tuple(max(1, int(BODY_STEP_MM / size)) for size in volume.spacing)
    z, y, x = steps
    dense = volume.unit(volume.array[::z, ::y, ::x]) > 0
    if not dense.any():
        return Box.whole(volume.shape)
    start, stop = extent_mm(dense, tuple(float(step) for step in steps))
    (z0, y0, x0), (z1, y1, x1) = np.maximum(0, start - steps), np.minimum(volume.shape, stop + steps)
    # Slices of air that a resampled scan was padded with would look like the end of the organs that it cuts.
    slices = range(int(z0), int(z1))
    first, last = (
        next(k for k in order if (volume.unit(volume.array[k, ::y, ::x]) > 0).any())
        for order in (slices, reversed(slices))
    )
    return Box((float(first), float(y0), float(x0)), (float(last + 1), float(y1), float(x1)))


def locate(
    foreground: NDArray[np.bool_], seen: Box, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> Roi:
    """Find the organs' box from the ROI net's foreground.

    Takes the largest group of foreground pieces (`BRIDGE_MM`) and frames it (`box.frame`). The box ends where the
    body does along z: slices of padding are no more to be seen than slices that were never scanned. Where the group is
    implausibly small (`LEAST_FOREGROUND_ML`, `LEAST_EXTENT_MM`), the whole volume is the box and `fallback` says why.

    Args:
        foreground: (z, y, x) mask over `seen` at any resolution, `ROI_SIZE` in the cascade.
        seen: the part of the volume that the ROI net saw.
        shape: the volume's voxels (z, y, x).
        spacing: the volume's voxel size in mm (z, y, x).
    """
    voxel = tuple(n * s / m for n, s, m in zip(seen.size, spacing, foreground.shape, strict=True))
    group = largest_group(foreground, voxel, BRIDGE_MM)
    volume_ml = float(np.count_nonzero(group)) * float(np.prod(voxel)) / 1000.0
    if volume_ml < LEAST_FOREGROUND_ML:
        return Roi(Box.whole(shape), f"only {volume_ml:.0f} ml of organs found at low resolution")
    start, stop = extent_mm(group, voxel)
    if (stop - start).min() < LEAST_EXTENT_MM:
        return Roi(Box.whole(shape), f"organs found at low resolution are only {(stop - start).min():.0f} mm thick")
    corner = np.multiply(seen.start, spacing)
    start, stop = corner + start, corner + stop
    box = frame(start, stop, _searchable(seen, shape), spacing)
    return Roi(box, found=Box.from_mm(start, stop, spacing))


def widen(box: Box, margins: Mapping[int, NDArray[np.float32]], seen: Box, volume: Volume) -> Box | None:
    """Find a larger box where the ROI net missed a part of an organ: one that the organ goes out of.

    Args:
        box: where the organ net looked, in voxels of `volume`.
        margins: what it found, by organ code (z, y, x) over `box`; see `postprocess.organ_margins`.
        seen: the part of the volume that the ROI net saw.
        volume: the scan.

    Returns:
        The box with each side that an organ reaches (`REACHED_CM2`) moved out by `WIDER_MM`, or to the end of what can
        be seen; None where no side moves by a voxel.
    """
    sizes = np.asarray(volume.spacing)
    reached = np.zeros((3, 2), bool)
    for margin in margins.values():
        reached |= side_areas(margin, np.multiply(box.size, sizes) / margin.shape) > REACHED_CM2 * 100.0
    within = _searchable(seen, volume.shape)
    room = np.transpose((np.subtract(box.start, within.start), np.subtract(within.stop, box.stop)))
    moves = np.where(reached, np.minimum(room, WIDER_MM / sizes[:, None]), 0.0)
    if moves.max() < 1.0:
        return None
    (z0, y0, x0), (z1, y1, x1) = (box.start - moves[:, 0]).tolist(), (box.stop + moves[:, 1]).tolist()
    return Box((z0, y0, x0), (z1, y1, x1))


def _searchable(seen: Box, shape: tuple[int, ...]) -> Box:
    """Where organs may be: along z what the ROI net saw, and the whole plane."""
    _, height, width = shape
    return Box((seen.start[0], 0.0, 0.0), (seen.stop[0], float(height), float(width)))
