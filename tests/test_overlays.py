from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from evaluation.__main__ import main
from evaluation.overlays import slice_of, spread

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
SHAPE = (40, 36, 16)


def save(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] = AFFINE) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def truth() -> NDArray[np.uint8]:
    codes = np.zeros(SHAPE, np.uint8)
    for code, (x, y) in enumerate(((5, 8), (25, 20), (25, 8), (12, 22)), 1):
        codes[x : x + 8, y : y + 8, 4:10] = code
    return codes


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Five cases, the later the less of the liver is found; of the third neither pancreas nor its label."""
    images, labels, found = (tmp_path / name for name in ("images", "labels", "found"))
    for number, name in enumerate("abcde"):
        codes = truth()
        if name == "c":
            codes[codes == 4] = 0
        hu = np.where(codes > 0, 60, -40).astype(np.int16)
        prediction = codes.copy()
        prediction[5 : 5 + number][prediction[5 : 5 + number] == 1] = 0
        save(images / f"{name}_0000.nii.gz", hu)
        save(labels / f"{name}.nii.gz", codes)
        save(found / f"{name}.nii.gz", prediction)
    return [str(folder) for folder in (found, labels, images)]


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, {"best": 0}),
        (2, {"best": 0, "worst": 1}),
        (3, {"best": 0, "median": 1, "worst": 2}),
        (8, {"best": 0, "median": 3, "worst": 7}),
    ],
)
def test_which_cases_are_drawn(count: int, places: dict[str, int]) -> None:
    assert spread(count) == places
    assert list(spread(count)) == list(places)


def test_the_slice_with_most_of_an_organ() -> None:
    true, found = np.zeros((2, 5, 4, 4), bool)
    assert slice_of(true, found) is None
    found[3, 1, 1] = True
    assert slice_of(true, found) == 3
    true[1, :2] = True
    true[2, :1] = True
    assert slice_of(true, found) == 1


def test_best_median_and_worst_are_drawn(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "overlays.png"
    assert main(["overlays", *folders, "--out", str(out)]) == 0
    # Of 8 rows of liver b has lost one, c two, e four: DSC 14 / 15, 12 / 14 and 8 / 12 beside three organs that are
    # whole, or absent on both sides.
    assert capsys.readouterr().out.splitlines() == ["a  100.0", "c  96.4", "e  91.7"]
    with Image.open(out) as picture:
        picture.load()
        assert picture.size == (1320, 957)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # The contour of the liver found, rgb(216, 101, 79), in the first column; that of the pancreas in the last.
    for colour, columns in (((216, 101, 79), slice(0, 330)), ((121, 186, 107), slice(990, 1320))):
        near = np.abs(pixels - colour).sum(axis=2) < 30
        assert near[:, columns].sum() > 100
        assert near.sum() == near[:, columns].sum()


def test_what_is_on_the_left_of_the_picture_is_the_patients_right(folders: list[str], tmp_path: Path) -> None:
    # The file's first axis goes to the left: the patient's right is where the index is small.
    hu = np.full(SHAPE, -40, np.int16)
    hu[:9] = 200
    save(Path(folders[2]) / "a_0000.nii.gz", hu)
    out = tmp_path / "overlays.png"
    assert main(["overlays", *folders, "--organs", "liver", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        top = np.asarray(picture.convert("L")).astype(float)[60:260]
    bright = (top > 190).sum(axis=0)
    grey = ((top > 60) & (top < 110)).sum(axis=0)
    across = np.arange(top.shape[1])
    assert (bright * across).sum() / bright.sum() < (grey * across).sum() / grey.sum() - 50


def test_cases_without_a_prediction_are_left_out(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "bcde":
        (Path(folders[0]) / f"{name}.nii.gz").unlink()
    assert main(["overlays", *folders, "--out", str(tmp_path / "overlays.png")]) == 0
    assert capsys.readouterr().out.splitlines() == ["a  100.0"]


def test_an_oblique_case_is_set_upright(folders: list[str], tmp_path: Path) -> None:
    turn = np.eye(4)
    angle = np.radians(20)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for folder, name in zip(folders, ("a", "a", "a_0000"), strict=True):
        path = Path(folder) / f"{name}.nii.gz"
        save(path, np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj), turn @ AFFINE)
    assert main(["overlays", *folders, "--out", str(tmp_path / "overlays.png")]) == 0


def test_what_cannot_be_drawn_is_one_line(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, labels, images = map(Path, folders)
    out = ["--out", str(tmp_path / "overlays.png")]

    def complaint(*arguments: str) -> str:
        assert main(["overlays", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none" in complaint(*folders, "--out", str(tmp_path / "none" / "overlays.png"))
    save(images / "a_0000.nii.gz", np.zeros((4, 4, 4), np.int16))
    assert "a_0000.nii.gz" in complaint(*folders, *out)
    (images / "a_0000.nii.gz").unlink()
    assert complaint(*folders, *out).endswith("images: no CT of the case a")
    for path in found.iterdir():
        path.unlink()
    assert "found: no *.nii.gz files" in complaint(*folders, *out)
    (labels / "a.nii.gz").write_bytes(b"none")
    assert "found" in complaint(*folders, *out)
    assert not (tmp_path / "overlays.png").exists()
