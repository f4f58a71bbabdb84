from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import safetensors.torch
import torch

from fastorgan import Cascade
from fastorgan.networks import DenseVNet
from fastorgan.phantom import make_phantom
from fastorgan.volume import load_image, save_image
from fastorgan.weights import Weights
from tests.synthetic_cache import one_thread
from training.__main__ import main
from training.cases import DataError
from training.checkpoint import CHECKPOINT, write_checkpoint
from training.left_out import segment_left_out


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def write_run(folder: Path, **changes: Any) -> Path:
    """A run whose network is the released one."""
    network = DenseVNet(drop=0.0)
    released = Weights.find()
    network.load_state_dict(safetensors.torch.load(released.read("organs", ".safetensors")), strict=False)
    folder.mkdir()
    state = {"kind": "organs", "variant": released.variant("organs"), "export": network.state_dict(), "left_out": ["b"]}
    write_checkpoint({**state, **changes}, folder / CHECKPOINT)
    return folder


def write_data(folder: Path, names: str = "ab") -> Path:
    """Empty files that stand for the cases: enough for all that fails before they are read."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / f"{name}.nii.gz").touch()
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_the_patients_left_out_are_segmented_by_the_runs_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, out = write_data(tmp_path / "data"), write_run(tmp_path / "run"), tmp_path / "out"
    image, truth = make_phantom()
    save_image(image, data / "images" / "b.nii.gz")
    save_image(truth, data / "labels" / "b.nii.gz")
    # "a" was trained on: its file, which is empty, is not read.
    assert main(["left-out", "--run", str(run), "--data", str(data), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'b.nii.gz'}\n"
    assert [path.name for path in out.iterdir()] == ["b.nii.gz"]
    expected = np.asarray(Cascade.load("cpu").segment(image).dataobj)
    found = np.asarray(load_image(out / "b.nii.gz").dataobj)
    assert (expected > 0).sum() > 10_000
    assert (found == expected).mean() > 0.9999


def test_a_run_on_all_patients_left_nobody_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", left_out=[])
    with pytest.raises(DataError, match="left no patient out; train with --fold"):
        next(segment_left_out(run, write_data(tmp_path / "data"), tmp_path / "out"))


def test_a_patient_whose_cases_are_gone_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", left_out=["b", "c"])
    with pytest.raises(DataError, match="no case of c, whom the run left out"):
        next(segment_left_out(run, write_data(tmp_path / "data"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["left-out", "--run", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"training: {tmp_path / CHECKPOINT}: cannot be read")


def test_checkpoints_of_before_say_nothing_of_patients(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint({"kind": "organs", "variant": "slim", "export": {"a": torch.zeros(1)}}, run / CHECKPOINT)
    with pytest.raises(DataError, match="left no patient out"):
        next(segment_left_out(run, tmp_path, tmp_path / "out"))
