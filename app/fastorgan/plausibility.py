"""Whether what was found can be organs: size, place, side, HU, how sure the network is.

Nothing here can tell that a border is a few mm off. It tells what is grossly wrong, such as a liver in a scan of the
legs, from figures that cost a few ms at the organ network's resolution. The limits come from the 42 volumes that the
networks were trained on, widened to what the literature knows in adults, so an organ of a small child, after surgery or
with a large tumour is doubted although it is found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .box import Box, side_areas
from .intensity import WINDOW_HU
from .labels import ORGANS
from .postprocess import REMOVED
from .volume import Volume

STEP = 2
"""Every second sample along each axis is looked at: an eighth of the work, and no figure changes by as much as 2 %."""

DIRECTIONS = (("above", "below"), ("before", "behind"), ("right of", "left of"))
"""What a positive and a negative distance mean, by axis (z, y, x)."""


@dataclass(frozen=True)
class Evidence:
    """What is known of one organ that was found.

    Attributes:
        volume_ml: in the box that the organ network saw.
        centre_mm: mean place (z, y, x) in mm from the volume's corner at the feet, the back and the patient's left.
        hu: mean in HU after clipping to `intensity.WINDOW_HU`.
        confidence: how far probability and label agree, 0 to 1: the Dice coefficient of the two, where a voxel's
            probability is that of its margin. Doubtful voxels lower it inside the organ and outside.
        stray: share of the voxels first taken for the organ that were taken away as pieces of something else.
        cut: by axis (z, y, x), whether it reaches an end of the scan, and so may be a part only.
        boxed_cm2: its area on those sides of the box that are no end of the scan.
        apart_mm: how far right half and left half lie apart, each the mean of what is on its side of the middle; None
            in a scan too narrow to show both kidneys.
    """

    volume_ml: float
    centre_mm: tuple[float, float, float]
    hu: float
    confidence: float
    stray: float
    cut: tuple[bool, bool, bool]
    boxed_cm2: float
    apart_mm: float | None


@dataclass(frozen=True)
class Limits:
    """What one organ's figures may be.

    Attributes:
        volume_ml: least, of an organ that is not cut, and most.
        hu: least and most.
        confidence: least.
    """

    volume_ml: tuple[float, float]
    hu: tuple[float, float]
    confidence: float


LIMITS = {
    "liver": Limits((400.0, 5000.0), (-20.0, 230.0), 0.88),
    "kidney": Limits((80.0, 1200.0), (0.0, 290.0), 0.88),
    "spleen": Limits((25.0, 1500.0), (0.0, 270.0), 0.88),
    "pancreas": Limits((15.0, 250.0), (-50.0, 270.0), 0.85),
}

OFFSETS_MM = {
    ("liver", "spleen"): ((-90.0, 90.0), (-10.0, 140.0), (80.0, 240.0)),
    ("liver", "kidney"): ((-30.0, 150.0), (0.0, 130.0), (-10.0, 150.0)),
    ("kidney", "spleen"): ((-170.0, 15.0), (-70.0, 80.0), (20.0, 180.0)),
    ("kidney", "pancreas"): ((-90.0, 60.0), (-110.0, 0.0), (-60.0, 110.0)),
    ("liver", "pancreas"): ((-25.0, 120.0), (-60.0, 60.0), (15.0, 160.0)),
    ("spleen", "pancreas"): ((-20.0, 130.0), (-140.0, 5.0), (-150.0, -10.0)),
}
"""How far the first organ's centre lies above, before and right of the second's, least and most."""

KIDNEYS_APART_MM = (65.0, 230.0)
"""Between the two kidneys' centres, left to right; in one kidney alone the halves are nearer."""

NARROW_MM = 250.0
"""A scan narrower than this need not show both kidneys."""

MOST_STRAY = 0.35
"""Share of an organ's first voxels that may be taken away."""

MOST_BOXED_CM2 = 10.0
"""Area in which an organ may end where the searched box does."""

