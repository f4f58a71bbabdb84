"""Statistics against values computed by hand."""

import csv
import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.errors import FastorganError
from fastorgan.labels import ORGANS
from fastorgan.organ_statistics import OrganStatistics, organ_statistics, write_statistics
from fastorgan.volume import load_image, read_volume

AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, -20], [0, 0, 5.0, 100], [0, 0, 0, 1]])


def case() -> tuple[nib.Nifti1Image, NDArray[np.uint8]]:
    """Two voxels of liver with 40 and 60 HU, three of spleen in the scan's left, lower, hind corner; RAS."""
    hu, codes = np.full((10, 8, 6), -1000, np.int16), np.zeros((10, 8, 6), np.uint8)
    codes[4, 3, 2] = codes[5, 3, 2] = 1
    hu[4, 3, 2], hu[5, 3, 2] = 40, 60
    codes[0, 0, 0] = codes[0, 0, 1] = codes[0, 1, 0] = 3
    hu[codes == 3] = 100
    return nib.Nifti1Image(hu, AFFINE), codes


def measured(image: nib.Nifti1Image, codes: NDArray[np.uint8]) -> dict[str, OrganStatistics]:
    return organ_statistics(read_volume(image, "case"), codes, image)


def turned(image: nib.Nifti1Image, codes: NDArray[np.uint8], orientation: str) -> dict[str, OrganStatistics]:
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    labels = nib.Nifti1Image(codes, image.affine).as_reoriented(turn)
    return measured(image.as_reoriented(turn), np.asarray(labels.dataobj))


def test_volume_hu_box_and_border() -> None:
    found = measured(*case())
    assert list(found) == ["liver", "kidney", "spleen", "pancreas"]
    # Voxels 4 and 5 along x span 3.5 to 5.5 voxels, -10 + 2 * 3.5 = -3 mm to 1 mm; y -12.5 to -9.5; z 107.5 to 112.5.
    assert found["liver"] == OrganStatistics(
        voxels=2, volume_ml=0.06, mean_hu=50.0, sd_hu=10.0, box_mm=((-3, -12.5, 107.5), (1, -9.5, 112.5)), touches=()
    )
    assert found["spleen"].touches == ("inferior", "posterior", "left")
    assert found["spleen"].box_mm == ((-11, -21.5, 97.5), (-9, -15.5, 107.5))
    assert (found["spleen"].mean_hu, found["spleen"].sd_hu) == (100.0, 0.0)
    assert found["kidney"] == OrganStatistics(0, 0.0, None, None, None, ())


@pytest.mark.parametrize("orientation", ["LPS", "PIR", "SLA", "ASR", "IAL"])
def test_the_files_orientation_does_not_matter(orientation: str) -> None:
    assert turned(*case(), orientation) == measured(*case())


@pytest.mark.parametrize(
    ("index", "side"),
    [((9, 3, 3), "right"), ((0, 3, 3), "left"), ((4, 7, 3), "anterior"), ((4, 0, 3), "posterior"),
     ((4, 3, 5), "superior"), ((4, 3, 0), "inferior")],
)  # fmt: skip
def test_each_face_has_its_name(index: tuple[int, int, int], side: str) -> None:
    image, codes = case()
    codes[:] = 0
    codes[index] = 4
    assert measured(image, codes)["pancreas"].touches == (side,)


def test_slope_and_intercept_count(tmp_path: Path) -> None:
    image, codes = case()
    path = tmp_path / "ct.nii"
    nib.save(image, path)
    with path.open("r+b") as file:
        file.seek(112)  # scl_slope and scl_inter
        file.write(struct.pack("<2f", 2.0, -10.0))
    liver = measured(load_image(path), codes)["liver"]
    assert (liver.mean_hu, liver.sd_hu) == (2 * 50 - 10, 2 * 10)


