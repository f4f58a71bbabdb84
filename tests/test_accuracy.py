import gzip
import math
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.accuracy import (
    FLARE21,
    FLARE22,
    CaseScores,
    Labels,
    Pair,
    PairError,
    Protocol,
    Score,
    Table,
    case_of,
    dsc,
    find_pairs,
    image_of,
    read_labels,
    score_labels,
    score_pair,
    write_csv,
)
from fastorgan.errors import FastorganError
from fastorgan.labels import IGNORE, ORGANS

LIVER, KIDNEY, SPLEEN, PANCREAS = ORGANS


def blank(*bars: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A volume of 3 x 3 x 20 voxels with bars (code, start, stop) along its last axis."""
    array = np.zeros((3, 3, 20), np.uint8)
    for code, start, stop in bars:
        array[1, 1, start:stop] = code
    return array


def truth_of(array: NDArray[np.uint8], third: float = 1.0) -> Labels:
    return Labels(array, (1.0, 1.0, third), np.diag([1.0, 1.0, third, 1.0]))


def save(path: Path, array: NDArray[Any], affine: NDArray[np.float64] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_dsc() -> None:
    a, b = np.array([True, True, True, False, False]), np.array([False, True, True, True, True])
    assert dsc(a, b) == pytest.approx(4 / 7)
    assert dsc(a, a) == 1.0
    assert dsc(a, ~a) == 0.0
    assert dsc(a & False, b & False) == 1.0


@pytest.mark.parametrize("protocol", [FLARE21, FLARE22])
def test_empty_organs(protocol: Protocol) -> None:
    truth = blank((LIVER.code, 2, 6), (KIDNEY.code, 8, 12))
    prediction = blank((LIVER.code, 2, 6), (SPLEEN.code, 8, 12))
    assert score_labels(prediction, truth_of(truth), protocol) == {
        "liver": Score(1.0, 1.0),
        "kidney": Score(0.0, 0.0),  # missed
        "spleen": Score(0.0, 0.0),  # invented
        "pancreas": Score(1.0, 1.0),  # absent and not found
    }


def test_tolerance_is_the_protocols_and_in_millimetres() -> None:
    truth, prediction = blank((3, 4, 8)), blank((3, 5, 9))
    # Bars of 4 voxels, shifted by one: 3 of 4 are common; of the 20 points of a bar 4 are its first, 4 its last.
    end, side = math.sqrt(3) / 8, math.sqrt(0.5)
    within = 3 * 4 * side + 4 * end
    assert score_labels(prediction, truth_of(truth, 1.0), FLARE21)["spleen"] == Score(0.75, 1.0)
    assert score_labels(prediction, truth_of(truth, 3.0), FLARE22)["spleen"] == Score(0.75, 1.0)
    far = score_labels(prediction, truth_of(truth, 1.001), FLARE21)["spleen"]
    assert far.dsc == 0.75
    assert far.nsd == pytest.approx(within / (3 * 4 * side + 8 * end), abs=1e-3)
    assert score_labels(prediction, truth_of(truth, 3.001), FLARE22)["spleen"].nsd < 1.0


def test_tolerances() -> None:
    assert dict(FLARE21.tolerances) == {"liver": 1, "kidney": 1, "spleen": 1, "pancreas": 1}
    assert dict(FLARE22.tolerances) == {"liver": 5, "kidney": 3, "spleen": 3, "pancreas": 5}


def test_flare22_voids_the_nsd_of_a_low_dsc() -> None:
    prediction = blank((1, 3, 4))
    at_least = score_labels(prediction, truth_of(blank((1, 3, 12))), FLARE22)["liver"]
    assert at_least.dsc == pytest.approx(0.2)
    assert at_least.nsd > 0.5
    below = blank((1, 3, 13))
    assert score_labels(prediction, truth_of(below), FLARE22)["liver"] == Score(2 / 11, 0.0)
    assert score_labels(prediction, truth_of(below), FLARE21)["liver"].nsd > 0.0


def test_voxels_to_ignore() -> None:
    truth = blank((1, 2, 6), (IGNORE, 6, 10), (2, 14, 18))
    prediction = blank((1, 2, 8), (2, 8, 10), (2, 14, 18), (3, 6, 7))
    scores = score_labels(prediction, truth_of(truth), FLARE21)
    assert scores["liver"] == scores["kidney"] == scores["spleen"] == Score(1.0, 1.0)
    beyond = score_labels(blank((1, 2, 12)), truth_of(truth), FLARE21)["liver"]
    assert beyond.dsc == pytest.approx(2 * 4 / (4 + 6))


def test_organs_and_nsd_can_be_left_out() -> None:
    array = blank((1, 2, 6))
    scores = score_labels(array, truth_of(array), FLARE21, [LIVER, PANCREAS], with_nsd=False)
    assert list(scores) == ["liver", "pancreas"]
    assert scores["liver"].dsc == scores["pancreas"].dsc == 1.0
    assert math.isnan(scores["liver"].nsd)
    assert math.isnan(scores["pancreas"].nsd)


def test_score_pair_takes_the_ground_truths_spacing(tmp_path: Path) -> None:
    truth, prediction = blank((4, 4, 8)), blank((4, 5, 9))
    affine = np.diag([-0.5, 0.5, 1.5, 1.0])
    pair = Pair("a.nii.gz", save(tmp_path / "p.nii.gz", prediction, affine), save(tmp_path / "t.nii.gz", truth, affine))
    case = score_pair(pair, FLARE21)
    assert case.name == "a.nii.gz"
    assert case.value("pancreas", "dsc") == 0.75
    expected = score_labels(prediction, Labels(truth, (0.5, 0.5, 1.5), affine), FLARE21)["pancreas"].nsd
    assert 0.0 < case.value("pancreas", "nsd") == expected < 1.0


@pytest.mark.parametrize(
    ("array", "affine", "reason"),
    [
        (blank()[:, :, 1:], np.eye(4), r"shapes differ, 3 x 3 x 19 and 3 x 3 x 20 voxels"),
        (blank(), np.diag([1.0, 1.0, 1.1, 1.0]), r"affines differ, a corner voxel lies 1\.9 mm from"),
        (blank(), np.diag([-1.0, 1.0, 1.0, 1.0]), r"affines differ"),
        (np.full((3, 3, 20), 0.5, np.float32), np.eye(4), r"not whole numbers"),
        (np.full((3, 3, 20), np.nan, np.float32), np.eye(4), r"not whole numbers"),
        (np.full((3, 3, 20), 256, np.int16), np.eye(4), r"not whole numbers"),
        (np.full((3, 3, 20), -1, np.int16), np.eye(4), r"not whole numbers"),
        (np.zeros((3, 3, 20, 2), np.uint8), np.eye(4), r"not one three-dimensional volume \(shape 3 x 3 x 20 x 2\)"),
    ],
)
def test_pairs_that_do_not_fit(array: NDArray[Any], affine: NDArray[np.float64], reason: str, tmp_path: Path) -> None:
    prediction, truth = save(tmp_path / "p.nii.gz", array, affine), save(tmp_path / "t.nii.gz", blank())
    with pytest.raises(PairError, match=reason) as caught:
        score_pair(Pair("a.nii.gz", prediction, truth), FLARE21)
    assert str(prediction) in str(caught.value)
    assert str(truth) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounding_of_an_affine_is_no_difference(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, 3] += 0.03
    pair = Pair(
        "a", save(tmp_path / "p.nii.gz", blank((1, 2, 3)), affine), save(tmp_path / "t.nii.gz", blank((1, 2, 3)))
    )
    assert score_pair(pair, FLARE21).value("liver", "dsc") == 1.0


def test_labels_of_other_types(tmp_path: Path) -> None:
    array = blank((2, 3, 9), (IGNORE, 12, 14))
    for kind in (np.int16, np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(read_labels(save(tmp_path / "a.nii.gz", array.astype(kind))).array, array)
    labels = read_labels(save(tmp_path / "b.nii.gz", array[..., None], np.diag([0.7, 0.8, 2.5, 1.0])))
    np.testing.assert_array_equal(labels.array, array)
    assert labels.spacing == pytest.approx((0.7, 0.8, 2.5))


@pytest.mark.parametrize("kept", [0, 30, 400])
def test_damaged_files(kept: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 5, (20, 20, 20), np.uint8)
    whole = save(tmp_path / "a.nii.gz", noise)
    damaged = tmp_path / "b.nii.gz"
    damaged.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(FastorganError, match=r"b\.nii\.gz"):
        read_labels(damaged)


def test_a_file_shorter_than_its_header_says(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.nii.gz", np.zeros((20, 20, 20), np.uint8))
    short = tmp_path / "b.nii.gz"
    short.write_bytes(gzip.compress(gzip.decompress(whole.read_bytes())[:-100]))
    with pytest.raises(PairError, match=r"b\.nii\.gz: damaged"):
        read_labels(short)


def test_pairs_of_folders(tmp_path: Path) -> None:
    for name in ("p/b.nii.gz", "p/a.nii.gz", "t/b.nii.gz", "t/c.nii.gz"):
        save(tmp_path / name, blank())
    (tmp_path / "t" / "notes.txt").touch()
    pairs = find_pairs(tmp_path / "p", tmp_path / "t")
    assert [pair.name for pair in pairs] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert pairs[0] == Pair("a.nii.gz", tmp_path / "p" / "a.nii.gz", tmp_path / "t" / "a.nii.gz")
    for pair, missing in ((pairs[0], pairs[0].truth), (pairs[2], pairs[2].prediction)):
        with pytest.raises(PairError, match="no such file") as caught:
            score_pair(pair, FLARE21)
        assert f"{pair.prediction} against {pair.truth}: {missing}: no such file" == str(caught.value)


def test_pair_of_files_has_the_ground_truths_name(tmp_path: Path) -> None:
    prediction, truth = save(tmp_path / "out.nii.gz", blank()), save(tmp_path / "a.nii.gz", blank())
    assert find_pairs(prediction, truth) == [Pair("a.nii.gz", prediction, truth)]


def test_pairs_that_are_none(tmp_path: Path) -> None:
    file = save(tmp_path / "a.nii.gz", blank())
    (tmp_path / "empty").mkdir()
    for predictions, truths, reason in (
        (file, tmp_path, "two folders or two files"),
        (tmp_path / "gone", tmp_path, "gone: no such file or folder"),
        (tmp_path / "empty", tmp_path / "empty", r"no \*\.nii\.gz files"),
    ):
        with pytest.raises(PairError, match=reason):
            find_pairs(predictions, truths)


def test_case_names() -> None:
    assert [case_of(name) for name in ("a.nii.gz", "a.b.nii", "a")] == ["a", "a.b", "a"]


CASES = [
    CaseScores("a.nii.gz", {"liver": Score(0.9, 0.123456789), "kidney": Score(1.0, 1.0), "spleen": Score(0.5, 0.25)}),
    CaseScores("b.nii.gz", {organ.name: Score(2 / 3, 0.5) for organ in ORGANS}),
]


def test_flare21_csv(tmp_path: Path) -> None:
    write_csv(CASES, FLARE21, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().decode() == (
        "Name,DSC_1,NSD-1mm_1,DSC_2,NSD-1mm_2,DSC_3,NSD-1mm_3,DSC_4,NSD-1mm_4\n"
        "a.nii.gz,0.9,0.123456789,1.0,1.0,0.5,0.25,,\n"
        "b.nii.gz,0.6666666666666666,0.5,0.6666666666666666,0.5,0.6666666666666666,0.5,0.6666666666666666,0.5\n"
    )


def test_flare22_csv(tmp_path: Path) -> None:
    write_csv(CASES, FLARE22, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().decode() == (
        "Name,Liver_DSC,Kidney_DSC,Spleen_DSC,Pancreas_DSC,Liver_NSD,Kidney_NSD,Spleen_NSD,Pancreas_NSD\n"
        "a.nii.gz,0.9000,1.0000,0.5000,,0.1235,1.0000,0.2500,\n"
        "b.nii.gz,0.6667,0.6667,0.6667,0.6667,0.5000,0.5000,0.5000,0.5000\n"
    )


def test_csv_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="cannot be written"):
        write_csv(CASES, FLARE21, tmp_path)


def test_table() -> None:
    table = Table(["a.nii.gz", "b.nii.gz"], ORGANS)
    titles = re.split(r"  +", table.header())
    assert titles[:4] == ["case", "liver DSC", "liver NSD", "kidney DSC"]
    assert titles[7:] == ["pancreas DSC", "pancreas NSD"]
    assert table.row(CASES[0]).split() == ["a", "90.0", "12.3", "100.0", "100.0", "50.0", "25.0", "-", "-"]
    mean, overall = table.summary(CASES).splitlines()
    # Liver 0.9 and 2/3: mean 0.78333, sample deviation 0.23333 / √2 = 0.16499.
    assert mean.startswith("mean ± SD   78.3 ± 16.5")
    assert mean.endswith(" 66.7          50.0")
    # Means of the organs: 0.78333, 0.83333, 0.58333, 0.66667; NSD: 0.31173, 0.75, 0.375, 0.5.
    assert overall == "mean of the organs, 2 cases: DSC 71.7, NSD 48.4"


def test_table_of_nothing() -> None:
    table = Table(["a.nii.gz"], [PANCREAS], ("dsc",))
    mean, overall = table.summary([CASES[0]]).splitlines()
    assert mean.split() == ["mean", "±", "SD", "-"]
    assert overall == "mean of the organs, 1 case: DSC -"


def test_table_lines_are_of_one_length() -> None:
    table = Table(["a-case-with-a-long-name.nii.gz", "b.nii.gz"], ORGANS)
    lines = [table.header(), table.row(CASES[0]), table.row(CASES[1]), table.summary(CASES).splitlines()[0]]
    assert len({len(line) for line in lines}) == 1


def test_the_ct_of_a_case_has_one_of_two_names(tmp_path: Path) -> None:
    (tmp_path / "a_0000.nii.gz").touch()
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "b.nii.gz").touch()
    assert image_of(tmp_path, "a") == tmp_path / "a_0000.nii.gz"
    assert image_of(tmp_path, "b") == tmp_path / "b.nii.gz"
    with pytest.raises(PairError, match=r"no CT of the case c\Z"):
        image_of(tmp_path, "c")
