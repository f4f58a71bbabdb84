import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.box import ROI_SIZE
from tests.synthetic_cache import anatomy, as_roi, cached
from training.__main__ import main
from training.boxes import AIR_HU, VIEWS, WITHOUT_ORGANS, Field, Finding, judge, judge_all, table

SPACING = (4.0, 2.0, 2.0)
ORGANS_HU = 100.0


def block() -> Field:
    """200 x 300 x 400 mm of fat; organs from 60 to 140, 80 to 220 and 100 to 300 mm."""
    organs = np.zeros((50, 150, 200), bool)
    organs[15:35, 40:110, 50:150] = True
    return Field(np.where(organs, ORGANS_HU, -100.0).astype(np.float32), organs, SPACING)


class Bright:
    """Stands for a ROI net: finds what is brighter than so many HU, moved by samples along x."""

    def __init__(self, shift: int = 0, least_hu: float = 0.0):
        self.shift = shift
        # The networks' range is -1 at -200 HU and 1 at 300.
        self.least = (least_hu + 200) / 250 - 1

    def __call__(self, whole: NDArray[np.float32]) -> NDArray[np.float32]:
        assert whole.shape == ROI_SIZE
        return np.roll(whole > self.least, self.shift, axis=2)[None].astype(np.float32)


def test_a_cached_scan_becomes_hu() -> None:
    codes = np.zeros((2, 3, 4), np.uint8)
    codes[0, 0, 0] = 1
    image = np.full(codes.shape, 102, np.uint8)
    image[1] = 0
    field = Field.of(as_roi(cached(codes, (5.0, 4.0, 3.0), image=image)))
    # 102 of 255 levels over 500 HU from -200; what is at the window's lower end may be any air.
    assert field.hu[0] == pytest.approx(np.zeros((3, 4)), abs=1e-4)
    assert (field.hu[1] == AIR_HU).all()
    assert field.organs.sum() == 1
    assert field.spacing == (5.0, 4.0, 3.0)


def test_parts_are_cut_in_mm_and_are_never_empty() -> None:
    field = block()
    assert field.span(0) == (60, 140)
    assert field.span(2) == (100, 300)
    assert field.part(0, 60, 100).hu.shape == (10, 150, 200)
    assert field.part(2, -math.inf, 100).hu.shape == (50, 150, 50)
    assert field.part(0, 150, math.inf).hu.shape == (12, 150, 200)
    assert field.part(0, 500, math.inf).hu.shape == (1, 150, 200)


def test_turns_are_rigid_in_mm() -> None:
    field = block()
    turned = field.turned(about_x=30)
    # cos 30 * 200 + sin 30 * 300 and cos 30 * 300 + sin 30 * 200 mm.
    assert np.multiply(turned.hu.shape, SPACING) == pytest.approx([323.2, 359.8, 400], abs=4)
    assert turned.organs.sum() == pytest.approx(field.organs.sum(), rel=0.02)
    assert (turned.hu[0, 0] == AIR_HU).all()
    # Organs of 80 x 140 mm: 80 cos 30 + 140 sin 30 and 140 cos 30 + 80 sin 30 mm high and deep.
    assert np.diff(turned.span(0)) == pytest.approx(139.3, abs=8)
    assert np.diff(turned.span(1)) == pytest.approx(161.2, abs=6)
    middle = np.mean(np.argwhere(turned.organs), axis=0) + 0.5
    # The organs' middle is 0, 0 and 0 mm from the scan's, but for 150 of 300 mm along y.
    assert middle * SPACING == pytest.approx(np.multiply(turned.hu.shape, SPACING) / 2, abs=3)


def test_a_net_that_finds_the_organs_frames_them_as_labels_do() -> None:
    finding = judge(Bright(), "whole", "block", block())
    assert finding.found
    assert finding.shows
    # Samples of 200 / 96, 300 / 96 and 400 / 96 mm.
    assert finding.beyond_mm == pytest.approx(np.zeros(6), abs=4.2)
    assert finding.lost == 0
    assert finding.ratio == pytest.approx(1, abs=0.06)


