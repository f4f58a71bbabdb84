import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastorgan
from fastorgan import report
from fastorgan.errors import FastorganError
from fastorgan.labels import ORGANS
from fastorgan.monitor import MemoryPeak
from fastorgan.report import CaseRecord, Engine, OrganMeasure, RoiBox, RunReport, Status, measure

DOCUMENT = Path(__file__).parents[1] / "docs" / "report.md"

ENGINE = Engine("openvino", "2026.0.0", "cuda:1", "NVIDIA TITAN X", "bf16", 2)

DONE = CaseRecord(
    input="a_0000.nii.gz",
    status=Status.DONE,
    output="a.nii.gz",
    warnings=("kidney: not found",),
    device="NVIDIA TITAN X",
    shape=(30, 40, 50),
    spacing=(5.0, 0.7421875123, 0.75),
    roi=RoiBox((1, 0, 2), (29, 40, 50), "nothing found"),
    organs={"liver": OrganMeasure(1234.56789, True, 0.9123, ("on one side only",)), "kidney": OrganMeasure(0.0, False)},
    seconds={"read": 1.23456789, "organs": 0.00004},
    total_seconds=2.00006,
    memory=MemoryPeak(2048.06, 1700.04, 812.25, None),
)


def strict(text: str) -> Any:
    """Parse JSON and refuse what only Python takes for JSON."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def run_report(**facts: Any) -> RunReport:
    return RunReport(ENGINE, {"organs.xml": "ab" * 32}, {"device": "cuda:1"}, **facts)


# Measures


def test_volumes_and_borders() -> None:
    labels = np.zeros((6, 5, 7), np.uint8)
    labels[1:3, 1:3, 1:3] = 1  # 8 voxels inside
    labels[5, 2, 3] = labels[4, 2, 3] = labels[4, 3, 3] = 4  # 3 voxels, one on the last face of the first axis
    labels[0, 0, :3] = 255
    labels[0, 1, 0] = 9
    organs = measure(labels, (0.5, 2.0, 3.0))  # a voxel has 3 mm³
    assert list(organs) == ["liver", "kidney", "spleen", "pancreas"]
    assert [organ.volume_ml for organ in organs.values()] == pytest.approx([0.024, 0.0, 0.0, 0.009])
    assert [organ.touches_border for organ in organs.values()] == [False, False, False, True]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_each_face_is_a_border(axis: int, end: int) -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    place = [2, 2, 2]
    place[axis] = end
    labels[tuple(place)] = 3
    one_further_in = np.roll(labels, 1 if end == 0 else -1, axis)
    assert measure(labels, (1.0, 1.0, 1.0))["spleen"].touches_border
    assert not measure(one_further_in, (1.0, 1.0, 1.0))["spleen"].touches_border


def test_a_single_slice_is_all_border() -> None:
    labels = np.zeros((5, 6, 1), np.uint8)
    labels[2, 2, 0] = 2
    assert measure(labels, (1.0, 1.0, 1.0))["kidney"] == OrganMeasure(0.001, True)


def test_an_empty_array_has_no_organs() -> None:
    organs = measure(np.zeros((0, 4, 4), np.uint8), (1.0, 1.0, 1.0))
    assert set(organs.values()) == {OrganMeasure(0.0, False)}


@given(
    labels=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(0, 5)),
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_axis_order_and_layout_do_not_matter(
    labels: np.ndarray[Any, np.dtype[np.uint8]], order: list[int], flips: tuple[bool, bool, bool]
) -> None:
    spacing = (0.5, 0.75, 4.0)
    expected = {}
    for organ in ORGANS:
        where = np.argwhere(labels == organ.code)
        on_border = bool(((where == 0) | (where == np.array(labels.shape) - 1)).any())
        expected[organ.name] = OrganMeasure(len(where) * 1.5 / 1000, on_border)
    a, b, c = (spacing[axis] for axis in order)
    turned = labels.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    for layout in (turned, np.ascontiguousarray(turned), np.asfortranarray(turned)):
        measured = measure(layout, (a, b, c))
        assert {name: m.touches_border for name, m in measured.items()} == {
            name: m.touches_border for name, m in expected.items()
        }
        for name, organ_measure in measured.items():
            assert organ_measure.volume_ml == pytest.approx(expected[name].volume_ml)


def test_a_box_spares_reading_what_lies_outside() -> None:
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[1:3, 2:5, 0:2] = 1
    labels[4, 4, 3] = 3  # not in the box, so that it is seen whether that is read
    box = RoiBox((1, 2, 0), (3, 5, 2))
    assert measure(labels, (1.0, 1.0, 1.0), box)["liver"] == OrganMeasure(0.012, True)
    assert measure(labels, (1.0, 1.0, 1.0), box)["spleen"].volume_ml == 0.0
    turned = measure(labels[::-1], (1.0, 1.0, 1.0), RoiBox((3, 2, 0), (5, 5, 2)))
    assert turned["liver"] == OrganMeasure(0.012, True)


@pytest.mark.parametrize("layout", ["C", "F"])
def test_measuring_does_not_copy_the_volume(layout: Any) -> None:
    labels = np.ones((160, 160, 160), np.uint8, order=layout)
    tracemalloc.start()
    try:
        organs = measure(labels[::-1], (1.0, 1.0, 1.0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert organs["liver"] == OrganMeasure(4096.0, True)
    # A face turns into indices of 8 bytes; np.bincount of the whole would take eight times it.
    assert peak < labels.nbytes / 4


@pytest.mark.parametrize(
    ("labels", "spacing"),
    [
        (np.zeros((4, 4), np.uint8), (1.0, 1.0, 1.0)),
        (np.zeros((4, 4, 4), np.int16), (1.0, 1.0, 1.0)),
        (np.zeros((4, 4, 4), np.uint8), (1.0, 0.0, 1.0)),
        (np.zeros((4, 4, 4), np.uint8), (1.0, -1.0, 1.0)),
        (np.zeros((4, 4, 4), np.uint8), (1.0, math.nan, 1.0)),
        (np.zeros((4, 4, 4), np.uint8), (1.0, 1.0)),
    ],
)
def test_what_cannot_be_measured(labels: Any, spacing: Any) -> None:
    with pytest.raises(ValueError, match="must be three"):
        measure(labels, spacing)


# Records


def test_a_case_that_is_done() -> None:
    assert DONE.to_dict() == {
        "input": "a_0000.nii.gz",
        "output": "a.nii.gz",
        "status": "done",
        "error": None,
        "warnings": ["kidney: not found"],
        "shape": [30, 40, 50],
        "spacing_mm": [5.0, 0.742188, 0.75],
        "roi": {"start": [1, 0, 2], "stop": [29, 40, 50], "fallback": "nothing found"},
        "organs": {
            "liver": {
                "volume_ml": 1234.57,
                "touches_border": True,
                "confidence": 0.912,
                "doubts": ["on one side only"],
            },
            "kidney": {"volume_ml": 0.0, "touches_border": False, "confidence": None, "doubts": []},
        },
        "statistics": None,
        "seconds": {"read": 1.2346, "organs": 0.0},
        "total_seconds": 2.0001,
        "device": "NVIDIA TITAN X",
        "memory": {
            "gpu_peak_mib": 2048.1,
            "gpu_process_peak_mib": 1700.0,
            "gpu_note": None,
            "rss_peak_mib": 812.2,
        },
    }


def test_a_case_that_failed_has_the_same_keys() -> None:
    record = CaseRecord("b.nii.gz", Status.FAILED, error="b.nii.gz: no such file").to_dict()
    assert list(record) == list(DONE.to_dict())
    assert (record["status"], record["error"]) == ("failed", "b.nii.gz: no such file")
    unknown = ("output", "shape", "spacing_mm", "roi", "organs", "total_seconds", "device")
    assert {record[key] for key in unknown} == {None}
    assert (record["warnings"], record["seconds"]) == ([], {})
    assert record["memory"] == {
        "gpu_peak_mib": None,
        "gpu_process_peak_mib": None,
        "gpu_note": "not measured",
        "rss_peak_mib": None,
    }


def test_the_run() -> None:
    started = datetime(2026, 3, 1, 10, 30, 0, 987654, tzinfo=timezone(timedelta(hours=1)))
    failed = CaseRecord("b.nii.gz", Status.FAILED, error="b.nii.gz: no such file")
    run = run_report(started=started, cases=[DONE, failed, failed], total_seconds=3.00001, gpu_at_start_mib=301.26)
    facts = run.to_dict()
    assert facts["schema_version"] == 1
    assert "not a medical device" in facts["notice"]
    assert facts["fastorgan"] == fastorgan.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["platform"]
    assert facts["engine"] == {
        "name": "openvino",
        "version": "2026.0.0",
        "device": "cuda:1",
        "device_name": "NVIDIA TITAN X",
        "precision": "bf16",
        "threads": 2,
    }
    assert facts["weights_sha256"] == {"organs.xml": "ab" * 32}
    assert facts["started"] == "2026-03-01T09:30:00Z"
    assert facts["total_seconds"] == 3.0
    assert facts["memory"]["gpu_at_start_mib"] == 301.3
    assert facts["counts"] == {"done": 1, "failed": 2, "skipped": 0}
    assert [case["input"] for case in facts["cases"]] == ["a_0000.nii.gz", "b.nii.gz", "b.nii.gz"]


def test_a_run_starts_now_and_has_no_total_until_it_ends() -> None:
    run = run_report()
    assert abs(datetime.now(UTC) - run.started) < timedelta(minutes=1)
    assert run.to_dict()["total_seconds"] is None
    with pytest.raises(ValueError, match="time zone"):
        run_report(started=datetime(2026, 3, 1)).to_dict()


# Writing


def test_the_file_is_strict_json_with_the_same_contents(tmp_path: Path) -> None:
    run = run_report(cases=[DONE], total_seconds=1.0)
    path = tmp_path / "run.json"
    run.write(path)
    text = path.read_text(encoding="ascii")
    assert text.endswith("}\n")
    assert strict(text) == run.to_dict()
    assert list(strict(text)) == list(run.to_dict())


def test_what_json_lacks(tmp_path: Path) -> None:
    case = CaseRecord(
        input=os.fsdecode(b"bj\xf6rn.nii.gz"),  # a file name that is no UTF-8
        status=Status.DONE,
        shape=tuple(np.array([3, 4, 5])),
        spacing=(np.float32(0.5), math.nan, 1.0),  # type: ignore[arg-type]
        seconds={"read": math.inf, "roi": np.float64(0.25)},
    )
    options = {
        "inputs": Path("in") / "x",
        "devices": ("cpu", 1),
        "threshold": math.nan,
        "flag": np.bool_(True),
        "status": Status.DONE,
        "nested": {1: None},
    }
    run = RunReport(ENGINE, {}, options, cases=[case])
    run.write(tmp_path / "run.json")
    facts = strict((tmp_path / "run.json").read_text(encoding="ascii"))
    assert facts["options"] == {
        "inputs": str(Path("in") / "x"),
        "devices": ["cpu", 1],
        "threshold": None,
        "flag": True,
        "status": "done",
        "nested": {"1": None},
    }
    (record,) = facts["cases"]
    assert os.fsencode(record["input"]) == b"bj\xf6rn.nii.gz"
    assert record["shape"] == [3, 4, 5]
    assert record["spacing_mm"] == [0.5, None, 1.0]
    assert record["seconds"] == {"read": None, "roi": 0.25}


def test_a_report_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run = run_report()
    run.write(path)
    run.cases.append(DONE)
    run.write(path)
    assert len(strict(path.read_text())["cases"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_old_report_stays_until_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    beside: list[Path] = []

    def full(handle: int) -> None:
        beside.extend(file for file in tmp_path.iterdir() if file != path)
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastorganError) as caught:
        run_report().write(path)
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    assert len(beside) == 1
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_rename_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def refuse(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(FastorganError, match="Permission denied"):
        run_report().write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none" / "run.json"
    with pytest.raises(FastorganError, match=re.escape(f"{path}: cannot be written (No such file or directory)")):
        run_report().write(path)


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(FastorganError, match="not a regular file"):
            run_report().write(path)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_others_may_read_the_report_where_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run_report().write(tmp_path / "run.json")
    finally:
        os.umask(before)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o640


# The document


def keys(value: Any, prefix: str = "") -> list[str]:
    """Every key of a JSON value with its path, in order; an array's are those of its items."""
    if isinstance(value, list):
        return [key for item in value for key in keys(item, prefix)]
    if not isinstance(value, dict):
        return []
    return [key for name, item in value.items() for key in (f"{prefix}{name}", *keys(item, f"{prefix}{name}."))]


