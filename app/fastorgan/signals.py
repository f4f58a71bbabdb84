"""SIGINT (Ctrl-C) and SIGTERM: where they end a command, and where they wait.

Python raises what their handlers raise between any two instructions of the main thread. Between taking a lock and
entering the block that gives it back, the lock stays taken, and all threads that want it wait for ever.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is open, a first SIGINT (Ctrl-C) or SIGTERM is only noted, so that a loop can end where it is safe.

    A second signal acts as if this class were not there. Signals that the process ignores stay ignored. Outside the
    main thread, where Python delivers no signals, nothing is changed.

    Attributes:
        signal: the one that came; None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                # None stands for a handler that Python did not set and could not put back.
                if before is not signal.SIG_IGN and before is not None:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have a signal that comes within the block come at its end; for work of an instant that must not end half-way."""
    stop = StopRequest()
    try:
        with stop:
            yield
    finally:
        if stop.signal is not None:
            signal.raise_signal(stop.signal)


class Terminated(BaseException):
    """SIGTERM came; no `except Exception` on the way may take it for a case's failure."""

    code = 128 + signal.SIGTERM
    """What a command ends with."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that no half-written file stays and no container is left running.

    The first process of a container needs this to stop at all: Linux drops signals that it has no handler for.

    Raises:
        Terminated: within the block, when SIGTERM comes.
    """
    # Python delivers signals to the main thread alone; whoever calls from another one keeps theirs.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        # None: a handler that was not set by Python, and that Python cannot set again.
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
