"""`fastorgan.signals`, and `fastorgan` under SIGTERM, as `docker stop`, a batch system or an operator sends it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastorgan.__main__ import main
from fastorgan.signals import StopRequest, Terminated, terminable, uninterrupted

APP = Path(__file__).parents[1] / "app"

# Writes a label volume again and again: a signal that comes after the first byte meets a file half-written.
WRITER = """
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from fastorgan import __main__ as command
from fastorgan.volume import save_image


def write(options):
    noise = np.random.default_rng(0).integers(0, 5, (128, 128, 128), np.uint8)
    image = nib.Nifti1Image(noise, np.eye(4))
    while True:
        save_image(image, options.output)


command._phantom = write
sys.exit(command.main(["phantom", sys.argv[1]]))
"""


def test_sigterm_ends_a_run_with_143_and_leaves_no_partial_file(tmp_path: Path) -> None:
    target = tmp_path / "labels.nii.gz"
    command = [sys.executable, "-c", WRITER, str(target)]
    environment = {**os.environ, "PYTHONPATH": str(APP)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: any(file.stat().st_size > 0 for file in tmp_path.glob(".fastorgan-*")), process)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143
    assert errors == "fastorgan: terminated\n"
    assert time.monotonic() - begun < 5
    assert {file.name for file in tmp_path.iterdir()} <= {target.name}


def test_a_whole_command_leaves_the_handler_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["predict", str(tmp_path / "missing.nii.gz"), str(tmp_path / "missing" / "out")]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    capsys.readouterr()


def test_main_runs_in_another_thread_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    arguments = ["predict", str(tmp_path / "missing.nii.gz"), str(tmp_path)]
    thread = threading.Thread(target=lambda: codes.append(main(arguments)))
    thread.start()
    thread.join()
    assert codes == [2]
    capsys.readouterr()


def hear(number: int) -> list[str]:
    """What happens around a block in which a signal comes."""
    heard = []
    try:
        with uninterrupted():
            heard.append("before")
            signal.raise_signal(number)
            heard.append("after")
    except (KeyboardInterrupt, Terminated) as error:
        heard.append(type(error).__name__)
    return heard


@pytest.fixture
def listening() -> Iterator[None]:
    """Where the tests run in the background of a script, the shell has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_a_signal_within_an_uninterrupted_block_comes_at_its_end() -> None:
    assert hear(signal.SIGINT) == ["before", "after", "KeyboardInterrupt"]
    with terminable():
        assert hear(signal.SIGTERM) == ["before", "after", "Terminated"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("listening")
def test_a_signal_comes_where_the_block_fails_too() -> None:
    def fail() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert isinstance(caught.value.__context__, ValueError)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert hear(signal.SIGINT) == ["before", "after"]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_a_second_signal_is_heard_at_once() -> None:
    heard = []

    def twice() -> None:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            heard.append(stop.signal)
            signal.raise_signal(signal.SIGINT)
            heard.append(None)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert heard == [signal.SIGINT]


def test_in_another_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def look() -> None:
        with terminable(), uninterrupted():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def _wait_for(ready: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
