"""Whether a CT's values are HU, and the errors of that kind that can be mended with certainty.

The histogram of a CT is unlike any other: air near -1000 HU, fat and soft tissue between -150 and 250, little between
and above. Where the values do not have that form as they are, but have it after one of the usual errors is undone, the
error is certain. All else is only said.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PADDING_HU = -1500.0
"""Values below are no measurement: scanners fill what lies outside their round field of view with -2000 or -3024."""

OFFSET_HU = 1024.0
"""What DICOM's rescale intercept usually takes off, and what is too much where it was lost."""

SAMPLES = 48
"""Voxels looked at per axis at most."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Rescale:
    """How stored values become HU.

    Attributes:
        slope, intercept: HU = stored * slope + intercept.
        wrapped: whether stored values are signed numbers that were taken for unsigned ones of 16 bits.
        warning: what is wrong with the values, or None.
    """

    slope: float
    intercept: float
    wrapped: bool = False
    warning: str | None = None


def find_rescale(stored: NDArray[np.generic], slope: float, intercept: float) -> Rescale:
    """Judge a volume's values by a sample of them.

    Args:
        stored: finite values of a volume, any axis order.
        slope, intercept: as the file gives them.

    Returns:
        `slope` and `intercept`, corrected where that is certain; `warning` then says how, and otherwise what is
        doubtful. None where the values look like HU.
    """
    part = stored[tuple(slice(n // SAMPLES // 2, None, max(1, n // SAMPLES)) for n in stored.shape)]
    with np.errstate(over="ignore"):
        hu = part.astype(np.float64) * slope + intercept
    if _is_ct(hu):
        return Rescale(slope, intercept)
    least = float(hu[hu > PADDING_HU].min(initial=np.inf))
    if least >= -10.0 and _is_ct(np.where(hu > PADDING_HU, hu - OFFSET_HU, hu)):
        said = f"values are {OFFSET_HU:.0f} above HU, as stored without their offset; {OFFSET_HU:.0f} is taken off"
        return Rescale(slope, intercept - OFFSET_HU, warning=said)
    if _is_ct(-hu):
        said = "values are inverted, air bright and bone dark; they are turned over"
        return Rescale(-slope, -intercept, warning=said)
    unsigned = stored.dtype.newbyteorder("=") == np.uint16 and (slope, intercept) == (1.0, 0.0)
    if unsigned and _is_ct(np.where(hu > 32767, hu - 65536, hu)):
        said = "negative values are stored as 65535 and less; 65536 is taken off them"
        return Rescale(slope, intercept, wrapped=True, warning=said)
    return Rescale(slope, intercept, warning=_doubt(hu))


def _share(hu: Values, low: float, high: float) -> float:
    return float(np.mean((hu >= low) & (hu < high)))


def _is_ct(hu: Values) -> bool:
    """Whether values have a CT's two peaks, air and soft tissue, and little else."""
    hu = hu[hu > PADDING_HU]
    if not hu.size:
        return False
    tissue = _share(hu, -150.0, 250.0)
    return _share(hu, -1100.0, -850.0) >= 0.02 and tissue >= 0.05 and tissue + _share(hu, -1100.0, -700.0) >= 0.85


def _doubt(hu: Values) -> str | None:
    low, high = float(hu.min()), float(hu.max())
    span = f"values lie between {low:g} and {high:g}"
    checks: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: low == high, f"every voxel has the value {low:g}"),
        (lambda: low >= -1.5 and high <= 1.5, f"{span}: scaled to a unit range, not HU, so do not trust the result"),
        (lambda: low >= 0 and high <= 255, f"{span}: grey levels of a picture, not HU, so do not trust the result"),
        (lambda: low > -200, f"{span}, none is air's or lung's: not HU, or cut to a window"),
        (lambda: _share(hu, -200.0, 300.0) < 0.001, f"{span}, none is soft tissue's; is this a CT in HU?"),
    )
    return next((said for holds, said in checks if holds()), None)
