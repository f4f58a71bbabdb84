from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.box import Box
from fastorgan.labels import ORGANS
from fastorgan.plausibility import LIMITS, OFFSETS_MM, Evidence, doubts, examine, misplaced
from fastorgan.postprocess import REMOVED
from fastorgan.volume import FileGrid, Volume

Floats = NDArray[np.float32]


def volume(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Volume:
    return Volume(np.zeros(shape, np.int16), spacing, 1.0, 0.0, FileGrid(shape[::-1], np.eye(3)))


SCAN = volume((100, 100, 125), (4.0, 3.0, 2.0))
INSIDE = Box((10.0, 20.0, 30.0), (50.0, 60.0, 70.0))  # 160 x 120 x 80 mm: samples of 4 x 3 x 2 mm
SIZE = (40, 40, 40)


def margins(code: int = 1, **more: tuple[tuple[slice, slice, slice], float]) -> dict[int, Floats]:
    """One organ of 10 x 20 x 12 samples whose margin is 4, and -8 around it; `more` sets other parts."""
    margin = np.full(SIZE, -8.0, np.float32)
    margin[10:20, 10:30, 20:32] = 4.0
    for part, value in more.values():
        margin[part] = value
    return {code: margin}


def hu_crop(hu: float) -> Floats:
    return np.full(SIZE, (hu + 200.0) / 500.0, np.float32)


# Evidence


def test_an_organ_is_measured() -> None:
    found = examine(margins(), hu_crop(50.0), INSIDE, SCAN)["liver"]
    assert found.volume_ml == pytest.approx(10 * 20 * 12 * 24.0 / 1000)
    # The first sample of every two stands for both: means lie half a sample lower at the most.
    assert found.centre_mm == pytest.approx((10 * 4 + 15 * 4, 20 * 3 + 20 * 3, 30 * 2 + 26 * 2), abs=4.0)
    assert found.hu == pytest.approx(50.0, abs=0.01)
    # All voxels have the probability 1 / (1 + e^-4) = 0.982, and nothing else has any: 2 · 0.982 / (1 + 0.982).
    assert found.confidence == pytest.approx(0.9909, abs=1e-4)
    assert found.stray == 0.0
    assert found.cut == (False, False, False)
    assert found.boxed_cm2 == 0.0
    # 12 samples of 2 mm: the means of the halves are 12 mm apart.
    assert found.apart_mm == pytest.approx(12.0)


def test_half_belief_outside_lowers_the_confidence() -> None:
    # As many voxels as the organ has at a probability of 0.5 less a little.
    beside = ((slice(10, 20), slice(10, 30), slice(8, 20)), -0.0001)
    found = examine(margins(beside=beside), hu_crop(50.0), INSIDE, SCAN)["liver"]
    assert found.confidence == pytest.approx(2 * 0.982 / (1 + 0.982 + 0.5), abs=1e-3)


def test_pieces_that_were_taken_away_are_counted() -> None:
    beside = ((slice(10, 20), slice(10, 30), slice(0, 4)), REMOVED)
    found = examine(margins(beside=beside), hu_crop(50.0), INSIDE, SCAN)["liver"]
    assert found.stray == pytest.approx(4 / 16)


def test_a_narrow_scan_need_not_show_both_kidneys() -> None:
    narrow = volume((100, 100, 124), (4.0, 3.0, 2.0))
    found = examine(margins(2), hu_crop(50.0), INSIDE, narrow)
    assert found["kidney"].apart_mm is None
    assert "on one side only" not in doubts(found).get("kidney", [])
    assert "on one side only" in doubts(examine(margins(2), hu_crop(50.0), INSIDE, SCAN))["kidney"]


def test_only_the_scans_own_ends_cut_an_organ() -> None:
    whole = Box((0.0, 20.0, 30.0), (40.0, 60.0, 70.0))
    low = ((slice(0, 10), slice(10, 30), slice(20, 32)), 4.0)
    cut = examine(margins(low=low), hu_crop(50.0), whole, SCAN)["liver"]
    assert cut.cut == (True, False, False)
    assert cut.boxed_cm2 == 0.0
    # The same at a side of the box that is not the scan's: 20 x 12 samples of 3 x 2 mm end there.
    boxed = examine(margins(low=low), hu_crop(50.0), INSIDE, SCAN)["liver"]
    assert boxed.cut == (False, False, False)
    assert boxed.boxed_cm2 == pytest.approx(20 * 12 * 6.0 / 100)


def test_organs_that_are_not_there_have_no_evidence() -> None:
    assert examine({}, hu_crop(50.0), INSIDE, SCAN) == {}
    assert examine({3: np.full(SIZE, -1.0, np.float32)}, hu_crop(50.0), INSIDE, SCAN) == {}
    assert list(examine(margins(2), hu_crop(50.0), INSIDE, SCAN)) == ["kidney"]


def test_one_sample_is_an_organ_too() -> None:
    margin = np.full(SIZE, -8.0, np.float32)
    margin[10, 10, 10] = 1.0
    found = examine({4: margin}, hu_crop(50.0), INSIDE, SCAN)["pancreas"]
    assert found.volume_ml == pytest.approx(8 * 24.0 / 1000)
    assert found.apart_mm == 0.0


# Doubts

WHOLE = (False, False, False)
CUT = (True, False, False)

ABDOMEN = {
    "liver": Evidence(1500.0, (300.0, 200.0, 280.0), 100.0, 0.97, 0.0, WHOLE, 0.0, 90.0),
    "kidney": Evidence(320.0, (240.0, 145.0, 205.0), 130.0, 0.97, 0.0, WHOLE, 0.0, 140.0),
    "spleen": Evidence(200.0, (315.0, 140.0, 120.0), 110.0, 0.97, 0.0, WHOLE, 0.0, 35.0),
    "pancreas": Evidence(80.0, (265.0, 200.0, 205.0), 80.0, 0.94, 0.0, WHOLE, 0.0, 60.0),
}
"""A usual abdomen."""


def but(organ: str, **figures: Any) -> dict[str, Evidence]:
    """`ABDOMEN` with other figures of one organ."""
    return {**ABDOMEN, organ: replace(ABDOMEN[organ], **figures)}


def test_a_usual_abdomen_raises_none() -> None:
    assert doubts(ABDOMEN) == {}
    assert doubts({}) == {}


@pytest.mark.parametrize(
    ("organ", "figures", "said"),
    [
        ("liver", {"volume_ml": 300.0}, "only 300 ml, usually more than 400"),
        ("liver", {"volume_ml": 28423.0}, "28423 ml, usually less than 5000"),
        ("spleen", {"hu": -60.0}, "-60 HU on average, usually 0 to 270"),
        ("kidney", {"hu": 300.0}, "300 HU on average, usually 0 to 290"),
        ("kidney", {"apart_mm": 30.0}, "on one side only"),
        ("kidney", {"apart_mm": 300.0}, "two sides 300 mm apart, usually less than 230"),
        ("pancreas", {"stray": 0.5}, "what was left of scattered pieces (50% taken away)"),
        ("liver", {"boxed_cm2": 40.0}, "may go on outside the part of the scan that was searched"),
    ],
)
def test_each_figure_out_of_its_range_is_said(organ: str, figures: dict[str, float], said: str) -> None:
    assert doubts(but(organ, **figures)) == {organ: [said]}


@pytest.mark.parametrize("organ", [organ.name for organ in ORGANS])
def test_a_low_confidence_is_said(organ: str) -> None:
    least = LIMITS[organ].confidence
    said = f"uncertain (confidence {least - 0.1:.2f}, usually more than {least:.2f})"
    assert doubts(but(organ, confidence=least - 0.1)) == {organ: [said]}
    assert doubts(but(organ, confidence=least)) == {}


def test_a_part_of_an_organ_may_be_small_and_on_one_side() -> None:
    assert doubts(but("liver", volume_ml=60.0, cut=CUT)) == {}
    assert doubts(but("kidney", volume_ml=20.0, apart_mm=20.0, cut=CUT)) == {}
    # Its middle is lower or higher than the whole organ's, but not further right.
    assert doubts(but("spleen", cut=CUT, centre_mm=(100.0, 140.0, 120.0))) == {}
    assert list(doubts(but("spleen", cut=CUT, centre_mm=(315.0, 140.0, 350.0)))) == ["spleen"]


def test_a_spleen_as_large_as_the_liver_is_said_of_both() -> None:
    said = "the spleen has 80% of the liver's volume, usually less than 75%"
    assert doubts(but("spleen", volume_ml=1200.0)) == {"liver": [said], "spleen": [said]}
    # What is left of a liver says nothing.
    part = but("spleen", volume_ml=1200.0)
    assert doubts({**part, "liver": replace(part["liver"], cut=CUT)}) == {}


def test_every_two_organs_are_held_against_each_other() -> None:
    names = [organ.name for organ in ORGANS]
    assert {frozenset(pair) for pair in OFFSETS_MM} == {frozenset((a, b)) for a in names for b in names if a != b}


def test_the_misplaced_organ_is_told_from_those_in_place() -> None:
    # A spleen on the right, and behind nothing: in conflict with all three.
    lines = misplaced(but("spleen", centre_mm=(315.0, 140.0, 300.0)))
    assert list(lines) == ["spleen"]
    assert lines["spleen"] == "lies oddly: liver 20 mm left of spleen, usually 80 to 240 mm right of"


def test_of_two_in_conflict_both_are_told() -> None:
    two = {name: ABDOMEN[name] for name in ("liver", "spleen")}
    two["spleen"] = replace(two["spleen"], centre_mm=(315.0, 140.0, 300.0))
    assert sorted(misplaced(two)) == ["liver", "spleen"]


def test_a_mirrored_abdomen_is_doubted() -> None:
    mirrored = {
        name: replace(found, centre_mm=(*found.centre_mm[:2], 400.0 - found.centre_mm[2]))
        for name, found in ABDOMEN.items()
    }
    assert {"liver", "spleen"} <= set(doubts(mirrored))


def test_an_abdomen_upside_down_is_doubted() -> None:
    turned = {
        name: replace(found, centre_mm=(500.0 - found.centre_mm[0], *found.centre_mm[1:]))
        for name, found in ABDOMEN.items()
    }
    assert doubts(turned)
