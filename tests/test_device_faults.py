"""Cards that fail: at the start, while the networks are loaded, and in the middle of a batch; all without a card.

torch is the real one. Its card is a stand-in: what should go to "cuda:0" stays on the CPU in float32, and fails with
torch's own errors and texts when it is told to.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan import cascade, roi, runtime
from fastorgan.__main__ import main
from fastorgan.cascade import Cascade
from fastorgan.errors import DeviceError
from fastorgan.phantom import make_phantom
from fastorgan.report import Engine
from fastorgan.runtime import FallbackRuntime, Network, TorchRuntime, choose_runtime
from fastorgan.weights import Weights
from tests.stand_in_card import StandInCard

torch: Any = pytest.importorskip("torch")

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 170.00 MiB. GPU 0 has a total capacity of 11.76 GiB of which 3.00 MiB is "
    "free. Process 4711 has 11.70 GiB memory in use.\nSee documentation for Memory Management"
)
BUSY = (
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace might be wrong."
)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be …"
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


class FailingCard(StandInCard):
    """Works until told otherwise.

    Attributes:
        loading: what the card says while a network is loaded.
        running: what it says to a network that runs, by the run's number, from 1.
        spoiled: the runs of which one result is no number.
        forwards: how many runs there were.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.loading: Exception | None = None
        self.running: dict[int, Exception] = {}
        self.spoiled: set[int] = set()
        self.forwards = 0

    def take_network(self, network: Any) -> None:
        if self.loading is not None:
            raise self.loading
        network.register_forward_pre_hook(self._before)
        network.register_forward_hook(self._after)

    def _before(self, network: Any, given: Any) -> None:
        self.forwards += 1
        if (error := self.running.get(self.forwards)) is not None:
            raise error

    def _after(self, network: Any, given: Any, result: Any) -> Any:
        if self.forwards in self.spoiled:
            result = result.clone()
            result[0, 0, 5, 5, 5] = float("nan")
        return result


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FailingCard:
    """Make torch and the driver tell of one card, which works until told otherwise."""
    monkeypatch.setattr(runtime, "_cuda_fault", lambda: None)
    return FailingCard(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Let the networks see an eighth of the samples, so that tests are quick; torch does not mind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roi, "ROI_SIZE", (48, 48, 48))
        patch.setattr(cascade, "CROP_SIZE", (48, 64, 96))
        yield


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom."""
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    image, _ = make_phantom((96, 96, 45), (4.0, 4.0, 6.6), seed=3)
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def expected(ct: Path) -> NDArray[np.uint8]:
    """What the CPU alone finds in it."""
    labels = codes(Cascade.load("cpu", engine="torch").segment(nib.Nifti1Image.from_filename(ct)))
    assert labels.any()
    return labels


def codes(image: nib.Nifti1Image) -> NDArray[np.uint8]:
    return np.asarray(image.dataobj, np.uint8)


# One runtime takes another's place


class Counting:
    """A runtime whose networks answer with its number, and which fails when told to."""

    def __init__(self, number: float):
        self.faults: list[str] = []
        self.number = number
        self.fault: DeviceError | None = None
        self.loaded: list[str] = []

    @property
    def engine(self) -> Engine:
        return Engine("counting", "1", "cpu", f"device {self.number}", "f32", 1)

    def load(self, weights: Weights, network: str) -> Network:
        if self.fault is not None:
            raise self.fault
        self.loaded.append(network)

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            if self.fault is not None:
                raise self.fault
            return np.full_like(x, self.number)

        return run


ROI_INPUT = np.zeros((32, 32, 32), np.float32)
WEIGHTS: Any = None
ZERO = np.zeros(1, np.float32)


def test_a_card_that_works_is_kept() -> None:
    card, cpu = Counting(1), Counting(2)
    both = FallbackRuntime(lambda: card, lambda: cpu)
    roi = both.load(WEIGHTS, "roi")
    assert [roi(ZERO)[0], roi(ZERO)[0]] == [1, 1]
    assert both.engine.device_name == "device 1"
    assert both.faults == []
    assert cpu.loaded == []


def test_a_fault_while_running_moves_both_networks_and_they_stay() -> None:
    card, cpu = Counting(1), Counting(2)
    both = FallbackRuntime(lambda: card, lambda: cpu)
    roi, organs = both.load(WEIGHTS, "roi"), both.load(WEIGHTS, "organs")
    assert roi(ZERO)[0] == 1
    card.fault = DeviceError("cuda:0 failed: it is hot")
    assert organs(ZERO)[0] == 2
    # The card is well again, but is not trusted any more.
    card.fault = None
    assert roi(ZERO)[0] == 2
    assert organs(ZERO)[0] == 2
    assert both.engine.device_name == "device 2"
    assert both.faults == ["cuda:0 failed: it is hot; the CPU is used instead"]
    assert sorted(cpu.loaded) == ["organs", "roi"]


def test_a_fault_while_loading_moves_the_network_that_was_loaded_before() -> None:
    card, cpu = Counting(1), Counting(2)
    both = FallbackRuntime(lambda: card, lambda: cpu)
    roi = both.load(WEIGHTS, "roi")
    card.fault = DeviceError("cuda:0 failed: full")
    organs = both.load(WEIGHTS, "organs")
    assert [organs(ZERO)[0], roi(ZERO)[0]] == [2, 2]
    assert len(both.faults) == 1


def test_where_the_cpu_fails_too_both_reasons_are_given() -> None:
    def fail(text: str) -> Callable[[], Any]:
        def start() -> Any:
            raise DeviceError(text)

        return start

    with pytest.raises(DeviceError, match=r"^cuda:0 is gone; nor can the CPU be used: OpenVINO is not installed\Z"):
        FallbackRuntime(fail("cuda:0 is gone"), fail("OpenVINO is not installed"))
    cpu = Counting(2)
    both = FallbackRuntime(fail("cuda:0 is gone"), lambda: cpu)
    roi = both.load(WEIGHTS, "roi")
    cpu.fault = DeviceError("the CPU is hot")
    with pytest.raises(DeviceError, match=r"^the CPU is hot\Z"):
        roi(ZERO)


# What torch says becomes one line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.cuda.OutOfMemoryError(OUT_OF_MEMORY), "cuda:0 failed: CUDA out of memory"),
        (torch.AcceleratorError(BUSY), "cuda:0 failed: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        (
            RuntimeError(NO_KERNEL),
            "cuda:0 failed: CUDA error: no kernel image is available for execution on the device",
        ),
        (AssertionError("Torch not compiled with CUDA enabled"), "cuda:0 failed: Torch not compiled with CUDA enabled"),
        (RuntimeError(""), "cuda:0 failed: RuntimeError"),
    ],
)
def test_whatever_cuda_raises_is_a_device_error(card: FailingCard, error: Exception, line: str) -> None:
    weights = Weights.find()
    card.loading = error
    with pytest.raises(DeviceError) as caught:
        TorchRuntime("cuda:0").load(weights, "roi")
    assert str(caught.value) == line
    card.loading = None
    network = TorchRuntime("cuda:0").load(weights, "roi")
    card.running[1] = error
    with pytest.raises(DeviceError) as caught:
        network(ROI_INPUT)
    assert str(caught.value) == line


def test_values_that_are_not_finite_are_a_device_error(card: FailingCard) -> None:
    network = TorchRuntime("cuda:0").load(Weights.find(), "roi")
    card.spoiled.add(1)
    with pytest.raises(DeviceError, match=r"^cuda:0 failed: the roi network gave values that are not finite\Z"):
        network(ROI_INPUT)
    assert np.isfinite(network(ROI_INPUT)).all()


def test_a_driver_older_than_the_build_is_named(card: FailingCard, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn(OLD_DRIVER, UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with warnings.catch_warnings():
        # Nothing beside the one line may reach the terminal.
        warnings.simplefilter("error")
        with pytest.raises(DeviceError) as caught:
            choose_runtime("cuda")
        assert str(caught.value) == (
            f"cuda:0 is not available: torch {torch.__version__} sees no usable NVIDIA GPU (CUDA initialization: The "
            "NVIDIA driver on your system is too old (found version 11040))"
        )
        found = choose_runtime("auto")
    assert found.engine.device == "cpu"
    assert found.faults == [f"{caught.value}; the CPU is used instead"]


def test_a_damaged_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    genuine = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(DeviceError, match=r"^cuda:0 needs torch, which cannot be loaded \(libcudart\.so\.12: cannot "):
        TorchRuntime("cuda:0")


@pytest.mark.parametrize("built_for_cuda", [True, False])
def test_no_driver_is_told_where_torch_was_built_for_cuda(
    monkeypatch: pytest.MonkeyPatch, built_for_cuda: bool
) -> None:
    monkeypatch.setattr(runtime, "_built_for_cuda", lambda: built_for_cuda)
    monkeypatch.setattr(runtime, "_cuda_fault", lambda: "no NVIDIA driver answers here")
    told = ["no NVIDIA driver answers here; the CPU is used instead (--device cpu would say so)"]
    assert choose_runtime("auto").faults == (told if built_for_cuda else [])
    # Whoever asks for the CPU, or for an engine that knows nothing else, is not told of cards.
    assert choose_runtime("cpu").faults == []
    assert choose_runtime("auto", "openvino").faults == []


@pytest.mark.parametrize("library", ["libtorch_cuda.so", "torch_cuda.dll", None])
def test_a_build_for_cuda_is_known_by_its_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str | None
) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    if library is not None:
        (tmp_path / "torch" / "lib" / library).touch()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert runtime._built_for_cuda() == (library is not None)


# The whole command


@pytest.fixture
def places(ct: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three cases of the one CT, a folder for labels, a report."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.nii.gz").symlink_to(ct)
    return tmp_path / "in", tmp_path / "out", tmp_path / "run.json"


def predict(places: tuple[Path, Path, Path], *options: str) -> tuple[int, Any]:
    inputs, outputs, report = places
    code = main(
        ["predict", str(inputs), str(outputs), "--report", str(report), "--engine", "torch", "--jobs", "1", *options]
    )
    return code, json.loads(report.read_text()) if report.exists() else None


def test_a_full_card_at_the_start_leaves_the_batch_to_the_cpu(
    card: FailingCard, places: tuple[Path, Path, Path], expected: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    card.loading = torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)
    code, report = predict(places)
    line = "cuda:0 failed: CUDA out of memory; the CPU is used instead"
    assert code == 0
    assert report["warnings"] == [line]
    assert (report["engine"]["name"], report["engine"]["device"]) == ("torch", "cpu")
    assert f"fastorgan: warning: {line}\n" in capsys.readouterr().err
    assert not any(line in case["warnings"] for case in report["cases"])
    for name in "abc":
        labels = codes(nib.Nifti1Image.from_filename(places[1] / f"{name}.nii.gz"))
        assert np.array_equal(labels, expected)


@pytest.mark.parametrize("forward", [3, 4])
def test_a_fault_in_the_middle_of_a_batch_costs_no_case_and_no_label(
    card: FailingCard,
    places: tuple[Path, Path, Path],
    expected: NDArray[np.uint8],
    capsys: pytest.CaptureFixture[str],
    forward: int,
) -> None:
    # The second case: its ROI network, or its organ network.
    card.running[forward] = torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)
    code, report = predict(places)
    line = "cuda:0 failed: CUDA out of memory; the CPU is used instead"
    assert code == 0
    assert report["warnings"] == []
    assert report["engine"]["device"] == "cuda:0"
    assert [line in case["warnings"] for case in report["cases"]] == [False, True, False]
    devices = [case["device"] for case in report["cases"]]
    assert devices[0] == "Example GPU"
    assert devices[1] == devices[2] != "Example GPU"
    assert card.forwards == forward
    assert capsys.readouterr().err.count(line) == 1
    for name in "abc":
        labels = codes(nib.Nifti1Image.from_filename(places[1] / f"{name}.nii.gz"))
        assert np.array_equal(labels, expected)


def test_under_an_explicit_cuda_a_fault_at_the_start_is_one_line(
    card: FailingCard, places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    card.loading = torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)
    code, report = predict(places, "--device", "cuda")
    assert code == 2
    assert report is None
    assert capsys.readouterr().err == "fastorgan: cuda:0 failed: CUDA out of memory\n"
    assert not list(places[1].glob("*"))


def test_under_an_explicit_cuda_a_fault_in_the_middle_fails_that_case_alone(
    card: FailingCard, places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    card.running[3] = torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)
    code, report = predict(places, "--device", "cuda:0")
    assert code == 2
    assert [case["status"] for case in report["cases"]] == ["done", "failed", "done"]
    assert report["cases"][1]["error"] == f"{places[0] / 'b.nii.gz'}: cuda:0 failed: CUDA out of memory"
    assert [case["device"] for case in report["cases"]] == ["Example GPU", None, "Example GPU"]
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in places[1].iterdir()) == ["a.nii.gz", "c.nii.gz"]
