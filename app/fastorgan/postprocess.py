"""The paper's "connected domain analysis": which pieces of each organ anatomy allows."""

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from .components import largest_components, largest_group
from .labels import ORGANS

LEAST_MM3 = {"liver": 10_000.0, "kidney": 4_000.0, "spleen": 4_000.0, "pancreas": 1_000.0}
"""A smaller piece is no organ, nor enough of one to be of use at the border of a scan."""

BRIDGE_MM = {"pancreas": 15.0}
"""Pieces of such an organ with a narrower gap between them are one: it is thin, and where its neck is not recognised
head and tail come apart."""

REMOVED = -1.0
"""Margin given to voxels of a piece that is taken away."""


def organ_margins(logits: NDArray[np.float32], voxel: tuple[float, float, float]) -> dict[int, NDArray[np.float32]]:
    """Clean each organ and say by how much it wins over every other class, voxel by voxel.

    A voxel belongs to an organ where the organ's margin is above 0. Two organs' margins never add up to more than 0,
    so after linear interpolation no point belongs to two organs.

    Args:
        logits: (classes, z, y, x), background first.
        voxel: size of one voxel in mm (z, y, x).

    Returns:
        By the organ's code the margin (z, y, x), its logit minus the largest other one, with pieces beyond the number
        that anatomy allows or smaller than `LEAST_MM3` set to `REMOVED`. Organs that are not there have no entry.
    """
    margins = {}
    for organ in ORGANS:
        others = [logit for code, logit in enumerate(logits) if code != organ.code]
        margin = reduce(lambda best, logit: np.maximum(best, logit, out=best), others[1:], others[0].copy())
        np.subtract(logits[organ.code], margin, out=margin)
        won = margin > 0
        least = LEAST_MM3[organ.name] / float(np.prod(voxel))
        if organ.name in BRIDGE_MM:
            kept = largest_group(won, voxel, (BRIDGE_MM[organ.name],) * 3)
            kept = kept & (np.count_nonzero(kept) >= least)
        else:
            kept = largest_components(won, organ.components, least)
        if kept.any():
            margin[won & ~kept] = REMOVED
            margins[organ.code] = margin
    return margins