MOST_SPLEEN = 0.75
"""Volume of the spleen by that of the liver. In a mirrored scan most of the liver is taken for the spleen."""


def examine(
    margins: Mapping[int, NDArray[np.float32]], crop: NDArray[np.float32], box: Box, volume: Volume
) -> dict[str, Evidence]:
    """Gather what is known of each organ that was found.

    Args:
        margins: by organ code (z, y, x) over `box`; see `postprocess.organ_margins`.
        crop: what the organ network saw (z, y, x), HU window as [0, 1].
        box: where both lie in `volume`.
        volume: the scan.

    Returns:
        By the organ's name; an organ without a margin above 0 has no entry.
    """
    found = {}
    crop = crop[::STEP, ::STEP, ::STEP]
    for organ in ORGANS:
        if organ.code in margins:
            evidence = _examine_organ(margins[organ.code], crop, box, volume)
            if evidence is not None:
                found[organ.name] = evidence
    return found


def _examine_organ(margin: NDArray[np.float32], crop: NDArray[np.float32], box: Box, volume: Volume) -> Evidence | None:
    sample = np.multiply(box.size, volume.spacing) / margin.shape * STEP
    margin = np.ascontiguousarray(margin[::STEP, ::STEP, ::STEP])
    won = margin > 0
    count = int(np.count_nonzero(won))
    if count == 0:
        return None
    plane = np.count_nonzero(won, axis=0)
    profiles = (np.count_nonzero(won, axis=(1, 2)), plane.sum(axis=1), plane.sum(axis=0))
    places = [(np.arange(len(profile)) + 0.5) * size for profile, size in zip(profiles, sample, strict=True)]
    z, y, x = (float(profile @ place) / count for profile, place in zip(profiles, places, strict=True))
    corner = np.multiply(box.start, volume.spacing)
    areas = side_areas(margin, sample)
    ends = np.transpose((np.less(box.start, 1.0), np.greater(box.stop, np.subtract(volume.shape, 1.0))))
    cut = ((areas > 0) & ends).any(axis=1).tolist()
    # Below -6 lie probabilities that weigh nothing.
    near = margin[margin > -6.0]
    probability = 1.0 / (1.0 + np.exp(-near))
    low, high = WINDOW_HU
    narrow = volume.shape[2] * volume.spacing[2] < NARROW_MM
    stray = int(np.count_nonzero(margin == np.float32(REMOVED)))
    return Evidence(
        volume_ml=count * float(sample.prod()) / 1000.0,
        centre_mm=(z + float(corner[0]), y + float(corner[1]), x + float(corner[2])),
        hu=float(crop[won].mean(dtype=float)) * (high - low) + low,
        confidence=2.0 * float(probability[near > 0].sum(dtype=float)) / (count + float(probability.sum(dtype=float))),
        stray=stray / (count + stray),
        cut=(cut[0], cut[1], cut[2]),
        boxed_cm2=float(areas[~ends].sum()) / 100.0,
        apart_mm=None if narrow else _halves_apart(profiles[2], places[2]),
    )


def _halves_apart(profile: NDArray[np.intp], place: NDArray[np.float64]) -> float:
    """Distance between the means of what lies left and right of the middle of all."""
    used = np.flatnonzero(profile)
    middle = (used[0] + used[-1] + 1) // 2
    left, right = slice(used[0], max(middle, used[0] + 1)), slice(middle, used[-1] + 1)
    return float(np.average(place[right], weights=profile[right]) - np.average(place[left], weights=profile[left]))


def doubts(found: Mapping[str, Evidence]) -> dict[str, list[str]]:
    """Say what speaks against each organ that was found.

    Returns:
        By the organ's name, for organs with doubts alone, a few words for each doubt.
    """
    lines: dict[str, list[str]] = {organ.name: [] for organ in ORGANS if organ.name in found}
    for name, evidence in found.items():
        lines[name] += _own_doubts(name, evidence)
    for name, others in misplaced(found).items():
        lines[name].append(others)
    if {"liver", "spleen"} <= found.keys() and not any(found["liver"].cut):
        share = found["spleen"].volume_ml / found["liver"].volume_ml
        said = f"the spleen has {share:.0%} of the liver's volume, usually less than {MOST_SPLEEN:.0%}"
        if share > MOST_SPLEEN:
            for name in ("liver", "spleen"):
                lines[name].append(said)
    return {name: said for name, said in lines.items() if said}


