"""A batch under kill -9, SIGTERM and Ctrl-C at random moments: what is there is whole, and --resume does the rest."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastorgan.volume import load_image, read_volume
from tests.child_process import ended

ROOT = Path(__file__).parents[1]

CASES = [f"case{number}" for number in range(6)]

MOMENTS = int(os.environ.get("FASTORGAN_MOMENTS", "10"))
"""Random moments for each signal in the slow test; with the real networks, which take longer, a fifth of them."""

# Where the tests run in the background of a script, the shell has Ctrl-C ignored.
HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"

# The command with networks that cost nothing, so that a signal meets reading and writing more often.
FAKE = """
import sys
from pathlib import Path

from tests.conftest import FakeRuntime, find_by_hu, label_by_hu
from fastorgan import cascade, roi
from fastorgan.__main__ import main
from fastorgan.cascade import Cascade
from fastorgan.weights import Weights

networks = {"roi": {"variant": "slim", "sha256": {"roi.xml": "ab"}}}
roi.ROI_SIZE, cascade.CROP_SIZE = (24, 24, 24), (24, 32, 48)
known = Cascade(FakeRuntime(find_by_hu, label_by_hu), Weights(Path("nowhere"), {"version": "0", "networks": networks}))
Cascade.load = lambda *_, **__: known
sys.exit(main(sys.argv[1:]))
"""

# The same where the first cases wait for the networks, and SIGTERM comes when these are there but nobody has been told.
UNTOLD = """
import signal
import threading
import time
from concurrent.futures import Future

notify, result = threading.Condition.notify, Future.result
waiting, signals = [], [signal.SIGTERM]


def hear_and_notify(condition, n=1):
    if condition._waiters and threading.current_thread() is threading.main_thread() and signals:
        signal.raise_signal(signals.pop())
    notify(condition, n)


def wait_and_be_counted(future, timeout=None):
    waiting.append(future)
    return result(future, timeout)


def load_late(*_, **__):
    while len(waiting) < 2:
        time.sleep(0.01)
    time.sleep(0.5)
    return known


