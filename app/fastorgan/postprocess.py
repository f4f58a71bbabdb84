"""The paper's "connected domain analysis": which pieces of each organ anatomy allows."""

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from .components import largest_components
from .labels import ORGANS

LEAST_MM3 = {"liver": 10_000.0, "kidney": 4_000.0, "spleen": 4_000.0, "pancreas": 1_000.0}
"""A smaller piece is no organ, nor enough of one to be of use at the border of a scan."""

HESITATION = {"pancreas": 1.0}
"""Parts of such an organ are one piece where, on a way between them, the organ's margin is never further below 0 than
this: where the net finds the organ at least 1/e as likely as what it took. A pancreas is thin enough to break there;
what hangs together with another organ in that way is bowel rather than a part of it."""

REMOVED = -1.0
"""Margin given to voxels of a piece that is taken away."""


def organ_margins(logits: NDArray[np.float32], voxel_mm3: float) -> dict[int, NDArray[np.float32]]:
    """Clean each organ and say by how much it wins over every other class, voxel by voxel.

    A voxel belongs to an organ where the organ's margin is above 0. Two organs' margins never add up to more than 0,
    so after linear interpolation no point belongs to two organs.

    Args:
        logits: (classes, z, y, x), background first.
        voxel_mm3: volume of one voxel.

    Returns:
        By the organ's code the margin (z, y, x), its logit minus the largest other one. Pieces (`HESITATION`) beyond
        the number that anatomy allows, or smaller than `LEAST_MM3`, are set to `REMOVED`. Organs that are not there
        have no entry.
    """
    margins = {}
    for organ in ORGANS:
        others = [logit for code, logit in enumerate(logits) if code != organ.code]
        margin = reduce(lambda best, logit: np.maximum(best, logit, out=best), others[1:], others[0].copy())
        np.subtract(logits[organ.code], margin, out=margin)
        won = margin > 0
        least = LEAST_MM3[organ.name] / voxel_mm3
        within = margin > -HESITATION[organ.name] if organ.name in HESITATION else None
        kept = largest_components(won, organ.components, least, within)
        if kept.any():
            margin[won & ~kept] = REMOVED
            margins[organ.code] = margin
    return margins
