"""The doctor on this machine, and on machines that lack something."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan import doctor
from fastorgan.__main__ import main
from fastorgan.box import CROP_SIZE, ROI_SIZE
from fastorgan.doctor import GIB, Finding, Verdict, Wish, examine, screen
from fastorgan.errors import DeviceError
from fastorgan.memory import MIB
from fastorgan.report import Engine
from fastorgan.weights import Weights


class Runtime:
    """Networks that answer zeros, or what `answer` makes of their input."""

    faults: list[str]

    def __init__(self, answer: Callable[[NDArray[np.float32]], NDArray[np.float32]] = np.zeros_like) -> None:
        self.faults = []
        self.sizes: list[tuple[int, ...]] = []
        self._answer = answer

    engine = Engine("fake", "1.0", "cuda:0", "test card", "f16", None)

    def load(self, weights: Weights, network: str) -> Any:
        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            self.sizes.append(x.shape)
            return self._answer(x)

        return run


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(doctor, "choose_runtime", lambda *_: runtime)
    return runtime


def found(subject: str, **wish: Any) -> list[Finding]:
    return [finding for finding in examine(Wish(**wish)) if finding.subject == subject]


def test_a_machine_that_can_run_is_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    assert main(["doctor", str(tmp_path / "new"), "--device", "cpu", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "openvino" in said
    assert "cpu" in said
    assert "1 threads; networks loaded in" in said
    assert f"{len(Weights.find().sha256)} files with the SHA-256 of their manifest" in said
    assert f"{tmp_path}: can be written to" in said
    assert said.splitlines()[-1].endswith("`fastorgan predict` can run.") or "mind the warnings" in said
    assert list(tmp_path.iterdir()) == []


def test_both_networks_run_on_their_own_sizes(runtime: Runtime) -> None:
    (finding,) = found("Engine")
    assert finding.verdict is Verdict.OK
    assert finding.text.startswith("fake 1.0 on cuda:0 (test card), f16; networks loaded in ")
    assert runtime.sizes == [ROI_SIZE, CROP_SIZE]


def test_a_card_that_was_left_is_a_warning(runtime: Runtime) -> None:
    runtime.faults = ["cuda:0 fell off; the CPU is used instead"]
    assert [finding.verdict for finding in found("Engine")] == [Verdict.OK, Verdict.WARNING]


@pytest.mark.parametrize("error", [DeviceError("no such card"), OSError("libcuda is\nbroken")])
def test_an_engine_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def choose(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "choose_runtime", choose)
    (finding,) = found("Engine")
    assert finding.verdict is Verdict.WRONG
    assert str(error).split()[0] in finding.text
    assert "\n" not in finding.text
    assert main(["doctor"]) == 2


def test_numbers_that_are_not_finite_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "choose_runtime", lambda *_: Runtime(lambda x: np.full_like(x, np.nan)))
    (finding,) = found("Engine")
    assert (finding.verdict, "not finite" in finding.text) == (Verdict.WRONG, True)


def test_changed_weights_are_wrong(tmp_path: Path, runtime: Runtime) -> None:
    released = Weights.find().folder
    for path in released.iterdir():
        if path.suffix != ".md":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert found("Weights", weights=tmp_path)[0].verdict is Verdict.OK
    with (tmp_path / "roi.bin").open("ab") as file:
        file.write(b"x")
    (finding,) = found("Weights", weights=tmp_path)
    assert finding.verdict is Verdict.WRONG
    assert "roi.bin" in finding.text


@pytest.mark.parametrize(
    ("free", "verdict"),
    [(100 * MIB, Verdict.WRONG), (1 * GIB, Verdict.WARNING), (8 * GIB, Verdict.OK), (None, Verdict.OK)],
)
def test_memory_is_judged(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, free: int | None, verdict: Verdict
) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: free)
    (finding,) = found("Memory")
    assert finding.verdict is verdict


def test_a_place_that_labels_cannot_have_is_wrong(tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nothing")):
        (finding,) = found("Disk", output=place)
        assert finding.verdict is Verdict.WRONG
    assert found("Disk", output=tmp_path / "a" / "b")[0].verdict is Verdict.OK


def test_a_missing_library_is_named(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "pillow") else real(name))
    first, second = found("Libraries")
    assert "no torch (for NVIDIA GPUs)" in first.text
    assert (second.verdict, "pillow" in second.text) == (Verdict.WARNING, True)


def test_json_has_the_same(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["healthy"] is True
    assert {"subject", "verdict", "text"} == set(shown["findings"][0])


def test_the_screen_sums_up() -> None:
    ok, warning, wrong = (Finding("A", verdict, "text") for verdict in Verdict)
    assert screen([ok]).endswith("All is well: `fastorgan predict` can run.")
    assert screen([ok, warning]).endswith("mind the warnings.")
    assert screen([ok, wrong, wrong]).endswith("2 things must be mended before `fastorgan predict` can run.")
    assert screen([ok]).splitlines()[0] == "ok     A  text"