def test_a_finding_beside_the_organs_falls_short_on_one_side() -> None:
    field = block()
    room = ((0, 0), (0, 0), (0, 100))
    field = replace(field, hu=np.pad(field.hu, room, "edge"), organs=np.pad(field.organs, room))
    # 20 samples of 600 / 96 mm too far: 225 to 425 mm in place of 100 to 300. With 12 mm on both sides that is 213 to
    # 437, and grown to the least extent of 250 mm 200 to 450.
    finding = judge(Bright(shift=20), "whole", "block", field)
    assert finding.beyond_mm is not None
    assert finding.beyond_mm[2] == pytest.approx(-125, abs=6.3)
    assert finding.beyond_mm[5] == pytest.approx(125, abs=6.3)
    assert finding.lost == pytest.approx(100 / 200, abs=0.04)


def test_a_net_that_finds_nothing_frames_nothing() -> None:
    finding = judge(Bright(least_hu=200), "whole", "block", block())
    assert not finding.found
    assert finding.beyond_mm is None


def test_grey_values_change_as_the_views_say() -> None:
    field = block()
    air = replace(field, hu=np.where(field.organs, ORGANS_HU, AIR_HU).astype(np.float32))
    assert sorted(np.unique(VIEWS["60 HU more"](air).hu)) == [AIR_HU, 160]
    assert sorted(np.unique(VIEWS["half the contrast"](air).hu)) == [AIR_HU, 50]
    noisy = VIEWS["noise of 80 HU"](field)
    assert float((noisy.hu - field.hu).std()) == pytest.approx(80, rel=0.01)
    # 10 mm are two or three slices of 4 mm.
    assert 3 <= len(np.unique(VIEWS["slices of 10 mm"](field).hu)) <= 4


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_shows_organs(view: str) -> None:
    field = VIEWS[view](block())
    assert field.hu.shape == field.organs.shape
    assert field.organs.any()
    assert field.hu.min() >= AIR_HU


@pytest.mark.parametrize(("view", "height"), [("above the organs", 56), ("below the organs", 56)])
def test_views_beside_the_organs_show_none(view: str, height: float) -> None:
    field = WITHOUT_ORGANS[view](block())
    assert not field.organs.any()
    assert field.hu.shape[0] * SPACING[0] == height


def test_low_views_without_organs_do_not_count() -> None:
    codes = np.zeros((60, 40, 40), np.uint8)
    codes[10:25, 5:35, 5:35] = 1
    source = as_roi(cached(codes, (5.0, 8.0, 8.0), image=np.where(codes, 200, 60).astype(np.uint8)))
    views = [finding.view for finding in judge_all(Bright(), [source])]
    # 175 mm above the organs, 50 below.
    assert views == [*VIEWS, "above the organs"]


def test_the_table_sums_by_view() -> None:
    sides = np.array([0.0, 3.0, -13.0, 0.0, 2.0, 0.0])
    findings = [
        Finding("whole", "a", True, True, sides, 0.001, 1.2),
        Finding("whole", "b", True, True, np.zeros(6), 0.0, 1.0),
        Finding("half", "a", False, True),
        Finding("half", "b", True, True, np.zeros(6), 0.0, 1.1),
        Finding("empty", "a", True, False),
    ]
    lines = table(findings).splitlines()[2:]
    assert lines == [
        "| whole | 2 | 2 | 1 of 12 sides | 13 | 1.5 | 0.10 | 1.100, at most 1.20 |",
        "| half | 2 | 1 | 0 of 6 sides | 0 | 0.0 | 0.00 | 1.100, at most 1.10 |",
        "| empty | 1 | 1 |  |  |  |  |  |",
        "| all but whole | 2 | 1 | 0 of 6 sides | 0 | 0.0 | 0.00 | 1.100, at most 1.10 |",
    ]


def test_the_command_judges_the_released_net_by_a_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        as_roi(cached(anatomy((24, 30, 44)), (8.0, 7.5, 7.5), name=name)).save(tmp_path / f"{name}.roi.npz")
    assert main(["boxes", "--data", str(tmp_path), "--fold", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| whole | 1 |")
    assert len(lines) == 2 + len(VIEWS) + 1


def test_a_run_that_left_nobody_out_cannot_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_roi(cached(anatomy((24, 30, 44)), (8.0, 7.5, 7.5))).save(tmp_path / "a.roi.npz")
    assert main(["boxes", "--data", str(tmp_path), "--run", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
