import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.synthetic_cache import LEVELS, anatomy, one_thread, write_cache
from training import __main__ as cli
from training.__main__ import main
from training.cache import load_cache
from training.cases import DataError

ROOT = Path(__file__).parents[1]

COMMANDS = ("prepare", "warp", "refine", "fit", "export", "quantise", "left-out", "curves")


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def failing(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command leaves on standard error when its input is bad."""
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("training: ")
    return line


def misused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line after a usage error."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# Help


def test_the_help_names_all_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m training")
    assert all(re.search(rf"^ +{command} +\w", shown, re.MULTILINE) for command in COMMANDS)
    assert all(re.search(rf"^ +{code} +\w", shown, re.MULTILINE) for code in (0, 2, 130, 143))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_can_be_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    example = re.search(r"^example: python -m training (.*)$", shown, re.MULTILINE)
    assert example is not None
    arguments = example[1].split()
    assert arguments[0] == command
    cli._parser().parse_args(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    options = shown[shown.index("options:") :].replace("\n                        ", "  ")
    lines = [line for line in options.splitlines() if line.startswith("  -")]
    assert len(lines) >= 2
    for line in lines:
        assert re.search(r" {2,}\S", line[3:]), line


def test_the_help_needs_neither_torch_nor_nibabel() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'nibabel', 'scipy', 'openvino'): sys.modules[name] = None\n"
        "from training.__main__ import main\n"
        "main(['fit', '--help'])\n"
    )
    paths = os.pathsep.join((str(ROOT / "app"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout


# Usage


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "-5"),
        ("--threads", "0"),
        ("--minutes", "0"),
        ("--minutes", "nan"),
        ("--minutes", "inf"),
        ("--slice", "-1"),
        ("--rate", "0"),
    ],
)
def test_numbers_that_are_not_positive_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = misused(["fit", "roi", "--data", "a", "--out", "b", f"{option}={value}"], capsys)
    assert line.endswith(f"argument {option}: {value} is not a positive number")


def test_words_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    line = misused(["fit", "roi", "--data", "a", "--out", "b", "--steps", "many"], capsys)
    assert "argument --steps: invalid" in line
    assert "'many'" in line


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["fit", "lungs", "--data", "a", "--out", "b"], ["fit", "roi"], ["export", "roi", "--run", "a"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert misused(arguments, capsys).startswith("python -m training")


# Bad input


def test_a_folder_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(["prepare", "--data", tmp_path, "--out", tmp_path / "cache"], capsys)
    assert line.startswith(f"training: {tmp_path}: no training data here")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.nii.gz").touch()
    occupied = tmp_path / "file"
    occupied.touch()
    assert str(occupied) in failing(["prepare", "--data", tmp_path, "--out", occupied], capsys)


def test_data_errors_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: Path) -> None:
        raise DataError(f"{data}: is not what it should be")

    monkeypatch.setattr("training.cases.find_cases", refuse)
    line = failing(["prepare", "--data", "there", "--out", "here"], capsys)
    assert line == "training: there: is not what it should be"


def test_an_interrupted_preparation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(data: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.cases.find_cases", interrupt)
    assert main(["prepare", "--data", "there", "--out", "here"]) == 130
    assert capsys.readouterr().err == "training: interrupted\n"


def test_without_torch_training_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments in (
        ["fit", "roi", "--data", "a", "--out", "b"],
        ["export", "roi", "--run", "a", "--version", "1"],
    ):
        assert "needs torch: pip install 'fastorgan[train]'" in failing(arguments, capsys)


@needs_torch
def test_bad_input_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = write_cache(tmp_path / "cache")
    fit = ["fit", "organs", "--out", tmp_path / "run", "--steps", 1, "--data"]
    nowhere = tmp_path / "nowhere"
    assert failing([*fit, nowhere], capsys).startswith(f"training: {nowhere}: no *.organs.npz files")
    assert "there is no fold 3 of 3" in failing([*fit, cache, "--fold", 3, 3], capsys)
    assert "every patient is left out" in failing([*fit, cache, "--fold", 0, 1], capsys)
    assert "size 100 x 96 x 96: sides must be multiples of 8" in failing([*fit, cache, "--size", 100, 96, 96], capsys)
    assert "there is no device 'tpu'" in failing([*fit, cache, "--device", "tpu"], capsys)
    assert "nowhere: cannot be read" in failing([*fit, cache, "--init", nowhere], capsys)
    roi = ["fit", "roi", "--data", cache, "--out", tmp_path / "run", "--size", 96, 96, 96]
    assert "the ROI net's size is fixed" in failing(roi, capsys)
    (cache / "case1.organs.npz").write_bytes(b"damaged")
    assert "case1.organs.npz: damaged" in failing([*fit, cache], capsys)
    occupied = tmp_path / "file"
    occupied.touch()
    whole = ["fit", "organs", "--steps", 1, "--data", write_cache(tmp_path / "whole"), "--out", occupied]
    assert str(occupied) in failing(whole, capsys)


@needs_torch
def test_bad_input_of_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ["export", "roi", "--version", "1.0", "--out", tmp_path / "weights", "--run", tmp_path]
    assert f"{tmp_path / 'checkpoint.pt'}: cannot be read" in failing(export, capsys)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert "checkpoint.pt: damaged" in failing(export, capsys)


# From a data folder to a checkpoint


def test_prepare_counts_its_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_flare(tmp_path / "data")
    assert main(["prepare", "--data", str(data), "--out", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] train_000 (patient train_000)",
        "[2/2] train_001 (patient train_001)",
    ]
    assert [volume.name for volume in load_cache(tmp_path / "cache", "roi")] == ["train_000", "train_001"]


@needs_torch
def test_flares_folders_become_a_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, out = tmp_path / "cache", tmp_path / "run"
    assert main(["prepare", "--data", str(write_flare(tmp_path / "data")), "--out", str(cache)]) == 0
    fit = ["fit", "organs", "--data", str(cache), "--out", str(out), "--size", "24", "24", "32", "--steps", "2"]
    assert main(fit) == 0
    assert (out / "checkpoint.pt").is_file()
    assert "organs: step 2/2, 100.0%" in capsys.readouterr().err


@needs_torch
def test_options_reach_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import fit

    plans: list[fit.Plan] = []

    class Noted:
        step = 7

        def __init__(self, plan: Any, world: Any):
            assert world.size == 1
            plans.append(plan)

        def fit(self) -> None:
            return None

    monkeypatch.setattr(fit, "Run", Noted)
    line = (
        "fit organs --data c --out o --preset paper --size 72 96 144 --rate 0.002 --steps 5 --minutes 1.5 --slice 0.5"
    )
    assert main([*line.split(), "--fold", "1", "6", "--init", "i.pt", "--device", "cuda:1", "--seed", "3"]) == 0
    assert main(["fit", "roi", "--data", "c", "--out", "o", "--variant", "paper"]) == 0
    first, second = plans
    assert (first.network, first.data, first.out, first.init) == ("organs", Path("c"), Path("o"), Path("i.pt"))
    assert (first.recipe.optimiser, first.recipe.size, first.recipe.rate) == ("sgd", (72, 96, 144), 0.002)
    assert (first.steps, first.minutes, first.slice_minutes) == (5, 1.5, 0.5)
    assert (first.fold, first.device, first.seed) == ((1, 6), "cuda:1", 3)
    assert (second.network, second.variant, second.recipe.optimiser) == ("roi", "paper", "muon")
    assert (second.steps, second.minutes, second.fold, second.device) == (None, None, None, "cpu")


def write_flare(data: Path) -> Path:
    """Two small cases in FLARE21's own folders."""
    codes = anatomy((12, 16, 20))
    hu = np.vectorize(LEVELS.get)(codes).astype(np.int16) - 100
    for folder in ("TrainingImg", "TrainingMask"):
        (data / folder).mkdir(parents=True)
    affine = np.diag([10.0, 10.0, 15.0, 1.0])
    for number in range(2):
        name = f"train_{number:03}"
        for array, path in (
            (hu + number, data / "TrainingImg" / f"{name}_0000.nii.gz"),
            (codes, data / "TrainingMask" / f"{name}.nii.gz"),
        ):
            nib.save(nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine), path)
    return data
