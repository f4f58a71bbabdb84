import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastorgan import runtime
from fastorgan.box import CROP_SIZE, ROI_SIZE
from fastorgan.errors import DeviceError
from fastorgan.runtime import INPUT_SIZES, OpenVinoRuntime, choose_runtime, resolve_device, usable_cores
from fastorgan.weights import Weights


class Driver:
    """An NVIDIA driver that lists some cards, or fails to."""

    def __init__(self, cards: int | Exception):
        self.cards = cards
        self.closed = False

    def uuids(self) -> Sequence[str]:
        if isinstance(self.cards, Exception):
            raise self.cards
        return [f"GPU-{n}" for n in range(self.cards)]

    def close(self) -> None:
        self.closed = True


def pretend(monkeypatch: pytest.MonkeyPatch, *, torch: bool, driver: Driver | None) -> None:
    """Make torch look installed or not, and let a driver answer or not."""

    def find_spec(name: str) -> object:
        assert name == "torch"
        return object() if torch else None

    def open_driver() -> Driver:
        if driver is None:
            raise DeviceError("no NVIDIA driver answers here")
        return driver

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(runtime, "PyNvml", open_driver)


# Devices


@pytest.mark.parametrize(
    ("device", "engine", "resolved"),
    [
        ("cpu", "auto", "cpu"),
        ("cpu", "openvino", "cpu"),
        ("cpu", "torch", "cpu"),
        ("cuda", "auto", "cuda:0"),
        ("cuda", "torch", "cuda:0"),
        ("cuda:0", "auto", "cuda:0"),
        ("cuda:12", "torch", "cuda:12"),
        ("auto", "openvino", "cpu"),
    ],
)
def test_a_device_that_is_named_is_taken(
    monkeypatch: pytest.MonkeyPatch, device: str, engine: str, resolved: str
) -> None:
    pretend(monkeypatch, torch=True, driver=Driver(1))
    assert resolve_device(device, engine) == resolved


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_auto_takes_cuda_where_there_is_torch_and_a_card(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    driver = Driver(2)
    pretend(monkeypatch, torch=True, driver=driver)
    assert resolve_device("auto", engine) == "cuda:0"
    assert driver.closed


@pytest.mark.parametrize(
    ("torch", "driver"),
    [(False, Driver(1)), (True, None), (True, Driver(0)), (True, Driver(RuntimeError("GPU is lost")))],
)
def test_auto_takes_the_cpu_where_anything_is_lacking(
    monkeypatch: pytest.MonkeyPatch, torch: bool, driver: Driver | None
) -> None:
    pretend(monkeypatch, torch=torch, driver=driver)
    assert resolve_device() == "cpu"
    assert resolve_device("auto", "torch") == "cpu"


@pytest.mark.parametrize("device", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:0,1", " cpu", "cuda:0\n"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=r"^there is no device .*; choose auto, cpu, cuda or cuda:N\Z"):
        resolve_device(device)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"^there is no engine 'onnx'; choose auto, openvino, torch\Z"):
        resolve_device("cpu", "onnx")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_openvino_does_not_run_on_cuda(device: str) -> None:
    with pytest.raises(DeviceError, match=f"OpenVINO does not run on {device}"):
        resolve_device(device, "openvino")


# Engines that are not there


def test_without_torch_cuda_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match=r"^cuda:1 needs torch: pip install 'fastorgan\[gpu\]'\Z"):
        choose_runtime("cuda:1")
    with pytest.raises(DeviceError, match=r"^cpu needs torch: "):
        choose_runtime("cpu", "torch")


def test_without_openvino_the_cpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match=r"^OpenVINO is not installed: pip install openvino\Z"):
        choose_runtime("cpu")


def test_a_card_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, name: str):
            self.type, _, index = name.partition(":")
            self.index = int(index)

    torch = ModuleType("torch")
    cuda = ModuleType("torch.cuda")
    vars(torch).update(cuda=cuda, device=Device, __version__="2.9.1")
    monkeypatch.setitem(sys.modules, "torch", torch)
    vars(cuda).update(is_available=lambda: False, device_count=lambda: 0)
    with pytest.raises(DeviceError, match=r"^cuda:0 is not available: torch 2.9.1 sees no usable NVIDIA GPU\Z"):
        choose_runtime("cuda")
    vars(cuda).update(is_available=lambda: True, device_count=lambda: 2)
    with pytest.raises(DeviceError, match=r"^cuda:2 is not available: torch sees 2 GPU\(s\)\Z"):
        choose_runtime("cuda:2")


# Precisions


@pytest.mark.parametrize(
    ("files", "able", "precision"),
    [
        ((".xml", ".bin"), ["FP32"], "f32"),
        ((".xml", ".bin"), ["FP32", "BF16"], "bf16"),
        ((".xml", ".bin", "-int8.xml", "-int8.bin"), ["FP32", "INT8", "BF16"], "int8"),
    ],
)
def test_the_precision_suits_the_processor_and_the_weights(
    monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], able: list[str], precision: str
) -> None:
    read: list[str] = []
    settings: list[dict[str, object]] = []

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return able

        def read_model(self, *content: bytes) -> None:
            read.extend(part.decode() for part in content)

        def compile_model(self, model: None, device: str, asked: dict[str, object]) -> Any:
            settings.append(asked)
            return SimpleNamespace(create_infer_request=lambda: None)

    class Release(Weights):
        def read(self, network: str, suffix: str) -> bytes:
            return suffix.encode()

    names = {f"roi{suffix}": "" for suffix in files}
    weights = Release(Path(), {"networks": {"roi": {"sha256": names}}})
    chosen = OpenVinoRuntime(2)
    monkeypatch.setattr(chosen, "_core", Core())
    chosen.load(weights, "roi")
    assert chosen.engine.precision == precision
    assert read == list(files[-2:])
    # What is not in eight bits stays in floats.
    assert settings[0]["INFERENCE_PRECISION_HINT"] == ("bf16" if precision == "bf16" else "f32")
    assert settings[0]["INFERENCE_NUM_THREADS"] == 2


# Facts


def test_the_networks_inputs_are_the_cascades() -> None:
    assert INPUT_SIZES == {"roi": ROI_SIZE, "organs": CROP_SIZE}
    assert ROI_SIZE == (96, 96, 96)
    assert CROP_SIZE == (96, 128, 192)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities")
def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_signals_are_safe_after_two_runtimes_have_come_and_gone() -> None:
    # OpenVINO's CPU plugin gives the thread a stack for signals; of two plugins that overlap, the later one puts the
    # earlier one's back when it goes, which is no memory any more.
    code = """
import os, signal, time
from fastorgan.runtime import OpenVinoRuntime
from fastorgan.weights import Weights

first, second = OpenVinoRuntime(1), OpenVinoRuntime(1)
networks = [runtime.load(Weights.find(), "roi") for runtime in (first, second)]
del first, networks[0]
del second, networks[0]
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    app = Path(__file__).parents[1] / "app"
    environment = {**os.environ, "PYTHONPATH": str(app)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities")
def test_a_network_may_run_on_every_core() -> None:
    # OpenVINO would tie a lone thread to the first core, in every process alike.
    network = OpenVinoRuntime(1).load(Weights.find(), "roi")
    shape = INPUT_SIZES["roi"]
    seen: set[frozenset[int]] = set()
    worker = threading.Thread(target=lambda: [network(np.zeros(shape, np.float32)) for _ in range(3)])
    worker.start()
    while worker.is_alive():
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                seen.add(frozenset(os.sched_getaffinity(int(task.name))))
    worker.join()
    assert seen == {frozenset(os.sched_getaffinity(0))}
