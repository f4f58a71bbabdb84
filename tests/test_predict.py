import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan import predict, volume
from fastorgan.box import Box
from fastorgan.cascade import Cascade, Segmentation
from fastorgan.errors import DeviceError, FastorganError, VolumeError, WeightsError
from fastorgan.labels import ORGANS
from fastorgan.outputs import Outputs
from fastorgan.plausibility import Evidence
from fastorgan.predict import Job, Settings, case_name, judged, plan_jobs, run_batch, warnings_for
from fastorgan.report import CaseRecord, Engine, OrganMeasure, RunReport, Status
from fastorgan.roi import Roi
from fastorgan.volume import Volume

Blocks = tuple[nib.Nifti1Image, NDArray[np.uint8]]


@dataclass
class Folders:
    """A folder of inputs and one for outputs, and a CT to put into the first."""

    inputs: Path
    outputs: Path
    image: nib.Nifti1Image
    cascade: Cascade

    def put(self, *names: str) -> list[Path]:
        """Write the CT under each name."""
        for name in names:
            nib.save(self.image, self.inputs / name)
        return [self.inputs / name for name in names]

    def run(self, inputs: list[Path] | None = None, output: Path | None = None, **settings: Any) -> RunReport:
        jobs = plan_jobs(inputs or [self.inputs], output or self.outputs)
        return run_batch(jobs, Settings(device="cpu", **settings))

    def written(self) -> list[str]:
        return sorted(path.name for path in self.outputs.iterdir())

    def is_whole(self, path: Path) -> bool:
        """Whether a label file holds what the cascade finds in the CT."""
        labels: Any = nib.load(path)
        return np.array_equal(np.asarray(labels.dataobj), np.asarray(self.cascade.segment(self.image).dataobj))


@pytest.fixture
def folders(tmp_path: Path, blocks: Blocks, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """Folders, and `predict` with the cascade that knows the CT's organs."""
    (tmp_path / "in").mkdir()

    def load(device: str, **options: object) -> Cascade:
        assert device == "cpu"
        return by_hu

    monkeypatch.setattr(Cascade, "load", load)
    return Folders(tmp_path / "in", tmp_path / "out", blocks[0], by_hu)


# Names


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("X_0000.nii.gz", "X"),
        ("X_0000.nii", "X"),
        ("X.nii.gz", "X"),
        ("X.nii", "X"),
        ("X_0001.nii.gz", "X_0001"),
        ("X_0000_0000.nii.gz", "X_0000"),
        ("X.1_0000.nii.gz", "X.1"),
        ("a b.nii.gz", "a b"),
        ("Bauch-Größe 腹部.nii.gz", "Bauch-Größe 腹部"),
        ("-x_0000.nii", "-x"),
        ("_0000.nii.gz", "_0000"),
        ("X.nii.nii.gz", "X.nii"),
        ("X.mha", "X"),
        ("X_0000.nrrd", "X"),
        ("X.hdr", "X"),
        ("X.txt", "X.txt"),
    ],
)
def test_cases_are_named_without_suffix_and_channel(name: str, case: str) -> None:
    assert case_name(Path("folder.nii") / name) == case


# Plans


def targets(jobs: list[Job]) -> list[tuple[str, str]]:
    return [(job.source.name, job.target.name) for job in jobs]


def test_a_folder_is_taken_in_the_order_of_names(folders: Folders) -> None:
    folders.put("c_0000.nii.gz", "a.nii", "b.nii.gz", "B10.nii.gz")
    for name in (".hidden.nii.gz", "notes.txt", "d.nii.gz.part", "e.img", "f.mhd"):
        (folders.inputs / name).touch()
    (folders.inputs / "sub").mkdir()
    jobs = plan_jobs([folders.inputs], folders.outputs)
    assert targets(jobs) == [
        ("B10.nii.gz", "B10.nii.gz"),
        ("a.nii", "a.nii.gz"),
        ("b.nii.gz", "b.nii.gz"),
        ("c_0000.nii.gz", "c.nii.gz"),
    ]
    assert {job.target.parent for job in jobs} == {folders.outputs}
    assert all(job.obstacle is None for job in jobs)
    assert not folders.outputs.exists()


def test_files_and_folders_may_be_mixed(folders: Folders, tmp_path: Path) -> None:
    folders.put("a.nii")
    jobs = plan_jobs([tmp_path / "z.nii.gz", folders.inputs], folders.outputs)
    assert targets(jobs) == [("z.nii.gz", "z.nii.gz"), ("a.nii", "a.nii.gz")]


def test_a_single_file_may_go_to_a_file(tmp_path: Path) -> None:
    source = tmp_path / "ct.nii.gz"
    for name in ("labels.nii.gz", "labels.nii"):
        assert plan_jobs([source], tmp_path / name) == [Job(source, tmp_path / name)]
    # A folder is one whatever its name.
    (tmp_path / "folder.nii.gz").mkdir()
    assert plan_jobs([source], tmp_path / "folder.nii.gz") == [Job(source, tmp_path / "folder.nii.gz" / "ct.nii.gz")]
    assert plan_jobs([source], tmp_path / "labels") == [Job(source, tmp_path / "labels" / "ct.nii.gz")]


def test_a_folder_of_one_file_goes_to_a_folder(folders: Folders, tmp_path: Path) -> None:
    folders.put("a.nii")
    assert plan_jobs([folders.inputs], tmp_path / "x.nii.gz")[0].target == tmp_path / "x.nii.gz" / "a.nii.gz"


