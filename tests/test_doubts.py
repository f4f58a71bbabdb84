import csv
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.accuracy import PairError
from evaluation.doubts import COPIES, Codes, Hu, Verdict, by_copy, judge, of_parts, summary, write_csv
from fastorgan.cascade import Cascade
from fastorgan.phantom import make_phantom
from fastorgan.plausibility import Evidence

SIZE = np.array([1.0, 1.0, 10.0])

EVIDENCE = Evidence(
    volume_ml=1500.0,
    hu=100.0,
    confidence=0.95,
    stray=0.0,
    cut=(True, False, True),
    boxed_cm2=0.0,
    centre_mm=(1.0, 2.0, 3.0),
    apart_mm=None,
)


def verdict(case: str, copy: str, organ: str, dsc: float, *, found: bool = True, said: tuple[str, ...] = ()) -> Verdict:
    return Verdict(case, copy, organ, dsc, not math.isnan(dsc) and dsc > 0, EVIDENCE if found else None, said)


def scan(slices: int, organ: slice) -> tuple[Hu, Codes]:
    hu = np.arange(4 * 6 * slices, dtype=np.int16).reshape(4, 6, slices)
    codes = np.zeros(hu.shape, np.uint8)
    codes[1, 2, organ] = 1
    return hu, codes


def test_labels_are_turned_and_cut_along_with_the_ct() -> None:
    hu, codes = scan(8, slice(2, 6))
    where = {
        "as it is": (1, 2, [2, 3, 4, 5]),
        # Mirrored at the middle of four columns and six rows, and of eight slices.
        "mirrored": (2, 2, [2, 3, 4, 5]),
        "half turn": (2, 3, [2, 3, 4, 5]),
        "head down": (1, 2, [2, 3, 4, 5]),
        # Half of the organ's four slices stay.
        "lower half": (1, 2, [2, 3]),
    }
    for copy, (x, y, slices) in where.items():
        spoilt = COPIES[copy](hu, codes, SIZE)
        assert spoilt is not None
        assert [tuple(place) for place in np.argwhere(spoilt[1] == 1)] == [(x, y, z) for z in slices], copy
        assert sorted(spoilt[0][spoilt[1] == 1]) == sorted(hu[1, 2, : 4 if copy == "lower half" else 6][2:]), copy


def test_the_right_half_is_the_upper_half_of_x() -> None:
    hu, codes = scan(8, slice(2, 6))
    spoilt = COPIES["right half"](hu, codes, SIZE)
    assert spoilt is not None
    np.testing.assert_array_equal(spoilt[0], hu[2:])
    assert not spoilt[1].any()


def test_grey_values_are_spoilt_and_labels_stay() -> None:
    hu, codes = np.array([[[-1000, -160, 40, 240, 900]]], np.int16), np.array([[[0, 1, 2, 3, 4]]], np.uint8)
    expected = {
        "inverted": [976, 136, -64, -264, -924],
        "HU + 1024": [24, 864, 1064, 1264, 1924],
        "HU - 150": [-1150, -310, -110, 90, 750],
        "0 to 255": [0, 0, 127, 255, 255],
    }
    for copy, values in expected.items():
        spoilt = COPIES[copy](hu, codes, SIZE)
        assert spoilt is not None
        assert spoilt[0].ravel().tolist() == values, copy
        assert spoilt[1] is codes


def test_parts_without_organs_keep_their_distance() -> None:
    # 10 mm a slice, organs in slices 12 to 19.
    hu, codes = scan(48, slice(12, 20))
    parts = {"chest": slice(22, 47), "pelvis and legs": slice(0, 10), "head": slice(32, 48)}
    for copy, part in parts.items():
        spoilt = COPIES[copy](hu, codes, SIZE)
        assert spoilt is not None
        np.testing.assert_array_equal(spoilt[0], hu[:, :, part], err_msg=copy)
        assert not spoilt[1].any()


