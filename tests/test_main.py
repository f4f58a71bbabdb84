import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

import fastorgan
from fastorgan import __main__ as command
from fastorgan.__main__ import main
from fastorgan.cascade import Cascade

APP = Path(__file__).parents[1] / "app"

Blocks = tuple[nib.Nifti1Image, NDArray[np.uint8]]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(APP), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def usage_error(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


# Help and version


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["phantom", "--help"]])
def test_help_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(*arguments) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: fastorgan ")
    assert said.err == ""
    if arguments[0] == "predict":
        for option in (
            "INPUT",
            "OUTPUT",
            "--device",
            "--engine",
            "--threads",
            "--weights",
            "--report",
            "--preview",
            "--split",
        ):
            assert option in said.out
    if arguments[0] != "phantom":
        assert "exit codes:\n  0 " in said.out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error("--version") == 0
    assert capsys.readouterr().out == f"fastorgan {fastorgan.__version__}\n"


HEAVY = ("numpy", "nibabel", "scipy", "openvino", "torch", "pynvml", "PIL", "tqdm")

SHOW_LOADED = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", sorted(set({HEAVY}) & set(sys.modules))))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import fastorgan",
        "import fastorgan; fastorgan.__version__",
        "from fastorgan.__main__ import main; main(['--help'])",
        "from fastorgan.__main__ import main; main(['predict', '--help'])",
        "from fastorgan.__main__ import main; main(['--version'])",
    ],
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    ended = python("-c", SHOW_LOADED + code)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "LOADED []"
    assert ended.stderr == ""


def test_the_cascade_loads_no_engine() -> None:
    ended = python("-c", SHOW_LOADED + "import fastorgan; fastorgan.Cascade")
    loaded = ended.stdout.splitlines()[-1]
    assert "numpy" in loaded
    assert "openvino" not in loaded
    assert "torch" not in loaded


def test_the_package_has_the_cascade_and_no_other_surprise() -> None:
    assert fastorgan.Cascade is Cascade
    with pytest.raises(AttributeError, match="has no attribute 'cascades'"):
        _ = fastorgan.cascades


