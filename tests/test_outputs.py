"""What is written beside the labels, by the whole batch."""

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.cascade import Cascade
from fastorgan.errors import FastorganError
from fastorgan.label_tables import ITK_SNAP_NAME, SLICER_NAME
from fastorgan.outputs import Outputs
from fastorgan.predict import Settings, plan_jobs, run_batch
from fastorgan.report import RunReport


def run(inputs: Path, outputs: Outputs, target: str = "out") -> RunReport:
    # One job: which case comes first is then no matter of chance.
    return run_batch(plan_jobs([inputs], inputs.parent / target), Settings(device="cpu", jobs=1, outputs=outputs))


def array(path: Path) -> NDArray[np.uint8]:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj)


def test_split_writes_masks_that_make_up_the_labels(inputs: Path) -> None:
    report = run(inputs, Outputs(split=True))
    folder = inputs.parent / "out" / "ct"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.nii.gz" for name in ("kidney", "liver", "pancreas", "spleen")
    ]
    labels = array(folder.with_name("ct.nii.gz"))
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
    for code, name in enumerate(("liver", "kidney", "spleen", "pancreas"), 1):
        mask: Any = nib.load(folder / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(mask.dataobj), labels == code)
        assert np.array_equal(mask.affine, np.diag([5.0, 5.0, 5.0, 1.0]))
        assert f">{name}<".encode() in mask.header.extensions[0].get_content()
    assert list(report.cases[0].seconds)[-1] == "split"


def test_split_follows_the_label_files_suffix(inputs: Path) -> None:
    run_batch(
        plan_jobs([inputs / "ct_0000.nii.gz"], inputs.parent / "labels.nii"),
        Settings(device="cpu", outputs=Outputs(split=True)),
    )
    assert (inputs.parent / "labels" / "liver.nii").is_file()


def test_a_folder_that_cannot_be_made_is_a_warning(inputs: Path) -> None:
    (inputs.parent / "out").mkdir()
    (inputs.parent / "out" / "ct").touch()
    (case,) = run(inputs, Outputs(split=True)).cases
    assert case.status == "done"
    assert len(case.warnings) == 1
    assert "no file per organ" in case.warnings[0]


def test_the_statistics_agree_with_the_report(inputs: Path) -> None:
    path = inputs.parent / "out" / "organs.csv"
    report = run(inputs, Outputs(statistics=path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["ct"] * 4
    organs = report.cases[0].organs
    assert organs is not None
    assert [float(row["volume_ml"]) for row in rows] == [round(organ.volume_ml, 2) for organ in organs.values()]
    assert 45 < float(rows[0]["mean_hu"]) < 55
    shown = report.cases[0].to_dict()["statistics"]
    assert shown["liver"]["mean_hu"] == float(rows[0]["mean_hu"])


def test_without_a_wish_nothing_more_is_written_or_measured(inputs: Path) -> None:
    (case,) = run(inputs, Outputs()).cases
    assert case.statistics is None
    assert list(case.seconds) == ["read", "wait", "roi", "organs", "restore", "check", "write"]
    assert [path.name for path in (inputs.parent / "out").iterdir()] == ["ct.nii.gz"]


def test_label_tables_lie_in_the_folder_of_the_labels(inputs: Path) -> None:
    run(inputs, Outputs(label_tables=True))
    assert {SLICER_NAME, ITK_SNAP_NAME} < {path.name for path in (inputs.parent / "out").iterdir()}


def test_a_table_that_cannot_be_written_is_said_before_the_first_case(inputs: Path) -> None:
    with pytest.raises(FastorganError, match=r"none/organs.csv: cannot be written"):
        run(inputs, Outputs(statistics=inputs.parent / "none" / "organs.csv"))
    assert list((inputs.parent / "out").iterdir()) == []


def test_an_interrupted_run_leaves_the_table_of_what_is_done(
    inputs: Path, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inputs / "later.nii.gz").write_bytes((inputs / "ct_0000.nii.gz").read_bytes())
    find_organs, calls = by_hu.find_organs, []

    def interrupted(volume: Any) -> Any:
        calls.append(volume)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find_organs(volume)

    monkeypatch.setattr(by_hu, "find_organs", interrupted)
    path = inputs.parent / "organs.csv"
    with pytest.raises(KeyboardInterrupt):
        run(inputs, Outputs(statistics=path))
    assert len(path.read_text().splitlines()) == 1 + 4


def test_a_resumed_run_keeps_the_rows_of_what_is_done(inputs: Path) -> None:
    path = inputs.parent / "organs.csv"
    run(inputs, Outputs(statistics=path))
    (inputs / "later.nii.gz").write_bytes((inputs / "ct_0000.nii.gz").read_bytes())
    jobs = plan_jobs([inputs], inputs.parent / "out")
    report = run_batch(jobs, Settings(device="cpu", resume=True, outputs=Outputs(statistics=path, resume=True)))
    assert [case.status for case in report.cases] == ["skipped", "done"]
    with path.open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["ct"] * 4 + ["later"] * 4
