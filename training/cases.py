"""Find the training cases in a data folder, and tell which belong to one patient."""

import csv
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fastorgan.errors import FastorganError

LAYOUTS = (("images", "labels"), ("TrainingImg", "TrainingMask"), ("imagesTr", "labelsTr"))
"""Folder names of images and labels: this project's, FLARE21's own, nnU-Net's."""

# HCC-TACE-Seg volumes of one patient differ by phase or date, which their names end in.
_PHASE = re.compile(r"^(hcc\d+)(pv|art|nc|later|earlier)$")


class DataError(FastorganError):
    """A data folder does not hold what training needs."""


@dataclass(frozen=True)
class Case:
    """One labelled volume: its name, its patient, and its files.

    Attributes:
        structures: labels of further organs, by FLARE22's codes; None where there are none.
    """

    name: str
    patient: str
    image: Path
    labels: Path
    structures: Path | None = None


def find_cases(data: Path) -> list[Case]:
    """List the cases of a data folder in the order of their names.

    Images are NAME_0000.nii.gz or NAME.nii.gz, labels NAME.nii.gz, in any of `LAYOUTS`. A file patients.csv with the
    columns name,patient may group volumes by patient, and structures/NAME.nii.gz may label further organs.

    Raises:
        DataError: if the folder has no known layout or no case, an image has no label, two images share a name, or
            patients.csv lacks a column.
    """
    for images, labels in LAYOUTS:
        if (data / images).is_dir() and (data / labels).is_dir():
            break
    else:
        known = ", ".join(f"{a}/ with {b}/" for a, b in LAYOUTS)
        raise DataError(f"{data}: no training data here; expected {known}")
    patients = _patients(data / "patients.csv")
    cases = []
    for image in sorted((data / images).glob("*.nii.gz")):
        name = image.name.removesuffix(".nii.gz").removesuffix("_0000")
        label = data / labels / f"{name}.nii.gz"
        if not label.is_file():
            raise DataError(f"{image}: there is no label file {label}")
        structures = data / "structures" / f"{name}.nii.gz"
        patient = patients.get(name, patient_of(name))
        cases.append(Case(name, patient, image, label, structures if structures.is_file() else None))
    cases.sort(key=lambda case: case.name)
    for first, second in pairwise(cases):
        if first.name == second.name:
            raise DataError(f"{first.image} and {second.image}: two images for one case")
    if not cases:
        raise DataError(f"{data / images}: no *.nii.gz files")
    return cases


def patient_of(name: str) -> str:
    """The patient that a case name stands for: `hcc002pv` and `hcc002art` are `hcc002`, other names their own."""
    match = _PHASE.match(name)
    return match.group(1) if match else name


def split_fold(patients: list[str], fold: int, folds: int) -> set[str]:
    """Patients that fold `fold` of `folds` leaves out: every `folds`-th of the sorted names.

    Raises:
        DataError: if there is no such fold.
    """
    if not 0 <= fold < folds:
        raise DataError(f"there is no fold {fold} of {folds}; folds count from 0")
    return set(sorted(set(patients))[fold::folds])


def _patients(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        if not {"name", "patient"} <= set(rows.fieldnames or ()):
            raise DataError(f"{path}: needs the columns name and patient in its first line")
        return {row["name"]: row["patient"] for row in rows}