def test_hu_and_box_of_an_oblique_scan_are_the_files_own() -> None:
    image, codes = case()
    angle = np.deg2rad(30)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = nib.Nifti1Image(np.asarray(image.dataobj), turn @ AFFINE)
    found = measured(oblique, codes)
    assert (found["liver"].mean_hu, found["liver"].sd_hu) == (50.0, 10.0)
    assert found["spleen"].touches == ("inferior", "posterior", "left")
    # By force: all corners of all voxels.
    voxels = np.argwhere(codes == 3)
    corners = (voxels[:, None] + np.array(list(np.ndindex(2, 2, 2)))[None] - 0.5).reshape(-1, 3)
    mm = corners @ oblique.affine[:3, :3].T + oblique.affine[:3, 3]
    assert found["spleen"].box_mm is not None
    assert np.allclose(found["spleen"].box_mm, [mm.min(axis=0), mm.max(axis=0)])


def test_hu_that_were_mended_are_measured_in_oblique_scans_too() -> None:
    # A body of 40 HU in air, stored with 1024 added: reading takes them off, and says so.
    hu, codes = np.full((40, 40, 20), -1000, np.int16), np.zeros((40, 40, 20), np.uint8)
    hu[8:32, 8:32] = 40
    codes[10:20, 10:20, 5:15] = 1
    for angle in (0.0, np.deg2rad(25)):
        affine = np.diag([3.0, 3.0, 3.0, 1.0])
        affine[:2, :2] = 3 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        image = nib.Nifti1Image(hu + np.int16(1024), affine)
        volume = read_volume(image, "case")
        assert volume.warnings
        found = organ_statistics(volume, codes, image)["liver"]
        assert found.mean_hu == pytest.approx(40.0)
        assert found.sd_hu == pytest.approx(0.0)


def test_csv_has_one_row_per_case_and_organ(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    write_statistics([("a", measured(*case())), ('b,"c', measured(*case()))], path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["organ"]) for row in rows] == [
        (name, organ.name) for name in ("a", 'b,"c') for organ in ORGANS
    ]
    liver, kidney, spleen = rows[:3]
    assert (liver["voxels"], liver["volume_ml"], liver["mean_hu"], liver["sd_hu"]) == ("2", "0.06", "50.0", "10.0")
    assert (liver["x_min_mm"], liver["x_max_mm"], liver["z_max_mm"]) == ("-3.0", "1.0", "112.5")
    assert (kidney["mean_hu"], kidney["x_min_mm"], kidney["touches_left"]) == ("", "", "0")
    assert [spleen[f"touches_{side}"] for side in ("left", "right", "inferior")] == ["1", "0", "1"]


def test_json_has_the_same(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    write_statistics([("a", measured(*case()))], path)
    rows = json.loads(path.read_text())
    assert rows[0] == {
        "case": "a",
        "organ": "liver",
        "voxels": 2,
        "volume_ml": 0.06,
        "mean_hu": 50.0,
        "sd_hu": 10.0,
        "box_mm": [[-3.0, -12.5, 107.5], [1.0, -9.5, 112.5]],
        "touches": [],
    }


@pytest.mark.parametrize("name", ["s.txt", "s", "csv"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FastorganError, match=f"{name}: the name of a statistics file must end in .csv or .json"):
        write_statistics([], tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_table_can_be_continued(tmp_path: Path, suffix: str) -> None:
    path, whole = tmp_path / f"s{suffix}", tmp_path / f"whole{suffix}"
    organs = measured(*case())
    write_statistics([("a", organs), ("b", {"liver": organs["kidney"]})], path)
    write_statistics([("b", organs), ("c", organs)], path, keep=True)
    write_statistics([("a", organs), ("b", organs), ("c", organs)], whole)
    assert path.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("name", "text"), [("s.json", "{"), ("s.json", "[1]"), ("s.json", '[{"a": 1}]'), ("s.csv", "a,b\n1,2\n")]
)
def test_what_is_no_table_is_not_continued(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FastorganError, match="continued"):
        write_statistics([], tmp_path / name, keep=True)
    assert (tmp_path / name).read_text() == text