def test_two_cases_of_one_name_are_not_mixed_up(folders: Folders) -> None:
    first, second, third = folders.put("X.nii", "X.nii.gz", "X_0000.nii.gz")
    jobs = plan_jobs([folders.inputs], folders.outputs)
    assert [job.source for job in jobs] == [first, second, third]
    assert jobs[0].obstacle is None
    for job in jobs[1:]:
        assert job.obstacle == f"its labels would overwrite those of {first}; give the two different names"


def test_no_input_is_overwritten(folders: Folders, tmp_path: Path) -> None:
    plain, channel = folders.put("a.nii.gz", "b_0000.nii.gz")
    for output in (folders.inputs, folders.inputs / ".." / "in"):
        jobs = plan_jobs([folders.inputs], output)
        assert jobs[0].obstacle == f"its labels would overwrite the input {plain}; choose another output folder"
        assert jobs[1].obstacle is None
        assert jobs[1].target.resolve() == folders.inputs / "b.nii.gz"
    assert plan_jobs([plain], plain)[0].obstacle is not None
    # By way of a link, too.
    (tmp_path / "linked").symlink_to(folders.inputs)
    assert plan_jobs([plain], tmp_path / "linked")[0].obstacle is not None
    (tmp_path / "labels.nii.gz").symlink_to(channel)
    assert plan_jobs([channel], tmp_path / "labels.nii.gz")[0].obstacle is not None


def test_an_empty_folder_is_refused(folders: Folders) -> None:
    (folders.inputs / "notes.txt").touch()
    with pytest.raises(VolumeError, match=r"in: holds no CT volume \(\.nii\.gz, .*\)\Z"):
        plan_jobs([folders.inputs], folders.outputs)