def test_python_m_is_the_command() -> None:
    ended = python("-m", "fastorgan", "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"fastorgan {fastorgan.__version__}\n", "")


# Usage


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "COMMAND"),
        (["segment"], "invalid choice: 'segment'"),
        (["predict"], "INPUT, OUTPUT"),
        (["predict", "in"], "OUTPUT"),
        (["predict", "in", "out", "--fast"], "--fast"),
        (["predict", "in", "out", "--threads", "0"], "0 is not a positive number"),
        (["predict", "in", "out", "--threads", "-2"], "-2 is not a positive number"),
        (["predict", "in", "out", "--threads", "two"], "two is not a positive number"),
        (["predict", "in", "out", "--threads", "1.5"], "1.5 is not a positive number"),
        (["phantom"], "OUTPUT"),
        (["phantom", "a.nii", "--seed", "x"], "--seed"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: fastorgan")
    assert reason in said.err.splitlines()[-1]


# Exit codes


def test_all_done_ends_with_0(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = inputs.parent / "out"
    assert main(["predict", str(inputs), str(output), "--device", "cpu"]) == 0
    assert [path.name for path in output.iterdir()] == ["ct.nii.gz"]
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"[1/1] {output / 'ct.nii.gz'}: liver ")


def test_one_bad_file_ends_with_2_after_the_good_ones(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inputs / "bad.nii.gz").write_bytes(b"no CT")
    assert main(["predict", str(inputs), str(inputs.parent / "out"), "--device", "cpu"]) == 2
    assert (inputs.parent / "out" / "ct.nii.gz").is_file()
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith(f"fastorgan: {inputs / 'bad.nii.gz'}: ")
    assert len(said.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--engine", "onnx"], "there is no engine 'onnx'"),
        (["--device", "cuda", "--engine", "openvino"], "OpenVINO does not run on cuda"),
        (["--device", "cpu", "--report", "none/run.json"], "none/run.json: cannot be written"),
    ],
)
def test_what_stops_a_run_is_one_line_and_2(
    inputs: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(inputs), str(inputs.parent / "out"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fastorgan: {reason}")
    assert len(said.err.splitlines()) == 1


def test_an_empty_folder_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"fastorgan: {tmp_path}: holds no CT volume (.nii.gz, .nii, .hdr, .img, .mha, .nrrd, or DICOM slices)\n"
    )


def test_missing_weights_are_one_line_and_2(tmp_path: Path, blocks: Blocks, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    nib.save(blocks[0], tmp_path / "ct.nii")
    weights = tmp_path / "weights"
    arguments = [
        "predict",
        str(tmp_path / "ct.nii"),
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--weights",
        str(weights),
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"fastorgan: {weights / 'weights.json'}: no weights here")


def test_an_interrupt_ends_with_130(
    inputs: Path, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_organs(volume: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    assert main(["predict", str(inputs), str(inputs.parent / "out"), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "fastorgan: interrupted\n"
    assert list((inputs.parent / "out").iterdir()) == []


def test_debug_lets_an_unforeseen_error_through(
    inputs: Path, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_organs(volume: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(by_hu, "find_organs", find_organs)
    arguments = ["predict", str(inputs), str(inputs.parent / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    assert "failed unexpectedly (ZeroDivisionError: a bug)" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--debug"])


# Names and options


def test_names_that_begin_with_a_dash_follow_two_dashes(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inputs / "ct_0000.nii.gz").rename(inputs / "-x.nii.gz")
    monkeypatch.chdir(inputs)
    assert main(["predict", "--device", "cpu", "--", "-x.nii.gz", "--out"]) == 0
    assert main(["predict", "./-x.nii.gz", "./-y.nii.gz", "--device", "cpu"]) == 0
    assert sorted(path.name for path in inputs.iterdir()) == ["--out", "-x.nii.gz", "-y.nii.gz"]
    assert [path.name for path in (inputs / "--out").iterdir()] == ["-x.nii.gz"]


def test_a_name_that_is_no_text_is_printed_somehow(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Latin-1 bytes in a UTF-8 system, as archives from elsewhere leave them.
    latin = inputs / os.fsdecode("größe.nii.gz".encode("latin-1"))
    (inputs / "ct_0000.nii.gz").rename(latin)
    (inputs / os.fsdecode(b"\xff.nii.gz")).touch()
    output = inputs.parent / "out"
    report = output / "run.json"
    assert main(["predict", str(inputs), str(output), "--device", "cpu", "--report", str(report)]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "gr\\udcf6\\udcdfe.nii.gz: liver " in said.out
    assert "\\udcff.nii.gz: " in said.err
    assert (output / latin.name).is_file()
    assert json.loads(report.read_text(encoding="ascii"))["counts"] == {"done": 1, "failed": 1, "skipped": 0}


def test_the_report_holds_the_options(inputs: Path) -> None:
    report = inputs.parent / "run.json"
    output = inputs.parent / "out"
    arguments = ["predict", str(inputs), str(output), "--device", "cpu", "--threads", "2", "--report", str(report)]
    assert main(arguments) == 0
    assert json.loads(report.read_text(encoding="ascii"))["options"] == {
        "inputs": [str(inputs)],
        "output": str(output),
        "device": "cpu",
        "engine": "auto",
        "threads": 2,
        "jobs": 2,
        "cluster": None,
        "weights": None,
        "report": str(report),
        "page": None,
        "preview": False,
        "split": False,
        "statistics": None,
        "label_tables": False,
        "resume": False,
        "max_voxels": None,
        "series": None,
        "dicom_seg": False,
        "grand_challenge": None,
        "shard": None,
        "debug": False,
    }


# Phantoms


@pytest.fixture
def small_phantom(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the command make a few voxels instead of a patient; returns the seeds asked for."""
    seeds = []

    def make_phantom(*, seed: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
        seeds.append(seed)
        image = nib.Nifti1Image(np.full((3, 4, 5), seed, np.int16), np.eye(4))
        return image, nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4))

    monkeypatch.setattr("fastorgan.phantom.make_phantom", make_phantom)
    return seeds


def test_a_phantom_and_its_labels_are_written(
    tmp_path: Path, small_phantom: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    image, labels = tmp_path / "a" / "p_0000.nii.gz", tmp_path / "b" / "p.nii"
    assert main(["phantom", str(image), "--labels", str(labels), "--seed", "7"]) == 0
    assert capsys.readouterr().out == f"{image}\n{labels}\n"
    assert small_phantom == [7]
    for path, value in ((image, 7), (labels, 1)):
        written: Any = nib.load(path)
        assert (np.asarray(written.dataobj) == value).all()
    assert main(["phantom", str(tmp_path / "q.nii")]) == 0
    assert small_phantom == [7, 0]


@pytest.mark.parametrize("name", ["file/p.nii.gz", "file/deep/p.nii.gz", "p.mhd", "folder.nii"])
def test_a_phantom_that_cannot_be_written_is_one_line_and_2(
    tmp_path: Path, name: str, small_phantom: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.nii").mkdir()
    assert main(["phantom", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith(f"fastorgan: {tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.nii"]


def test_a_negative_seed_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["phantom", str(tmp_path / "p.nii"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("fastorgan: phantom: the seed ")


def test_main_returns_what_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_phantom", lambda options: 17)
    assert main(["phantom", "p.nii"]) == 17


# Every command


COMMANDS = ("predict", "doctor", "phantom", "completion")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(command, "--help") == 0
    said = capsys.readouterr().out
    assert re.search(rf"examples?:\s+fastorgan {command}\b", said)
    assert "--debug" in said


def test_debug_shows_where_an_error_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", str(tmp_path / "none.nii.gz"), str(tmp_path / "out"), "--device", "nowhere"]
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([*arguments, "--debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1].startswith("fastorgan: there is no device 'nowhere'")


def test_an_unforeseen_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr(command, "_phantom", fail)
    assert main(["phantom", "p.nii"]) == 2
    assert capsys.readouterr().err == (
        "fastorgan: failed unexpectedly (ZeroDivisionError: a bug); --debug shows where\n"
    )
    with pytest.raises(ZeroDivisionError):
        main(["phantom", "p.nii", "--debug"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    assert "statistics" in script


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["3", "2/2", "-1/2", "a/b", "1/0", "1/2/3"])
def test_a_shard_that_is_none_is_refused(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", "in", "out", f"--shard={shard}"])
    assert caught.value.code == 2
    assert "is not I/N with I from 0 to N - 1" in capsys.readouterr().err


# Start-up

SLOW_TO_IMPORT = ("scipy.ndimage", "pydicom", "torch", "matplotlib", "openvino.tools.ovc")


def test_a_ct_is_segmented_without_what_is_slow_to_import(inputs: Path) -> None:
    code = (
        "import sys; from fastorgan.__main__ import main; code = main(sys.argv[1:]); "
        f"print([name for name in {SLOW_TO_IMPORT} if sys.modules.get(name)]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "predict", str(inputs), str(inputs.parent / "out"), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "app")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