def example() -> Any:
    (block,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return strict(block)


def test_the_example_has_the_keys_of_a_report_in_their_order() -> None:
    shown = example()
    case = shown["cases"][0]
    organs = measure(np.zeros((2, 2, 2), np.uint8), (1.0, 1.0, 1.0))
    record = CaseRecord(
        "a.nii.gz",
        Status.DONE,
        roi=RoiBox((0, 0, 0), (2, 2, 2)),
        organs=organs,
        seconds=dict.fromkeys(case["seconds"], 0.0),
    )
    run = RunReport(ENGINE, shown["weights_sha256"], shown["options"], cases=[record])
    assert keys(shown) == keys(run.to_dict())
    assert shown["notice"] == report.NOTICE
    assert shown["schema_version"] == report.SCHEMA_VERSION


def test_every_key_is_explained() -> None:
    rows = re.findall(r"^\| (.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    shown = example()
    free = ("weights_sha256.", "options.", "counts.", "cases.seconds.")
    names = {key.removeprefix("cases.") for key in keys(shown) if not key.startswith(free)}
    names = {re.sub(r"^(engine|memory)\.", "", name) for name in names}
    names = {re.sub(r"^organs\.\w+\.", "organs.*.", name) for name in names if not re.fullmatch(r"organs\.\w+", name)}
    assert names == explained


def test_importing_loads_no_engine_and_no_nvml() -> None:
    code = "import sys, fastorgan.report; print(sorted({'torch', 'openvino', 'pynvml', 'scipy'} & set(sys.modules)))"
    app = str(Path(fastorgan.__file__).parents[1])
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=os.environ | {"PYTHONPATH": app}, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