def _own_doubts(name: str, evidence: Evidence) -> list[str]:
    limits = LIMITS[name]
    least, most = limits.volume_ml
    lines = []
    if evidence.volume_ml < least and not any(evidence.cut):
        lines.append(f"only {evidence.volume_ml:.0f} ml, usually more than {least:.0f}")
    if evidence.volume_ml > most:
        lines.append(f"{evidence.volume_ml:.0f} ml, usually less than {most:.0f}")
    low, high = limits.hu
    if not low <= evidence.hu <= high:
        lines.append(f"{evidence.hu:.0f} HU on average, usually {low:.0f} to {high:.0f}")
    if evidence.confidence < limits.confidence:
        lines.append(f"uncertain (confidence {evidence.confidence:.2f}, usually more than {limits.confidence:.2f})")
    if evidence.stray > MOST_STRAY:
        lines.append(f"what was left of scattered pieces ({evidence.stray:.0%} taken away)")
    if evidence.boxed_cm2 > MOST_BOXED_CM2:
        lines.append("may go on outside the part of the scan that was searched")
    if name == "kidney" and not any(evidence.cut) and evidence.apart_mm is not None:
        near, far = KIDNEYS_APART_MM
        if evidence.apart_mm < near:
            lines.append("on one side only")
        elif evidence.apart_mm > far:
            lines.append(f"two sides {evidence.apart_mm:.0f} mm apart, usually less than {far:.0f}")
    return lines


def misplaced(found: Mapping[str, Evidence]) -> dict[str, str]:
    """Say which organs lie where they cannot, against each other.

    An organ that is in conflict with most of the others is the culprit, and is left out of what the others are held
    against; of two that contradict each other alone, both may be wrong.

    Returns:
        By the organ's name, for the organs in question alone, a few words.
    """
    conflicts: dict[tuple[str, str], str] = {}
    for first, second in combinations([organ.name for organ in ORGANS if organ.name in found], 2):
        told = _conflict(found, first, second)
        if told is not None:
            conflicts[first, second] = told
    lines: dict[str, str] = {}
    while conflicts:
        counts = {name: sum(name in pair for pair in conflicts) for name in found}
        worst = max(counts.values())
        for name in [name for name, count in counts.items() if count == worst]:
            against = next((pair for pair in conflicts if name in pair), None)
            if against is not None:
                lines[name] = conflicts[against]
        conflicts = {pair: told for pair, told in conflicts.items() if not lines.keys() & set(pair)}
    return lines


def _conflict(found: Mapping[str, Evidence], first: str, second: str) -> str | None:
    limits = OFFSETS_MM.get((first, second))
    if limits is None:
        return None
    ours, theirs = found[first], found[second]
    for axis, (low, high) in enumerate(limits):
        if ours.cut[axis] or theirs.cut[axis]:
            # The middle of what is left of an organ is not the organ's.
            continue
        distance = ours.centre_mm[axis] - theirs.centre_mm[axis]
        if not low <= distance <= high:
            side = DIRECTIONS[axis][distance < 0]
            return f"lies oddly: {first} {abs(distance):.0f} mm {side} {second}, usually {_span(axis, low, high)}"
    return None


def _span(axis: int, low: float, high: float) -> str:
    more, less = DIRECTIONS[axis]
    if low >= 0:
        return f"{low:.0f} to {high:.0f} mm {more}"
    if high <= 0:
        return f"{abs(high):.0f} to {-low:.0f} mm {less}"
    return f"{-low:.0f} mm {less} to {high:.0f} mm {more}"