threading.Condition.notify, Future.result = hear_and_notify, wait_and_be_counted
""" + FAKE.replace("lambda *_, **__: known", "load_late")

REAL = "import sys; from fastorgan.__main__ import main; sys.exit(main(sys.argv[1:]))"


ENDS: dict[int, tuple[int, ...]] = {
    signal.SIGKILL: (-9, 0),
    signal.SIGTERM: (143, -15, 0),
    signal.SIGINT: (130, -2, 1, 0),
}
"""Exit codes by signal. 0: it came too late. Minus the signal: before the command could handle it; Python itself ends
with 1 where Ctrl-C meets its imports."""


@dataclass
class Batch:
    """A batch that can be interrupted.

    Attributes:
        folder: holds `in`, and an output folder for each run.
        code: the Python program that runs the command.
        seconds: what a run takes from its first report, written before the first case, to its end.
        whole: the label files' bytes, as an uninterrupted run makes them.
    """

    folder: Path
    code: str
    seconds: float = 0.0
    whole: dict[str, bytes] | None = None

    def start(self, out: Path, *options: str) -> "subprocess.Popen[str]":
        arguments = ["predict", str(self.folder / "in"), str(out), "--device", "cpu", *options]
        arguments += ["--report", str(out.with_suffix(".json"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "app"), str(ROOT)])}
        # A process that hangs is told to abort, and says where its threads are.
        environment["PYTHONFAULTHANDLER"] = "1"
        command = [sys.executable, "-c", HEAR + self.code, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, out: Path, *options: str) -> dict[str, Any]:
        """Run to the end; returns the report."""
        with self.start(out, *options) as process:
            _, errors = ended(process, 300)
        assert process.returncode == 0, errors
        report: dict[str, Any] = json.loads(out.with_suffix(".json").read_text(encoding="ascii"))
        return report


def make_batch(folder: Path, code: str) -> Batch:
    """Six CTs that differ, and what comes of them."""
    (folder / "in").mkdir()
    codes = np.zeros((60, 50, 40), np.uint8)
    codes[36:54, 12:34, 14:32] = 1
    codes[6:14, 6:14, 8:20] = codes[40:48, 2:9, 6:17] = 2
    codes[6:18, 30:42, 18:32] = 3
    codes[22:32, 20:27, 16:22] = 4
    for number, case in enumerate(CASES):
        hu = np.array([-50, 50, 120, 190, 260], np.int16)[np.roll(codes, number, axis=0)]
        hu[0] = -1000
        nib.save(
            nib.Nifti1Image(hu.repeat(2, 0).repeat(2, 1), np.diag([2.5, 2.5, 5, 1])), folder / "in" / f"{case}.nii.gz"
        )
    batch = Batch(folder, code)
    with batch.start(folder / "uninterrupted") as process:
        begun = _wait_for(folder / "uninterrupted.json", process)
        ended(process, 300)
        batch.seconds = time.monotonic() - begun
    assert process.returncode == 0
    batch.whole = unpacked(folder / "uninterrupted")
    assert sorted(batch.whole) == [f"{case}.nii.gz" for case in CASES]
    return batch


def unpacked(folder: Path) -> dict[str, bytes]:
    """What the files of a folder hold: ISA-L may pack the same bytes in two ways."""
    return {path.name: gzip.decompress(path.read_bytes()) for path in folder.iterdir()}


def _wait_for(report: Path, process: "subprocess.Popen[str]") -> float:
    """Wait until the work begins; returns when that was."""
    while not report.exists() and process.poll() is None:
        time.sleep(0.002)
    return time.monotonic()


def interrupt(batch: Batch, number: int, part: float, name: str) -> bool:
    """Interrupt a run, check what it left, resume it and check that; False if it had ended before.

    Args:
        batch: what to run.
        number: the signal.
        part: when, of the time that the work takes; below 0, while Python and the networks are loaded, in seconds.
        name: of the output folder.
    """
    assert batch.whole is not None
    out = batch.folder / name
    with batch.start(out) as process:
        begun = time.monotonic() if part < 0 else _wait_for(out.with_suffix(".json"), process)
        moment = -part if part < 0 else part * batch.seconds
        try:
            process.wait(moment)
            batch.seconds = min(batch.seconds, time.monotonic() - begun)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, errors = ended(process)
    assert process.returncode in ENDS[number]
    if process.returncode in (143, 130):
        assert errors.splitlines()[-1] in ("fastorgan: terminated", "fastorgan: interrupted"), errors

    there = sorted(out.iterdir()) if out.exists() else []
    shown = {path.name: path for path in there if not path.name.startswith(".")}
    if number != signal.SIGKILL:
        assert [path.name for path in there] == list(shown), "a half-written file was left"
    for path in shown.values():
        read_volume(load_image(path), str(path), hounsfield=False)
        assert gzip.decompress(path.read_bytes()) == batch.whole[path.name], f"{path} is partial"
    report = out.with_suffix(".json")
    if report.exists():
        facts = json.loads(report.read_text(encoding="ascii"))
        done = {Path(case["output"]).name for case in facts["cases"] if case["status"] == "done"}
        assert facts["planned"] == len(CASES)
        assert done <= set(shown)
        if process.returncode in (143, 130):
            assert done == set(shown), "the report of an interrupted run lacks cases that it did"

    before = {path.name: path.stat().st_mtime_ns for path in shown.values()}
    facts = batch.finish(out, "--resume")
    assert facts["counts"] == {"done": len(CASES) - len(shown), "failed": 0, "skipped": len(shown)}
    assert unpacked(out) == batch.whole
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before, "a case was done again"
    print(f"{name}: exit {process.returncode} at {moment:.2f} s, {len(shown)} of {len(CASES)} done", flush=True)
    return process.returncode != 0


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """A batch with networks that cost nothing."""
    return make_batch(tmp_path_factory.mktemp("quick"), FAKE)


@pytest.mark.parametrize("number", ENDS, ids=[signal.Signals(number).name for number in ENDS])
def test_an_interrupted_batch_is_whole_and_resumes(quick: Batch, number: int) -> None:
    moments = random.Random(number)
    assert any(interrupt(quick, number, moments.uniform(0.0, 0.9), f"{number}-{n}") for n in range(10))


def test_a_signal_while_the_networks_are_handed_over_ends_the_run(quick: Batch) -> None:
    out = quick.folder / "untold"
    with replace(quick, code=UNTOLD).start(out) as process:
        _, errors = ended(process)
    assert (process.returncode, errors) == (143, "fastorgan: terminated\n")
    report = json.loads(out.with_suffix(".json").read_text(encoding="ascii"))
    done = {Path(case["output"]).name for case in report["cases"]}
    assert done == set(unpacked(out))
    # Those that were waiting.
    assert len(done) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fake networks", "real networks"])
def test_a_batch_may_be_interrupted_at_any_moment(tmp_path: Path, kind: str) -> None:
    if kind == "real networks":
        pytest.importorskip("openvino")
    batch = make_batch(tmp_path, REAL if kind == "real networks" else FAKE)
    moments = random.Random(2026)
    for n in range(MOMENTS if kind == "fake networks" else max(1, MOMENTS // 5)):
        for number in ENDS:
            # Where the machine was busier before than now, a run may end first.
            names = (f"{signal.Signals(number).name}-{n}-{again}" for again in range(10))
            low, high = (-1.5, 0.0) if n % 5 == 4 else (0.0, 1.0)
            assert any(interrupt(batch, number, moments.uniform(low, high), name) for name in names)
