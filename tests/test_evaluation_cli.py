import csv
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.__main__ import main

ROOT = Path(__file__).parents[1]


def save(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Cases a and b: the four organs as cubes of 2³ voxels; in b's prediction the liver lies one voxel off."""
    truth = np.zeros((8, 8, 8), np.uint8)
    for code, (x, y) in enumerate(((1, 1), (1, 5), (5, 1), (5, 5)), 1):
        truth[x : x + 2, y : y + 2, 3:5] = code
    off = truth.copy()
    off[truth == 1] = 0
    off[2:4, 1:3, 3:5] = 1
    for name, prediction in (("a", truth), ("b", off)):
        save(tmp_path / "predictions" / f"{name}.nii.gz", prediction)
        save(tmp_path / "truths" / f"{name}.nii.gz", truth)
    return str(tmp_path / "predictions"), str(tmp_path / "truths")


def test_score(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *folders, "--csv", str(tmp_path / "s.csv")]) == 0
    title, header, a, b, mean, overall = capsys.readouterr().out.splitlines()
    assert title.startswith("flare21, DSC and NSD in %")
    assert title.endswith("pancreas 1 mm")
    assert header.split()[:3] == ["case", "liver", "DSC"]
    assert a.split() == ["a"] + ["100.0"] * 8
    assert b.split() == ["b", "50.0"] + ["100.0"] * 7
    assert mean.split()[:9] == ["mean", "±", "SD", "75.0", "±", "35.4", "100.0", "±", "0.0"]
    assert overall == "mean of the organs, 2 cases: DSC 93.8, NSD 100.0"
    with (tmp_path / "s.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["Name", "DSC_1", "NSD-1mm_1", "DSC_2", "NSD-1mm_2", "DSC_3", "NSD-1mm_3", "DSC_4", "NSD-1mm_4"]
    assert rows[2] == ["b.nii.gz", "0.5", *["1.0"] * 7]


def test_score_leaves_out(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = ["--leave-out", "a:pancreas,liver", "--leave-out", "b.nii.gz:liver", "--leave-out", "b:spleen"]
    assert main(["score", *folders, "--no-nsd", "--csv", str(tmp_path / "s.csv"), *left_out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flare21, DSC in %"
    assert lines[2].split() == ["a", "-", "100.0", "100.0", "-"]
    assert lines[3].split() == ["b", "-", "100.0", "-", "100.0"]
    assert lines[4].split() == ["mean", "±", "SD", "-", "100.0", "±", "0.0", "100.0", "100.0"]
    rows = (tmp_path / "s.csv").read_text().splitlines()
    assert rows[1:] == ["a.nii.gz,,,1.0,,1.0,,,", "b.nii.gz,,,1.0,,,,1.0,"]


def test_score_of_flare22_and_some_organs(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--protocol", "flare22", "--organs", "spleen,liver", "--csv", str(tmp_path / "s.csv")]
    assert main(["score", *folders, *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flare22, DSC and NSD in %; NSD tolerance: liver 5 mm, spleen 3 mm"
    assert lines[3].split() == ["b", "50.0", "100.0", "100.0", "100.0"]
    rows = (tmp_path / "s.csv").read_text().splitlines()
    assert rows[2] == "b.nii.gz,0.5000,,1.0000,,1.0000,,1.0000,"


def test_score_of_two_files(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", f"{folders[0]}/b.nii.gz", f"{folders[1]}/a.nii.gz", "--organs", "liver"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["a", "50.0", "100.0"]


def test_bad_cases_do_not_stop_the_others(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, truths = map(Path, folders)
    (predictions / "a.nii.gz").write_bytes(b"not gzip")
    save(truths / "c.nii.gz", np.zeros((8, 8, 8), np.uint8))
    save(predictions / "d.nii.gz", np.zeros((8, 8, 7), np.uint8))
    save(truths / "d.nii.gz", np.zeros((8, 8, 8), np.uint8))
    assert main(["score", *folders, "--csv", str(tmp_path / "s.csv")]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[2].split()[:2] == ["b", "50.0"]
    assert "1 case:" in out.splitlines()[-1]
    lines = err.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, "acd", strict=True):
        assert line.startswith(f"error: {predictions / name}.nii.gz against {truths / name}.nii.gz: ")
    assert lines[1].endswith("c.nii.gz: no such file")
    assert "8 x 8 x 7 and 8 x 8 x 8" in lines[2]
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 2


def test_no_case_that_can_be_scored(folders: tuple[str, str], tmp_path: Path) -> None:
    for name in "ab":
        (Path(folders[0]) / f"{name}.nii.gz").unlink()
    assert main(["score", *folders, "--csv", str(tmp_path / "s.csv")]) == 2
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--leave-out", "c:liver"], "error: --leave-out: there is no case c; cases are a, b"),
        (["--csv", "nowhere/s.csv"], "error: nowhere/s.csv: there is no such folder"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], reason: str, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *folders, *options]) == 2
    assert capsys.readouterr() == ("", f"{reason}\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--organs", "liver,heart"], "there is no organ 'heart'; organs are liver, kidney, spleen, pancreas"),
        (["--leave-out", "liver"], "'liver' is not CASE:ORGAN[,ORGAN]"),
        (["--leave-out", "a:heart"], "there is no organ 'heart'"),
        (["--protocol", "flare99"], "invalid choice"),
    ],
)
def test_words_that_are_not_understood(
    options: list[str], reason: str, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", *folders, *options])
    assert reason in capsys.readouterr().err


def test_rank_of_score_files(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{name}.csv") for name in ("ours", "perfect")]
    for predictions, file in zip(folders, files, strict=True):
        assert main(["score", predictions, folders[1], "--csv", file]) == 0
    capsys.readouterr()
    assert main(["rank", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Ours ties in case a and in the NSD of b: ranks 1 1 1 2.
    assert lines[1].split() == ["1", "perfect", "0.500", "100.0", "1.00", "100.0", "1.00"]
    assert lines[2].split() == ["2", "ours", "0.625", "93.8", "1.50", "100.0", "1.00"]


def test_rank_with_efficiency(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    files = [str(tmp_path / "s.csv"), str(tmp_path / "x" / "s.csv")]
    for file in files:
        main(["score", folders[1], folders[1], "--csv", file])
    for number in (1, 2):
        (tmp_path / f"e{number}.csv").write_text(f"name,time,gpu_memory,x\na_0000,{number},0,\nb_0000,{number},0,\n")
    capsys.readouterr()
    efficiency = ["--efficiency", str(tmp_path / "e2.csv"), str(tmp_path / "e1.csv")]
    assert main(["rank", *files, *efficiency]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Files of one name go by their paths.
    assert lines[1].split()[1:3] == [files[1], "0.500"]
    assert lines[2].split()[1:3] == [files[0], "0.625"]
    assert main(["rank", *files, *efficiency[:2]]) == 2
    assert capsys.readouterr().err == "error: --efficiency: 1 files for 2 score files; give one for each\n"


@pytest.mark.parametrize("command", ["score", "rank"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"  python -m evaluation {command} " in capsys.readouterr().out


def test_runs_as_a_module(folders: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evaluation", "score", folders[0], f"{folders[1]}/gone"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "app")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {folders[1]}/gone: no such file or folder\n"


def test_scoring_needs_no_more_than_fastorgan_itself() -> None:
    # `try.sh` scores in an environment without the extra `evaluation`.
    code = (
        "import sys\n"
        "for name in ('psutil', 'matplotlib'): sys.modules[name] = None\n"
        "from evaluation.__main__ import main\n"
        "main(['score', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m evaluation score")
