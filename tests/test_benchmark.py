"""`evaluation.benchmark` and what belongs to it: stretched scans, floors, scaling, engines."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.accuracy import PairError
from evaluation.benchmark import BenchmarkError, Result, Run, Samples, Throughput, run_process
from evaluation.engines import CANDIDATES, Outcome, find_cases, header, row
from evaluation.floors import floors
from evaluation.scaling import Point, plot_points, write_points
from evaluation.stretched import stretch
from fastorgan.errors import VolumeError
from fastorgan.labels import ORGANS
from fastorgan.phantom import make_phantom
from fastorgan.runtime import INPUT_SIZES, TorchRuntime
from fastorgan.volume import load_image, save_image
from fastorgan.weights import Weights
from tests.stand_in_card import StandInCard


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """Five slices of 3 mm, each of a value of its own."""
    path = tmp_path / "ct.nii.gz"
    array = np.zeros((6, 7, 5), np.int16) + np.arange(5, dtype=np.int16) * 100
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return path


def values(path: Path) -> Any:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj)


# Stretched scans


def test_slices_are_repeated_evenly(ct: Path, tmp_path: Path) -> None:
    stretch(ct, tmp_path / "a.nii.gz", 10, noise=0)
    array = values(tmp_path / "a.nii.gz")
    assert array.dtype == np.int16
    assert array[0, 0].tolist() == [0, 0, 100, 100, 200, 200, 300, 300, 400, 400]


def test_slices_are_left_out_evenly(ct: Path, tmp_path: Path) -> None:
    stretch(ct, tmp_path / "a.nii.gz", 1, noise=0)
    assert values(tmp_path / "a.nii.gz")[0, 0].tolist() == [200]


@pytest.mark.parametrize("slices", [1, 3, 5, 10, 17])
def test_the_body_stays_where_it_was(ct: Path, tmp_path: Path, slices: int) -> None:
    stretch(ct, tmp_path / "a.nii.gz", slices)
    image = load_image(tmp_path / "a.nii.gz")
    assert image.shape == (6, 7, slices)
    # From 1.5 mm below the first centre to 1.5 mm above the last.
    edges = image.affine @ np.array([[0, 0, -0.5, 1], [0, 0, slices - 0.5, 1]]).T
    assert edges[2].tolist() == pytest.approx([-1.5, 13.5])
    assert nib.affines.voxel_sizes(image.affine)[:2].tolist() == [1.0, 2.0]


def test_no_two_slices_are_the_same_and_the_same_seed_is(ct: Path, tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        stretch(ct, tmp_path / name, 10)
    array = values(tmp_path / "a.nii.gz")
    assert (array[..., 0] != array[..., 1]).any()
    assert abs(array[..., :2].mean()) < 2
    assert 2 < array[..., :2].std() < 6
    assert np.array_equal(array, values(tmp_path / "b.nii.gz"))


def test_a_scan_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="no such file"):
        stretch(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", 3)


# Processes


def test_a_process_is_measured() -> None:
    code = "import time; a = bytearray(b'x') * 150_000_000; time.sleep(0.3); print(len(a))"
    run = run_process([sys.executable, "-c", code])
    assert run.said == "150000000\n"
    assert run.seconds > 0.3
    assert 150 < run.rss_mb < 300
    assert run.cpu_seconds < run.seconds + 5


def test_a_process_that_fails_is_said_with_its_last_words() -> None:
    with pytest.raises(BenchmarkError, match=r"exit code 3 second\Z"):
        run_process([sys.executable, "-c", "import sys; print('first\\nsecond', file=sys.stderr); sys.exit(3)"])


def test_the_table_has_medians_and_ratios(ct: Path, tmp_path: Path) -> None:
    ours = Samples([Run(seconds, 3.0, 500.0, "") for seconds in (2.5, 1.5, 2.0)])
    theirs = Samples([Run(seconds, 60.0, 4000.0, "") for seconds in (50.0, 40.0, 30.0)])
    for seconds in (1.0, 1.2, 0.9):
        ours.add_warm(seconds, {"read": 0.25, "wait": 0.0})
    theirs.add_warm(20.0, {"read": 5.0})
    engine = {"name": "openvino", "version": "1", "precision": "f32", "threads": 2, "device_name": "a CPU"}
    result = Result(ct, (6, 7, 5), engine, ours, theirs, {"liver": 0.991})
    lines = result.text().splitlines()
    assert lines[0].startswith("ct.nii.gz: 6 x 7 x 5, 0.0 MB; ")
    assert lines[1] == "openvino 1 f32, 2 threads, a CPU; medians of 3 runs (lowest to highest)"
    rows = {line[:24].strip(): line[24:].split() for line in lines[3:-1]}
    assert rows["process, s"] == ["2.00", "(1.50-2.50)", "40.00", "(30.00-50.00)", "20.0x"]
    assert rows["peak RSS, MB"][-1] == "8.0x"
    assert rows["warm case, s"] == ["1.00", "(0.90-1.20)", "20.00", "(20.00-20.00)", "20.0x"]
    assert rows["read"][-1] == "20.0x"
    assert rows["wait"] == ["0.000", "(0.000-0.000)", "-"]
    assert rows["GPU, MiB (whole card)"] == ["-", "-"]
    assert lines[-1] == "DSC of the two programs' labels, %: liver 99.1"
    result.write(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text(encoding="ascii"))
    assert written["fastorgan"]["cold_seconds"] == [2.5, 1.5, 2.0]
    assert written["reference"]["warm_stages"] == {"read": [5.0]}
    with pytest.raises(BenchmarkError, match="cannot be written"):
        result.write(tmp_path / "none" / "a.json")


def test_rates_are_told_against_one_job() -> None:
    text = Throughput(6, {1: [20.0, 30.0, 25.0], 2: [40.0, 50.0, 45.0]}, {1: [500.0] * 3, 2: [700.0] * 3}).text()
    assert text.splitlines()[2].split() == ["2", "45.0", "(40.0-50.0)", "1.80x", "700", "(700-700)"]


@pytest.mark.parametrize(
    "own", [["--runs", "2", "--no-reference", "ct.nii.gz"], ["ct.nii.gz", "--runs", "2", "--no-reference"]]
)
@pytest.mark.parametrize("handed_on", [[], ["--device", "cpu", "--jobs", "2"]])
def test_options_behind_dashes_go_to_predict(
    own: list[str], handed_on: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = []

    def benchmark(ct: Path, runs: int, options: list[str], *, reference: bool) -> Mock:
        taken.append((ct, runs, options, reference))
        return Mock(text=lambda: "done")

    monkeypatch.setattr("evaluation.benchmark.benchmark", benchmark)
    assert main(["benchmark", *own, *(["--", *handed_on] if handed_on else [])]) == 0
    assert taken == [(Path("ct.nii.gz"), 2, handed_on, False)]
    assert capsys.readouterr().out == "done\n"


@pytest.mark.slow
def test_a_phantom_is_benchmarked_and_its_labels_are_the_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    image, _ = make_phantom(seed=0)
    save_image(image, tmp_path / "ct.nii.gz")
    out = tmp_path / "a.json"
    assert main(["benchmark", str(tmp_path / "ct.nii.gz"), "--runs", "1", "--json", str(out)]) == 0
    assert "process, s" in capsys.readouterr().out
    written = json.loads(out.read_text(encoding="ascii"))
    assert written["agreement"]["liver"] > 0.95
    assert len(written["fastorgan"]["warm_seconds"]) == len(written["reference"]["warm_seconds"]) == 1
    assert main(["throughput", str(tmp_path / "ct.nii.gz"), "--cases", "2", "--runs", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    arguments = ["scaling", str(tmp_path / "ct.nii.gz"), str(tmp_path / "out"), "--runs", "1"]
    assert main([*arguments, "--slices", "20", "40", "--threads", "1"]) == 0
    assert (tmp_path / "out" / "scaling.csv").read_text().count("\n") == 3


# Floors, scaling, engines


def test_floors_are_positive_seconds(ct: Path) -> None:
    measured = floors(ct, 1)
    assert len(measured) == 8
    assert all(0 < seconds < 60 for seconds in measured.values())


def test_scaling_is_written_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        Point(50, 1, 2.0, 2.5, 400.0, 1.0),
        Point(100, 1, 3.0, 3.5, 500.0, 1.5),
        Point(50, 2, 1.5, 2.6, 400.0, 0.7),
    ]
    write_points(points, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[:2] == [
        "slices,threads,seconds,cpu_seconds,rss_mb,case_seconds",
        "50,1,2.0,2.5,400.0,1.0",
    ]
    plot_points(points, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_cases_have_a_ct_and_labels(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    for name in ("b", "a"):
        (tmp_path / "labels" / f"{name}.nii.gz").touch()
    images = tmp_path / "images"
    assert [ct for ct, _ in find_cases(tmp_path)] == [images / "a_0000.nii.gz", images / "b_0000.nii.gz"]
    assert find_cases(tmp_path, ["b", "c"]) == [(images / "b_0000.nii.gz", tmp_path / "labels" / "b.nii.gz")]
    with pytest.raises(PairError, match="no such case"):
        find_cases(tmp_path, ["c"])


def test_an_engine_is_told_with_its_loss_against_the_first() -> None:
    def outcome(name: str, score: float, gpu_mib: float | None) -> Outcome:
        seconds = {"roi": [0.1, 0.3, 0.2], "organs": [1.0, 3.0, 2.0]}
        dsc = {organ.name: {"a": score, "b": 0.9} for organ in ORGANS}
        return Outcome(name, seconds, seconds, 400.0, 180.0, gpu_mib, dsc)

    line = row(outcome("b", 0.896, 321.4), outcome("a", 0.9, None))
    assert line.split() == ["b", "0.200", "2.000", "2.20", "400", "180", "321", *["89.80", "(-0.20)"] * 4]
    assert len(line) == len(header())
    assert row(outcome("b", 0.9, None), outcome("b", 0.9, None)).split()[6] == "-"


def test_without_a_card_the_comparison_on_one_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.nii.gz").touch()
    assert main(["engines", str(tmp_path), "--gpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_card_takes_its_networks_in_either_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = pytest.importorskip("torch")
    card = StandInCard(monkeypatch)
    x = np.random.default_rng(0).normal(size=(48, 48, 48)).astype(np.float32)
    plain, channels = (CANDIDATES[name]().load(Weights.find(), "roi")(x) for name in ("cuda eager", "cuda channels"))
    assert card.layouts == [torch.contiguous_format, torch.channels_last_3d]
    np.testing.assert_allclose(plain, channels, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name.startswith("cuda")])
def test_on_a_card_each_form_agrees_with_the_cpu(name: str) -> None:
    torch: Any = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")
    for network, size in INPUT_SIZES.items():
        x = np.random.default_rng(0).normal(size=size).astype(np.float32)
        expected = TorchRuntime("cpu").load(Weights.find(), network)(x)
        run = CANDIDATES[name]().load(Weights.find(), network)
        # Twice: a graph replays into the same memory.
        for _ in range(2):
            found = run(x)
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
