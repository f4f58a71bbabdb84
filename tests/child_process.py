"""Processes that tests start: one that hangs fails its test, and shows where its threads are."""

import signal
import subprocess

import psutil


def ended(process: "subprocess.Popen[str]", seconds: float = 60) -> tuple[str, str]:
    """What a process wrote until its end, to its output and to its errors.

    Args:
        process: with its errors piped; with PYTHONFAULTHANDLER in its environment it shows where its threads are.
        seconds: that it may take.

    Raises:
        AssertionError: if it takes longer; it and all that it started are told to abort.
    """
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Whoever is left would hold the pipes open.
        parent = psutil.Process(process.pid)
        for each in [parent, *parent.children(recursive=True)]:
            each.send_signal(signal.SIGABRT)
        _, errors = process.communicate()
        raise AssertionError(f"no end after {seconds} s: {errors}") from None
