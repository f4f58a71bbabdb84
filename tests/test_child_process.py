import os
import subprocess
import sys

import pytest

from tests.child_process import ended


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_that_ends() -> None:
    with start("import sys; print('out'); print('errors', file=sys.stderr)") as process:
        assert ended(process) == ("out\n", "errors\n")


def test_a_process_that_hangs_with_another_is_aborted_and_shows_both_stacks() -> None:
    hang = "import time\ndef hang(): time.sleep(600)\nhang()"
    parent = "import subprocess, sys\ndef wait(): subprocess.run([sys.executable, '-c', sys.argv[1]])\nwait()"
    with start(parent, hang) as process, pytest.raises(AssertionError, match="no end after 2 s") as found:
        ended(process, 2)
    assert process.returncode == -6
    assert "in hang" in str(found.value)
    assert "in wait" in str(found.value)
