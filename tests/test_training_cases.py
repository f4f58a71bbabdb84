from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastorgan.errors import FastorganError
from training.cases import Case, DataError, find_cases, patient_of, split_fold


def lay_out(data: Path, images: str, labels: str, *pairs: tuple[str, str]) -> None:
    """Make empty files; only their names are looked at."""
    for folder in (images, labels):
        (data / folder).mkdir(parents=True, exist_ok=True)
    for image, label in pairs:
        (data / images / image).touch()
        (data / labels / label).touch()


def test_the_projects_own_layout(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", ("b_0000.nii.gz", "b.nii.gz"), ("a.nii.gz", "a.nii.gz"))
    assert find_cases(tmp_path) == [
        Case("a", "a", tmp_path / "images" / "a.nii.gz", tmp_path / "labels" / "a.nii.gz"),
        Case("b", "b", tmp_path / "images" / "b_0000.nii.gz", tmp_path / "labels" / "b.nii.gz"),
    ]


def test_labels_of_further_organs_are_found_where_there_are_some(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", ("a.nii.gz", "a.nii.gz"), ("b.nii.gz", "b.nii.gz"))
    (tmp_path / "structures").mkdir()
    (tmp_path / "structures" / "b.nii.gz").touch()
    assert [case.structures for case in find_cases(tmp_path)] == [None, tmp_path / "structures" / "b.nii.gz"]


def test_flare21s_own_layout(tmp_path: Path) -> None:
    names = ("train_000", "train_001", "train_360")
    lay_out(tmp_path, "TrainingImg", "TrainingMask", *((f"{n}_0000.nii.gz", f"{n}.nii.gz") for n in names))
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == list(names)
    assert [case.patient for case in cases] == list(names)
    assert cases[0].image == tmp_path / "TrainingImg" / "train_000_0000.nii.gz"
    assert cases[0].labels == tmp_path / "TrainingMask" / "train_000.nii.gz"


def test_nnunets_layout(tmp_path: Path) -> None:
    lay_out(tmp_path, "imagesTr", "labelsTr", ("liver_7_0000.nii.gz", "liver_7.nii.gz"))
    assert [case.name for case in find_cases(tmp_path)] == ["liver_7"]


def test_cases_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    # "ab.nii.gz" sorts before "a_0000.nii.gz"'s name "a" as a file, but not as a case.
    lay_out(tmp_path, "images", "labels", ("a_0000.nii.gz", "a.nii.gz"), ("a-b.nii.gz", "a-b.nii.gz"))
    assert [case.name for case in find_cases(tmp_path)] == ["a", "a-b"]


def test_other_files_are_no_cases(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", ("a.nii.gz", "a.nii.gz"))
    (tmp_path / "images" / "README.txt").touch()
    (tmp_path / "labels" / "spare.nii.gz").touch()
    assert [case.name for case in find_cases(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("hcc002pv", "hcc002"),
        ("hcc002art", "hcc002"),
        ("hcc005nc", "hcc005"),
        ("hcc005later", "hcc005"),
        ("hcc007earlier", "hcc007"),
        ("crlm1006", "crlm1006"),
        ("train_000", "train_000"),
        ("hccpv", "hccpv"),
    ],
)
def test_volumes_of_one_patient_are_told_by_their_names(name: str, patient: str) -> None:
    assert patient_of(name) == patient


def test_a_table_of_patients_goes_before_the_names(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", *((f"{n}.nii.gz", f"{n}.nii.gz") for n in ("x1", "x2", "hcc002pv")))
    (tmp_path / "patients.csv").write_text("name,patient\nx1,smith\nx2,smith\n")
    assert [case.patient for case in find_cases(tmp_path)] == ["hcc002", "smith", "smith"]


def test_a_table_of_patients_without_its_columns_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", ("a.nii.gz", "a.nii.gz"))
    (tmp_path / "patients.csv").write_text("case;subject\na;b\n")
    with pytest.raises(DataError, match=r"patients\.csv: needs the columns name and patient"):
        find_cases(tmp_path)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="TrainingImg/ with TrainingMask/") as caught:
        find_cases(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels")
    with pytest.raises(DataError, match=r"no \*\.nii\.gz"):
        find_cases(tmp_path)


def test_an_image_without_labels_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", ("a_0000.nii.gz", "b.nii.gz"))
    with pytest.raises(DataError, match=r"a_0000\.nii\.gz: there is no label file .*a\.nii\.gz"):
        find_cases(tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "images", "labels", ("a_0000.nii.gz", "a.nii.gz"), ("a.nii.gz", "a.nii.gz"))
    with pytest.raises(DataError, match="two images for one case"):
        find_cases(tmp_path)


def test_data_errors_are_shown_to_users_as_they_are() -> None:
    assert issubclass(DataError, FastorganError)


def test_a_fold_takes_every_nth_patient() -> None:
    patients = ["e", "a", "c", "b", "d", "a"]
    assert split_fold(patients, 0, 2) == {"a", "c", "e"}
    assert split_fold(patients, 1, 2) == {"b", "d"}


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1), st.integers(1, 8))
def test_folds_leave_out_each_patient_once(patients: list[str], folds: int) -> None:
    parts = [split_fold(patients, fold, folds) for fold in range(folds)]
    assert set().union(*parts) == set(patients)
    assert sum(len(part) for part in parts) == len(set(patients))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("fold", "folds"), [(2, 2), (-1, 3), (0, 0)])
def test_a_fold_that_is_not_there_is_refused(fold: int, folds: int) -> None:
    with pytest.raises(DataError, match=f"there is no fold {fold} of {folds}"):
        split_fold(["a", "b"], fold, folds)
