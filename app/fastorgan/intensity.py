"""The one HU window, shared by training and inference.

The paper leaves the window open. Soft tissue with and without contrast agent, fat and the kidneys' arterial phase
fit into [-200, 300] HU; lung and air saturate at its lower end, bone and metal at its upper.
"""

import numpy as np
from numpy.typing import NDArray

WINDOW_HU = (-200.0, 300.0)
"""Lower and upper end of the window in HU."""

LEVELS = 255
"""Steps of the eight-bit form that the training cache holds: one is 1.96 HU."""


def to_unit(hu: NDArray[np.generic]) -> NDArray[np.float32]:
    """Map HU to [0, 1] linearly over `WINDOW_HU`, clipped; any shape, a new float32 array."""
    low, high = WINDOW_HU
    # Doubles that float32 cannot hold are infinite then, and clipped as well.
    with np.errstate(over="ignore"):
        unit = hu.astype(np.float32)
    unit -= np.float32(low)
    unit *= np.float32(1.0 / (high - low))
    return np.clip(unit, 0.0, 1.0, out=unit)


def to_levels(unit: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round values in [0, 1] to the eight-bit levels 0 to `LEVELS`."""
    return np.rint(unit * LEVELS).astype(np.uint8)


def level_of(hu: float) -> float:
    """The eight-bit level of an HU value, before it is rounded."""
    return float(to_unit(np.array([hu]))[0]) * LEVELS


# The networks see values centred on the soft tissue, [-1, 1].
def to_network(unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map [0, 1] to the networks' input range [-1, 1]; written as arithmetic that torch tensors accept as well."""
    return unit * 2.0 - 1.0