def test_a_folder_that_cannot_be_listed_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def iterdir(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(VolumeError, match=r"in: cannot be read \(Permission denied\)\Z"):
        plan_jobs([folders.inputs], folders.outputs)


def test_a_link_to_itself_and_a_name_too_long_stop_nobody(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    (folders.inputs / "loop.nii.gz").symlink_to("loop.nii.gz")
    good, *_ = folders.put("z.nii.gz")
    long = folders.inputs / ("x" * 300 + ".nii.gz")
    report = folders.run([long, folders.inputs])
    assert [case.status for case in report.cases] == [Status.FAILED, Status.FAILED, Status.DONE]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"fastorgan: {long}: ")
    assert errors[1] == f"fastorgan: {folders.inputs / 'loop.nii.gz'}: no such file"
    assert report.cases[2].input == str(good)


# Batches


def test_every_case_gets_its_labels_and_its_line(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folders.put("a_0000.nii.gz", "b.nii")
    report = folders.run()
    assert folders.written() == ["a.nii.gz", "b.nii.gz"]
    assert all(folders.is_whole(path) for path in folders.outputs.iterdir())
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        target = folders.outputs / f"{'ab'[number - 1]}.nii.gz"
        assert line.startswith(f"[{number}/2] {target}: liver ")
        assert line.endswith(" s")
        assert [f"{organ.name} " in line for organ in ORGANS] == [True] * 4
    # 18 x 22 x 18 voxels of 0.125 ml.
    organs = report.cases[0].organs
    assert organs is not None
    assert organs["liver"].volume_ml == pytest.approx(891, rel=0.02)
    assert f"liver {organs['liver'].volume_ml:.0f} ml" in lines[0]


def zero_spacing(path: Path) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 84, 0.0)
    path.write_bytes(content)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 4
    path.write_bytes(content)


def spoil(folders: Folders) -> list[str]:
    """Put a bad file of each kind among the inputs, and return their names."""
    folder = folders.inputs
    volume = np.zeros((4, 5, 6), np.float32)

    def save(name: str, array: NDArray[Any]) -> None:
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name)

    folders.put("cut.nii.gz", "cut2.nii", "bit.nii.gz", "spacing.nii")
    os.truncate(folder / "cut.nii.gz", (folder / "cut.nii.gz").stat().st_size // 2)
    os.truncate(folder / "cut2.nii", 1000)
    flip_a_bit(folder / "bit.nii.gz")
    zero_spacing(folder / "spacing.nii")
    (folder / "empty.nii.gz").touch()
    (folder / "text.nii.gz").write_text("patient,age\n" * 99, encoding="ascii")
    (folder / "packed text.nii.gz").write_bytes(gzip.compress(b"patient,age\n" * 99))
    (folder / "folder.nii.gz").mkdir()
    (folder / "dangling.nii.gz").symlink_to("nowhere")
    save("flat.nii.gz", volume[0])
    save("four.nii.gz", np.stack([volume] * 4, axis=-1))
    save("nan.nii.gz", volume * np.nan)
    return [p.name for p in sorted(folder.iterdir())]


def test_bad_files_do_not_stop_good_ones(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    bad = spoil(folders)
    assert len(bad) == 12
    folders.put("00 first.nii.gz", "größe 腹部_0000.nii.gz", "zz last.nii")
    report = folders.run()
    status = {Path(case.input).name: case.status for case in report.cases}
    assert [name for name, ended in status.items() if ended is Status.FAILED] == bad
    assert [name for name, ended in status.items() if ended is Status.DONE] == [
        "00 first.nii.gz",
        "größe 腹部_0000.nii.gz",
        "zz last.nii",
    ]
    assert folders.written() == ["00 first.nii.gz", "größe 腹部.nii.gz", "zz last.nii.gz"]
    assert all(folders.is_whole(path) for path in folders.outputs.iterdir())
    said = capsys.readouterr()
    errors = said.err.splitlines()
    assert len(errors) == len(bad)
    for name, line in zip(bad, errors, strict=True):
        assert line.startswith(f"fastorgan: {folders.inputs / name}: ")
        assert "unexpectedly" not in line
    assert len(said.out.splitlines()) == 3


def test_every_file_bad_is_a_report_of_failures(folders: Folders) -> None:
    spoil(folders)
    report = folders.run()
    assert {case.status for case in report.cases} == {Status.FAILED}
    assert folders.written() == []


def test_names_with_spaces_and_dashes(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    sources = folders.put("-x.nii.gz", "--debug.nii", "a b.nii.gz", "腹部_0000.nii.gz", "$(rm).nii.gz", "100%.nii")
    report = folders.run(sources, report=folders.outputs / "run.json")
    assert {case.status for case in report.cases} == {Status.DONE}
    expected = ["$(rm)", "--debug", "-x", "100%", "a b", "腹部"]
    assert folders.written() == sorted([f"{name}.nii.gz" for name in expected] + ["run.json"])
    assert len(capsys.readouterr().out.splitlines()) == 6
    cases = json.loads((folders.outputs / "run.json").read_text(encoding="utf-8"))["cases"]
    assert [case["input"] for case in cases] == [str(source) for source in sources]


def test_an_obstacle_is_said_and_the_rest_done(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folders.put("X.nii", "X_0000.nii.gz")
    report = folders.run()
    assert [case.status for case in report.cases] == [Status.DONE, Status.FAILED]
    line = f"fastorgan: {second}: its labels would overwrite those of {first}; give the two different names\n"
    assert capsys.readouterr().err == line
    assert folders.written() == ["X.nii.gz"]


def test_outputs_in_the_folder_of_inputs_leave_the_inputs_whole(folders: Folders) -> None:
    sources = folders.put("a.nii.gz", "b_0000.nii.gz")
    before = [path.read_bytes() for path in sources]
    for statuses in ([Status.FAILED, Status.DONE], [Status.FAILED] * 3):
        report = folders.run(output=folders.inputs)
        assert [case.status for case in report.cases] == statuses
        assert [path.read_bytes() for path in sources] == before
    assert folders.is_whole(folders.inputs / "b.nii.gz")


def test_one_file_to_one_file(folders: Folders) -> None:
    (source,) = folders.put("ct.nii.gz")
    folders.run([source], folders.outputs / "deep" / "labels.nii")
    assert folders.is_whole(folders.outputs / "deep" / "labels.nii")


def test_a_file_that_is_not_there_is_one_failure(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    (good,) = folders.put("ct.nii.gz")
    missing = folders.inputs / "none.nii.gz"
    report = folders.run([missing, good])
    assert [case.status for case in report.cases] == [Status.FAILED, Status.DONE]
    assert capsys.readouterr().err == f"fastorgan: {missing}: no such file\n"


def test_a_target_that_cannot_be_written_is_one_failure(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folders.put("a.nii.gz", "b.nii.gz")
    (folders.outputs / "a.nii.gz").mkdir(parents=True)
    report = folders.run()
    assert [case.status for case in report.cases] == [Status.FAILED, Status.DONE]
    assert capsys.readouterr().err.startswith(f"fastorgan: {folders.outputs / 'a.nii.gz'}: cannot be written (")
    assert folders.written() == ["a.nii.gz", "b.nii.gz"]


def test_an_unforeseen_error_is_one_failure_unless_debugging(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, _ = folders.put("a.nii.gz", "b.nii.gz")
    find = by_hu.find_organs
    calls: list[int] = []

    def find_organs(volume: Volume) -> Segmentation:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("two\nlines")
        return find(volume)

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    report = folders.run(jobs=1)
    assert [case.status for case in report.cases] == [Status.FAILED, Status.DONE]
    line = f"fastorgan: {bad}: failed unexpectedly (RuntimeError: two lines); --debug shows where\n"
    assert capsys.readouterr().err == line
    calls.clear()
    with pytest.raises(RuntimeError, match="two"):
        folders.run(jobs=1, debug=True)


def test_memory_that_runs_out_costs_one_case(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, _ = folders.put("a.nii.gz", "b.nii.gz")
    find, calls = by_hu.find_organs, list[int]()

    def find_organs(volume: Volume) -> Segmentation:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return find(volume)

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    report = folders.run(jobs=1)
    assert [case.status for case in report.cases] == [Status.FAILED, Status.DONE]
    line = f"fastorgan: {bad}: does not fit into this machine's memory; --jobs 1 needs the least\n"
    assert capsys.readouterr().err == line


def test_an_interrupt_ends_the_batch_and_keeps_the_report(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade
) -> None:
    folders.put("a.nii.gz", "b.nii.gz", "c.nii.gz")
    find = by_hu.find_organs
    calls: list[int] = []

    def find_organs(volume: Volume) -> Segmentation:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find(volume)

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    with pytest.raises(KeyboardInterrupt):
        folders.run(jobs=1, report=folders.outputs / "run.json")
    assert folders.written() == ["a.nii.gz", "run.json"]
    report = json.loads((folders.outputs / "run.json").read_text(encoding="ascii"))
    # The third may be under way, and comes to its end.
    done = [case["input"] for case in report["cases"]]
    assert done[0] == str(folders.inputs / "a.nii.gz")
    assert {case["status"] for case in report["cases"]} == {"done"}
    assert sorted([f"{Path(name).name}" for name in done] + ["run.json"]) == folders.written()
    assert report["planned"] == 3
    assert report["total_seconds"] is None


def test_a_preview_lies_beside_its_labels(folders: Folders) -> None:
    folders.put("a_0000.nii.gz")
    report = folders.run(outputs=Outputs(preview=True))
    assert folders.written() == ["a.nii.gz", "a.png"]
    assert (folders.outputs / "a.png").read_bytes().startswith(b"\x89PNG")
    assert list(report.cases[0].seconds) == ["read", "wait", "roi", "organs", "restore", "check", "write", "preview"]


def test_lines_stay_whole_beside_a_progress_bar(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.put("a.nii.gz", "b.nii.gz")
    (folders.inputs / "c.nii.gz").touch()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    folders.run()
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        f"[{number}/3] {folders.outputs / name}" for number, name in ((1, "a.nii.gz"), (2, "b.nii.gz"))
    ]
    assert f"fastorgan: {folders.inputs / 'c.nii.gz'}: " in said.err


# Hostile names and places


def test_names_cannot_break_lines_or_steer_the_terminal(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folders.inputs / "a\n[2 of 2] forged: liver 1 ml\x1b[2J\u202e.nii.gz"
    bad.touch()
    good, *_ = folders.put("b\n\tx.nii.gz")
    report = folders.run(report=folders.outputs / "run.json")
    assert [case.status for case in report.cases] == [Status.FAILED, Status.DONE]
    said = capsys.readouterr()
    assert said.err == f"fastorgan: {folders.inputs}/a\\n[2 of 2] forged: liver 1 ml\\x1b[2J\\u202e.nii.gz: is empty\n"
    assert said.out.startswith(f"[2/2] {folders.outputs}/b\\n\\tx.nii.gz: liver ")
    assert said.out.count("\n") == 1
    assert (folders.outputs / "b\n\tx.nii.gz").exists()
    # The report has the names themselves, as JSON writes them.
    cases = json.loads((folders.outputs / "run.json").read_text(encoding="ascii"))["cases"]
    assert [case["input"] for case in cases] == [str(bad), str(good)]
    assert len(cases[0]["error"].splitlines()) == 1


def test_a_link_out_of_the_folder_is_read_but_never_written_through(folders: Folders, tmp_path: Path) -> None:
    (elsewhere,) = folders.put("elsewhere.nii.gz")
    elsewhere = elsewhere.rename(tmp_path / "elsewhere.nii.gz")
    before = elsewhere.read_bytes()
    (folders.inputs / "a.nii.gz").symlink_to(elsewhere)
    secret = tmp_path / "secret"
    secret.write_bytes(b"kept")
    folders.outputs.mkdir()
    (folders.outputs / "a.nii.gz").symlink_to(secret)
    (folders.outputs / "run.json").symlink_to(secret)
    report = folders.run(report=folders.outputs / "run.json")
    assert [case.status for case in report.cases] == [Status.DONE]
    assert secret.read_bytes() == b"kept"
    assert elsewhere.read_bytes() == before
    assert folders.is_whole(folders.outputs / "a.nii.gz")


def test_devices_and_pipes_are_no_volumes(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    # To open the pipe would wait for ever, to read the device never end.
    (folders.inputs / "a.nii").symlink_to("/dev/zero")
    os.mkfifo(folders.inputs / "b.nii.gz")
    report = folders.run()
    assert {case.status for case in report.cases} == {Status.FAILED}
    assert [line.endswith(": not a file") for line in capsys.readouterr().err.splitlines()] == [True] * 2


def test_an_input_that_vanishes_is_one_failure(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    gone, _ = folders.put("a.nii.gz", "b.nii.gz")
    jobs = plan_jobs([folders.inputs], folders.outputs)
    gone.unlink()
    report = run_batch(jobs, Settings(device="cpu"))
    assert [case.status for case in report.cases] == [Status.FAILED, Status.DONE]
    assert capsys.readouterr().err == f"fastorgan: {gone}: no such file\n"


def test_a_report_that_can_no_longer_be_written_costs_no_case(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.put("a.nii.gz", "b.nii.gz", "c.nii.gz")
    write, calls = RunReport.write, list[int]()

    def full_disk(self: RunReport, path: Path) -> None:
        calls.append(len(self.cases))
        if len(calls) > 1:
            raise FastorganError(f"{path}: cannot be written (No space left on device)")
        write(self, path)

    monkeypatch.setattr(RunReport, "write", full_disk)
    with pytest.raises(FastorganError, match="No space left"):
        folders.run(report=folders.outputs / "run.json")
    assert calls == [0, 1, 2, 3, 3]
    assert [folders.is_whole(folders.outputs / f"{case}.nii.gz") for case in "abc"] == [True] * 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of 64 KiB, or another one as the options say."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a disk")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_full_disk_is_one_line_a_case_and_leaves_nothing(
    folders: Folders, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders.put("a.nii.gz", "b.nii.gz")
    place = disk("size=64k")
    (place / "run.json").write_text("old")
    with pytest.raises(OSError), (place / "filler").open("wb") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(FastorganError, match=r"run\.json: cannot be written \(No space left on device\)"):
        folders.run(output=place, report=place / "run.json")
    capsys.readouterr()
    report = folders.run(output=place)
    assert [case.status for case in report.cases] == [Status.FAILED] * 2
    assert capsys.readouterr().err.splitlines() == [
        f"fastorgan: {place / name}: cannot be written (No space left on device)" for name in ("a.nii.gz", "b.nii.gz")
    ]
    assert sorted(path.name for path in place.iterdir()) == ["filler", "run.json"]
    assert (place / "run.json").read_text() == "old"


def test_a_read_only_disk_stops_the_batch_before_its_first_case(folders: Folders, disk: Callable[[str], Path]) -> None:
    folders.put("a.nii.gz")
    place = disk("ro")
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(place))}: cannot be written to; "):
        folders.run(output=place)
    with pytest.raises(VolumeError, match=r"new: cannot be made \(Read-only file system\)"):
        folders.run(output=place / "new")


class Deaf:
    """A stream whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise ValueError


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_nobody_listening_costs_no_case(folders: Folders, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    folders.put("a.nii.gz", "b.nii.gz")
    (folders.inputs / "c.nii.gz").touch()
    monkeypatch.setattr(sys, "stdout", Deaf(error))
    monkeypatch.setattr(sys, "stderr", Deaf(error))
    report = folders.run()
    assert [case.status for case in report.cases] == [Status.DONE, Status.DONE, Status.FAILED]


def test_max_voxels_is_kept(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = folders.put("a.nii.gz")
    voxels = int(np.prod(folders.image.shape))
    assert folders.run(max_voxels=voxels).cases[0].status is Status.DONE
    assert folders.run(max_voxels=voxels - 1).cases[0].status is Status.FAILED
    said = f"fastorgan: {source}: 60 x 50 x 40 voxels are more than {voxels - 1}; --max-voxels allows others\n"
    assert capsys.readouterr().err == said


# Resuming


def test_a_second_run_does_what_is_missing_and_no_more(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.put("a_0000.nii.gz", "b.nii", "c.nii.gz")
    (folders.inputs / "d.nii.gz").touch()
    folders.run()
    (folders.outputs / "b.nii.gz").unlink()
    before = {path: path.stat().st_mtime_ns for path in folders.outputs.iterdir()}
    find, calls = by_hu.find_organs, list[int]()

    def find_organs(volume: Volume) -> Segmentation:
        calls.append(1)
        return find(volume)

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    capsys.readouterr()
    report = folders.run(resume=True, report=folders.outputs / "run.json")
    assert [case.status for case in report.cases] == [Status.SKIPPED, Status.DONE, Status.SKIPPED, Status.FAILED]
    assert len(calls) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert folders.is_whole(folders.outputs / "b.nii.gz")
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"[1/4] {folders.outputs / 'a.nii.gz'}: skipped, its labels are there already"
    assert lines[1].startswith(f"[2/4] {folders.outputs / 'b.nii.gz'}: liver ")
    assert len(said.err.splitlines()) == 1
    facts = json.loads((folders.outputs / "run.json").read_text(encoding="ascii"))
    assert facts["planned"] == 4
    assert facts["counts"] == {"done": 1, "failed": 1, "skipped": 2}
    first = facts["cases"][0]
    assert first["output"] == str(folders.outputs / "a.nii.gz")
    assert first["error"] == f"{folders.inputs / 'a_0000.nii.gz'}: its labels are there already"
    assert first["organs"] is None


def spoil_labels(path: Path) -> None:
    path.write_bytes(b"no labels")


def shrink_labels(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4)), path)


def age_labels(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [spoil_labels, shrink_labels, age_labels, Path.unlink])
def test_labels_that_are_not_the_scans_are_made_anew(folders: Folders, change: Any) -> None:
    folders.put("a.nii.gz")
    folders.run()
    target = folders.outputs / "a.nii.gz"
    assert folders.run(resume=True).cases[0].status is Status.SKIPPED
    change(target)
    assert folders.run(resume=True).cases[0].status is Status.DONE
    assert folders.is_whole(target)


def test_a_picture_that_is_missing_is_made(folders: Folders) -> None:
    folders.put("a.nii.gz")
    folders.run()
    assert folders.run(resume=True, outputs=Outputs(preview=True)).cases[0].status is Status.DONE
    assert folders.run(resume=True, outputs=Outputs(preview=True)).cases[0].status is Status.SKIPPED


def test_without_resume_everything_is_done_again(folders: Folders) -> None:
    folders.put("a.nii.gz")
    for _ in range(2):
        assert folders.run().cases[0].status is Status.DONE


def test_an_obstacle_is_no_case_that_is_done(folders: Folders) -> None:
    folders.put("X.nii", "X_0000.nii.gz")
    folders.run()
    assert [case.status for case in folders.run(resume=True).cases] == [Status.SKIPPED, Status.FAILED]


def test_what_killed_runs_left_is_removed(folders: Folders) -> None:
    pytest.importorskip("fcntl")
    folders.put("a.nii.gz")
    folders.outputs.mkdir()
    (folders.outputs / ".fastorgan-0123456789abcdef.nii.gz").write_bytes(b"half")
    folders.run()
    assert folders.written() == ["a.nii.gz"]


# What stops a batch


def test_an_output_folder_that_cannot_be_made_stops_the_batch(folders: Folders) -> None:
    folders.put("a.nii.gz")
    folders.outputs.write_bytes(b"a file")
    with pytest.raises(VolumeError, match=r"out: cannot be made \(File exists\)\Z"):
        folders.run()
    assert folders.outputs.read_bytes() == b"a file"


def test_a_report_that_cannot_be_written_stops_the_batch_before_its_first_case(folders: Folders) -> None:
    folders.put("a.nii.gz")
    with pytest.raises(FastorganError, match=r"run\.json: cannot be written"):
        folders.run(report=folders.outputs / "none" / "run.json")
    assert folders.written() == []


@pytest.mark.parametrize("error", [DeviceError("no such device"), WeightsError("no weights")])
def test_what_the_cascade_lacks_stops_the_batch(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, error: FastorganError
) -> None:
    def load(*_: object, **__: object) -> Cascade:
        raise error

    monkeypatch.setattr(Cascade, "load", load)
    folders.put("a.nii.gz")
    with pytest.raises(type(error), match=str(error)):
        folders.run(report=folders.outputs / "run.json")
    assert folders.written() == []


def test_an_unknown_device_stops_the_batch(folders: Folders) -> None:
    folders.put("a.nii.gz")
    with pytest.raises(DeviceError):
        run_batch(plan_jobs([folders.inputs], folders.outputs), Settings(device="gpu"))
    assert not folders.outputs.exists()


def test_settings_reach_the_cascade(folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade) -> None:
    asked: list[object] = []

    def load(device: str, **options: object) -> Cascade:
        asked.append((device, options))
        return by_hu

    monkeypatch.setattr(Cascade, "load", load)
    folders.put("a.nii.gz")
    folders.run(engine="openvino", threads=3, weights=folders.inputs)
    assert asked == [("cpu", {"engine": "openvino", "threads": 3, "weights": folders.inputs})]
    monkeypatch.setattr(predict, "usable_cores", lambda: 4)
    folders.put(*(f"{letter}.nii.gz" for letter in "bcdef"))
    folders.run(jobs=2)
    assert asked[1] == ("cpu", {"engine": "auto", "threads": 3, "weights": None})


@pytest.mark.parametrize(
    ("cores", "cases", "at_once", "threads"),
    [
        (2, 6, 2, 1),
        (2, 5, 2, None),  # too few for it to matter that the first and the last networks run alone
        (2, 20, 1, None),
        (16, 20, 3, 14),
        (2, 20, 4, 1),
    ],
)
def test_in_a_long_batch_the_networks_leave_cores_to_the_other_cases(
    cores: int, cases: int, at_once: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "usable_cores", lambda: cores)
    assert predict.network_threads(cases, at_once) == threads


# Reports


def test_the_report_tells_each_case_on_the_files_axes(folders: Folders) -> None:
    # Feet first, then front, then right: an orientation of its own for each axis, and a voxel size of its own.
    folders.image = nib.Nifti1Image(np.asarray(folders.image.dataobj), np.diag([6.0, 5.0, 4.0, 1.0]))
    turned = folders.image.as_reoriented(np.array([[2, 1], [1, 1], [0, -1]]))
    assert nib.aff2axcodes(turned.affine) == ("I", "A", "R")
    nib.save(turned, folders.inputs / "a_0000.nii.gz")
    (folders.inputs / "b.nii.gz").write_bytes(b"")
    path = folders.outputs / "run.json"
    folders.run(report=path, options={"device": "cpu", "inputs": [folders.inputs]})
    report = json.loads(path.read_text(encoding="ascii"))
    assert report["counts"] == {"done": 1, "failed": 1, "skipped": 0}
    assert report["options"] == {"device": "cpu", "inputs": [str(folders.inputs)]}
    assert report["engine"]["name"] == "fake"
    assert report["weights_sha256"] == {"roi.xml": "ab"}
    assert report["total_seconds"] >= report["load_seconds"] >= 0
    done, failed = report["cases"]
    assert done["input"] == str(folders.inputs / "a_0000.nii.gz")
    assert done["output"] == str(folders.outputs / "a.nii.gz")
    assert done["status"] == "done"
    assert done["error"] is None
    assert done["warnings"] == []
    assert done["device"] == "test processor"
    assert done["shape"] == [40, 50, 60]
    assert done["spacing_mm"] == [4.0, 5.0, 6.0]
    # The organs span voxels 6 to 32 of 40 from the feet, so 8 to 34 from the head; 2 to 34 and 6 to 54 otherwise.
    assert done["roi"]["fallback"] is None
    for axis, (first, last) in enumerate(((8, 34), (2, 34), (6, 54))):
        assert 0 <= done["roi"]["start"][axis] <= first
        assert last <= done["roi"]["stop"][axis] <= done["shape"][axis]
    assert list(done["organs"]) == [organ.name for organ in ORGANS]
    assert done["organs"]["liver"]["volume_ml"] == pytest.approx(18 * 22 * 18 * 0.12, rel=0.02)
    assert not any(organ["touches_border"] for organ in done["organs"].values())
    assert list(done["seconds"]) == ["read", "wait", "roi", "organs", "restore", "check", "write"]
    assert 0 < sum(done["seconds"].values()) <= done["total_seconds"] + 1e-3
    assert done["memory"]["rss_peak_mib"] > 10
    assert failed["status"] == "failed"
    assert failed["error"].startswith(str(folders.inputs / "b.nii.gz"))
    for key in ("output", "shape", "spacing_mm", "roi", "organs", "device"):
        assert failed[key] is None


def test_the_report_is_there_after_every_case(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.put("a.nii.gz", "b.nii.gz", "c.nii.gz")
    write = RunReport.write
    lengths: list[int] = []

    def write_and_look(report: RunReport, path: Path) -> None:
        write(report, path)
        lengths.append(len(json.loads(path.read_text(encoding="ascii"))["cases"]))

    monkeypatch.setattr(RunReport, "write", write_and_look)
    folders.run(report=folders.outputs / "run.json")
    assert lengths == [0, 1, 2, 3, 3]


# Several cases at a time


def test_the_first_case_is_read_while_the_networks_are_loaded(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade
) -> None:
    folders.put("a.nii.gz")
    read = threading.Event()

    def load(*_: object, **__: object) -> Cascade:
        assert read.wait(20)
        return by_hu

    def read_volume(*given: Any) -> Volume:
        read.set()
        return volume.read_volume(*given)

    monkeypatch.setattr(Cascade, "load", load)
    monkeypatch.setattr(predict, "read_volume", read_volume)
    assert [case.status for case in folders.run(jobs=1).cases] == [Status.DONE]


def test_a_case_is_read_while_another_is_segmented_but_no_third(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, by_hu: Cascade
) -> None:
    folders.put("a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz", "e.nii.gz")
    find = by_hu.find_organs
    lock = threading.Lock()
    second = threading.Event()
    in_memory: list[int] = [0]
    most: list[int] = []

    def count(change: int) -> None:
        with lock:
            in_memory[0] += change
            most.append(in_memory[0])
            if in_memory[0] == 2:
                second.set()

    def read_volume(*given: Any) -> Volume:
        count(1)
        return volume.read_volume(*given)

    def save_image(*given: Any) -> None:
        volume.save_image(*given)
        count(-1)

    def find_organs(scan: Volume) -> Segmentation:
        assert second.wait(20)
        return find(scan)

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    monkeypatch.setattr(predict, "read_volume", read_volume)
    monkeypatch.setattr(predict, "save_image", save_image)
    report = folders.run(jobs=2)
    assert max(most) == 2
    assert [Path(case.input).name for case in report.cases] == [f"{name}.nii.gz" for name in "abcde"]
    assert all(folders.is_whole(path) for path in folders.outputs.iterdir())


# Warnings


def measures(*volumes: float) -> dict[str, OrganMeasure]:
    return {organ.name: OrganMeasure(ml, False) for organ, ml in zip(ORGANS, volumes, strict=True)}


@pytest.mark.parametrize(
    ("fallback", "volumes", "lines"),
    [
        (None, (1500, 300, 200, 80), []),
        (None, (1500, 300, 0, 0), ["not found: spleen, pancreas"]),
        (None, (0, 0, 0, 0), ["no organ was found; is this a CT of the abdomen, in HU?"]),
        ("only 3 ml", (1, 2, 3, 4), ["the whole volume was searched: only 3 ml"]),
        ("only 3 ml", (1, 2, 3, 0), ["the whole volume was searched: only 3 ml", "not found: pancreas"]),
    ],
)
def test_warnings_say_what_is_doubtful(fallback: str | None, volumes: tuple[float, ...], lines: list[str]) -> None:
    found = Segmentation(np.zeros((1, 1, 1), np.uint8), Roi(Box.whole((1, 1, 1)), fallback))
    assert warnings_for(found, measures(*volumes)) == lines


def test_doubts_reach_the_measures_and_the_warnings() -> None:
    sure = Evidence(1500.0, (300.0, 200.0, 280.0), 100.0, 0.97, 0.0, (False, False, False), 0.0, 90.0)
    evidence = {"liver": sure, "kidney": replace(sure, centre_mm=(240.0, 145.0, 205.0), apart_mm=20.0, volume_ml=150.0)}
    found = Segmentation(np.zeros((1, 1, 1), np.uint8), Roi(Box.whole((1, 1, 1))), evidence=evidence)
    organs = judged(measures(1500, 150, 200, 80), found)
    assert organs["liver"] == OrganMeasure(1500, False, 0.97, ())
    assert organs["kidney"] == OrganMeasure(150, False, 0.97, ("on one side only",))
    assert organs["spleen"] == OrganMeasure(200, False)
    assert warnings_for(found, organs) == ["kidney is doubtful: on one side only"]


def test_where_most_is_doubtful_the_scan_is_asked_about() -> None:
    found = Segmentation(np.zeros((1, 1, 1), np.uint8), Roi(Box.whole((1, 1, 1))))
    organs = {
        name: replace(organ, doubts=("only 1 ml", "lies oddly") if organ.volume_ml else ())
        for name, organ in measures(1, 1, 1, 0).items()
    }
    assert warnings_for(found, organs) == [
        "not found: pancreas",
        "most of what was found is doubtful; is this a CT of the abdomen, in HU, with the right header?",
        "liver is doubtful: only 1 ml; lies oddly",
        "kidney is doubtful: only 1 ml; lies oddly",
        "spleen is doubtful: only 1 ml; lies oddly",
    ]


def test_what_reaches_the_border_may_be_a_part() -> None:
    found = Segmentation(np.zeros((1, 1, 1), np.uint8), Roi(Box.whole((1, 1, 1))))
    organs = measures(900, 300, 200, 80)
    for name in ("liver", "spleen"):
        organs[name] = replace(organs[name], touches_border=True)
    assert warnings_for(found, organs) == [
        "cut off by the border of the scan, so that the volume may be only a part: liver, spleen"
    ]


def test_warnings_go_to_standard_error_with_the_files_name(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folders.inputs / "air.nii.gz"
    nib.save(nib.Nifti1Image(np.full((20, 20, 20), -1000, np.int16), np.diag([5.0, 5, 5, 1])), path)
    report = folders.run()
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"fastorgan: warning: {path}: {line}" for line in report.cases[0].warnings]
    assert report.cases[0].warnings == [
        "every voxel has the value -1000",
        "the whole volume was searched: only 0 ml of organs found at low resolution",
        "no organ was found; is this a CT of the abdomen, in HU?",
    ]
    assert len(said.out.splitlines()) == 1


# DICOM


@pytest.fixture
def study(folders: Folders) -> Path:
    """The CT as a series of slices in a folder of its own."""
    pytest.importorskip("highdicom", reason="DICOM needs the extra dicom")
    from tests.dicom_series import write_series

    hu = np.asarray(folders.image.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
    write_series(folders.inputs / "study", hu, spacing=(5, 5, 5), origin=(0, 0, 0))
    return folders.inputs / "study"


def labels_of(folders: Folders) -> NDArray[Any]:
    """What the cascade finds, on the grid of the slices."""
    return np.asarray(folders.cascade.segment(folders.image).dataobj)[::-1, ::-1]


def test_a_folder_of_slices_becomes_labels_and_a_dicom_seg(folders: Folders, study: Path) -> None:
    report = folders.run([study], dicom_seg=True)
    assert folders.written() == ["study.nii.gz", "study.seg.dcm"]
    written: Any = nib.load(folders.outputs / "study.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), labels_of(folders))
    assert written.affine.tolist() == [[-5, 0, 0, 0], [0, -5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]]
    (case,) = report.cases
    assert (case.input, case.status, case.shape) == (str(study), Status.DONE, (60, 50, 40))


def test_a_series_may_have_a_label_file_of_any_name(folders: Folders, study: Path) -> None:
    folders.run([study], folders.outputs / "labels.nii", dicom_seg=True)
    assert folders.written() == ["labels.nii", "labels.seg.dcm"]


def test_a_series_that_is_done_is_left_out(folders: Folders, study: Path) -> None:
    folders.run([study])
    assert folders.run([study], resume=True).cases[0].status is Status.SKIPPED
    # The DICOM SEG is not there yet.
    assert folders.run([study], resume=True, dicom_seg=True).cases[0].status is Status.DONE
    assert folders.run([study], resume=True, dicom_seg=True).cases[0].status is Status.SKIPPED
    os.utime(study / "IM0003.dcm", (2e9, 2e9))
    assert folders.run([study], resume=True).cases[0].status is Status.DONE


def test_what_is_unusual_about_a_series_is_a_warning(folders: Folders, study: Path) -> None:
    (study / "IM0020.dcm").unlink()
    (case,) = folders.run([study], dicom_seg=True).cases
    assert case.warnings[0] == "1 of 40 slices are missing (number 21); filled in from their neighbours"
    assert case.shape == (60, 50, 40)


def test_a_broken_series_among_others_is_named_and_the_others_are_done(folders: Folders, study: Path) -> None:
    folders.put("X_0000.nii.gz")
    slice_ = study / "IM0007.dcm"
    slice_.write_bytes(slice_.read_bytes()[:-100])
    report = folders.run([study, folders.inputs / "X_0000.nii.gz"], dicom_seg=True)
    broken, whole = report.cases
    assert broken.error is not None
    assert broken.error.startswith(f"{slice_}: its voxels cannot be read")
    assert whole.warnings[-1] == "not a DICOM series, so there is no DICOM SEG"
    assert folders.written() == ["X.nii.gz"]


def test_a_single_slice_is_told_from_its_series(folders: Folders, study: Path) -> None:
    (case,) = folders.run([study / "IM0003.dcm"]).cases
    assert case.error == f"{study / 'IM0003.dcm'}: a single DICOM slice; give the folder of its series"


def test_several_series_in_a_folder_need_a_choice(folders: Folders, study: Path) -> None:
    from tests.dicom_series import write_series

    write_series(study / "thin", np.zeros((4, 6, 5), np.int16), number=8)
    with pytest.raises(VolumeError, match="holds 2 series; choose by --series"):
        plan_jobs([study], folders.outputs)
    (job,) = plan_jobs([study], folders.outputs, series="8")
    assert (job.name, job.target) == ("thin", folders.outputs / "thin.nii.gz")
    assert [job.name for job in plan_jobs([study], folders.outputs, series="all")] == ["study", "thin"]
    # Of several inputs, the others are done.
    first, other = plan_jobs([study, study / "thin"], folders.outputs)
    assert first.obstacle is not None
    assert first.obstacle.startswith("holds 2 series")
    assert other.obstacle is None


def test_a_report_that_takes_long_to_write_is_written_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_REPORT_EVERY", 2)
    jobs = [Job(Path(f"c{i}"), Path(f"o{i}")) for i in range(100)]
    records = [CaseRecord(str(job.source), Status.FAILED, error="x") for job in jobs]
    report = RunReport(Engine("fake", "1", "cpu", None, "f32", 1), {}, {})
    written = []

    def slowly(report: RunReport, path: Path) -> None:
        written.append(len(report.cases))
        time.sleep(0.2)

    monkeypatch.setattr(RunReport, "write", slowly)
    predict.note_cases(report, jobs, records, Settings(report=tmp_path / "run.json"))
    assert len(report.cases) == 100
    # The next is due four seconds later.
    assert written == [1, 2]