def test_too_thin_a_part_is_left_out() -> None:
    # 20 mm below the organs 70 mm are left, less than the 80 of a test; above them nothing.
    hu, codes = scan(20, slice(9, 20))
    assert [COPIES[copy](hu, codes, SIZE) for copy in ("chest", "head", "pelvis and legs")] == [None] * 3


def test_an_organ_that_was_not_found_counts_as_warned() -> None:
    assert verdict("a", "as it is", "liver", 0.0, found=False).warned
    assert verdict("a", "as it is", "liver", 0.4, said=("small",)).warned
    assert not verdict("a", "as it is", "liver", 0.4).warned


def test_tables() -> None:
    verdicts = [
        verdict("a", "as it is", "liver", 0.95),
        verdict("a", "as it is", "kidney", 1.0),
        verdict("a", "as it is", "spleen", 0.9, said=("small",)),
        verdict("b", "as it is", "liver", 0.45, found=False),
        verdict("b", "chest", "liver", math.nan, found=False),
        verdict("b", "chest", "kidney", 0.0, said=("small",)),
        verdict("c", "chest", "liver", math.nan, found=False),
    ]
    assert summary(verdicts).splitlines()[2:] == [
        "| 0.9 to 1 | 3 | 1 | 33% |",
        "| 0.8 to 0.9 | 0 | 0 | – |",
        "| 0.7 to 0.8 | 0 | 0 | – |",
        "| 0.5 to 0.7 | 0 | 0 | – |",
        "| 0 to 0.5 | 2 | 2 | 100% |",
    ]
    assert by_copy(verdicts).splitlines()[2:] == [
        "| as it is | 70, 1/2 | 100, 0/1 | 90, 1/1 | –, 0/0 |",
        "| chest | –, 0/0 | 0, 1/1 | –, 0/0 | –, 0/0 |",
    ]
    assert of_parts(verdicts).splitlines()[2:] == ["| chest | 2 | 1 | 1 | 1 |"]


def test_csv_has_the_evidence(tmp_path: Path) -> None:
    path = tmp_path / "doubts.csv"
    write_csv(
        [
            verdict("a", "as it is", "liver", 0.95, said=("large", "dense")),
            verdict("a", "as it is", "spleen", 0.0, found=False),
        ],
        path,
    )
    with path.open(encoding="utf-8", newline="") as file:
        liver, spleen = csv.DictReader(file)
    assert (liver["dsc"], liver["found"], liver["volume_ml"], liver["cut"]) == ("0.9500", "1", "1500", "zx")
    assert (liver["z"], liver["y"], liver["x"], liver["apart_mm"]) == ("1.0", "2.0", "3.0", "")
    assert liver["doubts"] == "large; dense"
    assert (spleen["found"], spleen["present"], spleen["volume_ml"], spleen["z"]) == ("0", "0", "", "")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, image in zip(("images/p_0000", "labels/p"), make_phantom((96, 96, 45), (4.0, 4.0, 6.6)), strict=True):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(image, path)
    return folder


def test_a_phantom_is_judged_in_every_copy_asked_for(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "doubts.csv"
    command = [
        "doubts",
        str(phantoms),
        "--copies",
        "as it is,0 to 255",
        "--leave-out",
        "p:pancreas",
        "--csv",
        str(rows),
    ]
    assert main(command) == 0
    with rows.open(encoding="utf-8", newline="") as file:
        found = {(row["copy"], row["organ"]): row for row in csv.DictReader(file)}
    assert list(found) == [
        (copy, organ) for copy in ("as it is", "0 to 255") for organ in ("liver", "kidney", "spleen")
    ]
    assert float(found["as it is", "liver"]["dsc"]) > 0.8
    assert "| as it is |" in capsys.readouterr().out


def test_a_case_without_its_ct_is_said(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(PairError, match=r"no CT of the case p\Z"):
        next(judge(Cascade.load("cpu"), tmp_path, phantoms / "labels", ["as it is"]))


def test_a_copy_that_does_not_exist_is_said(phantoms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doubts", str(phantoms), "--copies", "upside down"]) == 2
    assert capsys.readouterr().err == "error: --copies: there is no 'upside down'\n"
